"""Operator matrices of flux reconstruction, the real small and fixed sparse matrices of PyFR (and so of GiMMiK).

Quadrilaterals and hexahedra are Kronecker products of one-dimensional Lagrange bases on Gauss-Legendre points (Huynh,
AIAA 2007-4079; Witherden, Farrington, Vincent, CPC 185, 2014) and are made here; simplices come from PyFR itself.

    M0    solution points -> flux points: interpolation
    M3    flux points -> solution points: divergence of the correction functions
    M132  = M1 - M3 M2, fluxes -> divergence: what GiMMiK's own benchmark calls m132
    M460  = M4 - M6 M0, solution -> gradient: m460
"""

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bsrgen.bench.clock import importable

Array = NDArray[np.float64]
EXPRESSIONS = {"M0": "M0", "M3": "M3", "M132": "M1 - M3*M2", "M460": "M4 - M6*M0"}  # in PyFR's words
DIMENSIONS = {"quad": 2, "hex": 3}
SHAPES = {"quad": "QuadShape", "hex": "HexShape", "tri": "TriShape", "tet": "TetShape"}  # in PyFR
LEGENDRE = "gauss-legendre"
POINTS = {"tri": "williams-shunn", "tet": "shunn-ham", "line": LEGENDRE, "quad": LEGENDRE, "hex": LEGENDRE}
TINY = 1e-10  # of the largest entry: rounding, which PyFR clears too


def simplices() -> bool:
    """Whether PyFR is here (pip install --no-deps pyfr is enough), which the triangles and tetrahedra need."""
    return importable("pyfr.shapes") and importable("pyfr.inifile")


@functools.cache
def operator_matrix(name: str) -> Array:
    """The matrix of a name such as "hex3 M132": element, order, operator."""
    element, operator = name.split()
    kind, order = element.rstrip("0123456789"), int(element.lstrip("abcdefghijklmnopqrstuvwxyz"))
    made = _tensor(DIMENSIONS[kind], order, operator) if kind in DIMENSIONS else from_pyfr(kind, order, operator)
    made = np.where(np.abs(made) < TINY * np.abs(made).max(), 0.0, made)
    made.flags.writeable = False
    return made


def _line(order: int) -> tuple[Array, Array, Array]:
    """On order + 1 Gauss-Legendre points: derivative [u,u], values at -1 and 1 [2,u], weights [u]."""
    x, w = np.polynomial.legendre.leggauss(order + 1)
    vandermonde = np.polynomial.legendre.legvander
    modal = np.linalg.inv(vandermonde(x, order))
    derivative = np.stack([np.polynomial.legendre.legval(x, np.polynomial.legendre.legder(c)) for c in modal.T], 1)
    return derivative, vandermonde(np.array([-1.0, 1.0]), order) @ modal, w


def _tensor(dimensions: int, order: int, operator: str) -> Array:
    """The operators on [-1,1]^d; points in lexicographic order, faces by axis and side."""
    derivative, ends, weights = _line(order)
    eye = np.eye(order + 1)

    def along(axis: int, factor: Array) -> Array:
        return functools.reduce(np.kron, [factor if a == axis else eye for a in range(dimensions)])

    axes, sides = range(dimensions), (0, 1)
    interpolate = np.vstack([along(a, ends[s : s + 1]) for a in axes for s in sides])
    correct = np.hstack([along(a, (ends[s] / weights)[:, None]) for a in axes for s in sides])
    outward = np.repeat([-1.0 if s == 0 else 1.0 for _ in axes for s in sides], (order + 1) ** (dimensions - 1))
    owner = np.repeat([a for a in axes for _ in sides], (order + 1) ** (dimensions - 1))
    normals = [np.where(owner == a, outward, 0.0)[:, None] for a in axes]
    rows: dict[str, Callable[[], Array]] = {
        "M0": lambda: interpolate,
        "M3": lambda: correct,
        "M132": lambda: np.hstack([along(a, derivative) - correct @ (normals[a] * interpolate) for a in axes]),
        "M460": lambda: np.vstack([along(a, derivative) - (normals[a].T * correct) @ interpolate for a in axes]),
    }
    return rows[operator]()


def from_pyfr(kind: str, order: int, operator: str) -> Array:
    """PyFR's own matrix, with the point sets of its documentation."""
    from pyfr import shapes
    from pyfr.inifile import Inifile

    settings = Inifile()
    settings.set("solver", "order", order)
    for name, points in POINTS.items():
        settings.set(f"solver-elements-{name}", "soln-pts", points)
        settings.set(f"solver-interfaces-{name}", "flux-pts", points)
    made: Array = getattr(shapes, SHAPES[kind])(0, settings).opmat(EXPRESSIONS[operator])
    return made
