"""The key of the store (R7): everything that can change an artifact is in it, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import compiler
from support import run_python

import bsrgen
from bsrgen import api, build
from bsrgen.bench.clock import importable
from bsrgen.pattern import Weight, random_weight
from bsrgen.quantize import quantized
from bsrgen.targets import native


class Asked(Exception):  # noqa: N818
    """Raised by the store instead of looking."""


def key_of(monkeypatch: pytest.MonkeyPatch, weight: Weight, **options: Any) -> str:
    """The key under which `compile` looks for this request."""

    def get(self: object, key: str) -> None:
        raise Asked(key)

    api._own_digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("bsrgen.store.Store.get", get)
        with pytest.raises(Asked) as asked:
            bsrgen.compile(weight, **options)
    api._own_digest.cache_clear()
    return str(asked.value)


WEIGHT = random_weight(0, (8, 8), (2, 2), 0.5)
OTHER_REQUESTS: dict[str, dict[str, Any]] = {
    "operator": {"operator": "spmm"}, "dtype": {"dtype": "float64"}, "epilogue": {"epilogue": ("bias", "relu")},
    "bound operand": {"bias": np.ones(8, np.float32)}, "its values": {"bias": np.zeros(8, np.float32)},
    "target": {"target": "x86-64"}, "targets": {"target": ("x86-64", "x86-64-v3")}, "n": {"n": 1},
    "tune": {"tune": "off"}, "strict": {"strict": True}, "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"}, "Y of bfloat16": {"dtype": "bfloat16", "out_dtype": "float32"},
    "X of float32": {"dtype": "bfloat16", "x_dtype": "float32"}, "int8": {"dtype": "int8"},
    "both": {"dtype": "bfloat16", "x_dtype": "float32", "out_dtype": "bfloat16"},
    "Y of int8": {"dtype": "int8", "out_dtype": "int8"}, "weight-only": {"dtype": "int8", "x_dtype": "float32"},
    "x_scale": {"dtype": "int8", "x_scale": 0.5}, "w_scale": {"dtype": "int8", "w_scale": np.ones(8)},
    "max w_scale": {"dtype": "int8", "w_scale": quantized(WEIGHT)[1]},
}  # fmt: skip
if importable("torch_mlir") and importable("llvmlite"):
    OTHER_REQUESTS["backend"] = {"backend": "mlir"}
if shutil.which("nvcc"):
    OTHER_REQUESTS["CUDA"] = {"backend": "cuda", "target": "sm_80"}
    OTHER_REQUESTS["CUDA for two"] = {"backend": "cuda", "target": ("sm_80", "sm_90")}
if native().family != "x86_64":
    OTHER_REQUESTS = {name: options for name, options in OTHER_REQUESTS.items() if not name.startswith("target")}


def test_key_holds_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: dict[str, Any] = {"epilogue": ("bias",)}
    keys = [key_of(monkeypatch, WEIGHT, **plain)]
    keys += [key_of(monkeypatch, WEIGHT, **plain | other) for other in OTHER_REQUESTS.values()]
    keys += [key_of(monkeypatch, WEIGHT, epilogue=steps) for steps in (("relu", "silu"), ("silu", "relu"))]
    assert len(set(keys)) == len(keys)
    assert key_of(monkeypatch, WEIGHT, threads=3, **plain) == keys[0]  # a default of calls, not of the artifact


def test_key_holds_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    data = WEIGHT.data.copy()
    data[0, 0, 0] = np.nextafter(data[0, 0, 0], 2)
    values, pattern = Weight(WEIGHT.pattern, data), random_weight(1, (8, 8), (2, 2), 0.5)
    keys = [key_of(monkeypatch, weight) for weight in (WEIGHT, values, pattern, random_weight(0, (8, 9), (2, 2), 0.5))]
    assert len(set(keys)) == 4
    assert key_of(monkeypatch, Weight(WEIGHT.pattern, WEIGHT.data.copy())) == keys[0]


def test_key_holds_the_generator_and_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = [key_of(monkeypatch, WEIGHT)]
    changes: list[tuple[Any, str, Any]] = [
        (api, "__version__", "9.9"), (api, "ABI", 9), (build, "COMPILE_FLAGS", ("-O0",)),
        (build, "LINK_FLAGS", ("-O0",)),
    ]  # fmt: skip
    for folder in ("templates", "runtime"):  # one more blank, somewhere
        copied = Path(shutil.copytree(getattr(api, folder.upper()), tmp_path / folder))
        path = next(path for path in sorted(copied.rglob("*")) if path.suffix in (".j2", ".h"))
        path.write_text(path.read_text() + " ")
        changes.append((api, folder.upper(), copied))
    cc = tmp_path / "cc"
    cc.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo other 1.0; else exec {compiler(native().family)} "$@"; fi\n'
    )
    cc.chmod(0o755)
    for module, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            keys.append(key_of(monkeypatch, WEIGHT))
    with monkeypatch.context() as patch:
        patch.setenv("BSRGEN_CC", str(cc))
        keys.append(key_of(monkeypatch, WEIGHT))
    assert len(set(keys)) == len(keys)
    assert key_of(monkeypatch, WEIGHT) == keys[0]


def test_key_does_not_depend_on_the_process() -> None:
    script = """
import bsrgen, bsrgen.store
from bsrgen.pattern import random_weight
bsrgen.store.Store.get = lambda self, key: print(key) or exit()
bsrgen.compile(random_weight(0, (8, 8), (2, 2), 0.5), epilogue=("bias", "clamp"))
"""
    assert len({run_python(script, PYTHONHASHSEED=str(seed)) for seed in (0, 1, 12345)}) == 1
