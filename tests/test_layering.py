"""The arrows between the packages and between their rooms, which are folders with one purpose.

They are read from the syntax tree of every module, so that a lazy import counts too.
"""

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "expert_store": frozenset[str](),
    "router": frozenset[str](),
    "extractor": frozenset({"expert_store", "router"}),
    "server": frozenset({"expert_store", "router", "extractor"}),
}
MODULES = sorted(path for package in MAY_IMPORT for path in (REPOSITORY / package).rglob("*.py"))


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import; relative imports stay inside their package and are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def _reads_environment(tree: ast.AST) -> Iterator[int]:
    """Lines that name os.environ, os.getenv or their relatives; a default that is only set reads nothing."""
    names = ("environ", "environb", "getenv", "putenv")
    calls = [
        node.value.func for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    set_only = {id(call.value) for call in calls if isinstance(call, ast.Attribute) and call.attr == "setdefault"}
    for node in ast.walk(tree):
        if id(node) in set_only:
            continue
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os":
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in names)


def _found(keep: Callable[[str], bool], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(REPOSITORY)}:{line} imports {module}"
        for path in paths
        for line, module in _imported(ast.parse(path.read_text()))
        if keep(module)
    ]


def _outside(*allowed: str) -> list[Path]:
    """The modules of the four packages that are not under one of the allowed paths."""
    return [path for path in MODULES if not path.relative_to(REPOSITORY).as_posix().startswith(allowed)]


def test_the_readers_of_this_page_see_every_way_to_import() -> None:
    source = (
        "import a.b\ndef f():\n    from c.d import e\n    importlib.import_module('g')\nfrom . import h\nos.getenv('X')"
        "\nos.environ.setdefault('X', 'Y')\nx = os.environ.setdefault('X', 'Y')"
    )
    tree = ast.parse(source)
    assert sorted(module for _, module in _imported(tree)) == ["a.b", "c.d", "g"]
    assert list(_reads_environment(tree)) == [6, 8]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_the_architecture_allows(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    paths = [path for path in MODULES if path.relative_to(REPOSITORY).parts[0] == package]
    assert paths, f"{package} has no modules"
    assert _found(lambda module: module.split(".")[0] in forbidden, paths) == []


def test_no_package_imports_tests_or_benchmarks() -> None:
    assert _found(lambda module: module.split(".")[0] in {"tests", "benchmarks"}, MODULES) == []


def test_only_the_http_layer_knows_the_web_framework() -> None:
    web = {"fastapi", "starlette", "sse_starlette"}
    assert _found(lambda module: module.split(".")[0] in web, _outside("server/api/")) == []


def test_only_the_metrics_modules_know_prometheus() -> None:
    assert (
        _found(
            lambda module: module.split(".")[0] == "prometheus_client",
            _outside("server/serving/metrics.py", "server/serving/metrics_vllm.py"),
        )
        == []
    )


def test_only_the_settings_read_the_environment() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in _outside("server/settings/load.py", "server/settings/openmp.py")
        for line in _reads_environment(ast.parse(path.read_text()))
    ]
    assert found == []


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    found = [
        path for path in MODULES if drawers & {part.removesuffix(".py") for part in path.relative_to(REPOSITORY).parts}
    ]
    assert found == []


ROOMED = ("extractor", "server")
"""Packages whose folders are rooms; the other two are a room each."""
LOOSE = {"__init__.py", "__main__.py", "errors.py"}
"""Modules that may lie beside a package's rooms: entry points, and the errors that all rooms raise."""
ROOM_MODULES = 16


def _room(module: str) -> str:
    """The room of a module, or the module itself where it lies beside the rooms."""
    package, *inside = module.split(".")
    return f"{package}.{inside[0]}" if package in ROOMED and inside else package


def _arrows() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    arrows: dict[str, set[str]] = {}
    for path in MODULES:
        room = _room(".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"))
        others = {_room(module) for _, module in _imported(ast.parse(path.read_text())) if _is_ours(module)}
        arrows.setdefault(room, set()).update(others - {room})
    return arrows


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in MAY_IMPORT


def _circle(arrows: dict[str, set[str]]) -> tuple[str, ...]:
    """Rooms that import one another in a circle; empty where arrows run one way."""
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def test_arrows_between_rooms_run_one_way() -> None:
    assert set(_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    arrows = _arrows()
    assert "server.engine" in arrows["server.serving"], "the arrows are not read"
    assert _circle(arrows) == ()


def test_a_room_holds_what_one_can_take_in() -> None:
    modules = [*MODULES, *(REPOSITORY / "benchmarks").rglob("*.py")]
    folders = Counter(path.relative_to(REPOSITORY).parent for path in modules if path.name != "__init__.py")
    assert {folder for folder, count in folders.items() if count > ROOM_MODULES} == set()


@pytest.mark.parametrize("package", ROOMED)
def test_no_module_lies_beside_the_rooms(package: str) -> None:
    assert {path.name for path in (REPOSITORY / package).glob("*.py")} - LOOSE == set()
