"""Ahead of time: Python builds the artifact, a C program links it; neither Python nor bsrgen is needed to run it.

python examples/03_aot_from_c/run.py [folder for the artifact and the program]
"""

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import bsrgen
from bsrgen.files import read_weight

HERE = Path(__file__).parent
WEIGHT = HERE.parent / "minilm_ffn_32x1_d20.safetensors"
TOKENS = 32  # as in main.c
TARGETS = {"x86_64": ("x86-64", "x86-64-v3", "x86-64-v4"), "aarch64": "aarch64"}  # one library for all CPUs of the kind


def main(folder: Path) -> None:
    weight = read_weight(WEIGHT)
    kernel = bsrgen.compile(weight, epilogue=("bias", "relu"), target=TARGETS[platform.machine()])
    artifact = kernel.save(folder / "kernel")
    print("artifact:", *sorted(path.name for path in artifact.iterdir()), sep="\n  ")

    M, K = kernel.shape
    names = [f"-DKERNEL={kernel.name}", f'-DHEADER="{kernel.name}.h"', f"-DM={M}", f"-DK={K}"]
    link = [f"-I{artifact}", f"-L{artifact}", f"-l{kernel.name}", "-Wl,-rpath,$ORIGIN/kernel"]
    program = folder / "program"
    command = ["cc", "-std=c11", "-O2", "-Wall", "-Wextra", *names, str(HERE / "main.c"), *link, "-o", str(program)]
    print("\n$", *command)
    subprocess.run(command, check=True)
    result = subprocess.run([program], check=True, capture_output=True, text=True, env={})
    print(result.stderr + result.stdout, end="")

    x = ((np.arange(TOKENS * K) % 7 - 3) / 4).reshape(TOKENS, K)
    bias = np.arange(M) % 5 / 8
    expected = np.maximum(x @ weight.todense().T.astype(np.float64) + bias, 0).sum()
    print(f"numpy: {expected:.6f}")
    assert abs(float(result.stdout) - expected) < 1e-5 * abs(expected)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as temp:
            main(Path(temp))
