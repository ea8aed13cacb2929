"""What the repository says of itself: no traces of one machine, and a README whose figures and commands are real."""

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from server.cli.main import main

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("expert_store", "router", "extractor", "server")
FUNCTION_LINES = 60


def _tracked() -> list[Path]:
    """Files under version control; outside a checkout (an unpacked archive), every file that git would see."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


def _modules() -> list[Path]:
    return [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]


def _texts() -> dict[str, str]:
    """Tracked text files by name; the bundled tokenizer and the licence are not ours to word."""
    texts = {}
    for path in _tracked():
        content = path.read_bytes()
        if b"\0" not in content and path.name not in {"tokenizer.json", "LICENSE"}:
            texts[path.relative_to(REPOSITORY).as_posix()] = content.decode("utf-8")
    return texts


def _readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w.])/(work|root|farm|home/\w+)/",
        r"py[p]i\.org|python[h]osted\.org|npm[j]s\.org|deb\.[d]ebian\.org|download\.py[t]orch\.org",
        r"\b(TO[D]O|FIX[M]E|XX[X])\b",
    ],
    ids=["paths of one machine", "package registries", "unfinished work"],
)
def test_tracked_files_are_free_of(pattern: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in _texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line) and name != "tests/test_repository.py"
    ]
    assert found == []


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    total = len(range(function.lineno, (function.end_lineno or function.lineno) + 1))
    first = function.body[0]
    is_said = ast.get_docstring(function) is not None
    return total - (len(range(first.lineno, (first.end_lineno or first.lineno) + 1)) if is_said else 0)


def test_functions_stay_short_enough_to_read() -> None:
    """Kernels aside: what one computes in registers cannot be handed to another function."""
    found = [
        f"{path.relative_to(REPOSITORY).as_posix()}:{node.name}"
        for path in _modules()
        if "kernels" not in path.with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _lines(node) > FUNCTION_LINES
    ]
    assert found == []


def test_modules_say_what_they_own() -> None:
    silent = [
        path for path in _modules() if path.name != "__init__.py" and not path.read_text().lstrip().startswith('"""')
    ]
    assert silent == []


def test_packages_are_typed_and_installed_together() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(PACKAGES)
    assert [name for name in PACKAGES if not (REPOSITORY / name / "py.typed").is_file()] == []


def test_every_dependency_has_an_exact_version_that_was_run() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    names = {re.split(r"[^\w.-]", text, maxsplit=1)[0].lower().replace("_", "-") for text in wanted}
    assert names - pins - {"triton"} == set()
    assert "torch==2.13.0" in lines


def test_files_that_the_readme_and_the_pages_link_to_exist() -> None:
    pages = {name: text for name, text in _texts().items() if name.endswith(".md")}
    broken = []
    for name, text in pages.items():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text):
            link = target[0] or target[1]
            if "://" not in link and not (REPOSITORY / name).parent.joinpath(link).exists():
                broken.append(f"{name} → {link}")
    assert broken == []


def test_modules_and_rooms_that_the_pages_name_exist() -> None:
    pages = {name: text for name, text in _texts().items() if name.startswith(("docs/", "README", "CONTRIBUTING"))}
    named = re.compile(r"`((?:expert_store|router|extractor|server|benchmarks|tests)/[\w./-]*)`")
    found = [(name, path) for name, text in pages.items() for path in named.findall(text)]
    assert [(name, path) for name, path in found if not (REPOSITORY / path).exists()] == []


def test_figures_in_the_readme_cite_results_that_exist() -> None:
    cited = re.findall(r"benchmarks/results/[\w./-]+\.json", _readme())
    assert [name for name in cited if not (REPOSITORY / name).is_file()] == []
    measured = re.findall(r"^.*\d\s*(?:tokens/s|MiB/s|GiB/s|GB/s).*$", _readme(), flags=re.MULTILINE)
    assert not measured or cited, "the README gives rates but cites no file under benchmarks/results"


def test_make_targets_that_the_pages_name_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    named = set()
    for page in ("README.md", "CONTRIBUTING.md"):
        for block in re.findall(r"```.*?```|`[^`\n]+`", (REPOSITORY / page).read_text(), flags=re.DOTALL):
            named |= set(re.findall(r"\bmake ([a-z][a-z-]*)", block))
    assert {"demo", "test"} <= named
    assert named - targets == set()


def _deepfew_lines() -> list[list[str]]:
    """Words of every `deepfew …` line in the README's code blocks, comments left out."""
    blocks = re.findall(r"^```\n(.*?)^```", _readme(), flags=re.DOTALL | re.MULTILINE)
    lines = [line.partition(" #")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("deepfew ")]


@pytest.mark.parametrize("command", sorted({words[0] for words in _deepfew_lines()}))
def test_commands_and_flags_in_the_readme_exist(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    used = {word for words in _deepfew_lines() if words[0] == command for word in words if word.startswith("--")}
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert used - known == set()


def test_docstrings_and_comments_are_sentences_with_a_subject() -> None:
    begins = re.compile(r'^\s*(?:r?"""|#)\s*(?:What|Which|Who|How) ')
    found = [
        f"{path.relative_to(REPOSITORY).as_posix()}:{number}: {line.strip()[:60]}"
        for path in _modules()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if begins.match(line)
    ]
    assert found == []
