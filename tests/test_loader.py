"""Where a launcher comes from: memory, the package's files, the cache, the compiler; and that it is compiled once."""

import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from oracle import ints, marks

from flash_attn_sm120 import (
    cache,
    calls,
    cli,
    flash_attn_func,
    flash_attn_varlen_func,
    kernel_file,
    launchers,
    loader,
    runtime,
    warmup,
)
from flash_attn_sm120.precompile import MANIFEST, precompile, write_manifest
from flash_attn_sm120.problem import AttentionProblem, ClassifyProblem, CombineProblem, Mod
from flash_attn_sm120.shipped import MODELS, Shapes, shipped_variants

COMBINE = CombineProblem("float16", 64, lse=True)
PROBLEM = AttentionProblem("bfloat16", 24, 24)
ROOT = Path(__file__).parents[1]
# A compiler that takes a moment, writes down what it does, and makes a file that can't be loaded.
COMPILER = """
import os, sys, time, types
from flash_attn_sm120 import kernel_file, loader, runtime
from flash_attn_sm120.problem import *
compiler = types.ModuleType("flash_attn_sm120.compile")
def build_best(problem, arch):
    with open(LOG, "a") as file:
        file.write(f"{problem.head_dim} {arch}\\n")
    time.sleep(0.05)
    return (lambda: "built"), None
compiler.build_best, compiler.to_file = build_best, lambda built, key: kernel_file.pack(bytes(1000), key)
import flash_attn_sm120
sys.modules["flash_attn_sm120.compile"] = flash_attn_sm120.compile = compiler
runtime.open_launcher = lambda path: kernel_file.read_key(path.read_bytes())["variant"]
"""


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """No files but the test's own, and nothing in memory."""
    monkeypatch.setenv(cache.DIRECTORY, str(tmp_path / "cache"))
    monkeypatch.setenv(loader.PRECOMPILED, str(tmp_path / "package"))
    monkeypatch.delenv(loader.NO_JIT, raising=False)
    for module, name in ((loader, "_loaded"), (launchers, "_launchers"), (launchers, "_targets"), (calls, "known")):
        monkeypatch.setattr(module, name, {})


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for the compiler; problems that it built."""
    from flash_attn_sm120 import compile

    built = []
    monkeypatch.setattr(compile, "build_best", lambda problem, arch: built.append(problem) or (object(), None))
    monkeypatch.setattr(compile, "to_file", lambda built, key: kernel_file.pack(b"\x7fELF" + bytes(1000), key))
    return built


@pytest.fixture
def opens(monkeypatch):
    """Files are handed out by name, not loaded."""
    monkeypatch.setattr(runtime, "open_launcher", lambda path: path)


def python(code, **environment):
    start = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(start)} | environment
    # Python finds what lies in the current directory first.
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd="/", stdout=subprocess.PIPE, text=True)


def test_sixteen_processes_compile_each_variant_once(tmp_path):
    log = tmp_path / "log"
    code = (
        f"LOG = {str(log)!r}\n"
        + COMPILER
        + textwrap.dedent("""
        order = (64, 128, 256) if os.getpid() % 2 else (256, 128, 64)
        for head_dim in order:
            print(loader.load(AttentionProblem("bfloat16", head_dim, head_dim), "sm_120a"))
    """)
    )
    processes = [python(code) for _ in range(16)]
    answers = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 16
    expected = sorted(f"bf16 {d}/{d} full" for d in (64, 128, 256))
    assert all(sorted(answer) == expected for answer in answers)
    assert sorted(log.read_text().splitlines()) == ["128 sm_120a", "256 sm_120a", "64 sm_120a"]


def test_a_compiler_that_dies_leaves_its_work_to_another(tmp_path):
    log = tmp_path / "log"
    code = f"LOG = {str(log)!r}\n" + COMPILER + 'print(loader.load(AttentionProblem("bfloat16", 64, 64), "sm_120a"))'
    dying = code.replace("time.sleep(0.05)", "print('here', flush=True); time.sleep(600)")
    first = python(dying)
    assert first.stdout.readline() == "here\n"
    second = python(code)
    first.kill()
    first.communicate()
    assert second.communicate()[0] == "bf16 64/64 full\n" and second.returncode == 0
    assert len(log.read_text().splitlines()) == 2


def test_a_problem_is_compiled_once_however_many_threads_ask(compiler, opens):
    found = []
    threads = [threading.Thread(target=lambda: found.append(loader.load(PROBLEM, "sm_120a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler == [PROBLEM] and len(found) == 8 and len(set(map(id, found))) == 1
    assert loader.load(PROBLEM, "sm_121a") is not found[0]


def test_the_package_comes_before_the_cache_and_the_cache_before_the_compiler(compiler, opens, monkeypatch, tmp_path):
    assert loader.source_of(PROBLEM, "sm_120a") == "JIT"
    cached = loader.load(PROBLEM, "sm_120a")
    assert cached.parent == tmp_path / "cache" and compiler == [PROBLEM]
    assert loader.is_loaded(PROBLEM, "sm_120a") and not loader.is_loaded(PROBLEM, "sm_121a")
    monkeypatch.setattr(loader, "_loaded", {})
    assert loader.source_of(PROBLEM, "sm_120a") == "cached"
    assert loader.load(PROBLEM, "sm_120a") == cached and compiler == [PROBLEM]

    key = kernel_file.built_in_key(PROBLEM, "sm_120a", kernel_file.host())
    brought = tmp_path / "package" / kernel_file.file_name(key)
    brought.parent.mkdir()
    brought.write_bytes(kernel_file.pack(bytes(10), key))
    monkeypatch.setattr(loader, "_loaded", {})
    assert loader.source_of(PROBLEM, "sm_120a") == "precompiled"
    assert loader.load(PROBLEM, "sm_120a") == brought
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(runtime, "driver_major", lambda: 12)
    for made_by, expected in (("12.9", "precompiled"), ("13.4", "cached")):
        brought.write_bytes(kernel_file.pack(bytes(10), key, made_by))
        assert loader.source_of(PROBLEM, "sm_120a") == expected
    brought.write_bytes(kernel_file.pack(bytes(10), key, "12.9")[:-1])
    assert loader.load(PROBLEM, "sm_120a") == cached and compiler == [PROBLEM]


def test_a_file_that_cannot_be_loaded_is_compiled_anew(compiler, caplog):
    """Whole by its checksum, but not what this machine loads."""
    launcher = loader.load(PROBLEM, "sm_120a")
    assert compiler == [PROBLEM] and type(launcher) is object and "can't be loaded" in caplog.text


def test_without_a_place_for_files_it_is_compiled(compiler, monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY, "/proc/nowhere")
    assert type(loader.load(PROBLEM, "sm_120a")) is object and compiler == [PROBLEM]
    assert loader.source_of(PROBLEM, "sm_120a") == "JIT"


def test_what_the_linker_refuses_is_used_and_not_kept(compiler, monkeypatch, caplog):
    from flash_attn_sm120 import compile
    from flash_attn_sm120.shared_object import NotLinkable

    def refuse(built, key):
        raise NotLinkable("relocation 127")

    monkeypatch.setattr(compile, "to_file", refuse)
    assert type(loader.load(PROBLEM, "sm_120a")) is object
    assert "relocation 127" in caplog.text and not cache.open_cache()[0].entries()


def test_a_function_of_the_callers_is_compiled_in_each_process(compiler, opens):
    mod = Mod("0" * 64, 1, lambda *_: None)
    for problem in (AttentionProblem("bfloat16", 64, 64, mask_mod=mod), ClassifyProblem(mod)):
        assert type(loader.load(problem, "sm_120a")) is object
        assert loader.source_of(problem, "sm_120a") == "JIT"
    assert len(compiler) == 2 and not cache.open_cache()[0].entries()


def test_a_different_plan_is_a_different_kernel(monkeypatch):
    before = kernel_file.cached_key(PROBLEM, "sm_120a", "x86_64")
    monkeypatch.setattr(kernel_file, "candidates", lambda problem, arch: ["another"])
    assert kernel_file.file_name(kernel_file.cached_key(PROBLEM, "sm_120a", "x86_64")) != kernel_file.file_name(before)


def test_without_jit_a_miss_names_the_variant(compiler, monkeypatch):
    monkeypatch.setenv(loader.NO_JIT, "1")
    with pytest.raises(RuntimeError, match=r"NO_JIT is set.* for bf16 24/24 full on sm_120a: AttentionProblem\(dtype="):
        loader.load(PROBLEM, "sm_120a")
    assert not compiler
    monkeypatch.setenv(loader.NO_JIT, "yes")
    with pytest.raises(ValueError, match="NO_JIT: expected 0 or 1, got 'yes'"):
        loader.load(PROBLEM, "sm_120a")


def test_importing_the_package_imports_no_compiler():
    code = (
        "import sys, flash_attn_sm120.interface, flash_attn_sm120.combine, flash_attn_sm120.launchers\n"
        "print([name for name in ('cutlass', 'tvm_ffi') if name in sys.modules])"
    )
    assert python(code).communicate()[0] == "[]\n"


LOADS = """
import sys
from flash_attn_sm120 import loader
from flash_attn_sm120.problem import CombineProblem
launcher = loader.load(CombineProblem("float16", 64, lse=True), "sm_120a")
try:
    launcher(1)
