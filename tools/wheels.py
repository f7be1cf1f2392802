"""Platform wheels out of the pure wheel and a folder of compiled kernels: python tools/wheels.py PURE FOLDER OUT

A kernel's file needs nothing of glibc itself; it calls two libraries of packages that this one depends on, whose wheels
are for manylinux_2_28. So are these. They hold for any Python, as the files do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

MANYLINUX = "manylinux_2_28"
INSIDE = "flash_attn_sm120/precompiled"
EPOCH = (2020, 1, 1, 0, 0, 0)  # of files in a wheel: the same input makes the same bytes


def platform_wheel(pure: Path, kernels: Path, host: str, out: Path) -> Path:
    """Writes the wheel for a host, "x86_64" or "aarch64", with its files of `kernels` and a manifest of just these.

    Raises ValueError where the kernels were compiled from other sources than the wheel has, or a file isn't the one
    that the manifest lists, or none is for this host."""
    name, version, _ = pure.name.split("-", 2)
    tag = f"py3-none-{MANYLINUX}_{host}"
    manifest = json.loads((kernels / "manifest.json").read_text())
    rows = [row for row in manifest["files"] if row["host"] == host]
    if not rows:
        raise ValueError(f"{kernels}: expected kernels for {host}, got none")
    with zipfile.ZipFile(pure) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    sources = _source_hash(contents)
    if sources != manifest["sources"]:
        raise ValueError(f"{kernels}: expected kernels of sources {sources}, got {manifest['sources']}")
    for row in rows:
        content = (kernels / row["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise ValueError(f"{kernels / row['file']}: expected the file that the manifest lists, got another")
        contents[f"{INSIDE}/{row['file']}"] = content
    contents[f"{INSIDE}/manifest.json"] = json.dumps({**manifest, "files": rows}, indent=1).encode()

    info = f"{name}-{version}.dist-info"
    lines = contents[f"{info}/WHEEL"].decode().splitlines()
    kept = [line for line in lines if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))]
    contents[f"{info}/WHEEL"] = "\n".join([*kept, "Root-Is-Purelib: false", f"Tag: {tag}", ""]).encode()
    record = f"{info}/RECORD"
    del contents[record]
    listed = [f"{path},sha256={_digest(content)},{len(content)}" for path, content in contents.items()]
    contents[record] = "\n".join([*listed, f"{record},,", ""]).encode()

    out.mkdir(parents=True, exist_ok=True)
    wheel = out / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path, content in contents.items():
            entry = zipfile.ZipInfo(path, EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return wheel


def _source_hash(contents: dict[str, bytes]) -> str:
    """As the installed package will compute it."""
    from flash_attn_sm120 import kernel_file

    with tempfile.TemporaryDirectory() as folder:
        for path, content in contents.items():
            if path.startswith("flash_attn_sm120/") and path.endswith(".py"):
                target = Path(folder, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        return kernel_file.source_hash(Path(folder, "flash_attn_sm120"))


def _digest(content: bytes) -> str:
    """As the wheel format writes it: base64 for addresses, without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def main() -> None:
    pure, kernels, out = map(Path, sys.argv[1:4])
    hosts = {row["host"] for row in json.loads((kernels / "manifest.json").read_text())["files"]}
    for host in sorted(hosts):
        wheel = platform_wheel(pure, kernels, host, out)
        print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
