"""The cache directory: what is written is whole or not there, and nothing that goes wrong with it is an error."""

import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from flash_attn_sm120 import cache, cli, kernel_file
from flash_attn_sm120.problem import AttentionProblem

PROBLEMS = [AttentionProblem("bfloat16", head_dim, head_dim) for head_dim in (64, 128, 256)]
KEYS = [kernel_file.cached_key(problem, "sm_120a", "x86_64") for problem in PROBLEMS]
KEY = KEYS[0]


def packed(key, size=5000):
    return kernel_file.pack(os.urandom(size), key)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY, str(tmp_path / "kept"))
    kept, reason = cache.open_cache()
    assert kept is not None, reason
    return kept


def child(code, **options):
    """Runs code in a process that has the same cache."""
    start = "from flash_attn_sm120 import cache, kernel_file\nfrom test_cache import *\nkept = cache.open_cache()[0]\n"
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here), *filter(None, sys.path)])}
    command = [sys.executable, "-c", start + textwrap.dedent(code)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


def test_what_is_written_is_read_by_its_key_alone(kept):
    content = packed(KEY)
    path = kept.write(KEY, content)
    assert kept.read(KEY) == path and path.read_bytes() == content
    assert all(kept.read(key) is None for key in KEYS[1:])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert [entry.key for entry in kept.entries()] == [KEY]


def test_a_file_cut_short_or_changed_anywhere_is_replaced(kept):
    content = packed(KEY)
    path = kept.folder / kernel_file.file_name(KEY)
    places = [len(content) * i // 20 for i in range(20)]
    damaged = [content[:place] for place in places]
    damaged += [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    for wrong in (*damaged, content[:-1], content + b"\0", os.urandom(5000)):
        path.write_bytes(wrong)
        path.chmod(0o600)
        assert kept.read(KEY) is None and not path.exists()
        assert kept.write(KEY, content) == path and kept.read(KEY) == path


@pytest.mark.parametrize(
    "change", ["target", "host", "sources", "dsl", "tvm_ffi", "compiler", "python", "problem", "plans"]
)
def test_a_whole_file_of_another_key_is_replaced(change, kept):
    other = {**KEY, change: "another"}
    path = kept.write(KEY, packed(KEY))
    path.write_bytes(packed(other))
    assert kept.read(KEY) is None and not path.exists()


def test_two_versions_stay_side_by_side(kept, monkeypatch):
    mine = kept.write(KEY, packed(KEY))
    monkeypatch.setattr(kernel_file, "_version", lambda package, parts=None: "5.0")
    other = kernel_file.cached_key(PROBLEMS[0], "sm_120a", "x86_64")
    path = kept.write(other, packed(other))
    assert kept.read(KEY) == mine and kept.read(other) == path != mine


def test_files_and_directories_of_others_are_left_alone(kept, monkeypatch, tmp_path):
    path = kept.write(KEY, packed(KEY))
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert kept.read(KEY) is None and path.exists()
    assert cache.open_cache() == (None, f"{kept.folder} belongs to user {me}, not to {me + 1}")
    monkeypatch.undo()
    path.chmod(0o622)
    assert kept.read(KEY) is None
    path.chmod(0o600)
    assert kept.read(KEY) == path
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert kept.read(KEY) is None
    path.unlink()
    os.mkfifo(path)
    assert kept.read(KEY) is None


def test_a_directory_that_others_may_write_is_closed(kept):
    kept.folder.chmod(0o777)
    assert cache.open_cache()[0] == kept
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700


def test_killed_in_mid_write(kept):
    process = child("""
        content = packed(KEY)
        class Dies(bytes):
            pass
        import builtins, os, signal
        opened = builtins.open
        def half(file, mode="r", *rest, **more):
            real = opened(file, mode, *rest, **more)
            if mode == "wb":
                real.write(content[: len(content) // 2])
                real.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return real
        builtins.open = half
        kept.write(KEY, content)
    """)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = kept.folder.iterdir()
    assert left.suffix == ".tmp" and left.stat().st_size > 1000
    assert kept.read(KEY) is None and kept.entries() == []
    path = kept.write(KEY, packed(KEY))
    assert kept.read(KEY) == path and left.exists()
    os.utime(left, (0, 0))
    kept.write(KEYS[1], packed(KEYS[1]))
    assert not left.exists() and kept.read(KEY) == path


def test_a_full_disk_is_no_error(kept):
    process = child("""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        print(kept.write(KEY, packed(KEY, 100_000)), list(kept.folder.iterdir()))
    """)
    assert process.communicate()[0] == "None []\n" and process.returncode == 0
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_directory_that_cannot_be_made_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "kept", "/proc/kept"):
        monkeypatch.setenv(cache.DIRECTORY, str(place))
        kept, reason = cache.open_cache()
        assert kept is None and str(place) in reason


def test_a_read_only_directory_is_read(kept, monkeypatch):
    path = kept.write(KEY, packed(KEY))

    def refuse(name, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return opened(name, flags, *rest, **more)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "utime", lambda path: refuse(path, os.O_WRONLY))
    assert kept.write(KEYS[1], packed(KEYS[1])) is None
    with kept.lock(KEYS[1]):
        assert kept.read(KEY) == path


def test_what_was_used_longest_ago_goes_first(kept, monkeypatch):
    monkeypatch.setattr(cache, "limit", lambda: 2 * len(packed(KEY)) + 100)
    small, _ = cache.open_cache()
    paths = []
    for age, key in enumerate(KEYS[:2]):
        paths.append(small.write(key, packed(key)))
        os.utime(paths[-1], (time.time() - 1000 + age,) * 2)
    assert small.read(KEY) == paths[0]  # so the second is the one used longest ago
    last = small.write(KEYS[2], packed(KEYS[2]))
    assert sorted(small.folder.iterdir()) == sorted([paths[0], last])
    assert small.entries()[0].key == KEYS[2]
    huge = packed(KEYS[1], 50_000)
    assert small.write(KEYS[1], huge).read_bytes() == huge and len(small.entries()) == 1


def test_where_it_is_and_how_much_it_holds(monkeypatch):
    monkeypatch.delenv(cache.DIRECTORY, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for base, expected in (("/x", "/x"), ("relative", "/home/someone/.cache"), ("", "/home/someone/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert str(cache.folder()) == f"{expected}/flash_attn_sm120"
    monkeypatch.setenv(cache.SIZE, "3")
    assert cache.limit() == 3 << 20
    monkeypatch.setenv(cache.SIZE, "0")
    assert cache.open_cache() == (None, f"{cache.SIZE} is 0")
    monkeypatch.setenv(cache.SIZE, "1.5")
    with pytest.raises(ValueError, match=r"expected MB as a whole number >= 0, got '1.5'"):
        cache.limit()


def test_a_lock_makes_others_wait_and_dies_with_its_process(kept):
    process = child(
        """
        with kept.lock(KEY):
            print("held", flush=True)
            input()
        """,
        stdin=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    waiting = child("""
        import logging
        logging.getLogger("flash_attn_sm120").addHandler(logging.StreamHandler(sys.stdout))
        with kept.lock(KEY):
            print(kept.read(KEY) is not None)
    """)
    assert waiting.stdout.readline() == f"waiting for process {process.pid}, which compiles {KEY['variant']}\n"
    kept.write(KEY, packed(KEY))
    process.kill()
    process.communicate()
    assert waiting.communicate()[0] == "True\n"
    with kept.lock(KEY):
        pass
    assert not list(kept.folder.glob("*.lock"))  # nobody needs it where the kernel is there


def test_the_command_shows_and_clears(kept, capsys, monkeypatch):
    for key in KEYS[:2]:
        kept.write(key, packed(key))
    broken = kept.write(KEYS[2], packed(KEYS[2]))
    broken.write_bytes(b"?")
    assert cli.main(["cache"]) == 0
    text = capsys.readouterr().out
    assert all(key["variant"] in text for key in KEYS[:2]) and "damaged" in text and "3 kernels" in text
    assert cli.main(["cache", "clear"]) == 0
    assert "Removed 3 kernels" in capsys.readouterr().out and not list(kept.folder.iterdir())
    monkeypatch.setenv(cache.SIZE, "0")
    assert cli.main(["cache"]) == 1 and cli.main(["cache", "clear"]) == 1
    assert f"{cache.SIZE} is 0" in capsys.readouterr().out
