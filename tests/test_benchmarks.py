"""benchmarks/: every point of every grid can be made; runner, report and the model's judge work.  No time is judged."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import REPOSITORY

from benchmarks import accuracy, decoder, matrices, report, run, tables
from benchmarks.figures import Contender, Figure, Limit, Run, break_even, load, save
from benchmarks.grids import DEFAULT, GRIDS
from benchmarks.machine import machine
from benchmarks.plots import plots
from benchmarks.points import DRAWN, Point
from bsrgen.bench.case import random_case
from bsrgen.bench.ceilings import Ceilings
from bsrgen.bench.clock import Timing, peer_threads
from bsrgen.bench.peer import Run as Prepared
from bsrgen.dtypes import as_dtype

needs_cc = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
ELEMENTS = ("quad1", "quad3", "hex1", "hex3", "tri2", "tet2")
SMALL = 1 << 20  # elements of the weights that are made here


@pytest.mark.parametrize("name", GRIDS)
def test_points_are_distinct_and_make_their_matrix(name: str) -> None:
    points = list(GRIDS[name].points())
    assert len(set(points)) == len(points)
    some = [p for p in GRIDS[name].thinned(max(len(points) // 4, 1)) if p.shape[0] * p.shape[1] <= SMALL]
    for point in some:
        assert 0 < point.density <= 1
        W = replace(point, n=min(point.n, 8)).case().weight
        p = W.pattern
        held = (
            np.float32 if point.dtype == "int8" else as_dtype(point.dtype).numpy
        )  # int8: on a grid, quantised by compile
        assert (p.shape, p.blocksize, W.data.dtype) == (point.shape, point.block, held)
        assert abs(p.nnzb - point.density * p.block_rows * p.block_cols) <= 0.5 + 1e-6


def test_thinning_takes_the_same_points_each_time_and_keeps_their_order() -> None:
    grid = GRIDS["shapes"]
    points, thin = list(grid.points()), list(grid.thinned(10))
    assert thin == list(grid.thinned(10))
    assert len(thin) == 16
    assert thin == sorted(thin, key=points.index)
    assert list(grid.thinned()) == points
    assert set(DEFAULT) <= set(GRIDS)


def test_points_are_chosen_by_their_line() -> None:
    chosen = run.selected(GRIDS["shapes"], 1, None, r"^linear .* 4x4 d=0\.[12] ")
    assert [str(point).split()[:5] for point in chosen[1]] == [
        ["linear", "float32", "768x768", "4x4", "d=0.2"], ["linear", "float32", "768x768", "4x4", "d=0.1"]
    ]  # fmt: skip


def test_shapes_hold_the_readme_table() -> None:
    points = set(GRIDS["shapes"].points())
    assert {Point(op, (768, 768), (32, 1), d, 128) for op in ("linear", "spmm") for d in (0.2, 0.1)} <= points


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("operator", matrices.EXPRESSIONS)
def test_operator_matrices_are_those_of_pyfr(element: str, operator: str) -> None:
    if not matrices.simplices():
        pytest.skip("pyfr is not installed")
    kind, order = element[:-1], int(element[-1])
    ours, theirs = matrices.operator_matrix(f"{element} {operator}"), matrices.from_pyfr(kind, order, operator)
    assert ours.shape == theirs.shape  # points come in another order: equal up to permutations and signs of normals
    a, b = (np.sort(np.abs(m[np.abs(m) > 1e-9])) for m in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_operator_matrices_differentiate() -> None:
    """M132 applied to a flux that is continuous over the faces, with M3 on its face values, is the divergence."""
    x, _ = np.polynomial.legendre.leggauss(4)
    f = (x**3)[:, None] * np.ones(4)  # d/dx x^3 on a quadrilateral, first axis slowest
    flux = np.concatenate([f.ravel(), np.zeros(16)])
    faces = np.concatenate([-np.full(4, -1.0), np.full(4, 1.0), np.zeros(8)])  # outward normal flux
    got = matrices.operator_matrix("quad3 M132") @ flux + matrices.operator_matrix("quad3 M3") @ faces
    np.testing.assert_allclose(got.reshape(4, 4), 3 * x[:, None] ** 2 * np.ones(4), atol=1e-10)


def test_pattern_kinds_are_those_of_random_weight() -> None:
    from bsrgen.pattern import _KINDS

    assert set(DRAWN) == set(_KINDS)


# ── the runner ───────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_cc
@pytest.mark.parametrize("operator", ["linear", "spmm"])
def test_figure_of_a_tiny_point(operator: str, tmp_path: Path) -> None:
    point = Point(operator, (50, 70), (5, 2), 0.3, 7, dtype="float64")
    with peer_threads(1):
        f = run.figure("shapes", point, run.Settings("model", 3), Ceilings())
    assert f.ours.name == "bsrgen"
    assert {"numpy dense", "scipy csr"} <= {c.name for c in f.contenders} | set(f.absent)
    assert all(c.over > 0 and c.samples == 3 for c in f.contenders)
    assert f.best("dense").over <= max(c.over for c in f.contenders if c.kind == "dense")
    assert f.read.name == "L1"
    assert 0 < f.peak.share_best < 2
    kept = Run("shapes", machine(), {}, {}, (f,))
    save(kept, tmp_path / "a.json")
    assert load(tmp_path / "a.json") == kept
    assert str(REPOSITORY) not in (tmp_path / "a.json").read_text()


def test_slow_peers_are_left_out_but_never_the_last_of_a_kind() -> None:
    import time

    def contender(seconds: float) -> Prepared:
        return Prepared(lambda: time.sleep(seconds), lambda: np.zeros(1))

    seconds = {"bsrgen": 1e-3, "a": 2e-3, "b": 0.1, "c": 0.1, "d": 0.2}
    kinds = {"bsrgen": "bsrgen", "a": "dense", "b": "dense", "c": "sparse", "d": "sparse"}
    kept, slow = run.without_slow({name: contender(s) for name, s in seconds.items()}, kinds)
    assert (set(kept), set(slow)) == ({"bsrgen", "a", "c"}, {"b", "d"})
    assert slow["d"].startswith("slow: ")


@needs_cc
def test_command_writes_json_and_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_BSRGEN_BENCH", "1")  # this process is not started again
    options = ["wavernn", "--thin", "40", "--rounds", "3", "--tune", "model", "--out", str(tmp_path)]
    stopped = CliRunner().invoke(run.main, [*options, "--minutes", "0"], catch_exceptions=False)
    assert "stopped after 0 of 1 points" in stopped.output
    assert not list(tmp_path.iterdir())
    CliRunner().invoke(run.main, options, catch_exceptions=False)
    (kept,) = tmp_path.glob("*-wavernn.json")
    assert len(load(kept).figures) == 1
    before = kept.read_bytes()
    CliRunner().invoke(run.main, options, catch_exceptions=False)  # there is nothing left to take
    assert kept.read_bytes() == before
    assert "over dense" in kept.with_suffix(".md").read_text()


def test_module_dispatches_its_verbs() -> None:
    for verb, word in (("accuracy", "--again"), ("report", "FILES"), ("--help", "[GRID]...")):
        command = [sys.executable, "-m", "benchmarks", verb, "--help"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout


def test_list_shows_every_grid_with_its_source() -> None:
    out = CliRunner().invoke(run.main, ["--list"]).output
    assert all(grid.title in out and grid.source in out for grid in GRIDS.values())


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def synthetic(grid: str, every: int = 1) -> Run:
    """A run whose times follow from the flop alone."""
    figures = []
    for p in GRIDS[grid].thinned(every):
        nnz = int(p.shape[0] * p.shape[1] * p.density)
        ours, dense = 2 * nnz * p.n / 2e11 + 1e-6, 2 * p.shape[0] * p.shape[1] * p.n / 2e11

        def contender(name: str, kind: str, s: float, ours: float = ours) -> Contender:
            return Contender(name, kind, s, s * 1.1, 30, s / ours, s / ours)

        rows = ("bsrgen", "bsrgen", ours), ("numpy dense", "dense", dense * 0.8), ("mkl csr", "sparse", 3 * ours)
        contenders = tuple(contender(*row) for row in rows)
        peak, read = Limit("FMA", "row", 2.4e11, 0.7, 0.6), Limit("L2", "row", 2e11, 0.1, 0.1)
        moved = 4 * nnz + 4 * sum(p.shape) * p.n
        figures.append(
            Figure(grid, p, nnz, 4 * nnz, moved, "a plan", "sparse", ours, contenders, {}, peak=peak, read=read)
        )
    rates = {"fma reg float32": 2.4e11, "read L1": 4e11, "read L2": 2e11, "read L3": 9e10, "read DRAM": 4e10}
    return Run(grid, machine(), {"tune": "model"}, rates, tuple(figures))


def test_tables_name_what_varies_only() -> None:
    text = tables.markdown(synthetic("shapes"), GRIDS["shapes"])
    assert "## Both operators, density 0.2\n\n| block | `linear` GFLOP/s |" in text
    assert "## spmm float32, pattern uniform, M x K 768x768, density 0.02, N 128, threads 1" in text
    assert text.count("\n## ") == 12
    assert "Both operators" not in tables.markdown(synthetic("smalln"), GRIDS["smalln"])


def test_backends_have_a_table_of_their_own() -> None:
    run = synthetic("mlir")
    beside = [
        Contender(n, k, 2e-3, 2e-3, 3, 1.0, 4.0) for n, k in (("bsrgen, MLIR", "mlir"), ("MLIR sparsifier", "stock"))
    ]
    run = replace(run, figures=tuple(replace(f, contenders=(*f.contenders, *beside)) for f in run.figures))
    text = tables.markdown(run, GRIDS["mlir"])
    assert "| block | C GFLOP/s | MLIR GFLOP/s | stock GFLOP/s | C of peak |" in text
    assert text.count("\n## ") == 2
    assert "| 60% | 15% | 15% | 240 |" in text


def test_reduced_types_have_tables_and_break_evens_of_their_own() -> None:
    text = tables.markdown(synthetic("reduced"), GRIDS["reduced"])
    assert all(f"## Both operators, density 0.2, {dtype}\n" in text for dtype in ("bfloat16", "int8", "float16"))
    table = text.split("## Break-even density against the best dense of the same type\n\n")[1].split("\n\n")[0]
    head, _, *rows = table.splitlines()
    assert head.count("768x768 N=128") == 4
    assert "4096" not in head
    assert "float16 " not in head.replace("bfloat16 ", "")
    assert len(rows) == 11
    assert rows[0].startswith("| 64x64 | > 0.5 |")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([(0.1, 2.0), (0.4, 0.5)], "0.2"),
        ([(0.1, 0.9), (0.4, 0.5)], "< 0.1"),
        ([(0.1, 2.0), (0.4, 1.5)], "> 0.4"),
        (None, "-"),
    ],
)
def test_break_even_beyond_what_was_timed(line: list[tuple[float, float]] | None, said: str) -> None:
    assert tables._even(line) == said


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_has_two_plots(grid: str) -> None:
    names = [plot.name for plot in plots(synthetic(grid, 9), GRIDS[grid].over)]
    assert len(names) == 2
    assert names[1] == f"{grid}-roofline"


@pytest.mark.parametrize("grid", ["shapes", "smalln", "dense", "pyfr", "reduced"])  # bars, tokens, density, types
def test_report(grid: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save(synthetic(grid, 4), tmp_path / f"2026-01-01-{grid}.json")
    result = CliRunner().invoke(report.main, [str(tmp_path / f"2026-01-01-{grid}.json")])
    assert result.exit_code == 0, result.output
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(pictures) == 2
    assert f"{grid}-roofline.png" in pictures
    assert (tmp_path / f"2026-01-01-{grid}.md").read_text().startswith(f"# {GRIDS[grid].title}")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("https://", "http").split("<body>")[0]
    assert not [word for word in ('src="http', 'href="http', "url(http") if word in page]


def test_report_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save(synthetic("smalln"), tmp_path / "a.json")
    result = CliRunner().invoke(report.main, [str(tmp_path / "a.json")])
    assert result.exit_code == 0
    assert "pip install 'bsrgen[report]'" in result.output
    assert (tmp_path / "a.md").exists()
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_report_refuses_other_files(tmp_path: Path) -> None:
    for text in ('{"schema": "other"}', '{"grid": 3}'):
        (tmp_path / "a.json").write_text(text)
        result = CliRunner().invoke(report.main, [str(tmp_path / "a.json")])
        assert result.exit_code == 1
        assert "a.json" in result.output


def test_break_even_lies_between_its_neighbours() -> None:
    assert break_even([(0.1, 4.0), (0.4, 1.0), (0.8, 0.5)]) == pytest.approx(0.4)
    assert break_even([(0.2, 2.0), (0.8, 0.5)]) == pytest.approx(0.4)
    assert break_even([(0.2, 2.0), (0.8, 1.5)]) is None


# ── the model's accuracy ─────────────────────────────────────────────────────────────────────────────────────────────


def test_matrices_are_drawn_by_the_seed() -> None:
    points = accuracy.draw()
    assert points[:6] == accuracy.draw(6)
    assert accuracy.draw(6, seed=1) != points[:6]
    assert len(points) == len(set(points)) == 60
    assert len({p.block for p in points}) > 10
    assert {p.operator for p in points} == {"linear", "spmm"}
    assert {p.kind for p in points} == set(DRAWN)


@needs_cc
def test_accuracy_of_two_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_BSRGEN_BENCH", "1")  # this process is not started again
    tiny = (Point("linear", (64, 48), (4, 4), 0.3, 8), Point("spmm", (40, 30), (1, 1), 0.3, 20))
    monkeypatch.setattr(accuracy, "draw", lambda count, seed, dtype: tiny)
    out = tmp_path / "a.json"
    options = ["--top", "2", "--others", "1", "--jobs", "2", "--rounds", "3", "--out", str(out)]
    result = CliRunner().invoke(accuracy.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert "for how many" not in result.output
    assert "of 2 matrices" in result.output
    kept = json.loads(out.read_text())
    assert kept["summary"]["matrices"] == 2
    for entry, pairs in accuracy.replay(kept):
        assert len(entry["plans"]) == len(pairs) == 3
        assert entry["pick_over_best"] >= 1
        for row, (plan, seconds) in zip(entry["plans"], pairs, strict=True):
            assert row["knobs"] == json.loads(json.dumps(plan.knobs()))
            assert row["counts"]["effective_flop"] == plan.counts(entry["point"]["n"]).effective_flop
            assert seconds == row["min_s"] > 0
    again = CliRunner().invoke(accuracy.main, ["--again", str(out)], catch_exceptions=False)
    assert "of 2 matrices" in again.output


def test_loss_of_todays_model_is_that_of_its_pick() -> None:
    case = random_case("linear", (64, 64), (4, 4), 0.5, 16)
    plans = [plan for _, plan in accuracy.contenders(case, 3, 2, 0)[1]]
    assert len(plans) == 5
    loss = accuracy.again_loss(16, [(plan, 1.0 + i) for i, plan in enumerate(plans)])
    assert loss.pick == 1.0  # the first is the model's best and was the fastest
    assert accuracy.again_loss(16, [(plan, 9.0 - i) for i, plan in enumerate(plans)]).pick == 9 / 5
    figures = accuracy.summary([loss, accuracy.Loss(1.5, (math.e,))])
    assert figures["share_within_15_percent"] == 0.5
    assert figures["worst_pick_over_best"] == 1.5


@needs_cc
def test_a_decoder_stack_is_its_float32_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="no torch")
    monkeypatch.setattr(decoder, "HIDDEN", 64)
    monkeypatch.setattr(decoder, "INNER", 96)
    layers = list(decoder.weights((32, 1), 0.2, 1)) * 2  # one pair of kernels for both layers
    want, got = decoder.reference(layers), decoder.sparse(layers, decoder.TYPES["int8"], 1)()
    assert got.shape == want.shape == (1, 64)
    assert np.linalg.norm(got - want) < decoder.OFF * np.linalg.norm(want)
    time = Timing((1e-3, 2e-3), 1)
    text = decoder.table(dict.fromkeys((*decoder.PEERS, "bsrgen"), time), 2)
    assert "| bsrgen | 1.00 | 1.50 | 667 | 1.00x | 1.00x | 1.00x |" in text
