"""A kernel for one pruned weight: compile, call, compare with scipy and with dense.

python examples/01_numpy.py
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import bsrgen
from bsrgen.files import read_weight

WEIGHT = Path(__file__).with_name("minilm_ffn_32x1_d20.safetensors")  # 1536 x 384, 20 % of the 32 x 1 blocks
TOKENS = 128


def microseconds(call: Callable[[], object]) -> float:
    """The fastest of 30 runs."""
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def main() -> None:
    W = read_weight(WEIGHT).tobsr()  # scipy.sparse.bsr_array: what you have already
    k = bsrgen.compile(W)  # operator="linear": Y = X @ W.T, as nn.Linear
    print(k, end="\n\n")

    x = np.random.default_rng(0).standard_normal((TOKENS, k.shape[1])).astype(np.float32)
    y = k(x)  # any number of rows
    dense = W.toarray()
    print(f"x {x.shape} -> y {y.shape}; largest difference to x @ W.T: {abs(y - x @ dense.T).max():.1e}")
    assert np.allclose(y, x @ dense.T, atol=1e-4)

    out = np.empty_like(y)
    times = {
        "bsrgen": microseconds(lambda: k(x, out=out, threads=1)),
        "scipy": microseconds(lambda: (W @ x.T).T),
        "dense": microseconds(lambda: np.matmul(x, dense.T, out=out)),
    }
    print(f"{TOKENS} tokens, bsrgen on one thread: " + ", ".join(f"{name} {us:.0f} us" for name, us in times.items()))

    fused = bsrgen.compile(W, epilogue=("bias", "gelu"), bias=np.ones(k.shape[0], np.float32))
    print(f"with bias and gelu in the kernel: {microseconds(lambda: fused(x, out=out, threads=1)):.0f} us")


if __name__ == "__main__":
    main()
