"""compile(...): all stages in one call."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from numpy.typing import DTypeLike

from bsrgen import __version__, advice, build, package
from bsrgen._paths import RUNTIME, TEMPLATES
from bsrgen.arguments import bind, default_threads
from bsrgen.artifact import Artifact, as_checked, write_manifest
from bsrgen.backends import Backend, backend_of
from bsrgen.choose import Tuning, as_tuning, choose
from bsrgen.dtypes import DTYPES, INT8, as_types
from bsrgen.epilogues import as_epilogues, pair_of
from bsrgen.errors import ArgumentTypeError, IncompatibleCPUError, UnsupportedError
from bsrgen.even import sample_of
from bsrgen.exam import Exam, affordable, require
from bsrgen.foreign import count
from bsrgen.given import Given
from bsrgen.kernel import Kernel
from bsrgen.loading import kernel_of
from bsrgen.manifest import ABI, CheckRecord
from bsrgen.operators import as_operator
from bsrgen.pattern import Weight
from bsrgen.pattern_compile import compile_pattern
from bsrgen.pattern_problem import PRODUCTS, as_pattern_problem, refuse_values
from bsrgen.problem import Problem, as_problem
from bsrgen.quantize import quantized
from bsrgen.store import Store
from bsrgen.targets import Target, native
from bsrgen.tracks import UNCHECKED, CpuTrack, Track, gpu_of, track_of

NOT_RACED = "tune='measure' without a GPU that runs it: the model chose"
CHECK_N = (3, 35)  # tokens of the check: fewer than a vector, and two vectors with a rest


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
    transposed: bool = False,
    axis: str | None = None,
    mask_block: tuple[int, int] | None = None,
    x_dtype: DTypeLike | None = None,
    quantize_x: bool = False,
    shape: tuple[int, int] | None = None,
    max_blocks: int | None = None,
    tune_seconds: float | None = None,
    executor: Executor | None = None,
    progress: Callable[[float], object] | None = None,
    **operands: Any,
) -> Kernel:
    """The kernel of one fixed block-sparse weight W [M, K].

    W: scipy sparse array or matrix, 2-D ndarray, torch sparse_bsr / sparse_csr / dense tensor, bsrgen Weight, or the
        triple (data, indices, indptr) with shape=.  What is not BSR needs blocksize=(R, C); BSR is re-blocked by it.
        A list of weights that share X makes one kernel of all: its results come as a tuple, views of one array of all
        rows (what `out` and operands are like), or with the epilogue "swiglu" or "geglu" [gate, up] make one,
        act(X @ gate.T) * (X @ up.T).
    operator: "linear", Y[N, M] = X[N, K] @ W.T, or "spmm", Y[M, N] = W @ X[K, N]; all row-major, N free at each call.
        Of a pattern, W's or a Pattern, for k(a, b) (see PatternKernel): "sddmm", data[nnzb, R, C] = A[M, N] @ B[K, N].T
        at the stored blocks, the gradient of spmm's weight; "linear_grad", that of linear's, A[N, M].T @ B[N, K]; and
        "softmax" of such data by rows.  dtype is that of the arrays, the result has that of the sums; epilogues of
        products "scale" and "accumulate"; backend "c" or "cuda" (PatternDeviceKernel); no tuning.
    transposed: the product with W.T, where W is given, and later updated, as it is: Y[N, K] = X[N, M] @ W, or of
        "spmm" Y[K, N] = W.T @ X[M, N].  All else, the kernel's shape and pattern, scales and operands, is that of W.T.
        Of a list of weights, X holds what is multiplied with each, side by side, and the result is their sum.
    dtype, x_dtype, out_dtype: types of W as it is stored, of X and of Y, names or numpy dtypes (ml_dtypes.bfloat16):
        W                 X                   Y, the default first
        float32, float64  as W                as W            sums of the same type
        bfloat16          bfloat16, float32   as X, the other one of these two       sums of float32, as all below
        float16           float16             float16, float32
        float16           float32             float32         for few tokens, as all of W shorter than X
        int8              int8                float32, bfloat16, int8                sums of int32, exact
        int8              float32             float32
        int8              bfloat16            bfloat16, float32
        float8_e4m3fn     float8_e4m3fn       bfloat16, float16, float32, float8_e4m3fn    backend "cuda", "sm_90a",
                                              linear alone; scales of W and X are epilogues, "scale" and "token_scale"
        None for x_dtype means dtype.
    int8: symmetric, W[m] stands for w_scale[m] * w[m], w in [-127, 127].  Floating W is quantised,
        w = round(W / w_scale), ties to even, clipped, with w_scale[m] = max |W[m]| / 127 (1 for a row of zeros) or the
        calibrated w_scale= [M] given here.  Integer W is taken as it is, w_scale= or ones with it.  X of int8 stands
        for x_scale * x, Y of int8 for y_scale * y: both come with the call or here as one number (1), see Kernel.
    quantize_x: with W of int8 and X of float32 or bfloat16, the kernel makes int8 of X, each token by its own largest
        magnitude (x_scale[n] = max |X[n]| / 127), and sums in int32.  False multiplies X as it is.
    epilogue: steps applied to the (scaled) sums in this order, rows of bsrgen.epilogues; their operands come with the
        call, or here by name (bias=b): converted like W, to float32 for reduced types, they become defaults of the
        kernel and of its artifact.
    mode: "static", the pattern is in the kernel;
        "dynamic": calls bring the weight, y = k(x, weight), see DynamicKernel, and of backend "cuda"
        DynamicDeviceKernel.  W then gives shape, block shape and the most blocks that one may have, unless max_blocks
        says more; None stands for an empty W, with shape= and blocksize=.  Not by backend "mlir".
        "pit", by backends "c" and "cuda": a dense operand is sparse in each call in another way, along `axis`, and W is
        taken as dense where it has no blocks of its own (no blocksize is needed).  The result is a PitKernel, or a
        PitDeviceKernel:
        axis="tokens"    k(x, live=): only live rows of X are computed
        axis="features"  k(x): only columns of W are read that x is not zero in; always takes W as dense
        axis="experts"   W a list or [E, M, K]; k(x, routing=): each token meets its expert's weight alone
        axis="outputs"   k(x, mask=): only blocks of Y, mask_block=(tokens, features), are computed
        With operator="spmm" tokens are columns of X, by backend "c".
    backend: "c", which "auto" stands for; "mlir", which needs the extra of that name (UnsupportedError without it); or
        "cuda", which needs nvcc, from the extra or elsewhere (CompilerNotFoundError): such kernels take device arrays.
        "mlir" makes them too, for targets of "cuda", with both extras.
    target: "native", an ISA level or microarchitecture, or several for one library that picks at run time.  Where the
        lowest one's plan uses the matrix unit (AMX), x86-64-v4-bf16 is added: the system may refuse that unit.  Of
        "cuda", one or several of sm_75, sm_80, sm_86, sm_89, sm_90, sm_90a; "native" is that of the first GPU here.
    n, threads: hints.  n is the number of tokens to plan for (128); threads the default of calls, None all cores.
    tune: "off" takes the first legal plan, "model" the one the cost model likes best, "measure" times the best few: on
        one core, or on the first GPU here that runs them; without one the model chooses, and a note says so.
    tune_seconds, executor, progress: of tune="measure".  When tune_seconds have passed, no further plan is compiled and
        timing ends; the model's best two for each target are measured in any case.  Any concurrent.futures.Executor
        compiles the plans, None means threads on all cores.  `progress` is told the share done, 0 to 1, unless the
        store has the result.
    strict: an absent block contributes nothing even where X holds Inf or NaN.  False allows plans that multiply absent
        blocks as zeros where that is faster: in finite X the results are the same but for the order of sums.

    The artifact is kept in the store (README, "The store"); the same request loads it from there.
    Errors: ArgumentError (scales that are not positive and finite), ArgumentTypeError, PatternError (W that float16 or
    int8 cannot hold), UnsupportedError (types that do not go together), BuildError, StoreError.
    """
    chosen = backend_of(backend, mode)
    if dtype is None:
        raise ArgumentTypeError(f"dtype=None: one of {', '.join(DTYPES)}")
    w, x, y = as_types(dtype, x_dtype, out_dtype, hopper=chosen.name == "cuda" and mode == "static")
    tuning = as_tuning(tune, tune_seconds, executor, progress, strict)
    n = None if n is None else count("n", n, 1)
    default_threads(threads)
    given = Given(W, blocksize, shape, mode, max_blocks, axis, mask_block, bool(transposed))
    if operator in PRODUCTS:
        refuse_values(
            operator, backend, operands, quantize_x=bool(quantize_x), x_dtype=x_dtype, strict=bool(strict),
            tune=tune if tune == "measure" else "", executor=executor, progress=progress,
        )  # fmt: skip
        of_pattern = as_pattern_problem(operator, given.pattern(operator), dtype, out_dtype, epilogue, n)
        build.prepare_calls()
        return compile_pattern(of_pattern, chosen.targets(target), _own_digest(), threads)
    along = given.along(row := as_operator(operator))
    if along and row.token_axis and chosen.name != "c":
        where = f"mode='pit' with operator {operator!r} and backend {chosen.name!r}"
        raise UnsupportedError(f"{where}: its lists are of rows of X; use operator='linear', or backend='c'")
    paired = pair_of(as_epilogues(epilogue)) is not None
    targets = chosen.targets(target)
    chosen.tools(targets)  # UnsupportedError where something is not installed
    weight, parts, pit = given.weight(w, paired, along, row)
    problem = as_problem(operator, weight.pattern, w, x, y, epilogue, n, bool(quantize_x), pit)
    bound, how = bind(problem, operands), "none"
    if w is INT8:
        known = weight.pattern.known
        how = "given" if "w_scale" in bound else "none" if not known or weight.data.dtype == w.numpy else "max"
        if known:
            weight, bound["w_scale"] = quantized(weight, bound.get("w_scale"))
    what = Bound(bound, how, parts, given.transposed)
    artifact = _artifact(chosen, problem, weight, targets, tuning, what)
    return kernel_of(artifact, threads=threads, may_be_foreign=True)


@dataclass(frozen=True, slots=True)
class Bound:
    """Operands bound to an artifact, where its weight_scale is from, the parts of its Y, and how W comes."""

    arrays: dict[str, Any]
    weight_scale: str
    parts: tuple[int, ...]
    transposed: bool = False


def _artifact(
    backend: Backend, problem: Problem, weight: Weight, targets: tuple[Target, ...], tuning: Tuning,
    bound: Bound,
) -> Artifact:  # fmt: skip
    """From the store, or built into it."""
    compiler = build.find_compiler(targets[0])
    keys = [_key(backend, problem, weight, targets, tune, tuning.strict, compiler, bound) for tune in tuning.keys]
    store = Store.default()
    found = [store.get(key) for key in keys]
    build.prepare_calls()
    for folder in filter(None, found):
        with suppress(FileNotFoundError):  # evicted by another process since it was checked: build it again
            return as_checked(folder)
    make = functools.partial(_make, backend, problem, weight, targets, tuning, compiler, bound)
    artifact = as_checked(store.publish(keys[-1], make))
    if len(keys) > 1 and not artifact.manifest.cut_short:
        copy = functools.partial(shutil.copytree, artifact.folder, dirs_exist_ok=True)
        return as_checked(store.publish(keys[0], copy))
    return artifact


def _key(
    backend: Backend, problem: Problem, weight: Weight, targets: tuple[Target, ...], tune: str, strict: bool,
    compiler: build.Compiler, bound: Bound,
) -> str:  # fmt: skip
    """Everything that can change a byte of the artifact, or the choice of its plan."""
    request = {
        "bsrgen": [__version__, ABI, _own_digest()],
        "backend": [backend.name, backend.tools(targets)],
        "problem": [problem.operator.name, [step.name for step in problem.epilogue], problem.n],
        "types": [row.name for row in (problem.dtype, problem.x_dtype, problem.out_dtype)],
        "pit": str(problem.pit) if problem.pit else "",
        "weight": weight.digest,
        "notes": weight.notes,
        "bound": {
            name: [array.shape, hashlib.sha256(array.tobytes()).hexdigest()] for name, array in bound.arrays.items()
        },
        "weight_scale": bound.weight_scale,
        "parts": bound.parts,
        "transposed": bound.transposed,
        "targets": [asdict(target) for target in targets],
        "tune": [tune, *(_where(target) for target in targets if tune.startswith("measure"))],
        "strict": strict,
        "compiler": [compiler.identity, build.COMPILE_FLAGS, build.LINK_FLAGS],
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _where(target: Target) -> str:
    """Where a race takes its times: those of one GPU, or of none, are not another's."""
    track = track_of(target)
    return "nowhere" if track is None else track.where


