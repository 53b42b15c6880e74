"""The house of DESIGN.md, section 2, read from the `ast`: imports go down, deployment is light, files are short."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import REPOSITORY

PACKAGE = REPOSITORY / "bsrgen"

# From the roof to the ground: a module imports only what stands in a line below its own.
FLOORS = """
    __main__
    cli
    __init__
    api
    bench
    package
    backends
    backends.c
    backends.c.candidates  backends.c.text
    build  tune  backends.c.plan
    emit  cost  backends.c.count
    kernel  plan  files
    problem
    pattern  arguments
    canonical  artifact  trampoline
    dtypes  operators  epilogues  targets  foreign  store  machine
    errors  _paths
"""
RANK = {name: -floor for floor, line in enumerate(FLOORS.split("\n")) for name in line.split()}
ROOMS = ("cli", "bench")  # packages whose own files may import each other in any order that is no circle

DEPLOY = [
    "kernel",
    "arguments",
    "artifact",
    "trampoline",
    "store",
    "pattern",
    "canonical",
    "foreign",
    "problem",
    "operators",
    "epilogues",
    "dtypes",
]
WORKSHOP = [
    "api",
    "build",
    "emit",
    "package",
    "plan",
    "cost",
    "tune",
    "backends",
    "bench",
    "cli",
    "files",
]  # needs a compiler or templates
NOT_ON_IMPORT = ("torch", "jinja2", "safetensors", "scipy", "matplotlib", "click", "rich", "archspec")
MAY_ON_IMPORT = {"cli": ("click", "rich"), "__main__": ("click", "rich"), "bench": ("scipy",)}

LONG_MODULES = {  # over 300 lines, and why
    "store.py": "one protocol: locks, rename, eviction and verification share its folder layout and its errors",
}
LONG_TEMPLATES: dict[str, str] = {}  # over 150 lines, and why


@dataclass(frozen=True)
class Import:
    """`module` as it is imported at `line`, and whether that happens only in a call."""

    module: str
    line: int
    late: bool


def name_of(path: Path) -> str:
    """bsrgen/backends/c/plan.py -> backends.c.plan; the package itself is __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The row of FLOORS that stands for `module`."""
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), module)


def imports(path: Path) -> list[Import]:
    """All imports that can run; those under `if TYPE_CHECKING:` cannot."""
    return list(_imports(ast.parse(path.read_text()), late=False))


def _imports(node: ast.AST, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports name the module in full"
            for alias in child.names:
                module = f"{child.module}.{alias.name}"
                known = module.removeprefix("bsrgen.") in MODULES
                yield Import(module if known else str(child.module), child.lineno, late)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _imports(child, late or isinstance(child, ast.FunctionDef | ast.Lambda))


def own(path: Path) -> list[tuple[str, Import]]:
    """Imports of bsrgen's own modules.  `from bsrgen import __version__` reads a constant and counts for nothing."""
    found = []
    for item in imports(path):
        if item.module.split(".")[0] == "bsrgen":
            found.append((item.module.removeprefix("bsrgen").removeprefix(".") or "__init__", item))
    return [(name, item) for name, item in found if name != "__init__" or not _version_only(path, item.line)]


def _version_only(path: Path, line: int) -> bool:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return any(
        node.lineno == line and all(a.name == "__version__" or a.name in MODULES for a in node.names) for node in nodes
    )


@pytest.mark.parametrize("module", MODULES)
def test_every_import_goes_down(module: str) -> None:
    room = room_of(module)
    assert room in RANK, f"{module} has no floor: give it one in FLOORS"
    for target, item in own(MODULES[module]):
        below = room_of(target)
        assert below in RANK, f"{target} has no floor: give it one in FLOORS"
        if room != below or room not in ROOMS:
            assert RANK[below] < RANK[room], (
                f"{MODULES[module]}:{item.line}: {module} imports {target}, which is not below it"
            )


def test_floors_name_only_what_exists() -> None:
    assert set(RANK) == {room_of(module) for module in MODULES}


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_within_a_room(room: str) -> None:
    left = {
        m: {t for t, _ in own(p) if room_of(t) == room and t != m} for m, p in MODULES.items() if room_of(m) == room
    }
    while free := [module for module, below in left.items() if not below & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"imports in a circle: {left}"


@pytest.mark.parametrize("module", DEPLOY)
def test_deploy_half_needs_no_workshop(module: str) -> None:
    for item in imports(MODULES[module]):
        name = item.module.removeprefix("bsrgen.")
        assert name.split(".")[0] not in WORKSHOP, f"{module}:{item.line} imports {item.module}"
        assert name.split(".")[0] != "jinja2", f"{module}:{item.line} imports jinja2"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    allowed = MAY_ON_IMPORT.get(room_of(module), ())
    at_once = {item.module.split(".")[0]: item.line for item in imports(MODULES[module]) if not item.late}
    for name in NOT_ON_IMPORT:
        assert name not in at_once or name in allowed, (
            f"{MODULES[module]}:{at_once[name]}: import {name} in the function"
        )


@pytest.mark.parametrize(
    ("folder", "pattern", "limit", "excused"),
    [("bsrgen", "*.py", 300, LONG_MODULES), ("templates", "*.j2", 150, LONG_TEMPLATES)],
    ids=["modules", "templates"],
)
def test_files_are_short(folder: str, pattern: str, limit: int, excused: dict[str, str]) -> None:
    root = REPOSITORY / folder
    lines = {p.relative_to(root).as_posix(): len(p.read_text().splitlines()) for p in root.rglob(pattern)}
    long = {name: count for name, count in lines.items() if count > limit}
    assert long.keys() <= excused.keys(), f"over {limit} lines: {long}"
    assert excused.keys() <= long.keys(), "an excuse that is no longer needed"


def test_functions_are_short() -> None:
    long = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if len(node.body) > 1 and isinstance(node.body[0], ast.Expr) else node.body[0]
                count = (
                    (node.end_lineno or 0) - first.lineno + 1
                )  # the body alone: not the signature, not the docstring
                if count > 40:
                    long.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}: {count} lines")
    assert not long, long
