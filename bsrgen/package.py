"""What lies beside the library in an artifact: manifest, pattern, pkg-config, CMake and a C example."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bsrgen import __version__
from bsrgen.build import COMPILE_FLAGS, Compiler
from bsrgen.cost import Cost, estimate
from bsrgen.emit import Source, render
from bsrgen.errors import BuildError
from bsrgen.manifest import (
    ABI,
    OPERANDS_FILE,
    PATTERN_FILE,
    SCHEMA,
    CostRecord,
    LevelRecord,
    Manifest,
    PitRecord,
    TuningRecord,
    ValuesRecord,
    operand_records,
)
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.tune import PLANNED_N
from bsrgen.verdict import Verdict


def describe(
    source: Source,
    weight: Weight,
    compiler: Compiler,
    tuning: tuple[TuningRecord, ...],
    folder: Path,
    bound: dict[str, np.ndarray[Any, Any]],
) -> Manifest:
    """Write the companions of the built library into `folder` and return the manifest, its digests still empty."""
    problem, p = source.plans[0].problem, weight.pattern
    if p.known:
        np.savez(folder / PATTERN_FILE, indptr=p.indptr, indices=p.indices)
    if bound:
        np.savez(folder / OPERANDS_FILE, **bound)  # type: ignore[arg-type]
    for template, name in (("package.pc.j2", f"{source.name}.pc"), ("package.cmake.j2", f"{source.name}Config.cmake")):
        (folder / name).write_text(render(f"c/{template}", name=source.name, version=__version__))
    (folder / "example.c").write_text(render(f"{source.entry['language']}/example.c.j2", a=source.entry))
    cost = estimate(source.plans[0], problem.n or PLANNED_N)
    library = (folder / f"lib{source.name}.so").read_bytes()
    places = _places(source, library, compiler)
    levels = tuple(
        LevelRecord(
            plan.target.name, plan.target.requires, str(plan), plan.knobs(), places.get(file),
            asdict(plan.counts(cost.n)), estimate(plan, cost.n).seconds, _measured(tuning, plan.target.name, cost.n),
        )
        for plan, file in zip(source.plans, source.values, strict=True)
    )  # fmt: skip
    measured_s = levels[0].measured_seconds
    measured_dense_s = _measured(tuning, levels[0].target, cost.n, dense=True)
    return Manifest(
        schema=SCHEMA, abi=ABI, bsrgen=__version__, name=source.name, operator=problem.operator.name,
        shape=p.shape, blocksize=p.blocksize, nnzb=p.nnzb, dtype=problem.dtype.name,
        parts=(), x_dtype=problem.x_dtype.name, out_dtype=problem.out_dtype.name, weight_scale="none",
        epilogue=tuple(step.name for step in problem.epilogue),
        operands=operand_records(problem.operands),
        pit=PitRecord(problem.pit.axis.name, problem.pit.tokens, problem.pit.rows) if problem.pit else None,
        pattern=p.digest, weight=weight.digest, family=source.plans[0].target.host, levels=levels,
        prototype=source.prototype, compiler="; ".join(filter(None, (compiler.identity, source.tools))),
        flags=COMPILE_FLAGS,
        cost=CostRecord(cost.n, cost.flop, cost.bytes, cost.seconds, cost.dense_seconds, measured_s, measured_dense_s),
        verdict=_verdict(source.plans[0], cost, measured_s), mode="static" if p.known else "dynamic",
        strict=False, check=None,
        tuning=tuning, notes=weight.notes, bound=tuple(sorted(bound)),
        files={path.name: "" for path in folder.iterdir()},
        workspace_bytes=source.entry.get("workspace_bytes", 0), workspace_n=source.entry.get("workspace_n", 0),
        scratch=bool(source.entry.get("scratch")),
    )  # fmt: skip


def _verdict(plan: Plan, cost: Cost, measured_s: float | None) -> Verdict:
    """What is known of one plan alone; `compile` puts advice.judge's in its place."""
    density, sparse_s, dense_s = plan.problem.pattern.density, cost.seconds, cost.dense_seconds
    if plan.dense:
        return Verdict(cost.n, density, "dense", cost.seconds, measured_s, sparse_s, None, dense_s, measured_s)
    return Verdict(cost.n, density, "sparse", cost.seconds, measured_s, sparse_s, measured_s, dense_s, None)


def _measured(tuning: tuple[TuningRecord, ...], level: str, n: int, *, dense: bool = False) -> float | None:
    """The best time of a race at n tokens: the winner's, or that of the best plan for the whole matrix."""
    times = [r.measured_seconds for r in tuning if (r.target, r.n) == (level, n) and (r.dense or not dense)]
    return min((seconds for seconds in times if seconds is not None), default=None)


def _places(source: Source, library: bytes, compiler: Compiler) -> dict[str, ValuesRecord]:
    """Where each data file lies in the library: all of them in one piece, in order, on 64-byte lines.

    Only the whole piece is sure to be there once: values may be all zero, or the same on two ISA levels.
    """
    at, starts, whole = 0, {}, bytearray()
    for blob in source.entry["blobs"]:
        whole += bytes(-len(whole) % 64)
        starts[blob["file"]] = len(whole)
        whole += source.files[blob["file"]]
    at = library.find(whole)
    while at >= 0 and at % 64:
        at = library.find(whole, at + 1)
    if at < 0:
        raise BuildError(f"{source.name}: the library does not hold its data: {compiler.path} is at fault")
    return {file: ValuesRecord(file, at + start, len(source.files[file])) for file, start in starts.items()}
