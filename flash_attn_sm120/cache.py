"""Compiled launchers in the user's cache directory, shared by all of the user's processes.

A file is written beside its place and renamed, so that a reader sees all of it or nothing; one that is damaged, stale
or somebody else's is passed over and replaced. Where the directory can't be used, nothing is kept and nothing fails.

FLASH_ATTN_SM120_CACHE_DIR: the directory; by default flash_attn_sm120 in XDG_CACHE_HOME or ~/.cache.
FLASH_ATTN_SM120_CACHE_SIZE: MB that it may hold, 512 by default; what was used longest ago goes first. 0: no cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flash_attn_sm120 import kernel_file
from flash_attn_sm120.kernel_file import SUFFIX, Key

DIRECTORY = "FLASH_ATTN_SM120_CACHE_DIR"
SIZE = "FLASH_ATTN_SM120_CACHE_SIZE"
DEFAULT_MB = 512
LEFT_BEHIND_SECONDS = 600  # a file that is still being written after so long belongs to a process that died
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger("flash_attn_sm120")


@dataclass(frozen=True)
class Entry:
    """A file of the cache. used: seconds since the epoch. key: None where the file is damaged."""

    path: Path
    size: int
    used: float
    key: Key | None


@dataclass(frozen=True)
class Cache:
    """A directory that is the user's own. limit: bytes that it may hold."""

    folder: Path
    limit: int

    def read(self, key: Key) -> Path | None:
        """The whole file of a key, or None. One that isn't whole, or of another key, is removed."""
        path = self.folder / kernel_file.file_name(key)
        try:
            content = _own_content(path)
        except OSError:
            return None
        try:
            kernel_file.check(content, key)
        except kernel_file.Damaged as reason:
            log.info("removed from the cache: %s, %s", path.name, reason)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return path

    def write(self, key: Key, content: bytes) -> Path | None:
        """Puts a file in its place, whole; None where the disk is full or the directory isn't to be written to."""
        path = self.folder / kernel_file.file_name(key)
        rough = self.folder / f".{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with open(os.open(rough, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(content)
            os.replace(rough, path)
        except OSError as reason:
            log.info("not kept in the cache: %s", reason)
            with contextlib.suppress(OSError):
                rough.unlink()
            return None
        self.shrink(keep=path)
        return path

    @contextlib.contextmanager
    def lock(self, key: Key) -> Iterator[None]:
        """One process at a time, for the whole of a compile; the others wait and say so. The lock of a process that
        dies is free. Where files can't be locked, nobody waits."""
        import fcntl

        path = self.folder / (Path(kernel_file.file_name(key)).stem + ".lock")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            yield
            return
        try:
            with contextlib.suppress(OSError):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "?"
                    log.warning("waiting for process %s, which compiles %s", owner, key["variant"])
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):
                os.pwrite(descriptor, f"{os.getpid():<20}".encode(), 0)
            yield
            # Whoever waits has this file open and finds the kernel when it is let in; the name has served.
            if (self.folder / kernel_file.file_name(key)).exists():
                with contextlib.suppress(OSError):
                    path.unlink()
        finally:
            os.close(descriptor)

    def entries(self) -> list[Entry]:
        """Every kernel that is kept, the one used last first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status, content = path.stat(), _own_content(path)
            except OSError:
                continue
            try:
                key = kernel_file.read_key(content)
            except ValueError:
                key = None
            found.append(Entry(path, status.st_size, status.st_mtime, key))
        return sorted(found, key=lambda entry: -entry.used)

    def shrink(self, keep: Path | None = None) -> None:
        """Removes what was used longest ago, until the limit is met, and what a process that died left half written."""
        files = []
        for path in self._files():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.suffix == ".tmp" and time.time() - status.st_mtime > LEFT_BEHIND_SECONDS:
                    path.unlink()
                elif path.suffix == SUFFIX:
                    files.append((path != keep, status.st_mtime, status.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for removable, _, size, path in sorted(files, key=lambda file: file[1]):
            if total <= self.limit:
                return
            if removable:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size

    def clear(self) -> tuple[int, int]:
        """Removes everything; (kernels, bytes) that went. Raises OSError where a file can't be removed."""
        count = total = 0
        for path in self._files():
            if path.suffix in (SUFFIX, ".tmp", ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    size = path.lstat().st_size
                    path.unlink()
                    count, total = count + (path.suffix == SUFFIX), total + size
        return count, total

    def _files(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except OSError:
            return []


def folder() -> Path:
    """Where the cache is, or would be."""
    named = os.environ.get(DIRECTORY)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    root = Path(base) if base and os.path.isabs(base) else Path(os.path.expanduser("~"), ".cache")
    return root / "flash_attn_sm120"


def limit() -> int:
    """Bytes that the cache may hold. ValueError where the environment doesn't say a number."""
    text = os.environ.get(SIZE, str(DEFAULT_MB))
    if not text.isdecimal():
        raise ValueError(f"{SIZE}: expected MB as a whole number >= 0, got {text!r}")
    return int(text) << 20


def open_cache() -> tuple[Cache | None, str]:
    """(the cache, "") or (None, why there is none). Makes the directory."""
    path, size = folder(), limit()
    if kernel_file.host() is None:
        return None, "launchers are kept in files on Linux only, on x86-64 and AArch64"
    if size == 0:
        return None, f"{SIZE} is 0"
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.geteuid():
            return None, f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}"
        if status.st_mode & OTHERS_WRITE:
            path.chmod(0o700)
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    return Cache(path, size), ""


def _own_content(path: Path) -> bytes:
    """Of a plain file that the user owns and nobody else may write; OSError for any other."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE:
            raise PermissionError(f"{path}: not the user's own file")
        return file.read()
