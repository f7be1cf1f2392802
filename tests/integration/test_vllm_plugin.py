"""with_vllm.py under every vLLM that the backend is made for, each in a process of its own.

`make test` puts the Python sources of 0.33.0 into .venv/vllm, `make test-vllm` those of all; VLLM_SOURCES names another
folder that vllm_python.py has filled.
"""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from vllm_python import VERSIONS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = Path(os.environ.get("VLLM_SOURCES", ROOT / ".venv" / "vllm"))


@pytest.mark.parametrize("version", VERSIONS)
def test_backend_inside_vllm(version):
    source = SOURCES / version
    if not (source / "complete").exists():
        told = f"no vLLM {version} in {SOURCES}: run python tests/integration/vllm_python.py {SOURCES}"
        assert not os.environ.get("CI"), told
        pytest.skip(told)
    paths = (source, SOURCES / "dependencies", HERE, ROOT, os.environ.get("PYTHONPATH", ""))
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:xdist", "-p", "no_gpu")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "with_vllm.py")],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_the_entry_point_is_installed():
    found = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "flash_attn_sm120"]
    assert found == ["flash_attn_sm120.integrations.vllm:register"]
