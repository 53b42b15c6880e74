"""The command line: every verb, --json, exit codes, and errors in one line."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import scipy.sparse
from click.testing import CliRunner, Result

from bsrgen.__main__ import main
from bsrgen.artifact import read_artifact, seal, write_manifest
from bsrgen.bench.clock import HANDICAPS
from bsrgen.cli import doctor
from bsrgen.cli.common import byte_count, duration, printable, size
from bsrgen.exam import error_share
from bsrgen.pattern import Pattern, random_weight
from bsrgen.picture import MAX_PIXELS, png
from bsrgen.targets import native
from bsrgen.verify import recover

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "minilm_ffn_32x1_d20.safetensors"
CHECKS = ("files", "cpu", "pattern", "values", "results", "threads")
pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("BSRGEN_CC", "cc")) is None, reason="no C compiler")


def run(*args: object, code: int = 0) -> Result:
    """The outcome of `bsrgen args`, which must end with `code` and without a traceback."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result


def run_json(*args: object, code: int = 0) -> Any:
    """The one document on stdout."""
    return json.loads(run(*args, "--json", code=code).stdout)


def refused(*args: object, code: int) -> str:
    """The one line on stderr, which --json repeats on stdout."""
    result = run(*args, "--json", code=code)
    (line,) = result.stderr.splitlines()
    error = json.loads(result.stdout)["error"]
    assert line == f"bsrgen: error: {error['message']}"
    assert error["exit_code"] == code
    return line


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small matrix, as scipy saves it."""
    path = tmp_path_factory.mktemp("weight") / "W.npz"
    scipy.sparse.save_npz(path, random_weight(3, (40, 36), (4, 3), 0.3).tobsr())
    return path


@pytest.fixture(scope="module")
def built(weight_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two ISA levels with an epilogue; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("artifact") / "out"
    run("compile", weight_file, "-o", folder, "--target", "x86-64-v2,native", "--epilogue", "bias,relu", "--n", 16)
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


# ── compile ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compile_without_output_prints_the_folder_in_the_store(weight_file: Path, cache: Path) -> None:
    folder = Path(run("compile", weight_file).stdout.removesuffix("\n"))
    assert folder.is_relative_to(cache)
    assert read_artifact(folder).manifest.shape == (40, 36)


def test_compile_says_what_it_made(weight_file: Path, tmp_path: Path) -> None:
    text = run("compile", weight_file, "-o", tmp_path / "out").stdout
    for word in ("linear_f32_40x36_b4x3_", "plan", "cost", "verdict", "check", "folder", "sha256"):
        assert word in text
    document = run_json("compile", weight_file, "-o", tmp_path / "out", "--operator", "spmm", "--dtype", "float64")
    assert document["folder"] == str(tmp_path / "out")
    assert document["manifest"]["operator"] == "spmm"
    assert document["manifest"]["dtype"] == "float64"
    assert document["pattern"]["nnzb"] == 36


def test_compile_takes_the_matrix_by_key_and_blocks_by_option(tmp_path: Path) -> None:
    W = np.zeros((6, 8), np.float32)
    W[2:4, 4:8] = 1
    np.savez(tmp_path / "two.npz", a=W, b=W)
    document = run_json("inspect", tmp_path / "two.npz", "--key", "b", "--blocksize", "2x4")
    assert document["pattern"]["nnzb"] == 1
    assert "--blocksize" in run("compile", tmp_path / "two.npz", "--key", "b", "--blocksize", "2", code=2).stderr
    assert "key" in refused("compile", tmp_path / "two.npz", "--blocksize", "2x4", code=2)


def test_compile_pit(tmp_path: Path) -> None:
    """W as it is in its file: dense, without blocks; experts by their keys, or as one array."""
    W = np.random.default_rng(0).standard_normal((3, 16, 24), np.float32)
    np.savez(tmp_path / "three.npz", a=W[0], b=W[1], c=W[2])
    np.save(tmp_path / "three.npy", W)
    pit = ("--mode", "pit", "--axis")
    made = run_json("compile", tmp_path / "three.npz", "--key", "a, b,c", *pit, "experts")["manifest"]
    assert made == run_json("compile", tmp_path / "three.npy", *pit, "experts")["manifest"]
    assert made["pit"] == {"axis": "experts", "tokens": 1, "rows": 16}
    options = (tmp_path / "three.npz", "--key", "b", *pit, "outputs", "--mask-block", "4x8", "-o", tmp_path / "out")
    assert run_json("compile", *options)["manifest"]["pit"] == {"axis": "outputs", "tokens": 4, "rows": 8}
    banner = next((tmp_path / "out").glob("linear_pit*.h")).read_text().replace("\n *   request   ", " ")
    assert "mode='pit', axis='outputs', mask_block=(4, 8)" in banner
    for wrong, word in ((("--axis", "tokens"), "'static'"), (pit[:2], "axis=None")):
        assert word in refused("compile", tmp_path / "three.npz", "--key", "b", "--blocksize", "8x8", *wrong, code=2)


@pytest.mark.parametrize(
    ("options", "types"),
    [
        (["--dtype", "bfloat16"], ("bfloat16", "bfloat16", "bfloat16")),
        (["--dtype", "bfloat16", "--x-dtype", "float32"], ("bfloat16", "float32", "float32")),
        (["--dtype", "int8", "--out-dtype", "int8"], ("int8", "int8", "int8")),
    ],
)
def test_reduced_types(options: list[str], types: tuple[str, str, str], weight_file: Path, tmp_path: Path) -> None:
    document = run_json("compile", weight_file, "-o", tmp_path / "out", *options)
    assert tuple(document["manifest"][name] for name in ("dtype", "x_dtype", "out_dtype")) == types
    assert run_json("verify", tmp_path / "out")["ok"]
    assert types[0] in run("inspect", tmp_path / "out").stdout
    assert types[0] in run("inspect", weight_file, *options).stdout


def test_a_file_of_int8_is_not_quantised_again(weight_file: Path, tmp_path: Path) -> None:
    W = random_weight(3, (40, 36), (4, 3), 0.3, dtype="int8").todense()
    for name, array, how in (("i.npy", W, "none"), ("f.npy", W.astype(np.float32), "max")):
        np.save(tmp_path / name, array)
        document = run_json("compile", tmp_path / name, "--dtype", "int8", "--blocksize", "4x3")
        assert document["manifest"]["weight_scale"] == how


def test_types_that_do_not_go_together(weight_file: Path) -> None:
    for verb in ("compile", "inspect", "tune"):
        assert "kernels read" in refused(verb, weight_file, "--dtype", "int8", "--x-dtype", "float64", code=2)
        assert "kernels write" in refused(verb, weight_file, "--out-dtype", "int8", code=2)
        assert "one of float32" in refused(verb, weight_file, "--x-dtype", "int3", code=2)


# ── inspect ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_weight_plans_without_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BSRGEN_CC", "/nonexistent")
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "unused"))
    document = run_json("inspect", EXAMPLE, "--n", 32, "--target", "x86-64-v3,x86-64-v4")
    assert [level["target"] for level in document["levels"]] == ["x86-64-v4", "x86-64-v3"]
    assert document["levels"][0]["counts"]["effective_flop"] == 2 * 3686 * 32 * 32
    assert document["pattern"]["blocks_per_row"] == {"min": 30, "mean": pytest.approx(3686 / 48), "max": 140}
    text = run("inspect", EXAMPLE).stdout
    for word in ("plan", "registers", "verdict", "0 of 48 empty", ":+"):
        assert word in text
    assert not (tmp_path / "unused").exists()


def test_inspect_artifact(built: Path) -> None:
    document = run_json("inspect", built)
    assert [counts["registers"] > 0 for counts in document["counts"]["levels"]] == [True, True]
    assert document["counts"]["levels"] == [level["counts"] for level in document["manifest"]["levels"]]
    assert document["manifest"]["epilogue"] == ["bias", "relu"]
    assert document["sha256"] in (built / "manifest.sha256").read_text()
    text = run("inspect", built).stdout
    for word in ("needs", "x86-64-v2", "compiler", "pattern.npz", "blocks in a block row"):
        assert word in text


def test_inspect_writes_a_picture(built: Path, tmp_path: Path) -> None:
    assert run_json("inspect", built, "--png", tmp_path / "p.png")["png"] == str(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == png(recovered(built).pattern)


def pixels(data: bytes) -> np.ndarray:
    """Decode what picture.png writes."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    w, h = struct.unpack_from(">II", chunks[b"IHDR"])
    return np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(h, w + 1)[:, 1:]