_LOOKS = {"cli", "bench", "integrations"}  # parts of the package that only look at artifacts, and use them


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
    backend: Backend, problem: Problem, weight: Weight, targets: tuple[Target, ...], tuning: Tuning,
    compiler: build.Compiler, bound: Bound, folder: Path,
) -> None:  # fmt: skip
    """Build, check and describe one artifact in `folder`."""
    exam = Exam(problem, sample_of(weight), tuple(dict.fromkeys(affordable(problem, n) for n in CHECK_N)))
    choices, tuning = [], tuning.begun()
    for number, target in enumerate(targets):
        step = replace(tuning, progress=functools.partial(_part, tuning.progress, number, len(targets)))
        choices.append(choose(backend, problem, weight, target, step, compiler, exam, folder / "tune"))
    if (lesser := choices[-1].plan.fallback) is not None:
        modelled = replace(tuning, mode="model") if tuning.mode == "measure" else tuning
        with suppress(UnsupportedError):  # the matrix unit has a plan, vectors have none
            choices.append(choose(backend, problem, weight, lesser, modelled, compiler, exam, folder / "tune"))
    plans = tuple(choice.plan for choice in choices)
    source = backend.emit(plans, weight)
    source = replace(source, tools=source.tools or backend.tools(targets))
    build.build(source, folder, compiler)
    records = tuple(record for choice in choices for record in choice.records)
    manifest = package.describe(source, weight, compiler, records, folder, bound.arrays)
    times = [(r.dense, r.measured_seconds) for r in choices[0].records if r.n == manifest.cost.n and r.measured_seconds]
    sparse_s, dense_s = (min((s for d, s in times if d == dense), default=None) for dense in (False, True))
    verdict = advice.judge(backend, plans[0], choices[0].ranked, weight, sparse_s, dense_s)
    notes = manifest.notes
    if manifest.device == "cuda" and track_of(targets[0]) is None:
        notes = (*notes, UNCHECKED, *([NOT_RACED] if tuning.mode == "measure" else []))
    manifest = msgspec.structs.replace(
        manifest, verdict=verdict, strict=tuning.strict, weight_scale=bound.weight_scale, parts=bound.parts,
        transposed=bound.transposed, notes=notes,
    )  # fmt: skip
    check = _check(write_manifest(folder, manifest), exam)
    if check is not None:
        write_manifest(folder, msgspec.structs.replace(manifest, check=check))


def _part(progress: Callable[[float], object], number: int, parts: int, share: float) -> None:
    progress((number + share) / parts)


def _check(artifact: Artifact, exam: Exam) -> CheckRecord | None:
    """Run the new kernel on random data against the float64 reference.  None where nothing here can run it."""
    m = artifact.manifest
    track: Track | None = CpuTrack() if m.device != "cuda" else gpu_of(m.levels[0].requires)
    if m.family != native().family or track is None:
        return None
    try:
        with track.entered():
            share, n = exam.worst(track.load(artifact, exam.weight))
    except IncompatibleCPUError:
        return None
    require(share, n, m)
    return CheckRecord(exam.tokens, share)
