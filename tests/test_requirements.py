"""Installing this package next to vLLM 0.33.0 changes none of its pins: each requirement is met by one of them, so that
nothing is left to a resolver. tests/integration/test_resolver.py asks one."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from vllm_pins import PINS

try:
    import tomllib
except ImportError:
    import tomli as tomllib  # which pytest brings along before Python 3.11

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
MACHINES = ("x86_64", "aarch64")


def met(requirement: str, machine: str, extra: str) -> bool:
    """Whether vLLM's pins meet a requirement, or it isn't one on this machine."""
    wanted = Requirement(requirement)
    where = {"python_version": "3.12", "python_full_version": "3.12.11", "sys_platform": "linux"}
    where |= {"platform_machine": machine, "platform_system": "Linux", "extra": extra}
    if wanted.marker is not None and not wanted.marker.evaluate(where):
        return True
    version, extras = PINS.get(wanted.name, ("", set()))
    return wanted.url is None and bool(version) and version in wanted.specifier and wanted.extras <= extras


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("extra", ["", "cu13"])
def test_vllms_pins_meet_every_requirement(extra, machine):
    requirements = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else ())]
    assert len(requirements) >= 3
    assert [text for text in requirements if not met(text, machine, extra)] == []
    assert "3.12.11" in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize(
    "requirement, good",
    [
        ("torch", True),
        ("torch>=2.14", True),
        ("torch<2.14", False),
        ("nvidia-cutlass-dsl[cu13]>=4.8,<4.9", True),
        ("nvidia-cutlass-dsl>=4.8.1", False),
        ("nvidia-cutlass-dsl[cu12]>=4.8", False),
        ("numpy", False),
        ("numpy; sys_platform == 'win32'", True),
    ],
)
def test_a_requirement_that_is_not_met_is_seen(requirement, good):
    assert met(requirement, "x86_64", "") == good
