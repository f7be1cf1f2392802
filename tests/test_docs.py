"""The documentation: links resolve, code parses, commands exist, the API page is right. Sizes of files."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest

from flash_attn_sm120 import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MOST_LINES = 600
make_api = runpy.run_path(str(ROOT / "docs" / "make_api.py"))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def anchors(page: Path) -> set[str]:
    plain = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {make_api["anchor"](title.strip()) for title in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert "://" not in target, f"{page.name}: {target} leaves the repository"
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_parses_and_imports_what_there_is(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("flash_attn_sm120"):
                for alias in node.names:
                    assert defined(node.module, alias.name), f"{page.name}: {node.module} has no {alias.name}"


def defined(module: str, name: str) -> bool:
    """Whether a module of the package has a name, read from its source: transformers and vllm may not be here."""
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").exists():
        source = path.with_suffix(".py")
    elif (path / f"{name}.py").exists() or (path / name / "__init__.py").exists():
        return True
    else:
        source = path / "__init__.py"
    ways = (rf"(def|class) {name}\b", rf"{name} = ", rf"(from \S+ )?import .*\b{name}\b", rf' +"?{name}"?,$')
    return any(re.search(f"^{way}", source.read_text(), re.MULTILINE) for way in ways)


def command_lines() -> list[str]:
    """Documented calls of our command, from fenced blocks, without comments; help pages count too."""
    texts = [text for page in PAGES for text in blocks(page, "")]
    texts += [getattr(command, "EPILOG", "") for command in cli.COMMANDS] + [cli.EPILOG]
    starts = r"^ *(?:flash-attn-sm120|\S*python3? -m flash_attn_sm120) +(.*)$"
    found = [line for text in texts for line in re.findall(starts, text, re.MULTILINE)]
    return sorted({re.split(r"  +|#", line)[0].strip() for line in found})


def test_documented_commands_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in command_lines() if "COMMAND" not in line]
    assert len(lines) > 8
    for line in lines:
        try:
            arguments = cli.parser().parse_args(shlex.split(line))
        except SystemExit as stop:
            pytest.fail(f"flash-attn-sm120 {line}: exits with {stop.code}")
        assert callable(arguments.run)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, *(ROOT / ".github" / "workflows").glob("*.yml")]:
        for target in re.findall(r"^\s*(?:- run: )?make (\w[\w-]*)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_every_command_documents_its_exit_codes():
    page = (ROOT / "docs" / "command-line.md").read_text()
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert "Exit code" in command.EPILOG and f"`{name}`" in page


def test_api_page_is_up_to_date():
    page = ROOT / "docs" / "api.md"
    assert page.read_text() == make_api["page"](), "run python docs/make_api.py"
    names = set(re.findall(r"^### ([\w.]+)$", page.read_text(), re.MULTILINE))
    public = set()
    for folder in ("", "mods", "distributed"):
        source = (ROOT / "flash_attn_sm120" / folder / "__init__.py").read_text()
        public |= set(re.findall(r'^ +"(\w+)",$', source.partition("__all__")[2].partition("]")[0], re.MULTILINE))
    assert len(public) > 15 and public - names == {"__version__"}


def test_no_file_is_too_long():
    files = [file for folder in ("flash_attn_sm120", "benchmarks", "docs") for file in (ROOT / folder).rglob("*.py")]
    sizes = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert len(sizes) > 90
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES}


def test_every_file_of_the_package_is_in_the_house():
    listed = re.search(r"```\n(.*?)```", (ROOT / "docs" / "house.md").read_text(), re.DOTALL)[1]
    for path in (ROOT / "flash_attn_sm120").iterdir():
        if path.name.startswith("__") or path.name == "py.typed":
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert re.search(rf"(?<!\w){re.escape(name)}", listed), f"docs/house.md: no {name}"
