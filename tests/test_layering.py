"""The house of DESIGN.md, section 2, read from the `ast`: imports go down, deployment is light, files are short."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import REPOSITORY

from bsrgen.api import _LOOKS

PACKAGE = REPOSITORY / "bsrgen"

# From the roof to the ground: a module imports only what stands in a line below its own.
FLOORS = """
    __main__
    cli
    bench
    integrations
    __init__
    attention  assemble
    api
    choose  pattern_compile
    advice  package  given  shapes
    pit_weight
    backends
    backends.mlir
    backends.mlir.gpu_candidates  backends.mlir.gpu_text
    backends.mlir.gpu_plan  backends.cuda
    backends.cuda.pattern_candidates
    backends.cuda.candidates  backends.cuda.hopper_text  backends.cuda.trial  backends.cuda.pattern_text
    backends.cuda.hopper_candidates
    backends.cuda.text  backends.cuda.hopper  backends.cuda.pattern_plan  backends.cuda.pattern_rows
    backends.cuda.dynamic
    backends.cuda.matrix  backends.cuda.hopper_count
    backends.cuda.hopper_tiles
    backends.cuda.plan  backends.cuda.hopper_packing  backends.cuda.hopper_turn
    backends.cuda.count
    backends.cuda.hopper_schedule  backends.cuda.hopper_shape
    backends.cuda.packing  backends.cuda.stream  backends.cuda.split  backends.cuda.pit
    backends.mlir.candidates  backends.mlir.text
    backends.mlir.plan  backends.c
    backends.c.pattern_text
    backends.c.candidates  backends.c.text
    backends.c.dynamic  backends.c.vector_text
    backends.c.matrix_candidates  backends.c.tiling  backends.c.levels  backends.c.features
    backends.c.covers
    build  tune  backends.c.plan  backends.mlir.lower  backends.c.pattern_plan
    backends.c.layout  backends.c.count_matrix  backends.c.matrix_text
    backends.c.matrix
    backends.c.packing
    backends.c.products  backends.c.tiles
    objects
    emit  cost  backends.c.count
    verify  model
    tracks
    loading
    pit_device  dynamic_device  pattern_device
    device  pattern_kernel  dynamic  pit_kernel
    exam  instance  device_memory
    kernel  plan  files  picture
    valued
    described
    artifact  shortcut
    arguments
    selection  onnx_graph
    problem  pattern_problem  occupancy  cover  quantize  stack  even
    pattern  prune
    canonical  manifest  trampoline  sparsity
    folder
    store  llvm  gpus  gpu_clock
    pit
    operators  epilogues  targets  foreign  integrity
    calibration  strides  bindings  device_arrays  scratches  nvcc  nvrtc  driver  backends.mlir.formula
    dtypes  _paths  clock  verdict  workspaces
    errors  machine
"""
RANK = {name: -floor for floor, line in enumerate(FLOORS.split("\n")) for name in line.split()}
ROOMS = ("cli", "bench", "integrations")  # their own files may import each other, but not in a circle

# What a machine needs that only loads and calls; it has no compiler and no templates.
DEPLOY = [
    "model", "loading", "device", "device_arrays", "device_memory", "workspaces", "scratches",
    "dynamic", "dynamic_device", "even", "kernel",
    "valued", "described", "pattern_problem", "pattern_kernel", "arguments", "strides", "problem", "quantize",
    "pit_kernel", "selection", "pit", "shortcut", "stack", "pattern", "canonical", "foreign", "artifact", "manifest",
    "folder", "pit_device", "pattern_device", "trampoline", "store", "integrity", "dtypes", "operators", "epilogues",
    "errors", "verdict", "machine", "_paths",
]  # fmt: skip
WORKSHOP = {
    "api", "attention", "pattern_compile", "advice", "build", "choose", "clock", "calibration", "cover", "emit", "nvcc",
    "nvrtc", "gpus", "gpu_clock", "tracks", "package", "plan", "cost", "occupancy", "tune", "backends", "bench", "cli",
    "jinja2", "assemble",
    "shapes", "integrations",
}  # fmt: skip

ON_USE = {
    "torch", "ml_dtypes", "jinja2", "safetensors", "scipy", "matplotlib", "click", "rich", "archspec", "threadpoolctl",
    "mlir", "torch_mlir", "llvmlite", "onnx", "onnxruntime", "jax", "jax_tvm_ffi", "tvm_ffi",
}  # fmt: skip
AT_ONCE = {
    "cli": {"click", "rich"},
    "__main__": {"click", "rich"},
    "bench": {"scipy"},
    "integrations": {"torch", "jax"},
}

LONG = {  # more lines than the house allows, and why
    "bsrgen/api.py": "compile and what its many arguments mean",
    "bsrgen/pattern.py": "Pattern, Weight and the two ways to make one, which share the checks",
    "bsrgen/store.py": "one protocol: rename, locks, ledger and eviction share its folders and its errors",
}


@dataclass(frozen=True)
class Import:
    """`module` in full, the line, and whether it is imported in a call and not at once."""

    module: str
    line: int
    late: bool


def name_of(path: Path) -> str:
    """bsrgen/backends/c/plan.py -> backends.c.plan; the package itself is __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> list[Import]:
    """All imports that can run: not those under `if TYPE_CHECKING:`, and not the constant `__version__`."""
    return list(_imports(ast.parse(MODULES[module].read_text()), late=False))


