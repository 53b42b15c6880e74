"""Compile a product at a block pattern: plan, text, library, check and manifest, from the store or built into it."""

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bsrgen import build, package
from bsrgen.artifact import Artifact, as_checked, write_manifest
from bsrgen.backends.c.pattern_plan import plan_pattern
from bsrgen.backends.c.pattern_text import emit_pattern
from bsrgen.cost import dense_flop_per_cycle
from bsrgen.errors import IncompatibleCPUError
from bsrgen.exam import error_share, require
from bsrgen.manifest import MASK_FILE, CheckRecord, CostRecord, Manifest
from bsrgen.pattern import Weight
from bsrgen.pattern_kernel import PatternKernel
from bsrgen.pattern_problem import PatternProblem
from bsrgen.plan import Plan
from bsrgen.store import Store
from bsrgen.targets import Target, native
from bsrgen.tune import PLANNED_N
from bsrgen.verdict import Verdict

MOST_FLOP = 1 << 26  # of the check: of larger ones a part of N is not worth waiting for


def compile_pattern(
    problem: PatternProblem, targets: tuple[Target, ...], generator: str, threads: int | None
) -> PatternKernel:
    """The kernel of `problem`; `generator` is the digest of this package's text.  BuildError, StoreError."""
    compiler = build.find_compiler(targets[0])
    masks = (problem.mask.kinds, problem.mask.bits) if problem.mask else ()
    request = {
        "bsrgen": generator, "problem": [str(problem), problem.pattern.digest, problem.dtype.name, problem.n],
        "mask": [hashlib.sha256(a.tobytes()).hexdigest() for a in masks],
        "targets": [asdict(target) for target in targets],
        "compiler": [compiler.identity, build.COMPILE_FLAGS, build.LINK_FLAGS],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    folder = Store.default().publish(key, functools.partial(_make, problem, targets, compiler))
    artifact = as_checked(folder)
    return PatternKernel(artifact, threads=threads, may_be_foreign=True)


def _make(problem: PatternProblem, targets: tuple[Target, ...], compiler: build.Compiler, folder: Path) -> None:
    """Build, check and describe one artifact in `folder`."""
    source = emit_pattern(tuple(plan_pattern(problem, target) for target in targets))
    build.build(source, folder, compiler)
    if problem.mask:
        np.savez(folder / MASK_FILE, kinds=problem.mask.kinds, bits=problem.mask.bits)
    p = problem.pattern
    nothing = Weight(p, np.zeros((p.nnzb, *p.blocksize), np.int8))
    manifest = package.describe(source, nothing, compiler, (), folder, {})
    cost, verdict = _against_dense(manifest, source.plans[0])
    manifest = msgspec.structs.replace(manifest, head=problem.head, cost=cost, verdict=verdict)
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
    """Run the new kernel on random arrays against the float64 reference.  None where this CPU cannot run it."""
    if artifact.manifest.family != native().family:
        return None
    try:
        kernel = PatternKernel(artifact, threads=1)
    except IncompatibleCPUError:
        return None
    rng, shares, numbers = np.random.default_rng(0), [], dict[str, Any](problem.numbers)
    ns = (1,) if problem.operator.headed else (3,) if problem.flop(35) > MOST_FLOP else (3, 35)
    for n in ns:
        arrays = problem.sample(rng, n)
        expected, bound = problem.reference(arrays, numbers.get("scale", 1.0))
        y = kernel(*arrays, threads=1, **numbers)
        shares.append((error_share(y, expected, bound), n))
    share, n = max(shares)
    require(share, n, artifact.manifest)
    return CheckRecord(ns, share)
