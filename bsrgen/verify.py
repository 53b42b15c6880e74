"""Verify: is this artifact what its manifest says, and does it compute that here?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.arguments import default_threads
from bsrgen.device import DeviceKernel
from bsrgen.errors import ArtifactCorruptError
from bsrgen.even import PlannedPattern, PlannedWeight, sample_of
from bsrgen.exam import Exam, error_share
from bsrgen.kernel import Kernel
from bsrgen.loading import load
from bsrgen.manifest import LevelRecord
from bsrgen.pattern import Weight
from bsrgen.pattern_kernel import OfPattern
from bsrgen.problem import Problem
from bsrgen.tracks import CpuTrack, HostCalls, gpu_of, sampled

Array = NDArray[Any]
CHECK_N = (1, 3, 35, 128)  # one, fewer than a vector, a rest, several tiles
NO_GPU = "not checked: there is no GPU here that runs it"
SAMPLED_N = ((1, 35, 300), (1, 2))  # of products at a pattern; heads of attention


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: `ok` or not, and what was seen."""

    what: str
    ok: bool
    detail: str


def verify(folder: str | Path, *, expect_sha256: str | None = None) -> tuple[Kernel, list[Finding]]:
    """Check the artifact in `folder` and load it: hashes first, then its values, then its results.

    The weight is read back out of every library level and must have the digest of the manifest; then the kernel must
    agree with the float64 reference of that weight on random data, and with itself on any number of threads.
    Errors: ArtifactError and its kin where the folder is damaged or this CPU cannot run it.
    """
    kernel = load(folder, expect_sha256=expect_sha256)
    m = kernel.artifact.manifest
    findings = [Finding("files", True, f"{len(m.files)} files have the sha256 of the manifest")]
    findings.append(Finding("cpu", True, f"runs {kernel.plan.target}; the library holds {_names(m.levels)}"))
    problem = kernel.problem  # raises where pattern.npz is not the manifest's pattern
    findings.append(Finding("pattern", True, str(problem.pattern)))
    if isinstance(kernel, OfPattern):
        return kernel, [*findings, *_sampled(kernel)]
    if isinstance(planned := kernel.pattern, PlannedPattern):
        findings.append(Finding("values", True, "none: they come with the call"))
        return kernel, [*findings, *_checked(kernel, problem, sample_of(PlannedWeight(planned, kernel.dtype)))]
    weights = [recover(kernel, number) for number in range(len(m.levels))]
    same = [weight.digest == m.weight and holds(kernel, i, weight) for i, weight in enumerate(weights)]
    values = f"{kernel.nnz} values in {len(same)} level{'s' * (len(same) > 1)}"
    findings.append(Finding("values", all(same), f"{values}: {'those' if all(same) else 'not those'} of the manifest"))
    return kernel, [*findings, *_checked(kernel, problem, weights[m.levels.index(kernel.plan)])]


def recover(kernel: Kernel, level: int) -> Weight:
    """The weight that an ISA level of the library holds.

    The library's own packing, fed with numbers that name each element, tells where each went; what it has no place for
    lies outside of the matrix and is zero.  Types shorter than 64 bits take several packings to tell a name from what
    else a library may keep there, sums of rows for instance.
    """
    p, dtype = kernel.pattern, kernel.dtype
    stored = _stored(kernel, level).view(dtype)
    digits, base = 8 // dtype.itemsize, _BASES[dtype.itemsize]
    names = np.arange(p.nnz, dtype=np.uint64) * _MIX % np.uint64(base**digits)
    found, known, left = np.zeros(stored.size, np.uint64), np.ones(stored.size, bool), names.copy()
    for digit in range(digits):
        left, now = np.divmod(left, np.uint64(base))
        bits = (now + 1).astype(f"u{dtype.itemsize}")  # 0 is what lies between
        place = kernel.packed(bits.view(dtype).reshape(p.nnzb, *p.blocksize), level).view(bits.dtype)
        known &= (place > 0) & (place <= base)
        found += np.where(known, place - np.uint64(1), 0).astype(np.uint64) * np.uint64(base**digit)
    order = np.argsort(names)
    at = np.searchsorted(names, found, sorter=order)
    known &= at < p.nnz
    element = order[np.where(known, at, 0)] if p.nnz else at
    known[known] = names[element[known]] == found[known]
    data = np.zeros(p.nnz, dtype)
    data[element[known]] = stored[known]
    return Weight(p, data.reshape(p.nnzb, *p.blocksize))


