"""compile(...): all stages in one call."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import DTypeLike

from bsrgen import __version__, advice, build, package
from bsrgen import tune as tuning
from bsrgen._paths import RUNTIME, TEMPLATES
from bsrgen.arguments import bind, default_threads
from bsrgen.artifact import Artifact, write_manifest
from bsrgen.backends import BACKENDS, Backend
from bsrgen.dtypes import as_dtype
from bsrgen.epilogues import as_epilogues
from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    BuildError,
    IncompatibleCPUError,
    UnsupportedError,
)
from bsrgen.integrity import MANIFEST
from bsrgen.kernel import Kernel
from bsrgen.manifest import ABI, CheckRecord, parse_manifest
from bsrgen.operators import as_operator
from bsrgen.pattern import Weight, as_weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem
from bsrgen.store import Store
from bsrgen.targets import Target, as_targets, native
from bsrgen.trampoline import trampoline
from bsrgen.verify import error_share

CHECK_N = (3, 35)  # tokens of the check: fewer than a vector, and two vectors with a rest
CHECK_ELEMENTS = 1 << 26  # most of X or Y in the check: a matrix of millions of columns is checked with fewer tokens


def compile(
    W: Any,
    operator: str = "linear",
    blocksize: tuple[int, int] | None = None,
    dtype: DTypeLike = "float32",
    out_dtype: DTypeLike | None = None,
    epilogue: str | Sequence[str] = (),
    mode: str = "static",
    backend: str = "auto",
    target: str | tuple[str, ...] = "native",
    n: int | None = None,
    threads: int | None = None,
    tune: Literal["off", "model", "measure"] = "model",
    strict: bool = False,
    *,
    shape: tuple[int, int] | None = None,
    **operands: Any,
) -> Kernel:
    """The kernel of one fixed block-sparse weight W [M, K].

    W: scipy sparse array or matrix, 2-D ndarray, torch sparse_bsr / sparse_csr / dense tensor, bsrgen Weight, or the
        triple (data, indices, indptr) with shape=.  What is not BSR needs blocksize=(R, C); BSR is re-blocked by it.
    operator: "linear", Y[N, M] = X[N, K] @ W.T, or "spmm", Y[M, N] = W @ X[K, N]; all row-major, N free at each call.
    dtype: type of W, X and Y, sums included: "float32" or "float64".  out_dtype: the same.
    epilogue: steps applied to the sums in this order, rows of bsrgen.epilogues; their operands come with the call, or
        here by name (bias=b): converted to dtype like W, they become defaults of the kernel and of its artifact.
    target: "native", an ISA level or microarchitecture, or several for one library that picks at run time.
    n, threads: hints.  n is the number of tokens to plan for (128); threads the default of calls, None all cores.
    tune: "off" takes the first legal plan, "model" the one the cost model likes best, "measure" times the best few.
    strict: an absent block contributes nothing even where X holds Inf or NaN.  False allows plans that multiply absent
        blocks as zeros where that is faster: in finite X the results are the same but for the order of sums.

    The artifact is kept in the store (README, "The store"); the same request loads it from there.
    Errors: ArgumentError, ArgumentTypeError, PatternError, UnsupportedError, BuildError, StoreError.
    """
    chosen = _backend(backend, mode)
    if dtype is None:
        raise ArgumentTypeError("dtype=None: 'float32' or 'float64'")
    element = as_dtype(dtype)
    if out_dtype is not None and as_dtype(out_dtype) != element:
        raise UnsupportedError(
            f"out_dtype={out_dtype!r} with dtype={element.name!r}: {element.name} kernels write {element.name}"
        )
    if tune not in ("off", "model", "measure"):
        raise ArgumentError(f"tune={tune!r}: one of 'off', 'model', 'measure'")
    if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
        raise ArgumentError(f"n={n!r}: a number of tokens from 1 up, or None")
    default_threads(threads)
    row = as_operator(operator)
    steps = as_epilogues(epilogue)
    targets = as_targets(target)
    weight = as_weight(W, blocksize=blocksize, shape=shape, dtype=element.numpy)
    problem = Problem(row, weight.pattern, element, steps, None if n is None else int(n))
    bound = bind(problem, operands)
    artifact = _artifact(chosen, problem, weight, targets, tune, bool(strict), bound)
    return Kernel(artifact, threads=threads, may_be_foreign=True)


def _backend(name: str, mode: str) -> Backend:
    if mode != "static":
        raise UnsupportedError(f"mode={mode!r}: 'static' is what this version has")
    if name != "auto" and (not isinstance(name, str) or name not in BACKENDS):
        raise UnsupportedError(f"backend={name!r}: 'auto' or one of {', '.join(BACKENDS)}")
    return BACKENDS["c" if name == "auto" else name]


def _artifact(
    backend: Backend, problem: Problem, weight: Weight, targets: tuple[Target, ...], tune: str, strict: bool,
    bound: dict[str, Any],
) -> Artifact:  # fmt: skip
    """From the store, or built into it."""
    compiler = build.find_compiler(targets[0])
    key = _key(problem, weight, targets, tune, strict, compiler, bound)
    store = Store.default()
    folder = store.get(key)
    _prepare_calls()
    if folder is not None:
        with suppress(FileNotFoundError):  # evicted by another process since it was checked: build it again
            return _parsed(folder)
    return _parsed(
        store.publish(key, lambda temp: _make(temp, backend, problem, weight, targets, tune, strict, compiler, bound))
    )


def _parsed(folder: Path) -> Artifact:
    """The artifact in a folder that the store has just checked."""
    return Artifact(folder, parse_manifest((folder / MANIFEST).read_bytes(), folder))


@functools.cache  # trying once in a process is enough
def _prepare_calls() -> None:
    """The extension for fast calls, built once; without Python.h calls take cffi's ABI mode."""
    if trampoline().mode != "api" and os.environ.get("BSRGEN_DISABLE_JIT") != "1":
        with suppress(BuildError):
            build.build_trampoline()
            trampoline.cache_clear()


