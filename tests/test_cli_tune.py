"""bsrgen tune: folders of weights into the store, past bad files, again without work, and interrupted."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import bsrgen
from bsrgen import api, build, tune
from bsrgen.__main__ import main
from bsrgen.artifact import read_artifact
from bsrgen.cli.tune import _jobs
from bsrgen.files import matrix_names, read_weight, write_weight
from bsrgen.pattern import random_weight

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("BSRGEN_CC", "cc")) is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Races of two, in a store of the test's own."""
    monkeypatch.setattr(tune, "TOP", 2)
    monkeypatch.setattr(build, "COMPILE_FLAGS", [flag.replace("-O3", "-O0") for flag in build.COMPILE_FLAGS])
    monkeypatch.setattr("bsrgen.build.prepare_calls", lambda: None)
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two weights of blocks, one level apart, and a note for people."""
    where = tmp_path / "weights"
    (where / "deep").mkdir(parents=True)
    write_weight(where / "up.npz", random_weight(1, (24, 32), (4, 2), 0.3))
    write_weight(where / "deep" / "down.safetensors", random_weight(2, (32, 24), (4, 2), 0.3), key="ffn.down")
    (where / "README.txt").write_text("not a weight")
    return where


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["tune", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result


def run_json(*args: object, code: int = 0) -> Any:
    return json.loads(run(*args, "--json", code=code).stdout)


def test_a_folder_into_the_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_json(folder, "--n", "1,9", "--out", tmp_path / "out")
    rows = found["results"]
    assert [(Path(row["file"]).name, row["key"], row["n"]) for row in rows] == [
        ("down.safetensors", "ffn.down", 1), ("down.safetensors", "ffn.down", 9),
        ("up.npz", None, 1), ("up.npz", None, 9),
    ]  # fmt: skip
    assert (found["failed"], found["interrupted"]) == ([], False)
    for row in rows:
        assert row["fresh"]
        assert not row["cut_short"]
        assert 0 < row["seconds"] <= row["model_pick_seconds"]
        assert row["flop_per_s"] > 0
    places = [
        path.parent.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("manifest.json")
    ]
    down = "deep/down.safetensors/ffn.down"
    assert sorted(places) == [f"{down}/n1", f"{down}/n9", "up.npz/n1", "up.npz/n9"]
    monkeypatch.setattr(build, "build", lambda source, *_: pytest.fail(f"{source.name} was built"))
    kernel = bsrgen.compile(read_weight(folder / "up.npz"), tune="measure", n=9)
    assert str(kernel.artifact) == rows[-1]["artifact"]
    assert read_artifact(tmp_path / "out" / "up.npz" / "n9").manifest.tuning == kernel.artifact.manifest.tuning
    again = run_json(folder, "--n", "1,9")
    assert not any(row["fresh"] for row in again["results"])
    assert [row["seconds"] for row in again["results"]] == [row["seconds"] for row in rows]


def test_the_table_and_the_options(folder: Path) -> None:
    options = ("--n", 4, "--operator", "spmm", "--dtype", "float64", "--epilogue", "bias", "--jobs", 1)
    done = run(folder / "up.npz", *options)
    for word in ("matrix", "GFLOP/s", "up.npz", "tuned", "~", "lanes along"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert done.stderr == ""
    assert "stored" in run(folder / "up.npz", *options).stdout
    W = read_weight(folder / "up.npz")
    kernel = bsrgen.compile(W, "spmm", dtype="float64", epilogue="bias", tune="measure", n=4)
    assert kernel.artifact.manifest.tuning


def test_every_matrix_of_a_file(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weight = np.kron(np.eye(4), np.ones((4, 4))).astype(np.float32)
    tensors = {"a/../b": weight, "c": 2 * weight, "bias": np.ones(16, np.float32)}
    save_file(tensors, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", x=weight, y=3 * weight, z=np.ones(3))
    assert matrix_names(tmp_path / "w.safetensors") == ["a/../b", "c"]
    assert matrix_names(tmp_path / "w.npz") == ["x", "y"]
    found = run_json(tmp_path / "w.safetensors", "--n", 4, "--blocksize", "4x4", "--out", tmp_path / "out")
    assert [row["key"] for row in found["results"]] == ["a/../b", "c"]
    assert sorted(p.name for p in (tmp_path / "out" / "w.safetensors").iterdir()) == ["a_.._b", "c"]


def test_bad_files_are_reported_at_the_end(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.npz").write_bytes(b"PK\x03\x04")
    np.save(folder / "dense.npy", np.eye(8, dtype=np.float32))
    result = run(folder, folder / "missing.npz", folder / "up.npz", "--n", 4, code=1)
    assert "up.npz" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("bsrgen: not tuned: ") for line in lines)
    assert {name for name in ("bad.npz", "dense.npy", "missing.npz") if any(name in line for line in lines)} == {
        "bad.npz", "dense.npy", "missing.npz",
    }  # fmt: skip
    document = run_json(folder, folder / "missing.npz", "--n", 4, code=1)
    assert len(document["results"]) == 2
    assert {Path(row["file"]).name for row in document["failed"]} == {"bad.npz", "dense.npy", "missing.npz"}
    assert all(row["error"] for row in document["failed"])


def test_interrupted_keeps_what_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = api.compile, []

    def compile_once(*args: Any, **options: Any) -> Any:
        calls.append(options["n"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(api, "compile", compile_once)
    result = run(folder, "--n", 4, code=130)
    assert "down.safetensors" in result.stdout
    assert "1 of 2 are done" in result.stderr
    monkeypatch.setattr(api, "compile", real)
    rows = run_json(folder, "--n", 4)["results"]
    assert [row["fresh"] for row in rows] == [False, True]


def test_a_budget_is_shared_by_the_ns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, budgets = api.compile, []

    def watched(*args: Any, **options: Any) -> Any:
        budgets.append(options["tune_seconds"])
        return real(*args, **options)

    monkeypatch.setattr(api, "compile", watched)
    rows = run_json(folder / "up.npz", "--n", "2,4", "--seconds-per-matrix", 0.002)["results"]
    assert budgets == [0.001, 0.001]
    assert all(row["cut_short"] for row in rows)
    assert "tuned, time" in run(folder / "up.npz", "--n", "2,4,6", "--seconds-per-matrix", 0.003).stdout


def test_two_files_of_one_name_have_places_of_their_own(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "up.npz"
    other.parent.mkdir()
    shutil.copy(folder / "up.npz", other)
    run(folder / "up.npz", other, other, "--n", 4, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["up.npz", "up.npz-2"]


def test_matrices_of_one_file_have_places_of_their_own(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weight = random_weight(0, (8, 8), (4, 4), 0.5).todense()
    keys = ["..", "a/b", "a_b", "a_b-2"]
    save_file(dict.fromkeys(keys, weight), tmp_path / "w.safetensors")
    jobs, refused = _jobs((tmp_path,), (1, 4))
    assert not refused
    assert len({job.place for job in jobs}) == 2 * len(keys)
    assert {len(job.place.parts) for job in jobs} == {3}


def test_usage(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no weights there" in run(tmp_path / "empty", code=2).stderr
    for options in ([], [folder, "--jobs", 0], [folder, "--seconds-per-matrix", 0], [folder, "--n", "x"]):
        assert "Usage" in run(*options, code=2).stderr
    for option, value in (
        ("--operator", "conv"),
        ("--dtype", "int9"),
        ("--epilogue", "frobnicate"),
        ("--target", "pdp11"),
    ):
        assert value in run(folder, option, value, code=2).stderr
