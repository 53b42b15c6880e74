"""Encoders to be timed beside each other, as functions of ids and live [batch, tokens]."""

import copy
import importlib.util
import io
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from model import Encoder
from obs import Block
from torch import Tensor

import bsrgen.integrations.torch as bt

Embed = Callable[[Tensor, Tensor], Tensor]
TYPES: dict[str, dict[str, Any]] = {  # how BsrConfig asks for them; bf16 is the whole model, int8 the products alone
    "f32": {},
    "bf16": {},
    "int8": {"dtype": "int8", "quantize_x": True},
}


def converted(model: Encoder, block: Block, name: str) -> Embed:
    """A pruned model with bsrgen's kernels, planned for a sentence of 128 tokens."""
    sparse = copy.deepcopy(model)
    if name == "bf16":
        sparse.bfloat16()
    bt.convert_(sparse.layers, bt.BsrConfig(block, n=128, min_speedup=0, **TYPES[name]))
    return sparse


def peers(dense: Encoder, example: tuple[Tensor, Tensor]) -> dict[str, Embed]:
    """The dense model by torch in float32 and bfloat16, compiled where g++ is, and by onnxruntime where that is."""
    found: dict[str, Embed] = {"torch f32": dense, "torch bf16": copy.deepcopy(dense).bfloat16()}
    if shutil.which("g++"):
        found["torch.compile f32"] = torch.compile(copy.deepcopy(dense), dynamic=False)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found["onnxruntime f32"] = _onnxruntime(dense, example)
    with torch.inference_mode():
        want = dense(*example)
        for name, embed in found.items():
            off = 1 - float((embed(*example).float() * want).sum(-1).mean())
            assert off < 1e-3, f"{name}: its embeddings are off by {off}"
    return found


def _onnxruntime(dense: Encoder, example: tuple[Tensor, Tensor]) -> Embed:
    import onnxruntime

    text = io.BytesIO()
    axes = {"ids": {0: "batch", 1: "tokens"}, "live": {0: "batch", 1: "tokens"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter by tracing needs no further package
        torch.onnx.export(dense, example, text, input_names=list(axes), dynamic_axes=axes, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(text.getvalue(), options, providers=["CPUExecutionProvider"])

    def embed(ids: Tensor, live: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "live": live.numpy()})[0])

    return embed