def _key(
    problem: Problem, weight: Weight, targets: tuple[Target, ...], tune: str, strict: bool, compiler: build.Compiler,
    bound: dict[str, Any],
) -> str:  # fmt: skip
    """Everything that can change a byte of the artifact, or the choice of its plan."""
    request = {
        "bsrgen": [__version__, ABI, _own_digest()],
        "problem": [problem.operator.name, problem.dtype.name, [step.name for step in problem.epilogue], problem.n],
        "weight": weight.digest,
        "notes": weight.notes,
        "bound": {name: [array.shape, hashlib.sha256(array.tobytes()).hexdigest()] for name, array in bound.items()},
        "targets": [asdict(target) for target in targets],
        "tune": tune,
        "strict": strict,
        "compiler": [compiler.identity, build.COMPILE_FLAGS, build.LINK_FLAGS],
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


_LOOKS = {"cli", "bench", "verify.py"}  # parts of the package that only look at artifacts


@functools.cache
def _own_digest() -> str:
    """Digest of this package's own text: another generator gives another artifact."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parent, TEMPLATES, RUNTIME):
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".j2", ".h", ".c") and not _LOOKS & set(path.relative_to(root).parts):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _make(
    folder: Path, backend: Backend, problem: Problem, weight: Weight, targets: tuple[Target, ...], tune: str,
    strict: bool, compiler: build.Compiler, bound: dict[str, Any],
) -> None:  # fmt: skip
    """Build, check and describe one artifact in `folder`."""
    plans, notes, timings = [], [], []
    for target in targets:
        plan, figures, times = _choose(backend, problem, weight, target, tune, strict, compiler)
        plans.append(plan)
        notes += figures
        timings.append(times)
    measured = next((times[0].seconds for times in timings if times), None)
    source = backend.emit(tuple(plans), weight)
    build.build(source, folder, compiler)
    manifest = package.describe(source, weight, compiler, measured, tuple(notes), folder, bound)
    clock = [min((t.seconds for t in timings[0] if t.plan.dense == dense), default=None) for dense in (False, True)]
    verdict = advice.judge(backend, plans[0], weight, *clock)
    manifest = msgspec.structs.replace(manifest, verdict=verdict, strict=strict)
    check = _check(write_manifest(folder, manifest), problem, weight)
    if check is not None:
        write_manifest(folder, msgspec.structs.replace(manifest, check=check))


def _choose(
    backend: Backend, problem: Problem, weight: Weight, target: Target, tune: str, strict: bool,
    compiler: build.Compiler,
) -> tuple[Plan, list[str], list[tuning.Timing]]:  # fmt: skip
    """The plan for one target, the figures of the tuning, and what the clock said, the winner first."""
    plans = [plan for plan in backend.candidates(problem, target) if not (strict and plan.zero_filled)]
    if not plans:
        raise UnsupportedError(f"{problem}: no plan of backend 'c' for {target.name}")
    if tune == "off":
        return plans[0], [], []
    ranked = [plan for _, plan in tuning.rank(plans, problem.n)]
    runs_here = target.family == native().family and set(target.requires) <= set(native().requires)
    if tune == "model" or not runs_here:
        return ranked[0], [], []

    rng = np.random.default_rng(0)
    n = problem.n or tuning.PLANNED_N
    x, given = problem.sample(rng, n)

    def make(plan: Plan, folder: Path) -> Any:
        source = backend.emit((plan,), weight)
        build.build(source, folder, compiler)
        artifact = write_manifest(folder, package.describe(source, weight, compiler, None, (), folder, {}))
        kernel = Kernel(artifact, threads=1)
        out = np.zeros(problem.operator.shape(n, problem.pattern.M), problem.dtype.numpy)
        return functools.partial(kernel, x, out=out, **given)

    timings = tuning.measure(ranked[: tuning.TOP], make)
    figures = [f"n={n} {timing.seconds * 1e6:.2f} us  {timing.plan}" for timing in timings]
    return timings[0].plan, figures, timings


def _check(artifact: Artifact, problem: Problem, weight: Weight) -> CheckRecord | None:
    """Run the new kernel on random data against the float64 reference.  None where this CPU cannot run it."""
    if artifact.manifest.family != native().family:
        return None
    try:
        kernel = Kernel(artifact, threads=1)
    except IncompatibleCPUError:
        return None
    rng, worst = np.random.default_rng(0), 0.0
    most = max(CHECK_ELEMENTS // max(*problem.pattern.shape, 1), 1)
    tokens = tuple(dict.fromkeys(min(n, most) for n in CHECK_N))
    for n in tokens:
        x, given = problem.sample(rng, n)
        old = rng.standard_normal(problem.operator.shape(n, problem.pattern.M)).astype(problem.dtype.numpy)
        expected, bound = problem.reference(weight, x, given, old)
        share = error_share(kernel(x, out=old, **given), expected, bound)
        if share > 1:
            raise BuildError(
                f"{kernel.name}: the kernel differs from float64 by {share:.3g} times its bound at n = {n}: "
                f"the compiler or bsrgen is at fault ({artifact.manifest.compiler}); please report it"
            )
        worst = max(worst, share)
    return CheckRecord(tokens, worst)
