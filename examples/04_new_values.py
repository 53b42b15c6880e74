"""New values for the same pattern, without a compiler: after a training step, or from another checkpoint.

python examples/04_new_values.py
"""

import tempfile
import time
from pathlib import Path

import numpy as np

import bsrgen
from bsrgen.pattern import Weight, random_weight


def main() -> None:
    rng = np.random.default_rng(0)
    W = random_weight(rng, (512, 512), (8, 8), 0.1)
    x = rng.standard_normal((16, 512)).astype(np.float32)

    start = time.perf_counter()
    k = bsrgen.compile(W)
    print(f"compile, or found in the store: {(time.perf_counter() - start) * 1e3:.1f} ms")
    before = k(x)

    W2 = Weight(W.pattern, W.data * 2)  # or a scipy bsr_array, or a torch tensor, with the same blocks
    start = time.perf_counter()
    k.update(W2)
    print(f"update: {(time.perf_counter() - start) * 1e3:.2f} ms")
    assert (k(x) == 2 * before).all()
    print("twice the values, twice the result")

    other = random_weight(rng, (512, 512), (8, 8), 0.1)
    try:
        k.update(other)
    except bsrgen.PatternMismatchError as error:
        print(f"another pattern is refused:\n  {error}")
    assert (k(x) == 2 * before).all()

    with tempfile.TemporaryDirectory() as temp:
        folder = k.save(Path(temp) / "updated")  # the library on disk gets the new values
        again = bsrgen.load(folder)
        assert (again(x) == 2 * before).all()
        print(f"saved and loaded: {again!r}")


if __name__ == "__main__":
    main()
