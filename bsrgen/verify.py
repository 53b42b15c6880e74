"""Verify: is this artifact what its manifest says, and does it compute that here?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.arguments import default_threads
from bsrgen.errors import ArtifactCorruptError
from bsrgen.exam import error_share
from bsrgen.kernel import Kernel, load
from bsrgen.manifest import LevelRecord
from bsrgen.pattern import Weight
from bsrgen.problem import Problem

Array = NDArray[Any]
CHECK_N = (1, 3, 35, 128)  # one, fewer than a vector, a rest, several tiles


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
    weights = [recover(kernel, number) for number in range(len(m.levels))]
    same = [weight.digest == m.weight and fills_zeros(kernel, i) for i, weight in enumerate(weights)]
    values = f"{kernel.nnz} values in {len(same)} level{'s' * (len(same) > 1)}"
    findings.append(Finding("values", all(same), f"{values}: {'those' if all(same) else 'not those'} of the manifest"))
    return kernel, [*findings, *_results(kernel, problem, weights[m.levels.index(kernel.plan)])]


def recover(kernel: Kernel, level: int) -> Weight:
    """The weight that an ISA level of the library holds.

    The library's own packing, fed with the numbers 1, 2, ... as bit patterns, tells where each value went; what it has
    no place for lies outside of the matrix and is zero.
    """
    p, (place, stored) = kernel.pattern, _places(kernel, level)
    data = np.zeros(p.nnz, kernel.dtype)
    data[place[place != 0].astype(np.int64) - 1] = stored[place != 0]
    return Weight(p, data.reshape(p.nnzb, *p.blocksize))


def fills_zeros(kernel: Kernel, level: int) -> bool:
    """Whether zeros are all that a level of the library holds where the weight has nothing."""
    place, stored = _places(kernel, level)
    return not stored[place == 0].any()


def _places(kernel: Kernel, level: int) -> tuple[Array, Array]:
    """For each packed value: the number, from 1, of the stored element that it is, 0 for none; and the values."""
    p, record = kernel.pattern, kernel.artifact.manifest.levels[level].values
    real = kernel.dtype
    bits = np.dtype(f"u{real.itemsize}")
    numbers = np.arange(1, p.nnz + 1, dtype=bits).view(real).reshape(p.nnzb, *p.blocksize)
    place = kernel.packed(numbers, level).view(bits)
    stored = np.fromfile(kernel.artifact.library, real, record.bytes // real.itemsize, offset=record.offset)
    if stored.size != place.size or np.count_nonzero(place) > p.nnz:
        raise ArtifactCorruptError(f"{kernel.artifact}: the values at {record.offset} do not fit the library's packing")
    return place, stored


def _results(kernel: Kernel, problem: Problem, weight: Weight) -> list[Finding]:
    rng, worst, same, threads = np.random.default_rng(), 0.0, True, default_threads(None)
    for n in CHECK_N:
        x, given = problem.sample(rng, n)
        old = rng.standard_normal(problem.operator.shape(n, problem.pattern.M)).astype(kernel.dtype)
        one = kernel(x, out=old.copy(), threads=1, **given)
        worst = max(worst, error_share(one, *problem.reference(weight, x, given, old)))
        same &= kernel(x, out=old.copy(), threads=threads, **given).tobytes() == one.tobytes()
    ns = ", ".join(map(str, CHECK_N))
    return [
        Finding("results", worst <= 1, f"largest error {100 * worst:.2g} % of the float64 bound at n = {ns}"),
        Finding("threads", same, f"1 and {threads} threads give {'equal' if same else 'different'} bits"),
    ]


def _names(levels: tuple[LevelRecord, ...]) -> str:
    return ", ".join(level.target for level in levels)
