"""Kernels whose text is the same share their objects: what is compiled again, and that results are their own."""

import numpy as np
import pytest
from support import assert_right, problem_of

import bsrgen
from bsrgen import build, objects
from bsrgen.pattern import random_weight


@pytest.fixture
def compiled(monkeypatch):
    """The files that compilers were given, and "link"."""
    seen, run = [], build._run

    def watched(command, folder):
        seen.append(next((word for word in command if word.endswith(".c")), "link"))
        return run(command, folder)

    monkeypatch.setattr(build, "_run", watched)
    return seen


def made(seed, density, **options):
    weight = random_weight(seed, (72, 40), (8, 1), density)
    return weight, bsrgen.compile(weight, epilogue="relu", n=32, **options)


def test_another_pattern_compiles_its_data_alone(compiled, rng):
    x = rng.standard_normal((33, 40), np.float32)
    for seed, density in ((1, 0.4), (2, 0.4), (3, 0.45)):
        before = len(compiled)
        weight, kernel = made(seed, density)
        fresh = compiled[before:]
        assert seed == 1 or fresh == [f"{kernel.name}_data.c", "link"], fresh
        for n in (1, 33):
            assert_right(problem_of(weight, epilogue="relu"), weight, kernel(x[:n]), x[:n])
        assert kernel.name.encode() in kernel.artifact.library.read_bytes()
        assert b"qqqq" not in kernel.artifact.library.read_bytes()
    assert "unit.c" in compiled


def test_names_that_are_cut_into_pieces(compiled, monkeypatch, rng):
    """Then files are compiled as they lie."""
    monkeypatch.setattr(objects.Nameless, "named", lambda self, data: None)
    weight, kernel = made(4, 0.4)
    x = rng.standard_normal((5, 40), np.float32)
    assert_right(problem_of(weight, epilogue="relu"), weight, kernel(x), x)
    assert f"{kernel.name}.c" in compiled
    assert "sed" not in (kernel.artifact.folder / "build.log").read_text()
