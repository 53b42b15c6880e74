"""Cycles of the AMX micro-kernels on one core: counts that are exact, rates from the research note and Intel's manual.

One product: max(rows of A, dword rows of B, 9.5).  Everything else is Rates.  `python proto/cost.py` prints the table.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from packing import BF16, INT8, Direct, Gather

from bsrgen.cover import cover
from bsrgen.pattern import Pattern, random_weight

GHZ = 3.05


@dataclass(frozen=True)
class Rates:
    """Per cycle, or cycles each; unmeasured ones are from the optimisation manual (Golden Cove)."""

    lines: float = 2.0  # loads of 64 bytes out of L1; a tile row is one
    loads: float = 3.0  # all loads
    stores: float = 1.0  # of 64 bytes
    shuffles: float = 1.0
    l2_bytes: float = 48.0
    latency: float = 52.0  # of a product: one tile of sums takes one product in that time
    overlap: float = 0.25  # of the resources that do not bound; to be fitted
    store_tile: float = 16.0
    begin: float = 60.0  # a block row and unit: loop, mispredictions, sums that drain
    configure: float = 200.0


RATES = Rates()


@dataclass(frozen=True)
class Step:
    """One K step of one pass: products, lines and loads, stores, shuffles, bytes from L2, chains."""

    dots: float
    lines: float
    loads: float
    stores: float
    shuffles: float
    l2: float
    chains: int

    def cycles(self, r: Rates, overlap: float | None = None) -> float:
        parts = [self.dots, max(self.lines / r.lines, self.loads / r.loads), self.stores / r.stores,
                 self.shuffles / r.shuffles, self.l2 / r.l2_bytes]  # fmt: skip
        bound = max(*parts, r.latency if self.chains < 4 else 0)
        return bound + (r.overlap if overlap is None else overlap) * (sum(parts) - max(parts))


def product(rows: float, dword_rows: float) -> float:
    """Cycles of one product."""
    return max(rows, dword_rows, 9.5)


def gather_steps(plan: Gather, units_of_chunk: int, n_units: int, l1: int = 48 << 10) -> list[Step]:
    """The K steps of each pass."""
    T, g, s = plan.token_tiles, plan.element.group, plan.step_rows
    out = []
    resident = plan.panel_row * (plan.panel_rows + 1) <= l1 // 2
    for q, p in enumerate(plan.passes):
        rows = plan.tiles[p["first"] : p["first"] + p["tiles"]]
        x_loads = sum(op["what"] == "x" for op in p["ops"]) * s
        lines, loads, stores, shuffles, l2 = sum(rows) + x_loads, sum(rows) + x_loads, 0.0, 0.0, 0.0
        w_bytes = p["step_bytes"] / max(min(units_of_chunk, n_units), 1)
        l2 += w_bytes
        if plan.gathers and q == 0:
            if plan.single:
                listed = s * g
                lines += listed * T / 2 * (1 if g == 2 else 0.5)
                loads += listed * T / 2 + listed
                shuffles += s * T * (1 if g == 2 else 2 + 0.5)  # int8: vpermb and unpack, half of the inserts
                l2 += 0 if resident else listed * 32 * plan.element.bytes * T / 2
            else:
                lines += s * T
                loads += s * T + s
                l2 += 0 if resident else s * T * 64
            stores += s * T
        elif not plan.gathers and q == 0:
            l2 += 0 if resident else s * T * 64
        dots = sum(product(r, s) for r in rows) * T
        out.append(Step(dots, lines, loads, stores, shuffles, l2, T * p["tiles"]))
    return out


def gather_seconds(plan: Gather, n: int, r: Rates = RATES, overlap: float | None = None) -> dict[str, float]:
    """Microseconds of each part of a call."""
    p, T = plan.pattern, plan.token_tiles
    units = -(-n // (16 * T))
    per_step = [s.cycles(r, overlap) for s in gather_steps(plan, plan.chunk, units)]
    steps = int(plan.steps.sum()) * units
    blocks16 = -(-p.K // 32) * -(-n // 32)  # 32 x 32 pieces of X
    if plan.linear:
        pack = blocks16 * ({2: 100.0, 1: 70.0}[plan.element.bytes] if plan.single else {2: 85.0, 1: 45.0}[plan.element.bytes])
    else:
        pack = blocks16 * 60.0
    tiles = p.block_rows * len(plan.tiles) * units * T
    finish = tiles * (r.store_tile + (60.0 if plan.linear else 30.0))
    control = p.block_rows * units * r.begin + r.configure
    parts = {"steps": steps * sum(per_step), "pack": pack, "finish": finish, "control": control}
    return {k: v / GHZ / 1e3 for k, v in parts.items()} | {"per_step": sum(per_step)}


def direct_step(plan: Direct, n_units: int) -> Step:
    """One K step of the widest pass."""
    T, V = plan.token_tiles, min(plan.row_tiles, plan.tiles)
    d = plan.k_tile // plan.element.group
    d *= plan.pieces
    lines = T * 16 + V * d
    if plan.gathers:  # on the first pass; 64 bytes a token are copied, in pieces
        share, q = 1 / len(plan.passes), plan.pieces
        l2 = T * 16 * 64 * share + V * d * plan.tile_cols * 4 / max(min(plan.chunk, n_units), 1)
        shuffles = T * 16 * (q - 1) / 2 * share  # inserts from memory: either vector port
        return Step(T * V * product(16, d), lines, lines + T * 16 * q * share, T * 16 * share, shuffles, l2, T * V)
    x_line = plan.k_tile * plan.element.bytes if plan.copy_x else 64
    l2 = T * 16 * x_line / len(plan.passes) + V * d * plan.tile_cols * 4 / max(min(plan.chunk, n_units), 1)
    return Step(T * V * product(16, d), lines, lines, 0, 0, l2, T * V)


def direct_seconds(plan: Direct, n: int, r: Rates = RATES, overlap: float | None = None) -> dict[str, float]:
    """Microseconds of each part of a call."""
    p = plan.pattern
    units = -(-n // (16 * plan.token_tiles))
    step = direct_step(plan, units).cycles(r, overlap)
    steps = int(plan.steps.sum()) * (1 if plan.gathers else p.C // plan.k_tile) * len(plan.passes) * units
    pack = n * p.K * plan.element.bytes / 64 * 1.5 * plan.pieces**0.5 if plan.copy_x or plan.gathers else 0.0
    tiles = p.block_rows * plan.tiles * -(-n // 16)
    parts = {"steps": steps * step, "pack": pack, "finish": tiles * (r.store_tile + 20.0),
             "control": p.block_rows * len(plan.passes) * units * r.begin + 2 * r.configure}  # fmt: skip
    return {k: v / GHZ / 1e3 for k, v in parts.items()} | {"per_step": step}


def candidates(own: Pattern, element: Any) -> list[tuple[str, Any]]:
    """Plans of linear worth ranking, covers of taller blocks among them."""
    out: list[tuple[str, Any]] = []
    g = element.group
    if own.C * element.bytes in (16, 32):
        for rows in sorted({own.R, 8, 16, 32} - set(range(own.R))):
            p = own if rows == own.R else cover(own, (rows, own.C)).blocks
            for T, V in ((2, 2), (4, 1)):
                if (V == 2) == (rows > 16):
                    out.append((f"joined {T}x{V}" + ("" if rows == own.R else f" as {rows}x{own.C}"), Direct(p, element, T, V, gathers=True)))
    if own.C % (8 * g) == 0:
        for T, V in ((2, 2), (4, 1), (3, 1), (1, 4)):
            for copy in (False, True):
                if V <= -(-own.R // 16) or V == 1:
                    out.append((f"direct {T}x{V}{' copy' if copy else ''}", Direct(own, element, T, V, copy_x=copy)))
        out += [(f"panel {T}x{V}", Gather(own, element, True, T, V, gathers=False)) for T, V in ((2, 2), (4, 1))]
    for rows in sorted({own.R, 8, 16, 32} - set(range(own.R))):
        if rows % own.R == 0:
            p = own if rows == own.R else cover(own, (rows, own.C)).blocks
            for T, V in ((2, 2), (4, 1), (2, 1)):
                if (V == 2) == (rows > 16):
                    out.append((f"gather {T}x{V}" + ("" if rows == own.R else f" as {rows}x{own.C}"), Gather(p, element, True, T, V)))
    return out


def seconds(plan: Any, n: int, overlap: float | None = None) -> dict[str, float]:
    return (direct_seconds if isinstance(plan, Direct) else gather_seconds)(plan, n, overlap=overlap)


def total(parts: dict[str, float]) -> float:
    return sum(v for k, v in parts.items() if k != "per_step")


def main() -> None:
    shapes = [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4), (64, 1), (32, 1), (16, 1), (8, 1), (4, 1)]
    for element, dense in ((BF16, 104.0), (INT8, 50.0)):
        print(f"{element.name}: 768x768, density 0.2, N = 128; microseconds; dense {dense}")
        print("| blocks | plan | cycles/step | steps | pack | finish | control | sum | x dense | bound | second best |\n|---|---|---|---|---|---|---|---|---|---|---|")
        for shape in shapes:
            own = random_weight(np.random.default_rng(7), (768, 768), shape, 0.2).pattern
            ranked = sorted(((total(seconds(plan, 128)), name, plan) for name, plan in candidates(own, element)), key=lambda q: q[0])
            t, name, plan = ranked[0]
            s = seconds(plan, 128)
            low = total(seconds(plan, 128, 0.0))
            others = "; ".join(f"{q[1]} {q[0]:.1f}" for q in ranked[1:4])
            print(f"| {shape[0]}x{shape[1]} | {name} | {s['per_step']:.0f} | {s['steps']:.1f} | {s['pack']:.1f} | {s['finish']:.1f} | "
                  f"{s['control']:.1f} | {t:.1f} | {dense / t:.1f} | {dense / low:.1f} | {others} |")  # fmt: skip


if __name__ == "__main__":
    main()
