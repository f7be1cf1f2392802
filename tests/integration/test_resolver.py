"""Installing this package next to vLLM 0.33.0 changes no version that vLLM resolves to.

Needs the package index and installs nothing.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_pins

ROOT = Path(__file__).parents[2]
PINS = {name: version for name, (version, _) in vllm_pins.PINS.items()}
# An index may be days behind the floor that vLLM gives its certificates, which have no part in this.
OVERRIDE = "certifi\n"
WHERE = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28")


def resolve(folder: Path, *requirements: str) -> dict[str, str] | str:
    """Version of each distribution, or what uv says where there is no answer."""
    for name, text in (("requirements.in", "\n".join(requirements)), ("override.txt", OVERRIDE)):
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *WHERE, "--no-annotate", "--no-header"]
    command += ["--override", str(folder / "override.txt"), str(folder / "requirements.in")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    return dict(re.findall(r"^([\w.-]+)(?:\[.*\])?(?:==| @ )(\S+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize(
    "wanted",
    [("vllm==0.33.0",), ("nvidia-cutlass-dsl[cu13]==4.8.0", *(f"{name}=={PINS[name]}" for name in PINS))],
    ids=["vllm", "pins"],
)
def test_nothing_else_changes(tmp_path, wanted):
    before = resolve(tmp_path, *wanted)
    if isinstance(before, str):  # without this package: no fault of it; test_requirements.py needs no index
        pytest.skip(f"no answer from the package index: {before[:200]}")
    assert before.items() >= PINS.items() and "flash-attn-sm120" not in before
    after = resolve(tmp_path, *wanted, f"flash-attn-sm120[cu13] @ {ROOT.as_uri()}")
    assert isinstance(after, dict), after
    assert after.pop("flash-attn-sm120").startswith("file:")
    assert after == before
