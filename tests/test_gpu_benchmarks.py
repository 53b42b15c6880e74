"""benchmarks/gpu without a GPU: the whole script in rehearsal, its results, the peers that can be asked on a CPU."""

import ctypes
import json
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from programs import run as run_program
from programs import tool
from support import REPOSITORY

from benchmarks.gpu import contenders, cusparse, grids, l2, results, take
from benchmarks.gpu.results import Figure, Line, Results
from benchmarks.gpu.stages import Timer
from benchmarks.points import Point
from bsrgen._paths import RUNTIME
from bsrgen.errors import UnsupportedError


def invoke(*arguments: Any) -> str:
    done = CliRunner().invoke(take.main, [str(word) for word in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels made ahead, a run that its budget ends, one that goes on from there, one that has nothing left to do."""
    chosen = "float32|int8"
    options = ("--rehearse", "--rounds", 3, "--artifacts", tmp_path / "kernels", "--only", chosen, "--target", "sm_80")
    said = invoke("--prepare", *options)
    assert len(list((tmp_path / "kernels").iterdir())) == said.count("KB") == 2
    monkeypatch.setattr("bsrgen.api.compile", lambda *a, **o: pytest.fail("they were made ahead"))
    out = ("--out", tmp_path / "out")
    said = invoke(*options, *out, "--budget-s", 0)
    assert "0 of 2 points" not in said
    assert "the budget is over" in said
    said = invoke(*options, *out)
    assert "2 of 2 points to take" in said
    document = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [figure["point"]["dtype"] for figure in document["figures"]] == ["float32", "int8"]
    for figure in document["figures"]:
        ours = figure["lines"][0]
        assert (ours["name"], ours["how"]) == ("bsrgen", "rehearsed")
        assert 0 <= ours["error"] < take.WRONG
        assert ours["hot"]["rounds"] == ours["cold"]["rounds"] == 3
    assert document["figures"][0]["lines"][1]["name"] == "torch dense"
    assert document["figures"][0]["absent"]["cusparse bsr"] == "RuntimeError: cuSPARSE needs a GPU"
    assert len(document["commands"]) == 2
    said = invoke(*options, *out)
    assert "0 of 2 points to take" in said
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text.startswith("# rehearsal on the CPU, no GPU, no figures")


def test_rehearsal_of_weights_that_come_with_the_call(tmp_path: Path) -> None:
    """Two contenders more: the call, and the preparation, which can be recorded as well."""
    invoke("--rehearse", "--dynamic", "--rounds", 3, "--target", "sm_80", "--only", "float32", "--out", tmp_path)
    (figure,) = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    errors = {line["name"]: line["error"] for line in figure["lines"]}
    assert errors["bsrgen, dynamic"] == errors["prepare a weight"] == errors["bsrgen"] < take.WRONG


def test_figures_of_several_devices_are_not_mixed(tmp_path: Path) -> None:
    Results({"device": "another GPU", "date": "2026-01-01"}).save(tmp_path)
    done = CliRunner().invoke(take.main, ["--rehearse", "--only", "nothing", "--out", str(tmp_path)])
    assert "holds figures of another GPU" in done.output
    (tmp_path / "gpu.json").write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match="not of this version"):
        results.load(tmp_path)
    assert "--prepare needs" in CliRunner().invoke(take.main, ["--prepare"]).output


def test_points() -> None:
    found = grids.points(grids.DEFAULT)
    assert len({point for _, point in found}) == len(found)
    assert {name for name, _ in found[:5]} == set(grids.DEFAULT), "a run that is cut short has some of each"
    for _, point in found:
        assert point.shape[0] % point.block[0] == point.shape[1] % point.block[1] == 0


def figure(point: Point, nnz: int, **seconds: float) -> Figure:
    lines = [
        Line(name.replace("_", " ").replace("tuned", ", tuned").replace(" ,", ","),
             "bsrgen" if name == "bsrgen" else "dense" if "dense" in name else "sparse",
             {"min_s": s, "median_s": s, "rounds": 3}, {"min_s": s, "median_s": 2 * s, "rounds": 3}, "graph", 1e-3)
        for name, s in seconds.items()
    ]  # fmt: skip
    return Figure("prefill", point, nnz, int(1e9), tuple(lines), {"stk": "not installed: stk"})


def test_tables_and_goals(tmp_path: Path) -> None:
    square = Point("linear", (4096, 4096), (64, 64), 0.25, 2048, dtype="bfloat16")
    nnz = 4096 * 1024
    good = figure(square, nnz, bsrgen=1e-4, torch_dense=3e-4, torch_bsr_tuned=2e-4)
    poor = figure(replace(square, density=0.3), nnz, bsrgen=1e-4, torch_dense=1e-4, torch_bsr_tuned=0.5e-4)
    stream = figure(replace(square, shape=(16384, 16384), n=1), 1 << 26, bsrgen=2e-4)
    no_kernel = Figure("prefill", replace(square, n=5), 0, 0, (), {"bsrgen": "UnsupportedError: no plan"})
    held = Results({"device": "some GPU", "date": "2026-01-01", "driver": "1"}, {"copy": 3e12, "dense": 8e14},
                   [good, poor, stream, no_kernel], ["python -m benchmarks gpu"])  # fmt: skip
    assert good.efficiency == pytest.approx(0.75)
    assert good.best_sparse() == ("torch bsr, tuned", pytest.approx(2))
    assert no_kernel.efficiency is None
    assert [line.rpartition(": ")[2] for line in results.goals(held)] == ["1 of 2 points", "1 of 1 points",
                                                                          "1 of 2 points"]  # fmt: skip
    held.save(tmp_path)
    assert results.load(tmp_path) == held
    text = (tmp_path / "gpu.md").read_text()
    assert "| linear bfloat16 4096x4096 64x64 d=0.25 n=2048 | 100.0 | 200.0 | 171.80 | 75% | 3.00x | 2.00x |" in text
    assert "- stk: not installed: stk (3 points)" in text
    assert "- bsrgen: UnsupportedError: no plan (1 points)" in text
    assert "| copy | 3000 GB/s |" in text


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class HostStage:
    """Says that it is a GPU, and has the CPU's memory."""

    real, name, device, handle = True, "host", "cpu", 77

    def __init__(self, torch: Any = None) -> None:
        self.torch = torch

    def entered(self) -> Any:
        return nullcontext()

    def array(self, host: Any) -> Any:
        host = np.ascontiguousarray(host)
        if self.torch:
            return self.torch.from_numpy(host.copy())
        kept = types.SimpleNamespace(data=host.copy())
        kept.data_ptr = lambda: kept.data.ctypes.data
        return kept

    def host(self, array: Any, dtype: Any) -> Any:
        return array.contiguous().numpy().view(dtype) if self.torch else array.data.view(dtype)

    def timer(self, call: Any) -> Timer:
        return Timer(call, call, 1, "graph")

    def alive(self) -> bool:
        return True

    def sample(self, timer: Timer, cold: bool) -> float:
        timer.once()
        return 1e-6


CASES = [
    Point("linear", (64, 96), (16, 16), 0.4, 5), Point("spmm", (96, 64), (16, 16), 0.4, 7),
    Point("linear", (64, 96), (32, 16), 0.3, 3), Point("spmm", (64, 64), (16, 16), 0.0, 3),
]  # fmt: skip


def checked(contender: contenders.Contender, stage: Any) -> list[str]:
    """Prepare and run each case; the reasons of those that it declines."""
    reasons = []
    for point in CASES:
        case = point.case()
        if why := contender.declines(case):
            reasons.append(why)
            continue
        run = contender.prepare(stage, case)
        run.call()
        tokens = np.arange(point.n)
        error = take.error_of(case, run.result(), tokens, take.reference(case, tokens))
        assert error < 1e-5, (contender.name, point)
    return reasons


def test_cusparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a small library with cuSPARSE's prototypes, which says no to other arguments."""
    source = REPOSITORY / "tests" / "cuda" / "libcusparse.c"
    library = tmp_path / "libcusparse.so"
    run_program([tool("gcc"), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library])
    monkeypatch.setattr(cusparse, "_library", lambda: ctypes.CDLL(str(library)))
    named = {contender.name: contender for contender in contenders.peers()}
    assert checked(named["cusparse bsr"], HostStage()) == []
    assert checked(named["cusparse blocked-ell"], HostStage()) == ["Blocked-ELL has square blocks", "nothing stored"]
    with pytest.raises(RuntimeError, match="cusparseCreateBsr: cuSPARSE status 3"):
        cusparse._must("cusparseCreateBsr", ctypes.byref(ctypes.c_void_p()), *[ctypes.c_int64(0)] * 5,
                       (ctypes.c_int * 1)(5), None, None, 2, 2, 0, 0, 2)  # fmt: skip


def test_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense and the BSR products as they are asked for; Triton's kernel is replaced by what it stands for."""
    torch = pytest.importorskip("torch")
    ops, meta = pytest.importorskip("torch.sparse._triton_ops"), pytest.importorskip("torch.sparse._triton_ops_meta")
    tuned = []

    def product(zeros: Any, bsr: Any, x: Any, *, beta: int, alpha: int, out: Any, meta: Any) -> None:
        assert (beta, alpha) == (0, 1)
        out.copy_(bsr.to_dense() @ x)

    monkeypatch.setattr(contenders, "TUNED", {})
    monkeypatch.setattr(ops, "bsr_dense_addmm", product, raising=False)
    monkeypatch.setattr(meta, "tune_bsr_dense_addmm", lambda *a, **o: tuned.append(o) or {"num_stages": 3})
    named = {contender.name: contender for contender in contenders.peers()}
    for name in ("torch dense", "torch bsr", "torch bsr, tuned"):
        assert checked(named[name], HostStage(torch)) == []
    assert tuned == [{"beta": 0, "alpha": 1}] * len(CASES)
    run = named["torch bsr, tuned"].prepare(HostStage(torch), CASES[0].case())
    assert run.note == "{'num_stages': 3}"


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is wrong, or that breaks, or finds no kernel costs the others nothing."""
    case, stage = CASES[0].case(), HostStage()
    right = case.x @ case.dense().T

    def of(result: Any) -> Any:
        run = contenders.Run(lambda: None, lambda: result)
        return contenders.Contender("x", "sparse", lambda case: "", lambda stage, case: run)

    def broken(stage: Any, case: Any) -> Any:
        raise MemoryError("out of memory")

    kernel = types.SimpleNamespace(upload=lambda device: None, plan="plan")
    monkeypatch.setattr(take, "ours", lambda kernel: replace(of(right), name="bsrgen", kind="bsrgen"))
    others = (replace(of(right + 1), name="wrong"), replace(of(right * np.nan), name="nan"),
              replace(of(right), name="broken", prepare=broken), replace(of(right), name="fine"))  # fmt: skip
    found = take.figure(stage, "tiny", CASES[0], case, kernel, 3, others)  # type: ignore[arg-type]
    assert [line.name for line in found.lines] == ["bsrgen", "fine"]
    assert found.absent["wrong"].startswith("ArithmeticError: wrong: relative error")
    assert found.absent["nan"].endswith("inf")
    assert found.absent["broken"] == "MemoryError: out of memory"

    class Makes:
        tune = "model"

        def make(self, point: Point) -> Path:
            raise UnsupportedError("no plan")

    held = Results({"device": "d", "date": "t"})
    take.taken(held, stage, Makes(), [("tiny", CASES[0])], 3, float("inf"), lambda: None)  # type: ignore[arg-type]
    assert held.figures[0].absent == {"bsrgen": "UnsupportedError: no plan"}
    stage.alive = lambda: False  # type: ignore[method-assign]
    with pytest.raises(click.ClickException, match="context is broken"):
        take.taken(held, stage, Makes(), [("tiny", CASES[0])], 3, float("inf"), lambda: None)  # type: ignore[arg-type]


def test_rates_of_l2(tmp_path: Path) -> None:
    """The kernel that asks for them, in emulation: all that is sent arrives, whoever sends it."""
    library = tmp_path / "l2.so"
    headers = (f"-I{REPOSITORY / 'tests' / 'cuda'}", f"-I{RUNTIME}")
    flags = ("-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
             "-Wno-unused-function")  # fmt: skip
    run_program([tool("g++"), *flags, *headers, "-x", "c++", str(l2.SOURCE), "-o", str(library)])
    source = np.zeros(3 * l2.PIECE_BYTES + 16, np.uint8)
    at = -(-source.ctypes.data // 16) * 16
    bring = l2.bring_of(library, 3 * l2.PIECE_BYTES)
    for cluster in l2.CLUSTERS:
        assert bring(at, cluster, 15, 0) == 2 * cluster
