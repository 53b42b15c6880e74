"""An encoder layer of BERT-base's shape in PyTorch, pruned by blocks and converted: end to end, one run, one core."""

import copy
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import machine
from bsrgen.bench.clock import Timing, at_their_best, measure, peer_threads

CASES = (((32, 1), 0.2), ((16, 16), 0.1))
WIDTH, INNER, HEADS, SEED = 768, 3072, 12, 2026


def encoder_layer() -> Any:
    """The layer, post-norm as BERT's, random weights."""
    import torch
    from torch import nn

    class Encoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, t, d = x.shape
            q, k, v = (f(x).view(b, t, HEADS, d // HEADS).transpose(1, 2) for f in (self.query, self.key, self.value))
            a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
            x = self.norm1(x + self.out(a))
            return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))

    torch.manual_seed(SEED)
    return Encoder().eval()


def contenders(sequence: int, batch: int, train: bool) -> dict[str, Any]:
    """Models by name, checked against their dense twins; to train: without those that are fused to infer."""
    import torch

    import bsrgen.integrations.torch as bt

    dense = encoder_layer()
    models = {"torch f32": (dense, torch.float32), "torch bf16": (copy.deepcopy(dense).bfloat16(), torch.bfloat16)}
    x = torch.randn(batch, sequence, WIDTH)
    for block, density in CASES:
        pruned = copy.deepcopy(dense)
        bt.prune_(pruned, block, density)
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            model = copy.deepcopy(pruned).to(dtype)
            bt.convert_(model, bt.BsrConfig(block, n=sequence * batch))
            kinds = {"": model}
            if not train:
                kinds[", fused"] = copy.deepcopy(model)
                bt.fuse_(kinds[", fused"])
            for how, ours in kinds.items():
                with torch.no_grad():
                    off = (ours(x.to(dtype)).float() - pruned(x)).abs().max().item()
                assert off < (1e-4 if dtype == torch.float32 else 0.1), (block, name, how, off)
                models[f"bsrgen {name}, {block[0]}x{block[1]}, {density:.0%} stored{how}"] = ours, dtype
    make = _step if train else _call
    return {name: make(model, x.to(dtype)) for name, (model, dtype) in models.items()}


def _call(model: Any, x: Any) -> Any:
    import torch

    def call() -> Any:
        with torch.inference_mode():
            return model(x)

    return call


def _step(model: Any, x: Any) -> Any:
    """Forward and backward, to x and to all parameters: what a step takes but for the optimizer's part."""
    import torch

    x = x.detach().clone().requires_grad_()
    towards = torch.randn_like(x)

    def call() -> Any:
        for leaf in (x, *model.parameters()):
            leaf.grad = None
        model(x).backward(towards)
        return x.grad

    return call


def table(times: dict[str, Timing]) -> str:
    """Markdown: milliseconds, and how many times faster than torch in float32 and in bfloat16."""
    lines = ["| | ms, best | ms, median | over torch f32 | over torch bf16 |", "|---|---:|---:|---:|---:|"]
    for name, time in times.items():
        ratios = [f"{time.ratio(times[peer]):.2f}x" for peer in ("torch f32", "torch bf16")]
        lines.append(f"| {name} | {time.min_s * 1e3:.2f} | {time.median_s * 1e3:.2f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


@click.command()
@click.option("--sequence", type=click.IntRange(1), default=128, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=20.0, show_default=True, help="Of timing.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--train", is_flag=True, help="Forward and backward, at the fixed pattern.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for DATE-encoder.md.")
def main(sequence: int, batch: int, seconds: float, threads: int, train: bool, out: Path | None) -> None:
    """Time an encoder layer of BERT-base's shape: torch float32 and bfloat16, and bsrgen's after pruning."""
    at_their_best(threads)
    with peer_threads(threads):
        cpus, settle_s = (None, 0.0) if threads == 1 else ((), 5e-3)
        times = measure(contenders(sequence, batch, train), rounds=None, seconds=seconds, cpus=cpus, settle_s=settle_s)
    here = machine()
    cores = "one core" if threads == 1 else f"{threads} cores"
    where = f"{cores} of {here['cpu']}, {here['date']}, torch {here['packages']['torch']}"
    what = "forward and backward" if train else "inference"
    text = f"Encoder layer {WIDTH}, {INNER}, {HEADS} heads, {batch} x {sequence} tokens, {what}, {where}\n\n"
    text += table(times)
    click.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        stem = "encoder" + "-train" * train + (f"-{threads}" if threads > 1 else "")
        (out / f"{here['date']}-{stem}.md").write_text(text + "\n")