except TypeError as error:
    print(str(error)[:20], "cutlass" in sys.modules)
"""


def test_the_real_compiler_once_and_files_ever_after(tmp_path, capsys, monkeypatch):
    """Compiled ahead for both processors, then put into wheels, then compiled at a call; each is loaded elsewhere."""
    folder = tmp_path / "package"
    libraries = [path for root in runtime.dsl_folders() for path in root.glob(f"cu*/lib/{runtime.RUNTIME}")]
    cuda = min(int(path.parts[-3][2:]) for path in libraries)  # where there are two, not the one that the DSL takes
    made = list(precompile([COMBINE], ["sm_120a"], ["x86_64", "aarch64"], folder, 1, cuda))
    assert [each.error for each in made] == [""]
    (folder / "stays.so").write_bytes(b"not a kernel")
    stale = kernel_file.built_in_key(PROBLEM, "sm_120a", "x86_64")
    (folder / kernel_file.file_name(stale)).write_bytes(kernel_file.pack(b"old", stale))
    rows = write_manifest([COMBINE], ["sm_120a"], ["x86_64", "aarch64"], folder)
    assert {row["host"] for row in rows} == {"x86_64", "aarch64"} and {row["cuda"][:2] for row in rows} == {str(cuda)}
    names = {path.name for path in folder.iterdir()}
    assert names == {"stays.so", MANIFEST, *(row["file"] for row in rows)}
    assert python(LOADS, **{loader.NO_JIT: "1"}).communicate()[0] == "Expects 7 parameters False\n"
    monkeypatch.syspath_prepend(ROOT / "tools")
    _check_wheels(folder, rows, tmp_path)

    nowhere = {loader.PRECOMPILED: str(tmp_path / "nothing")}
    assert python(LOADS, **nowhere).communicate()[0] == "Expects 7 parameters True\n"
    assert python(LOADS, **nowhere, **{loader.NO_JIT: "1"}).communicate()[0] == "Expects 7 parameters False\n"
    (entry,) = cache.open_cache()[0].entries()
    assert entry.key["variant"] == "combine fp16 64 lse" and entry.key["target"] == "sm_120a"
    assert cli.main(["doctor"]) in (0, 1)
    text = capsys.readouterr().out
    assert "came with the package: 1 for sm_120a" in text and f"cache: 1 kernels in {tmp_path / 'cache'}" in text


def _check_wheels(kernels, rows, tmp_path):
    """Of a pure wheel of this tree and the kernels."""
    import wheels

    pure = tmp_path / "flash_attn_sm120-0.1.0-py3-none-any.whl"
    info = "flash_attn_sm120-0.1.0.dist-info"
    with zipfile.ZipFile(pure, "w") as archive:
        for path in sorted((ROOT / "flash_attn_sm120").rglob("*.py")):
            archive.write(path, path.relative_to(ROOT))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for host in ("x86_64", "aarch64"):
        wheel = wheels.platform_wheel(pure, kernels, host, tmp_path / "dist")
        assert wheel.name == f"flash_attn_sm120-0.1.0-py3-none-manylinux_2_28_{host}.whl"
        place = tmp_path / host
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        (own,) = (row for row in rows if row["host"] == host)
        inside = place / "flash_attn_sm120" / "precompiled"
        assert {path.name for path in inside.iterdir()} == {own["file"], MANIFEST}
        assert json.loads((inside / MANIFEST).read_text())["files"] == [own]
        tags = (place / info / "WHEEL").read_text()
        assert f"Tag: py3-none-manylinux_2_28_{host}\n" in tags and "Root-Is-Purelib: false" in tags
        listed = {line.split(",")[0] for line in (place / info / "RECORD").read_text().splitlines()}
        assert listed == {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    if kernel_file.host() == "x86_64":  # as installed: the package finds what lies inside
        path = os.pathsep.join([str(tmp_path / "x86_64"), *filter(None, [os.environ.get("PYTHONPATH")])])
        answer = python(LOADS, **{"PYTHONPATH": path, loader.PRECOMPILED: "", loader.NO_JIT: "1"})
        assert answer.communicate()[0] == "Expects 7 parameters False\n"
    with zipfile.ZipFile(pure, "a") as archive:
        archive.writestr("flash_attn_sm120/kernels/another.py", "")
    with pytest.raises(ValueError, match="expected kernels of sources"):
        wheels.platform_wheel(pure, kernels, "x86_64", tmp_path / "dist")


def test_calls_of_known_models_are_shipped(recorder):
    """Prefill and decode of each model, as transformers and vLLM call, ask for nothing that isn't."""
    for shapes in MODELS.values():
        for dtype in shapes.dtypes:
            _call(shapes, getattr(torch, dtype), None)
        for kv_dtype in shapes.kv_dtypes:
            for k_descale in (0.5, torch.ones(1)):
                _call(shapes, getattr(torch, shapes.dtypes[0]), getattr(torch, kv_dtype), k_descale)
    shipped = set(shipped_variants())
    assert not set(recorder.problems) - shipped
    assert len(set(recorder.problems)) > 0.9 * len(shipped)