def _imports(node: ast.AST, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            for name in (alias.name for alias in child.names if alias.name != "__version__"):
                assert child.level == 0, f"line {child.lineno}: imports name the module in full"
                module = f"{child.module}.{name}"
                yield Import(
                    module if module.removeprefix("bsrgen.") in MODULES else str(child.module), child.lineno, late
                )
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _imports(child, late or isinstance(child, ast.FunctionDef | ast.Lambda))


def own(module: str) -> list[tuple[str, int]]:
    """bsrgen's own modules that `module` imports, and the lines."""
    found = [item for item in imports(module) if item.module.split(".")[0] == "bsrgen"]
    return [(item.module.removeprefix("bsrgen").removeprefix(".") or "__init__", item.line) for item in found]


def room_of(module: str) -> str:
    """The row of FLOORS that stands for `module`."""
    return next((room for room in ROOMS if module.split(".")[0] == room), module)


@pytest.mark.parametrize("module", MODULES)
def test_every_import_goes_down(module: str) -> None:
    room = room_of(module)
    assert room in RANK, f"{module} has no floor: give it one in FLOORS"
    for target, line in own(module):
        below = room_of(target)
        assert below in RANK, f"{target} has no floor: give it one in FLOORS"
        down = RANK[below] < RANK[room] or room == below in ROOMS
        assert down, f"{MODULES[module]}:{line}: {module} imports {target}, which is not below it"


def test_floors_name_what_exists() -> None:
    assert set(RANK) == {room_of(module) for module in MODULES}


def test_what_decides_about_an_artifact_is_in_its_key() -> None:
    """All that compile imports, by whatever way, is in the digest of the generator."""
    todo, reached = ["api"], set()
    while todo:
        reached.add(module := todo.pop())
        todo += [target for target, _ in own(module) if target not in reached]
    assert {m for m in reached if _LOOKS & set(MODULES[m].relative_to(PACKAGE).parts)} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_within_a_room(room: str) -> None:
    inside = [module for module in MODULES if room_of(module) == room]
    left = {module: {target for target, _ in own(module)} & set(inside) - {module, room} for module in inside}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"imports in a circle: {left}"


@pytest.mark.parametrize("module", DEPLOY)
def test_deployment_needs_no_workshop(module: str) -> None:
    for item in imports(module):
        assert item.module.removeprefix("bsrgen.").split(".")[0] not in WORKSHOP, f"{module}:{item.line}: {item.module}"
    for target, line in own(module):
        assert target in DEPLOY, f"{module}:{line}: {target} would be deployed with it"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_on_use(module: str) -> None:
    allowed = AT_ONCE.get(room_of(module), set())
    for item in imports(module):
        package = item.module.split(".")[0]
        assert item.late or package not in ON_USE - allowed, f"{MODULES[module]}:{item.line}: import it in the function"


def test_records_are_decoded_by_decoders_of_their_module() -> None:
    """msgspec 0.22 looks at the fields of a Struct when it first decodes one: threads that do so together read a
    half-made table (12 of 60 processes of 8 threads crashed)."""
    late = re.compile(r"json\.decode\([^\n]*type=(?!dict\b|str\b)")
    assert [module for module, path in MODULES.items() if late.search(path.read_text())] == []


def test_files_are_short() -> None:
    limits = [(300, PACKAGE.rglob("*.py")), (150, (REPOSITORY / "templates").rglob("*.j2"))]
    long = {}
    for limit, paths in limits:
        for path in paths:
            if (count := len(path.read_text().splitlines())) > limit:
                long[path.relative_to(REPOSITORY).as_posix()] = f"{count} lines, {limit} allowed"
    assert {name: said for name, said in long.items() if name not in LONG} == {}
    assert LONG.keys() <= long.keys(), "an excuse that is not needed any more"


def test_functions_are_short() -> None:
    """At most 40 lines of body; signature and docstring do not count."""
    long = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[min(ast.get_docstring(node) is not None, len(node.body) - 1)]
                count = (node.end_lineno or 0) - first.lineno + 1
                if count > 40:
                    long.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {node.name} has {count} lines")
    assert not long