def test_picture_shows_every_block() -> None:
    pattern = random_weight(1, (12, 20), (3, 2), 0.4).pattern
    stored = np.zeros((pattern.block_rows, pattern.block_cols), bool)
    stored[pattern.rows, pattern.indices] = True
    image = pixels(png(pattern))
    high, wide = image.shape[0] // 4, image.shape[1] // 10
    np.testing.assert_array_equal(image[::high, ::wide] == 0, stored)
    np.testing.assert_array_equal(image[high - 1 :: high, wide - 1 :: wide] == 0, stored)


@pytest.mark.parametrize(
    ("shape", "blocksize"), [((0, 5), (1, 1)), ((1, 1), (1, 1)), ((9000, 30), (1, 7)), ((70, 5000), (64, 64))]
)
def test_picture_has_a_sane_size(shape: tuple[int, int], blocksize: tuple[int, int]) -> None:
    image = pixels(png(random_weight(1, shape, blocksize, 0.1).pattern))
    assert min(image.shape) >= 1
    assert max(image.shape) <= MAX_PIXELS


def test_picture_of_one_block_among_many_is_not_white() -> None:
    pattern = Pattern((9000, 9000), (1, 1), np.repeat([0, 1], [4000, 5001]), np.array([77]))
    assert (pixels(png(pattern)) < 255).sum() == 1


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def recovered(folder: Path) -> Any:
    from bsrgen.loading import load

    return recover(load(folder), 0)


