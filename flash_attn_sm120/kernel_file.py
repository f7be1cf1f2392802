"""A compiled launcher in a file: a shared object, behind it what it is of and a checksum.

The file's name is a hash of its key, which says all that the code inside depends on. dlopen doesn't read what lies
behind a shared object, so one file is one rename, and a reader can tell a whole file from any other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import struct
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from flash_attn_sm120 import runtime
from flash_attn_sm120.dispatch import candidates
from flash_attn_sm120.labels import label
from flash_attn_sm120.problem import AttentionProblem, ClassifyProblem, CombineProblem

Problem = AttentionProblem | CombineProblem | ClassifyProblem
Key = Mapping[str, str]
SUFFIX = ".so"
MAGIC = b"FASM120\1"
TAIL = struct.Struct("<32sI8s")  # checksum, bytes of the key, magic
HOSTS = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
# Folders whose sources no compiled kernel depends on.
APART = ("integrations", "simulator")


class Damaged(ValueError):
    """A file that isn't what its name says."""


def host() -> str | None:
    """This machine's processor, "x86_64" or "aarch64"; None where launchers aren't kept in files."""
    return HOSTS.get(platform.machine().lower()) if sys.platform == "linux" else None


def built_in_key(problem: Problem, arch: str, processor: str) -> Key | None:
    """Of a file that comes with the package: it holds for any Python, and for the releases of the DSL and of TVM FFI
    whose runtime libraries it can call. None where the problem isn't kept in files."""
    versions = {"dsl": _version("nvidia-cutlass-dsl", 2), "tvm_ffi": _version("apache-tvm-ffi", 2)}
    return _key(problem, arch, processor, versions)


def cached_key(problem: Problem, arch: str, processor: str) -> Key | None:
    """Of a file that this machine compiled: it holds for just the versions that are installed."""
    versions = {"dsl": _version("nvidia-cutlass-dsl"), "tvm_ffi": _version("apache-tvm-ffi")}
    versions |= {"compiler": runtime.compiler_libraries(), "python": platform.python_version()}
    return _key(problem, arch, processor, versions)


def _key(problem: Problem, arch: str, processor: str, versions: dict[str, str]) -> Key | None:
    if uses_function(problem):
        return None
    plans = candidates(problem, arch) if isinstance(problem, AttentionProblem) else []
    return {
        "variant": label(problem),
        "problem": repr(problem),
        "plans": repr(plans),
        "target": arch,
        "host": processor,
        "sources": source_hash(),
        **versions,
    }


def uses_function(problem: Problem) -> bool:
    """A function of the caller is part of the code. What it uses of installed libraries is known by name only, which
    is enough within a process and not beyond it."""
    return isinstance(problem, ClassifyProblem) or (isinstance(problem, AttentionProblem) and problem.modded)


def file_name(key: Key) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:40] + SUFFIX


def pack(shared_object: bytes, key: Key, made_by: str = "") -> bytes:
    """What is written to the file. made_by: release of the CUDA compiler, such as "12.9"."""
    text = json.dumps([dict(key), made_by], sort_keys=True).encode()
    body = shared_object + text
    return body + TAIL.pack(hashlib.sha256(body).digest(), len(text), MAGIC)


def read_note(content: bytes) -> tuple[dict[str, str], str]:
    """(key, made_by) of a whole file. Damaged where it is cut short, changed, or another kind of file."""
    if len(content) < TAIL.size:
        raise Damaged(f"{len(content)} bytes")
    checksum, length, magic = TAIL.unpack_from(content, len(content) - TAIL.size)
    body = content[: -TAIL.size]
    if magic != MAGIC or length > len(body) or hashlib.sha256(body).digest() != checksum:
        raise Damaged("cut short or changed")
    key, made_by = json.loads(body[len(body) - length :])
    return key, made_by


def read_key(content: bytes) -> dict[str, str]:
    """The key of a whole file; raises as read_note does."""
    return read_note(content)[0]


def check(content: bytes, key: Key) -> None:
    """Damaged where a file's content isn't a whole file of this key."""
    found = read_key(content)
    if found != dict(key):
        differs = next(name for name in (*key, *found) if key.get(name) != found.get(name))
        raise Damaged(f"{differs}: expected {key.get(differs)}, got {found.get(differs)}")


@functools.cache
def source_hash(root: Path = Path(__file__).parent) -> str:
    """Of this package's modules, or of those in another folder: those that a kernel could depend on."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in APART:
            total.update(f"{name.as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:32]


@functools.cache
def _version(package: str, parts: int | None = None) -> str:
    try:
        return ".".join(metadata.version(package).split(".")[:parts])
    except metadata.PackageNotFoundError:
        return "none"
