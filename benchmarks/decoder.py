"""The MLPs of a decoder at one token: a stack of LLaMA-7B's SwiGLU layers, dense in torch and sparse by bsrgen."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import bsrgen
from benchmarks.machine import machine
from bsrgen.bench.clock import Timing, at_their_best, measure, peer_threads
from bsrgen.pattern import Weight, random_weight

HIDDEN, INNER, SEED = 4096, 11008, 2026  # Touvron et al., arXiv 2302.13971, table 2
BLOCKS = ((32, 1), (16, 16))
TYPES = {  # of the weights; x and y are float32
    "bf16": {"dtype": "bfloat16", "x_dtype": "float32"},
    "int8": {"dtype": "int8", "x_dtype": "float32", "quantize_x": True},
}
PEERS = ("torch f32", "torch bf16", "torch int8")
OFF = 0.05  # of the norm, from float32: int8 weights and tokens are a hundredth off in each of three products a layer

Stack = Callable[[], Any]  # one token through all layers
Layers = list[tuple[Weight, Weight, Weight]]


def weights(block: tuple[int, int], density: float, layers: int) -> Iterator[tuple[Weight, Weight, Weight]]:
    """Gate, up [INNER, HIDDEN] and down [HIDDEN, INNER] of each layer, each with a pattern of its own."""
    rng = np.random.default_rng(SEED)
    for _ in range(layers):
        gate, up = (random_weight(rng, (INNER, HIDDEN), block, density) for _ in range(2))
        yield gate, up, random_weight(rng, (HIDDEN, INNER), block, density)


def token() -> Any:
    return np.random.default_rng(SEED).standard_normal((1, HIDDEN), dtype=np.float32)


def reference(layers: Layers) -> Any:
    """The stack in float32 by torch, weight for weight: float32 [1, HIDDEN]."""
    import torch

    x = torch.from_numpy(token())
    for matrices in layers:
        gate, up, down = (torch.from_numpy(w.todense()) for w in matrices)
        x = x + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return x.numpy()


def sparse(layers: Layers, how: dict[str, Any], threads: int) -> Stack:
    """By two kernels a layer: gate and up with their product, down with the residual."""
    kernels = [
        (
            bsrgen.compile([gate, up], epilogue="swiglu", n=1, threads=threads, **how),
            bsrgen.compile(down, epilogue="residual", n=1, threads=threads, **how),
        )
        for gate, up, down in layers
    ]

    def run() -> Any:
        x = first
        for inner, outer in kernels:
            x = outer(inner(x), residual=x)
        return x

    first = token()
    return run


def dense(layers: int) -> dict[str, Stack]:
    """torch with float32 and bfloat16 weights, and with int8 weights by its own kernel for bfloat16 tokens."""
    import torch
    from torch.nn.functional import linear, silu

    def stack(matrices: list[Any], product: Callable[[Any, Any], Any], x: Any) -> Stack:
        def run() -> Any:
            y = x
            with torch.inference_mode():
                for gate, up, down in matrices:
                    y = y + product(silu(product(y, gate)) * product(y, up), down)
            return y

        return run

    def short(w: Any) -> Any:
        scale = w.abs().amax(1) / 127
        return (w / scale[:, None]).round().to(torch.int8), scale.bfloat16()

    torch.manual_seed(SEED)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    full = [tuple(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes) for _ in range(layers)]
    half = [tuple(w.bfloat16() for w in layer) for layer in full]
    bytes_ = [tuple(short(w) for w in layer) for layer in full]
    x = torch.from_numpy(token())
    return {
        "torch f32": stack(full, linear, x),
        "torch bf16": stack(half, linear, x.bfloat16()),
        "torch int8": stack(bytes_, lambda y, w: torch._weight_int8pack_mm(y, *w), x.bfloat16()),
    }


def contenders(density: float, layers: int, threads: int) -> dict[str, Stack]:
    """Stacks by name; the sparse ones are checked against their float32 twins."""
    ours = {}
    for block in BLOCKS:
        matrices = list(weights(block, density, layers))
        want = reference(matrices)
        for name, how in TYPES.items():
            stack = sparse(matrices, how, threads)
            off = np.linalg.norm(stack() - want) / np.linalg.norm(want)
            assert off < OFF, (block, name, off)
            ours[f"bsrgen {name}, {block[0]}x{block[1]}, {density:.0%} stored"] = stack
    return dense(layers) | ours


def table(times: dict[str, Timing], layers: int) -> str:
    """Markdown: a token's time, tokens a second, and how many times faster than each dense stack."""
    heads = ["", "ms, best", "ms, median", f"tokens/s of {layers} layers", *(f"over {peer}" for peer in PEERS)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, time in times.items():
        ratios = (f"{time.ratio(times[peer]):.2f}x" for peer in PEERS)
        cells = [f"{time.min_s * 1e3:.2f}", f"{time.median_s * 1e3:.2f}", f"{1 / time.median_s:.0f}", *ratios]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), default=0.2, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=20.0, show_default=True, help="Of timing.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for DATE-decoder.md.")
def main(layers: int, density: float, threads: int, seconds: float, out: Path | None) -> None:
    """Time the MLPs of a decoder of LLaMA-7B's shape at one token: torch's dense stacks and bsrgen's."""
    at_their_best(threads)
    with peer_threads(threads):
        cpus = () if threads > 1 else None
        times = measure(contenders(density, layers, threads), rounds=None, seconds=seconds, cpus=cpus)
    here = machine()
    text = (
        f"{layers} SwiGLU layers {HIDDEN} x {INNER}, one token, random weights, {threads} of the cores of {here['cpu']}"
    )
    text += f", {here['date']}, torch {here['packages']['torch']}: `{here['command']}`\n\n{table(times, layers)}"
    click.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        cores = "" if threads == 1 else f"-{threads}"
        (out / f"{here['date']}-decoder{cores}.md").write_text(text + "\n")
