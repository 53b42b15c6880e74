"""The emitted C of a small kernel, and what was decided before it was printed.

python examples/02_read_the_source.py
"""

import numpy as np

import bsrgen


def small_weight() -> np.ndarray:
    """12 x 16 in blocks of 4 x 4: two on the diagonal, one above it, none in the last column."""
    W = np.zeros((12, 16), np.float32)
    for i, j in ((0, 0), (1, 1), (0, 2)):
        W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = 1 + i + j
    return W


def main() -> None:
    k = bsrgen.compile(small_weight(), blocksize=(4, 4), epilogue="relu")
    print("pattern\n" + k.pattern.picture())
    print(f"problem  {k.problem}")
    print(f"plan     {k.plan}")
    print(f"cost     {k.cost.flop} FLOP and {k.cost.bytes} bytes at n = {k.cost.n}")
    print(f"verdict  {k.verdict}")
    print(f"files    {', '.join(sorted(path.name for path in k.artifact.folder.iterdir()))}\n")
    print(k.source)

    x = np.ones((2, 16), np.float32)
    assert (k(x) == x @ small_weight().T).all()
    print(f"x = ones(2, 16): y[0] = {k(x)[0]}")


if __name__ == "__main__":
    main()
