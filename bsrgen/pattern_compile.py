"""Compile a product at a block pattern: plan, text, library, check and manifest, from the store or built into it."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bsrgen import build, nvcc, package
from bsrgen.artifact import Artifact, as_checked, write_manifest
from bsrgen.backends import c, cuda
from bsrgen.cost import dense_flop_per_cycle
from bsrgen.emit import Source
from bsrgen.errors import IncompatibleCPUError
from bsrgen.exam import error_share, require
from bsrgen.gpus import GpuTarget
from bsrgen.loading import kernel_of
from bsrgen.manifest import MASK_FILE, CheckRecord, CostRecord, Manifest
from bsrgen.pattern import Weight
from bsrgen.pattern_kernel import OfPattern
from bsrgen.pattern_problem import PatternProblem
from bsrgen.plan import Plan
from bsrgen.store import Store
from bsrgen.targets import Target, native
from bsrgen.tracks import UNCHECKED, CpuTrack, Track, gpu_of, sampled, track_of
from bsrgen.tune import PLANNED_N
from bsrgen.verdict import Verdict

MOST_FLOP = 1 << 26  # of the check: of larger ones a part of N is not worth waiting for


@dataclass(frozen=True, slots=True)
class PatternBackend:
    """One plan a target, to text.  `tools` names what beside the compiler makes equal sources equal bytes."""

    plan: Callable[[PatternProblem, Any], Plan]
    emit: Callable[[tuple[Any, ...]], Source]
    tools: Callable[[], str] = lambda: ""


PATTERN_BACKENDS = {
    "c": PatternBackend(c.plan_pattern, c.emit_pattern),
    "cuda": PatternBackend(cuda.plan_pattern, cuda.emit_pattern, lambda: nvcc.identity()),
}


def compile_pattern(
    problem: PatternProblem, targets: tuple[Target, ...], generator: str, threads: int | None
) -> OfPattern:
    """The kernel of `problem`; `generator` is the digest of this package's text.  BuildError, StoreError."""
    backend = PATTERN_BACKENDS["cuda" if isinstance(targets[0], GpuTarget) else "c"]
    compiler, tools = build.find_compiler(targets[0]), backend.tools()
    masks = (problem.mask.kinds, problem.mask.bits) if problem.mask else ()
    request = {
        "bsrgen": generator, "problem": [str(problem), problem.pattern.digest, problem.dtype.name, problem.n],
        "mask": [hashlib.sha256(a.tobytes()).hexdigest() for a in masks],
        "targets": [asdict(target) for target in targets],
        "compiler": [compiler.identity, tools, build.COMPILE_FLAGS, build.LINK_FLAGS],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    folder = Store.default().publish(key, functools.partial(_make, problem, targets, backend, compiler))
    kernel = kernel_of(as_checked(folder), threads=threads, may_be_foreign=True)
    assert isinstance(kernel, OfPattern)
    return kernel


def _make(
    problem: PatternProblem, targets: tuple[Target, ...], backend: PatternBackend, compiler: build.Compiler,
    folder: Path,
) -> None:  # fmt: skip
    """Build, check and describe one artifact in `folder`."""
    source = backend.emit(tuple(backend.plan(problem, target) for target in targets))
    source = replace(source, tools=backend.tools())
    build.build(source, folder, compiler)
    if problem.mask:
        np.savez(folder / MASK_FILE, kinds=problem.mask.kinds, bits=problem.mask.bits)
    p = problem.pattern
    nothing = Weight(p, np.zeros((p.nnzb, *p.blocksize), np.int8))
    manifest = package.describe(source, nothing, compiler, (), folder, {})
    cost, verdict = _against_dense(manifest, source.plans[0])
    notes = (
        *manifest.notes,
        *([UNCHECKED] if isinstance(targets[0], GpuTarget) and track_of(targets[0]) is None else []),
    )
    manifest = msgspec.structs.replace(manifest, head=problem.head, cost=cost, verdict=verdict, notes=notes)
    check = _check(write_manifest(folder, manifest), problem)
    if check is not None:
        write_manifest(folder, msgspec.structs.replace(manifest, check=check))


def _against_dense(manifest: Manifest, plan: Plan) -> tuple[CostRecord, Verdict]:
    """What the model expects of all elements at the rate of dense products, and what follows."""
    s, cost, p = plan.problem, manifest.cost, plan.problem.pattern
    flop = s.flop(cost.n) * p.M * p.K / max(p.nnz, 1)
    dense = flop / dense_flop_per_cycle(s, plan.target, PLANNED_N) / (plan.target.ghz * 1e9) + plan.target.call_s
    verdict = Verdict(cost.n, p.density, "sparse", cost.seconds, None, cost.seconds, None, dense, None)
    return msgspec.structs.replace(cost, dense_seconds=dense), verdict


def _check(artifact: Artifact, problem: PatternProblem) -> CheckRecord | None:
    """Run the new kernel on random arrays against the float64 reference.  None where nothing here can run it."""
    m = artifact.manifest
    track: Track | None = CpuTrack() if m.device == "cpu" else gpu_of(m.levels[0].requires)
    if m.family != native().family or track is None:
        return None
    try:
        kernel = kernel_of(artifact, threads=1)
    except IncompatibleCPUError:
        return None
    rng, shares, numbers = np.random.default_rng(0), [], dict[str, Any](problem.numbers)
    ns = (1,) if problem.operator.headed else (3,) if problem.flop(35) > MOST_FLOP else (3, 35)
    with track.entered():
        for n in ns:
            arrays = problem.sample(rng, n)
            expected, bound = problem.reference(arrays, numbers.get("scale", 1.0))
            y = kernel(*arrays, **numbers) if m.device == "cpu" else sampled(kernel, arrays, expected.shape, numbers)
            shares.append((error_share(y, expected, bound), n))
    share, n = max(shares)
    require(share, n, artifact.manifest)
    return CheckRecord(ns, share)
