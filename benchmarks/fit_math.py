"""Derive the coefficients of runtime/bsrgen_math.h and print them as C:  python benchmarks/fit_math.py  (needs mpmath).

Every table is a polynomial or rational P(x)/Q(x), Q(0) = 1, fitted on Chebyshev nodes by weighted linear least squares
on P - f Q, reweighted by 1/Q (Sanathanan, Koerner, IEEE Trans. Automatic Control 8, 1963) and towards the minimax
solution by Lawson's factors |error| (Lawson, UCLA thesis, 1961).  Then the coefficients are rounded to the lane type one
at a time, lowest degree first, Q before P; those still free are refitted each time and take up the rounding error.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp
import numpy as np

mp.mp.dps = 60
NODES = 200
REFITS = 24
REAL = mp.mpf
LN2 = mp.log(2)


@dataclass(frozen=True, slots=True)
class Fit:
    """f on [lo, hi] by degrees n / m; `weight` times the error of P/Q is the relative error of the result."""

    name: str
    f: Callable[[REAL], REAL]
    weight: Callable[[REAL], REAL]
    lo: REAL
    hi: REAL
    n: int
    m: int = 0
    crowd: int = 1  # nodes are crowded towards lo by this power


def neg_log_erfc(scale: REAL, weight: Callable[[REAL, REAL], REAL], name: str, hi: float, n: int, m: int) -> Fit:
    """Where -log erfc(scale x) = x (c + x P(x)/Q(x)): the fit of P/Q, `weight(x, g)` for an absolute error of g."""
    c = 2 / mp.sqrt(mp.pi) * scale

    def g(x: REAL) -> REAL:
        return -mp.log(mp.erfc(x * scale))

    return Fit(name, lambda x: (g(x) / x - c) / x, lambda x: x * x * weight(x, g(x)), REAL(0), REAL(hi), n, m, 2)


def fits(real: type) -> list[Fit]:
    """The tables of one lane type."""
    f32 = real is np.float32
    ln2 = LN2 * REAL("1.0005")  # the rounding of x / (2 ln 2) moves the edge of the reduced range a little
    return [
        Fit(
            "exp_q", lambda r: (mp.expm1(r) - r) / r**2, lambda r: r**2 / abs(mp.expm1(r)), -ln2, ln2, 6 if f32 else 12
        ),
        neg_log_erfc(
            REAL(1), lambda x, g: mp.erfc(x) / mp.erf(x), "erf", 4 if f32 else 6, 7 if f32 else 7, 0 if f32 else 7
        ),
        neg_log_erfc(
            1 / mp.sqrt(2),
            lambda x, g: 1 / (g * (1 + x * x / 8)),
            "cdf",
            14.6 if f32 else 38.8,
            4 if f32 else 10,
            3 if f32 else 10,
        ),
    ]


def least_squares(rows: list[list[REAL]], rhs: list[REAL]) -> list[REAL]:
    """The x that minimises |rows x - rhs|, by normal equations in 60 digits."""
    A, b = mp.matrix(rows), mp.matrix(rhs)
    return list(mp.lu_solve(A.T * A, A.T * b))


def solve(fit: Fit, real: type) -> tuple[list[REAL], list[REAL], REAL]:
    """The rounded coefficients of P and Q, lowest degree first, and the largest weighted error."""
    nodes = [((1 - mp.cos(mp.pi * (i + REAL(1) / 2) / NODES)) / 2) ** fit.crowd for i in range(NODES)]
    xs = [fit.lo + (fit.hi - fit.lo) * u for u in nodes]
    fs, ws = [fit.f(x) for x in xs], [fit.weight(x) for x in xs]
    names = [("q", k) for k in range(1, fit.m + 1)] + [("p", k) for k in range(fit.n + 1)]
    c = {("q", 0): REAL(1)}
    lawson, den, worst = [REAL(1)] * NODES, [REAL(1)] * NODES, REAL(0)

    def refit(free: list[tuple[str, int]]) -> list[REAL]:
        """Solves for the free coefficients; returns the weighted errors."""
        known = [name for name in c if name not in free]
        s = [w / d * mp.sqrt(v) for w, d, v in zip(ws, den, lawson, strict=True)]
        column = {("p", k): [v * x**k for v, x in zip(s, xs, strict=True)] for k in range(fit.n + 1)}
        column |= {("q", k): [-v * f * x**k for v, f, x in zip(s, fs, xs, strict=True)] for k in range(fit.m + 1)}
        if free:
            rhs = [-mp.fsum(c[name] * column[name][i] for name in known) for i in range(NODES)]
            rows = [[column[name][i] for name in free] for i in range(NODES)]
            c.update(zip(free, least_squares(rows, rhs), strict=True))
        den[:] = [mp.fsum(c["q", k] * x**k for k in range(fit.m + 1)) for x in xs]
        num = [mp.fsum(c["p", k] * x**k for k in range(fit.n + 1)) for x in xs]
        assert min(den) > 0, fit.name
        return [abs(p / q - f) * w for p, q, f, w in zip(num, den, fs, ws, strict=True)]

    for step in range(REFITS):
        error = refit(names)
        worst = max(error)
        if 3 < step < REFITS - 1:
            lawson[:] = [v * (e + worst / 64) for v, e in zip(lawson, error, strict=True)]
            mean = mp.fsum(lawson) / NODES
            lawson[:] = [v / mean for v in lawson]
    print(f"/* {fit.name}: 2^{float(mp.log(worst, 2)):.1f} before rounding", end="")
    for i, name in enumerate(names):
        c[name] = REAL(float(real(float(c[name]))))
        error = refit(names[i + 1 :])
    print(f", 2^{float(mp.log(max(error), 2)):.1f} after */")
    return [c["p", k] for k in range(fit.n + 1)], [c["q", k] for k in range(fit.m + 1)], max(error)


if __name__ == "__main__":
    for real in (np.float32, np.float64):
        for fit in fits(real):
            p, q, e = solve(fit, real)
            print(fit.name, [real(float(v)) for v in p], [real(float(v)) for v in q])