def _call(shapes, dtype, kv_dtype, k_descale=None):
    d, dv = shapes.head_dim, shapes.head_dim_v or shapes.head_dim
    for mask in shapes.masks:
        options = {"causal": True, "window_size": (-1, -1) if mask == "causal" else (100, 0)}
        if shapes.sink:
            options["learnable_sink"] = torch.zeros(8, dtype=torch.bfloat16)
        pages = [torch.zeros(2, 16, 2, columns).to(kv_dtype or dtype) for columns in (d, dv)]
        if kv_dtype is not None:
            options |= {"k_descale": k_descale, "v_descale": torch.ones(1)}
        for rows, splits in ((40, 0), (1, 1), (1, 8)):
            q, table = torch.zeros(rows, 8, d, dtype=dtype), torch.zeros(1, 1000, dtype=torch.int32)
            served = {"seqused_k": ints("cpu", 9000), "page_table": table, "num_splits": splits}
            flash_attn_varlen_func(q, *pages, marks("cpu", rows), None, rows, 9000, **served, **options)
            if kv_dtype is None:
                q = q[None]
                k, v = torch.zeros(1, 9000, 2, d, dtype=dtype), torch.zeros(1, 9000, 2, dv, dtype=dtype)
                flash_attn_func(q, k, v, num_splits=splits, **options)
                flash_attn_varlen_func(q, k, v, seqused_k=ints("cpu", 300), num_splits=splits, **options)
                if splits == 0:
                    flash_attn_varlen_func(
                        q[0], k[0], v[0], marks("cpu", rows), marks("cpu", 9000), rows, 9000, **options
                    )


