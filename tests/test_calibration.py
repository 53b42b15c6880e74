"""Calibration: a record that counts on the CPU it was taken on and nowhere else, and is laid over native()'s rates."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from bsrgen import calibration
from bsrgen.__main__ import main
from bsrgen._paths import RUNTIME
from bsrgen.bench import calibrate
from bsrgen.calibration import FILE, SCHEMA, Calibration, Rates
from bsrgen.machine import cpu_model, parallel_cores
from bsrgen.targets import TARGETS, Target, host, native

RATES = Rates(3.125, 1.5, 48.0, 12.0, 6.0, 1e-6, 2e-5, 1.25, 1.75)


def record(**changed: Any) -> Calibration:
    return msgspec.structs.replace(Calibration(SCHEMA, cpu_model(), host().name, "2026-11-21", RATES), **changed)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_round_trip(root: Path) -> None:
    assert calibration.read() == (None, "")
    for rates in (RATES, msgspec.structs.replace(RATES, fork_s=None, bf16_dot_per_cycle=None)):
        assert calibration.write(record(rates=rates), root) == root / FILE
        assert calibration.read() == (record(rates=rates), "")
    assert [path.name for path in root.iterdir()] == [FILE]


def test_every_rate_is_a_field_of_target() -> None:
    assert set(RATES.known()) == {*Rates.__struct_fields__} <= asdict(host()).keys()


def test_native_takes_the_measured_rates_at_once(root: Path) -> None:
    before = native()
    assert before == host()
    calibration.write(record(), root)
    after = asdict(native())
    assert {name: after[name] for name in RATES.known()} == RATES.known()
    assert {name: value for name, value in after.items() if name not in RATES.known()} == {
        name: value for name, value in asdict(before).items() if name not in RATES.known()
    }
    assert TARGETS[before.name].ghz == Target.__dataclass_fields__["ghz"].default  # named rows are what they were
    (root / FILE).unlink()
    assert native() == before


GOOD = json.loads(msgspec.json.encode(record()))
DAMAGED = {
    "empty": b"", "cut off": msgspec.json.encode(record())[:-9], "no JSON": b"\xff\xfe{", "a list": b"[]",
    "another schema": json.dumps(GOOD | {"schema": 99}).encode(),
    "an older schema": json.dumps(GOOD | {"schema": SCHEMA - 1}).encode(),
    "an unknown field": json.dumps(GOOD | {"colour": "red"}).encode(),
    "a missing rate": json.dumps(GOOD | {"rates": {"ghz": 3.0}}).encode(),
    "zero": json.dumps(GOOD | {"rates": GOOD["rates"] | {"ghz": 0}}).encode(),
    "negative": json.dumps(GOOD | {"rates": GOOD["rates"] | {"call_s": -1e-6}}).encode(),
    "text": json.dumps(GOOD | {"rates": GOOD["rates"] | {"ghz": "fast"}}).encode(),
    "deep": b"[" * 50_000, "long": b" " * (1 << 20) + msgspec.json.encode(record()),
}  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_no_record(data: bytes, root: Path) -> None:
    (root / FILE).write_bytes(data)
    found, why = calibration.read()
    assert found is None
    assert str(root / FILE) in why
    assert native() == host()
    findings = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["findings"]
    (finding,) = [f for f in findings if f["what"] == "calibration"]
    assert finding["status"] == "warn"
    assert "--calibrate" in finding["advice"]


def test_a_record_of_another_cpu_or_level_does_not_count(root: Path) -> None:
    calibration.write(record(cpu="Z80"), root)
    assert native() == host()
    assert "another CPU, Z80" in calibration.read()[1]
    calibration.write(record(level="pdp11"), root)
    assert native() == host()
    assert "taken for pdp11" in CliRunner().invoke(main, ["doctor"]).stdout


@pytest.mark.skipif(shutil.which(os.environ.get("BSRGEN_CC", "cc")) is None, reason="no C compiler")
def test_doctor_calibrates(root: Path) -> None:
    done = CliRunner().invoke(main, ["doctor", "--calibrate"])
    assert done.exit_code == 0, done.output
    assert "measured   default" in done.stdout
    assert done.stderr == ""
    found, _ = calibration.read()
    assert found is not None
    rates = found.rates.known()
    assert 0.1 < rates["ghz"] < 20
    assert rates["dram_bytes_per_cycle"] < rates["l2_bytes_per_cycle"] * 2
    assert 1e-8 < rates["call_s"] < 1e-3
    has = {"bf16": host().has("avx512bf16"), "int8": host().has("avx512vnni") or host().has("avxvnni")}
    for kind, there in has.items():
        assert (f"{kind}_dot_per_cycle" in rates) == there
        assert not there or 0.1 < rates[f"{kind}_dot_per_cycle"] < 8
    assert native().ghz == rates["ghz"]
    document = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert document["calibration"]["rates"] == rates
    assert document["calibration"]["defaults"]["ghz"] == host().ghz
    assert oct((root / FILE).stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("names", ["gcc", "clang clang-19", "aarch64-linux-gnu-gcc"])
def test_fork_compiles_without_warnings(names: str, tmp_path: Path) -> None:
    cc = next(filter(shutil.which, names.split()), None)
    if cc is None:
        pytest.skip(f"{names.split()[0]} is not installed")
    flags = ["-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread", "-c"]
    subprocess.run([cc, *flags, str(RUNTIME / "bsrgen_fork.c"), "-o", str(tmp_path / "fork.o")], check=True)


def test_a_second_thread_costs_something() -> None:
    """Where there is one: about the length of a part at most, which the caller takes back from a late worker."""
    if parallel_cores() < 2:
        pytest.skip("one core: nothing to fork to")
    assert 0 < calibrate._fork_s() < 100 * calibrate.FORK_WORK_S
