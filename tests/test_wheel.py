"""The wheel, built and installed elsewhere: it carries its templates and runtime and needs no checkout."""

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from programs import run
from support import REPOSITORY

import bsrgen

OFFLINE = (
    "No matching distribution found",
    "Could not find a version",
    "Could not install requirement",
    "No module named pip",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-w", str(folder), str(REPOSITORY)]
    environment = os.environ | {"PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "20"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    said = result.stdout + result.stderr
    if result.returncode and any(words in said for words in OFFLINE):
        pytest.skip("hatchling is not installed, and pip cannot fetch it from here")
    assert result.returncode == 0, said
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, and the dependencies of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel])
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text(
        "\n".join(paths) + "\n"
    )  # after the wheel; their own .pth files do not count
    return folder / "bin" / "python"


def test_wheel_is_complete(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("bsrgen", "bsrgen"), ("templates", "bsrgen/templates"), ("runtime", "bsrgen/runtime")):
        root = REPOSITORY / folder
        files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {f"{inside}/{path.relative_to(root).as_posix()}" for path in files} <= names
    assert "bsrgen/py.typed" in names
    metadata = {name.partition("/")[2] for name in names if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= metadata


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bsrgen", f"bsrgen-{bsrgen.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", ".bin")) or "/tests/" in name]


USE = """
import sys
import bsrgen, numpy as np
from bsrgen.pattern import random_weight
print(bsrgen.__file__)
W = random_weight(0, (24, 40), (4, 4), 0.3)
k = bsrgen.compile(W, epilogue=("gelu",))
x = np.ones((3, 40), np.float32)
y = k(x)
again = bsrgen.load(k.save(sys.argv[1]))(x)
assert (y == again).all() and y.shape == (3, 24) and np.isfinite(y).all() and y.any()
print(k.source.count("\\n") > 100)
"""


def test_installed_wheel_compiles_elsewhere(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["BSRGEN_CACHE_DIR"] = str(tmp_path / "store")  # another text for the store to key on
    where, readable = run([python, "-c", USE, tmp_path / "saved"], cwd=tmp_path, env=environment).split()
    assert Path(where).is_relative_to(python.parents[1])
    assert readable == "True"


def test_command_is_installed(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = run([python, "-m", "bsrgen", "--help"], cwd=tmp_path, env=environment)
    for verb in ("compile", "bench", "inspect", "verify", "doctor", "cache"):
        assert verb in out
