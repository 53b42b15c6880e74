"""What lies beside the library in an artifact: manifest, pattern, pkg-config, CMake and a C example."""

from pathlib import Path
from typing import Any

import numpy as np

from bsrgen import __version__
from bsrgen.artifact import ABI, SCHEMA, CostRecord, LevelRecord, Manifest, OperandRecord, ValuesRecord
from bsrgen.build import COMPILE_FLAGS, Compiler
from bsrgen.cost import Cost, estimate
from bsrgen.emit import Source, render
from bsrgen.kernel import OPERANDS_FILE, PATTERN_FILE
from bsrgen.pattern import Weight
from bsrgen.tune import PLANNED_N, verdict


def describe(
    source: Source,
    weight: Weight,
    compiler: Compiler,
    measured_s: float | None,
    tuning: tuple[str, ...],
    folder: Path,
    bound: dict[str, np.ndarray[Any, Any]],
) -> Manifest:
    """Write the companions of the built library into `folder` and return the manifest, its file list still empty."""
    problem, p = source.plans[0].problem, weight.pattern
    np.savez(folder / PATTERN_FILE, indptr=p.indptr, indices=p.indices)
    if bound:
        np.savez(folder / OPERANDS_FILE, **bound)  # type: ignore[arg-type]
    for template, name in (("package.pc.j2", f"{source.name}.pc"), ("package.cmake.j2", f"{source.name}Config.cmake")):
        (folder / name).write_text(render(f"c/{template}", name=source.name, version=__version__))
    (folder / "example.c").write_text(render("c/example.c.j2", a=source.entry))
    cost = estimate(source.plans[0], problem.n or PLANNED_N)
    library = (folder / f"lib{source.name}.so").read_bytes()
    levels = tuple(
        LevelRecord(plan.target.name, plan.target.requires, str(plan), plan.knobs(), _values(folder, file, library))
        for plan, file in zip(source.plans, source.values, strict=True)
    )
    return Manifest(
        schema=SCHEMA, abi=ABI, bsrgen=__version__, name=source.name, operator=problem.operator.name,
        shape=p.shape, blocksize=p.blocksize, nnzb=p.nnzb, dtype=problem.dtype.name, out_dtype=problem.dtype.name,
        epilogue=tuple(step.name for step in problem.epilogue),
        operands=tuple(
            OperandRecord(o.name, o.kind, _json_number(o.default)) for o in problem.operands if o.kind != "out"
        ),
        pattern=p.digest, weight=weight.digest, family=source.plans[0].target.family, levels=levels,
        prototype=source.prototype, compiler=compiler.identity, flags=COMPILE_FLAGS,
        cost=CostRecord(cost.n, cost.flop, cost.bytes, cost.seconds, cost.dense_seconds, measured_s),
        verdict=_verdict(cost, weight, measured_s), check=None, tuning=tuning, notes=weight.notes,
        bound=tuple(sorted(bound)),
        files={f"lib{source.name}.so": "", **dict.fromkeys(source.values, "")},
    )  # fmt: skip


def _verdict(cost: Cost, weight: Weight, measured_s: float | None) -> str:
    return verdict(cost, weight.pattern.density, measured_s)


def _values(folder: Path, file: str, library: bytes) -> ValuesRecord:
    """Where the bytes of `file` lie in the library: .rodata is copied as it is, 64-byte aligned."""
    data = (folder / file).read_bytes()
    at = library.find(data) if data else 0
    while at >= 0 and at % 64:
        at = library.find(data, at + 1)
    assert at >= 0, f"{file} is not in the library"
    return ValuesRecord(file, at, len(data))


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or np.isfinite(value) else str(value)