# By bytes of an element: the largest bit pattern that stands for a digit; all are positive, and finite where floating.
_BASES = {1: 0x7F, 2: 0x7BFF, 4: 0x7F7F_FFFF, 8: 2**52}
_MIX = np.uint64(0x9E3779B1)  # a prime, so that names differ; neighbours then differ in every digit


def holds(kernel: Kernel, level: int, weight: Weight) -> bool:
    """Whether a level of the library holds exactly what it makes of `weight`: zeros in between, sums that fit."""
    return np.array_equal(kernel.packed(weight.data, level), _stored(kernel, level))


def _stored(kernel: Kernel, level: int) -> Array:
    """The bytes that a level of the library holds."""
    record = kernel.artifact.manifest.levels[level].values
    assert record is not None, "a dynamic kernel holds no values"
    stored = np.fromfile(kernel.artifact.library, np.uint8, record.bytes, offset=record.offset)
    empty = np.zeros((kernel.pattern.nnzb, *kernel.pattern.blocksize), kernel.dtype)
    if stored.size != kernel.packed(empty, level).size:
        raise ArtifactCorruptError(f"{kernel.artifact}: the values at {record.offset} do not fit the library's packing")
    return stored


def _checked(kernel: Kernel, problem: Problem, weight: Weight) -> list[Finding]:
    """Results of `weight`, on a GPU where the kernel is for one."""
    if not isinstance(kernel, DeviceKernel):
        return _results(kernel, problem, weight)
    if (track := gpu_of(kernel.artifact.manifest.levels[0].requires)) is None:
        return [Finding("results", True, NO_GPU)]
    with track.entered():
        return [_judged(Exam(problem, weight, CHECK_N).worst(HostCalls(kernel, weight))[0], track.where)]


def _results(kernel: Kernel, problem: Problem, weight: Weight) -> list[Finding]:
    rng, worst, same, threads = np.random.default_rng(), 0.0, True, default_threads(None)
    run = kernel.ready(weight)
    for n in CHECK_N:
        x, given = problem.sample(rng, n)
        old = problem.sample_out(rng, n)
        run(x, out=(one := old.copy()), threads=1, **given)
        worst = max(worst, error_share(one, *problem.reference(weight, x, given, old)))
        run(x, out=(other := old.copy()), threads=threads, **given)
        same &= other.tobytes() == one.tobytes()
    return [
        _judged(worst),
        Finding("threads", same, f"1 and {threads} threads give {'equal' if same else 'different'} bits"),
    ]


def _judged(worst: float, where: str = "") -> Finding:
    ns = ", ".join(map(str, CHECK_N))
    said = f"largest error {100 * worst:.2g} % of the float64 bound at n = {ns}"
    return Finding("results", worst <= 1, f"{said}; on {where}" if where else said)


def _sampled(kernel: OfPattern) -> list[Finding]:
    """The same of a kernel without values."""
    rng, worst, same, threads = np.random.default_rng(), 0.0, True, default_threads(None)
    problem, on_gpu = kernel.problem, isinstance(kernel, DeviceKernel)
    numbers: dict[str, Any] = dict(problem.numbers)
    track = gpu_of(kernel.artifact.manifest.levels[0].requires) if on_gpu else CpuTrack()
    if track is None:
        return [Finding("results", True, NO_GPU)]
    with track.entered():
        for n in SAMPLED_N[problem.operator.headed]:
            arrays = problem.sample(rng, n)
            expected, bound = problem.reference(arrays, numbers.get("scale", 1.0))
            one = sampled(kernel, arrays, expected.shape, numbers)
            worst = max(worst, error_share(one, expected, bound))
            same &= on_gpu or kernel(*arrays, threads=threads, **numbers).tobytes() == one.tobytes()
    said = f"1 and {threads} threads give {'equal' if same else 'different'} bits"
    results = Finding("results", worst <= 1, f"largest error {100 * worst:.2g} % of the float64 bound")
    return [results] if on_gpu else [results, Finding("threads", same, said)]


def _names(levels: tuple[LevelRecord, ...]) -> str:
    return ", ".join(level.target for level in levels)