def test_verify_reads_the_weight_back(built: Path, weight_file: Path) -> None:
    np.testing.assert_array_equal(recovered(built).tobsr().toarray(), scipy.sparse.load_npz(weight_file).toarray())


def test_verify_passes(built: Path) -> None:
    document = run_json("verify", built)
    assert document["ok"]
    assert [check["what"] for check in document["checks"]] == [
        "files",
        "cpu",
        "pattern",
        "values",
        "results",
        "threads",
    ]
    assert run("verify", built, "--expect-sha256", document["sha256"]).stdout.endswith("verified\n")
    assert "expected 00" in refused("verify", built, "--expect-sha256", "00", code=4)


def test_verify_sees_a_flipped_bit_of_any_file(copied: Path) -> None:
    for path in sorted(copied.iterdir()):
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert str(path) in refused("verify", copied, code=4).replace("manifest.sha256", "manifest.json") or (
            path.name == "manifest.sha256"
        )
        path.write_bytes(data)
    run("verify", copied)


def test_verify_sees_other_values_under_right_hashes(copied: Path) -> None:
    artifact = read_artifact(copied)
    at = artifact.manifest.levels[0].values.offset
    with open(artifact.library, "r+b") as file:
        file.seek(at)
        file.write(np.float32(7).tobytes())
    write_manifest(copied, artifact.manifest)
    document = run_json("verify", copied, code=1)
    seen = {check["what"]: check["ok"] for check in document["checks"]}
    assert {what for what in seen if not seen[what]} in ({"values"}, {"values", "results"})  # results: a filled zero
    assert set(seen) == set(CHECKS)
    assert "FAILED" in run("verify", copied, code=1).stdout


def test_verify_refuses_another_version(copied: Path) -> None:
    seal(copied, msgspec.to_builtins(read_artifact(copied).manifest) | {"abi": 99})
    assert "ABI 99" in refused("verify", copied, code=4)


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="no compiler for aarch64")
@pytest.mark.skipif(native().family == "aarch64", reason="this CPU is one")
def test_artifact_for_another_cpu_is_inspected_but_not_verified(weight_file: Path, tmp_path: Path) -> None:
    run("compile", weight_file, "-o", tmp_path / "out", "--target", "aarch64")
    document = run_json("inspect", tmp_path / "out")
    assert document["manifest"]["family"] == "aarch64"
    assert document["counts"]["levels"][0]["registers"] > 0
    refused("verify", tmp_path / "out", code=4)