def test_warmup(compiler, opens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    shapes = Shapes(64, masks=("full",))
    assert warmup([shapes, COMBINE, COMBINE]) == {"JIT": 11} and len(compiler) == 11
    assert warmup([shapes], "cuda:0", show=False) == {"loaded": 10}
    monkeypatch.setattr(loader, "_loaded", {})
    assert warmup([COMBINE], 0) == {"cached": 1} and len(compiler) == 11
    with pytest.raises(TypeError, match="shapes: expected Shapes or problems, got int 64"):
        warmup([64])
    with pytest.raises(ValueError, match="device: expected a CUDA device that PyTorch can use, got cpu"):
        warmup([COMBINE], "cpu")


def test_a_compile_waits_until_another_leaves_memory(compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "compilers_that_fit", lambda: 2)
    said = threading.Event()
    monkeypatch.setattr(
        loader.log, "warning", lambda text, *values: said.set() if "waiting for memory" in text else None
    )
    (tmp_path / "cache").mkdir(mode=0o700)
    held = [os.open(tmp_path / "cache" / f"compiler-{place}.lock", os.O_RDWR | os.O_CREAT) for place in range(2)]
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX)
    thread = threading.Thread(target=loader.load, args=(PROBLEM, "sm_120a"))
    thread.start()
    said.wait()
    assert not compiler
    for file in held:
        os.close(file)
    thread.join()
    assert compiler == [PROBLEM]


def test_no_more_compilers_than_memory_holds(monkeypatch):
    for free_kb, expected in ((100, 1), (loader.COMPILE_MB * 2 << 10, 2), (loader.COMPILE_MB * 500 << 10, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
        monkeypatch.setattr(Path, "read_text", lambda path, kb=free_kb: f"MemTotal: 9 kB\nMemAvailable:  {kb} kB\n")
        assert loader.compilers_that_fit() == expected
