"""What the machine says of itself: the quota of time that a container's control group allows."""

from pathlib import Path

import pytest

from bsrgen import machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group file system of our own, in which this process is in /pod/box."""
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:name=systemd:/x\n0::/pod/box\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_OWN_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    return tmp_path


def test_no_quota(group: Path) -> None:
    assert machine.core_quota() is None
    (group / "cpu.max").write_text("max 100000\n")
    assert machine.core_quota() is None
    assert machine.parallel_cores() == 8


def test_the_strictest_group_counts(group: Path) -> None:
    (group / "cpu.max").write_text("600000 100000\n")
    assert machine.core_quota() == 6
    (group / "pod" / "cpu.max").write_text("250000 100000\n")
    (group / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    assert machine.core_quota() == 2.5
    assert machine.parallel_cores() == 2
    (group / "pod" / "box" / "cpu.max").write_text("5000 100000\n")
    assert machine.parallel_cores() == 1


def test_a_group_outside_of_what_we_see(group: Path) -> None:
    (group / "cgroup").write_text("0::/../../host\n")
    (group / "cpu.max").write_text("300000 100000\n")
    assert machine.core_quota() == 3


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1.5), ("-1", None), ("nonsense", None)])
def test_version_one(group: Path, quota: str, cores: float | None) -> None:
    (group / "cpu").mkdir()
    (group / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.core_quota() == cores


def test_tiles_are_asked_for_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux on x86-64 answers; nobody else is asked, nor is a process without a C library an error."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert machine.tiles_permitted() in ((True, False) if "amx_tile" in flags else (False,))
    for where, value in (("platform.machine", lambda: "aarch64"), ("ctypes.CDLL", broken)):
        machine.tiles_permitted.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, value)
            assert not machine.tiles_permitted()
    machine.tiles_permitted.cache_clear()


def broken(name: object) -> None:
    raise OSError("no library")