def test_error_share_counts_nan_as_wrong() -> None:
    one = np.ones(2)
    assert error_share(one, one, one) == 0
    assert error_share(np.array([1, np.nan]), one, one) == np.inf
    assert error_share(np.array([1, np.nan]), np.array([1, np.inf]), one) == 0


# ── bench ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bench_compares_and_ends_in_one_line(weight_file: Path) -> None:
    text = run("bench", weight_file, "--n", "1,9", "--rounds", 3).stdout
    for word in ("n = 1 ", "n = 9 ", "numpy dense", "scipy csr", "of peak", "of its bound", "GFLOP/s"):
        assert word in text
    assert text.splitlines()[-1].startswith("verdict: ")
    assert max(map(len, text.splitlines()[:-1])) <= 110
    document = run_json("bench", weight_file, "--n", "9", "--rounds", 3, "--epilogue", "bias")
    assert [one["n"] for one in document["runs"]] == [9]
    names = {row["name"] for row in document["runs"][0]["contenders"]}
    assert {"bsrgen", "bsrgen + bias", "numpy dense", "scipy bsr"} <= names
    assert document["verdict"].endswith("(n=9)")


def test_bench_starts_again_without_what_slows_peers_down(weight_file: Path) -> None:
    """In a process of its own, where threadpoolctl may be missing and OpenBLAS may be held back."""
    env = os.environ | dict.fromkeys(HANDICAPS & {"OPENBLAS_CORETYPE"}, "Haswell")
    command = [sys.executable, "-m", "bsrgen", "bench", str(weight_file), "--n", "2", "--rounds", "3", "--json"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["runs"][0]["n"] == 2
    assert done.stderr == ""


# ── doctor and cache ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


def test_doctor_is_content(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSRGEN_NUM_THREAD", "2")
    document = run_json("doctor")
    status = {finding["what"]: finding["status"] for finding in document["findings"]}
    assert document["ok"]
    assert {"bsrgen", "compiler", "cpu", "target", "cores", "call path", "store", "peers"} <= set(status)
    assert any("BSRGEN_NUM_THREAD=2: not one of ours" in finding["detail"] for finding in document["findings"])
    assert "kernels can be built" in run("doctor").stdout


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [("BSRGEN_CC", "/nonexistent/cc", "compiler"), ("BSRGEN_CACHE_DIR", "/proc/none", "store")],
)
def test_doctor_fails_with_advice(
    name: str, value: str, what: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    document = run_json("doctor", code=1)
    (failed,) = [finding for finding in document["findings"] if finding["status"] == "fail"]
    assert failed["what"] == what
    assert failed["advice"]
    assert "FAIL" in run("doctor", code=1).stdout


def test_doctor_sees_a_compiler_without_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "cc"
    real = shutil.which("cc")
    fake.write_text(
        f'#!/bin/sh\ncase "$1" in -d*|--v*) exec {real} "$1";; esac\necho "math.h: No such file" >&2; exit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("BSRGEN_CC", str(fake))
    findings = [finding for finding in doctor._compiler() if finding.status == "fail"]
    assert "math.h: No such file" in findings[0].detail


def test_cache(weight_file: Path, store: Path) -> None:
    assert run_json("cache", "ls")["entries"] == []
    folder = Path(run("compile", weight_file).stdout.strip())
    listed = run_json("cache", "ls")
    assert listed["root"] == str(store)
    assert folder.name in [entry["key"] for entry in listed["entries"]]
    assert folder.name[:12] in run("cache", "ls").stdout
    assert run_json("cache", "gc")["entries"] == []
    evicted = run_json("cache", "gc", "--max-bytes", "0")["entries"]
    assert folder.name in [entry["key"] for entry in evicted]
    run("compile", weight_file)
    assert "removed" in run("cache", "clear").stdout
    assert run_json("cache", "ls")["entries"] == []


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def hostile(folder: Path) -> Iterator[Path]:
    """Weight files that must not get through."""
    for name, data in (
        ("empty.npz", b""),
        ("text.safetensors", b"not a tensor"),
        ("zip.npz", b"PK\x03\x04" + bytes(64)),
    ):
        (folder / name).write_bytes(data)
        yield folder / name
    np.save(folder / "objects.npy", np.array([[print]], object))
    yield folder / "objects.npy"
    triple = {"data": np.ones((1, 2, 2), np.float32), "indices": np.array([9]), "indptr": np.array([0, 1, 1])}
    np.savez(folder / "range.npz", **triple, shape=np.array([4, 4]))
    yield folder / "range.npz"
    (folder / "name with \x1b[31m[bold] in it.npz").write_bytes(b"")
    yield folder / "name with \x1b[31m[bold] in it.npz"
    yield folder / "missing.npz"
    yield folder


@pytest.mark.parametrize("name", ["compile", "inspect", "bench"])
def test_hostile_weights_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    for path in hostile(tmp_path):
        code = 4 if path == tmp_path and name == "inspect" else 2
        assert printable(str(path)) in refused(name, path, code=code)


@pytest.mark.parametrize(
    "options",
    [
        "--operator conv",
        "--dtype int9",
        "--target pdp11",
        "--target x86-64,aarch64",
        "--blocksize 5000000000x5000000000",
    ],
)
def test_hostile_options_are_refused_in_one_line(options: str, weight_file: Path) -> None:
    refused("compile", weight_file, *options.split(), code=2)


@pytest.mark.parametrize(
    "options", ["--n 0", "--n 1,x", "--n -3", "--rounds 1", "--threads 0", "--blocksize 0x1", "--tune best"]
)
def test_usage_errors(options: str, weight_file: Path) -> None:
    assert "Usage" in run("bench", weight_file, *options.split(), code=2).stderr


def test_exit_codes_of_build_and_output(weight_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    assert "not an artifact" in refused("compile", weight_file, "-o", tmp_path / "mine", code=2)
    refused("compile", weight_file, "-o", "/proc/none/out", code=3)
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "fresh"))
    monkeypatch.setenv("BSRGEN_DISABLE_JIT", "1")
    assert "BSRGEN_DISABLE_JIT" in refused("compile", weight_file, code=3)
    monkeypatch.delenv("BSRGEN_DISABLE_JIT")
    monkeypatch.setenv("BSRGEN_CC", "/nonexistent/cc")
    assert "no C compiler" in refused("compile", weight_file, code=3)


def test_help_tells_exit_codes_and_variables() -> None:
    text = run("--help").stdout
    for word in ("Exit codes", "BSRGEN_CACHE_DIR", "BSRGEN_DISABLE_JIT", "BSRGEN_CC", "BSRGEN_NUM_THREADS"):
        assert word in text
    for verb in main.commands:
        assert run(verb, "--help").stdout.startswith("Usage: ")


def test_a_process_of_its_own(weight_file: Path, tmp_path: Path) -> None:
    def bsrgen(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bsrgen", *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = bsrgen("compile", weight_file, "-o", tmp_path / "out", "--json", "--verbose")
    assert done.returncode == 0
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "out")
    assert "\x1b" not in done.stderr
    done = bsrgen("verify", tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("bsrgen: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert bsrgen("--version").stdout.startswith("bsrgen, version ")


def test_verbs_import_lightly() -> None:
    code = "import sys, bsrgen.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"numpy", "scipy", "rich", "jinja2", "torch"} & set(done.stdout.split())


def test_figures_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == ["0 B", "1023 B", "1 KB", "3 MB", "5120 GB"]
    assert [duration(s) for s in (1.5e-6, 0.0025, 1.25)] == ["1.5 us", "2.5 ms", "1.25 s"]
    assert byte_count(None, None, "500M") == 500 << 20  # type: ignore[arg-type]
