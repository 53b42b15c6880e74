"""Derive the tables of runtime/bsrgen_math.h and print them as C:  python benchmarks/fit_math.py  (needs mpmath; 20 s).

Every table is a polynomial or rational P(x)/Q(x), Q(0) = 1, fitted on Chebyshev nodes by weighted linear least squares on
P - f Q, reweighted by 1/Q (Sanathanan, Koerner, IEEE Trans. Automatic Control 8, 1963) and towards the minimax solution by
Lawson's factors |error| (thesis, UCLA, 1961).  Then the coefficients are rounded to the lane type one at a time, lowest
degree first, Q before P; those still free are refitted each time and take up the rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp
import numpy as np

mp.mp.dps = 60
NODES, REFITS = 200, 24
LN4 = 2 * mp.log(2)
LINE = 118


@dataclass(frozen=True, slots=True)
class Fit:
    """f by P/Q of degrees n/m on [lo, hi]; an error of P/Q times `weight` is the relative error of the result."""

    name: str
    f: Callable[[mp.mpf], mp.mpf]
    weight: Callable[[mp.mpf], mp.mpf]
    lo: float
    hi: float
    n: int
    m: int
    crowd: int = 1  # nodes crowd towards lo by this power


def fit_exp(n: int) -> Fit:
    """e^r = 1 + r + r^2 P(r), relative to e^r - 1; 0.694 > ln 2: rounding x / ln 4 moves the edge of the reduced range."""
    return Fit("exp", lambda r: (mp.expm1(r) - r) / r**2, lambda r: abs(r**2 / mp.expm1(r)), -0.694, 0.694, n, 0)


def fit_erfc(name: str, scale: mp.mpf, weight: Callable[..., mp.mpf], hi: float, n: int, m: int) -> Fit:
    """-log erfc(scale x) = g(x) = x (c + x P(x)/Q(x)); `weight(x, g)` is that of an absolute error of g."""

    def g(x: mp.mpf) -> mp.mpf:
        return -mp.log(mp.erfc(x * scale))

    c = 2 * scale / mp.sqrt(mp.pi)
    return Fit(name, lambda x: (g(x) / x - c) / x, lambda x: x * x * weight(x, g(x)), 0, hi, n, m, 2)


def fit_erf(hi: float, n: int, m: int) -> Fit:
    """Relative to erf(x) = 1 - e^-g."""
    return fit_erfc("erf", mp.mpf(1), lambda x, _: mp.erfc(x) / mp.erf(x), hi, n, m)


def fit_cdf(hi: float, n: int, m: int) -> Fit:
    """Relative to g, and less so in the tail, where the rounding of g dominates: Phi(-x) = e^-g / 2, g ~ x^2 / 2."""
    return fit_erfc("cdf", 1 / mp.sqrt(2), lambda x, g: 1 / (g * (1 + x * x / 8)), hi, n, m)


FITS = {
    np.float32: (fit_exp(6), fit_erf(4, 7, 0), fit_cdf(14.6, 4, 3)),
    np.float64: (fit_exp(12), fit_erf(6, 7, 7), fit_cdf(38.8, 10, 10)),
}


def least_squares(rows: list[list[mp.mpf]], rhs: list[mp.mpf]) -> list[mp.mpf]:
    """The x that minimises |rows x - rhs|, by normal equations in 60 digits."""
    A, b = mp.matrix(rows), mp.matrix(rhs)
    return list(mp.lu_solve(A.T * A, A.T * b))


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
            rhs = [-mp.fsum(value[name] * column[name][i] for name in fixed) for i in range(NODES)]
            rows = [[column[name][i] for name in free] for i in range(NODES)]
            value.update(zip(free, least_squares(rows, rhs), strict=True))
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


def table(name: str, values: list[float], real: type) -> str:
    """The C text of one table, in the shortest digits that read back as the same numbers."""
    suffix = "f" if real is np.float32 else ""
    text = f"static const real {name}[] = {{" + ", ".join(f"{real(v)!s}{suffix}" for v in values) + "};"
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > LINE:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def main() -> None:
    """Print the constants and tables of both lane types."""
    for real, fits in FITS.items():
        digits = 16 if real is np.float32 else 41  # n ln4_high is exact for every n that occurs
        high = mp.floor(LN4 * 2 ** (digits - 1)) / 2 ** (digits - 1)
        print(f"/* {real.__name__} */\nln4 = {float(high).hex()} + {float(LN4 - high)!r}, 1/ln4 = {real(1 / LN4)!s}")
        for scale in (mp.mpf(1), 1 / mp.sqrt(2)):
            c = 2 * scale / mp.sqrt(mp.pi)
            print(f"slope = {real(float(c))!s} + {float(c - float(real(float(c))))!r}")
        for fit in fits:
            p, q, error = solve(fit, real)
            print(f"/* degrees {fit.n}/{fit.m}, 2^{float(mp.log(error, 2)):.1f} */")
            print(table(f"{fit.name}_p", p, real) + (f"\n{table(f'{fit.name}_q', q, real)}" if fit.m else ""))


if __name__ == "__main__":
    main()
