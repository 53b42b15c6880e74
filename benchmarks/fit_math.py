"""Derive the tables of runtime/bsrgen_math.h and print them as C:  python benchmarks/fit_math.py  (needs mpmath; 20 s).

A table is a polynomial or rational P(x)/Q(x), Q(0) = 1, fitted on Chebyshev nodes by weighted linear least squares on
P - f Q, reweighted by 1/Q (Sanathanan, Koerner, IEEE Trans. Automatic Control 8, 1963) and towards the minimax solution
by Lawson's factors |error| (thesis, UCLA, 1961).  Then the coefficients are rounded to the lane type one at a time, low
degrees first, Q before P; those still free are refitted each time and take up the rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp
import numpy as np

mp.mp.dps = 60
NODES, REFITS = 200, 24
LN2 = mp.log(2)


@dataclass(frozen=True, slots=True)
class Fit:
    """f by P/Q of degrees n/m on [lo, hi]; `weight` times the error of P/Q is the error the result may show."""

    name: str
    f: Callable[[mp.mpf], mp.mpf]
    weight: Callable[[mp.mpf], mp.mpf]
    lo: float
    hi: float
    n: int
    m: int
    crowd: int = 1  # nodes crowd towards lo by this power


def fit_exp(n: int) -> Fit:
    """e^r = 1 + r + r^2 P(r), relative to e^r - 1; a little beyond ln 2 / 2, because x / ln 2 is rounded."""
    return Fit("exp", lambda r: (mp.expm1(r) - r) / r**2, lambda r: abs(r**2 / mp.expm1(r)), -0.348, 0.348, n, 0)


def fit_erf(hi: float, n: int, m: int) -> Fit:
    """g(x) = -log erfc(x) = x + x P(x)/Q(x), relative to erf(x) = 1 - e^-g."""
    return Fit("erf", lambda x: -mp.log(mp.erfc(x)) / x - 1, lambda x: x * mp.erfc(x) / mp.erf(x), 0, hi, n, m, crowd=2)


def fit_cdf(hi: float, n: int, m: int) -> Fit:
    """g(x) = -log(2 Phi(-x)) = x + x P(x)/Q(x), relative to Phi; 16 times less in the tail, where g is rounded."""

    def g(x: mp.mpf) -> mp.mpf:
        return -mp.log(mp.erfc(x / mp.sqrt(2)))

    def weight(x: mp.mpf) -> mp.mpf:
        return x / (1 + g(x)) * (1 + x * x / 64) / (1 + x * x / 4)

    return Fit("cdf", lambda x: g(x) / x - 1, weight, 0, hi, n, m, crowd=2)


FITS = {
    np.float32: (fit_exp(5), fit_erf(4, 8, 0), fit_cdf(14.6, 5, 3)),
    np.float64: (fit_exp(10), fit_erf(6, 8, 7), fit_cdf(38.8, 12, 11)),
}


def solve(fit: Fit, real: type) -> tuple[list[float], list[float], mp.mpf]:
    """Rounded coefficients of P and of Q, lowest degree first, and the largest weighted error."""
    nodes = [((1 - mp.cos(mp.pi * (i + 0.5) / NODES)) / 2) ** fit.crowd for i in range(NODES)]
    xs = [fit.lo + mp.mpf(fit.hi - fit.lo) * u for u in nodes]
    fs, ws = [fit.f(x) for x in xs], [fit.weight(x) for x in xs]
    p, q = [("p", k) for k in range(fit.n + 1)], [("q", k) for k in range(fit.m + 1)]
    value = {q[0]: mp.mpf(1)}
    lawson, den = [mp.mpf(1)] * NODES, [mp.mpf(1)] * NODES

    def refit(free: list[tuple[str, int]]) -> list[mp.mpf]:
        """Solve for the free coefficients, keep the others; the weighted errors at the nodes."""
        scale = [w / d * mp.sqrt(v) for w, d, v in zip(ws, den, lawson, strict=True)]
        factor = {"p": scale, "q": [-s * f for s, f in zip(scale, fs, strict=True)]}
        column = {(side, k): [s * x**k for s, x in zip(factor[side], xs, strict=True)] for side, k in p + q}
        if free:
            fixed = [name for name in value if name not in free]
            rhs = mp.matrix([-mp.fsum(value[name] * column[name][i] for name in fixed) for i in range(NODES)])
            A = mp.matrix([[column[name][i] for name in free] for i in range(NODES)])
            value.update(zip(free, mp.lu_solve(A.T * A, A.T * rhs), strict=True))  # 60 digits: normal equations do
        den[:] = [mp.fsum(value[name] * x ** name[1] for name in q) for x in xs]
        num = [mp.fsum(value[name] * x ** name[1] for name in p) for x in xs]
        return [abs(a / d - f) * w for a, d, f, w in zip(num, den, fs, ws, strict=True)]

    order = q[1:] + p
    for _ in range(REFITS):
        error = refit(order)
        floor = max(error) / 64  # no node is forgotten
        lawson[:] = [v * (e + floor) / (max(error) + floor) for v, e in zip(lawson, error, strict=True)]
    for i, name in enumerate(order):
        value[name] = mp.mpf(float(real(float(value[name]))))
        error = refit(order[i + 1 :])
    return [float(value[name]) for name in p], [float(value[name]) for name in q], max(error)


def text(values: list[float], real: type) -> str:
    """C constants in the shortest digits that read back as the same numbers."""
    suffix = "f" if real is np.float32 else ""
    return ", ".join([str(real(v)).removesuffix(".0") + suffix * (v != 1) for v in values])


def main() -> None:
    """Print the constants and tables of both lane types."""
    for real, fits in FITS.items():
        bits = 15 if real is np.float32 else 42  # n ln2_high is exact for every n that occurs
        high = mp.floor(LN2 * 2**bits) / 2**bits
        print(
            f"ln 2 = {float(high).hex()} + {text([float(LN2 - high)], real)}, 1 / ln 2 = {text([float(1 / LN2)], real)}"
        )
        for fit in fits:
            p, q, error = solve(fit, real)
            print(f"/* degrees {fit.n}/{fit.m}, 2^{float(mp.log(error, 2)):.1f} */")
            print(f"{fit.name}_p = {text(p, real)};\n{fit.name}_q = {text(q, real)};")


if __name__ == "__main__":
    main()
