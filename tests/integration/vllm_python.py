"""The Python sources of vLLM, without compiled code, for tests on machines without a GPU.

    python tests/integration/vllm_python.py FOLDER [VERSION ...]

FOLDER/VERSION gets the sources and metadata of each version's wheel (0.33.0 and 0.24.0 unless named), which are
downloaded without dependencies and then dropped: 340 MB each, 60 MB kept. FOLDER/dependencies gets what importing them
takes (vllm_requirements.txt), 280 MB. What is there already is kept.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.33.0", "0.24.0")
REQUIREMENTS = Path(__file__).with_name("vllm_requirements.txt")
KEPT = (".py", "/METADATA", "/entry_points.txt")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def unpack_sources(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        pip("download", "--no-deps", "--only-binary=:all:", "-d", download, f"vllm=={version}")
        (wheel,) = Path(download).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(KEPT)])


def main(folder: str, *versions: str) -> None:
    root = Path(folder)
    done = root / "dependencies" / "installed.txt"
    if not done.exists() or done.read_text() != REQUIREMENTS.read_text():
        pip("install", "--no-deps", "--upgrade", "--target", str(done.parent), "-r", str(REQUIREMENTS))
        done.write_text(REQUIREMENTS.read_text())
    for version in versions or VERSIONS:
        if not (root / version / "complete").exists():
            unpack_sources(version, root / version)
            (root / version / "complete").touch()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
