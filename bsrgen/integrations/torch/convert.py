"""convert_: the linear layers of a model, in place."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bsrgen.advice import predicted_speedup
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.foreign import host
from bsrgen.integrations.torch.config import BsrConfig
from bsrgen.integrations.torch.kernels import build
from bsrgen.integrations.torch.layer import BsrLinear, block_weight
from bsrgen.machine import parallel_cores
from bsrgen.pattern import Pattern, Weight
from bsrgen.problem import as_problem
from bsrgen.targets import as_targets

LIKELY_DENSE = 0.5  # layers that store more are judged by the model before a compiler runs

_log = logging.getLogger("bsrgen")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of one linear layer.  speedup: predicted, over a dense product at the config's n on one core."""

    name: str  # as in model.named_modules()
    converted: bool
    density: float  # stored blocks / all blocks
    speedup: float
    layer: BsrLinear | None = None

    def __str__(self) -> str:
        become = f"{self.layer}" if self.layer is not None else "stays dense"
        return f"{self.name}: density {self.density:.3g}, predicted {self.speedup:.2g}x over dense: {become}"


@dataclass(frozen=True, slots=True)
class _Job:
    """One nn.Linear, under all its names."""

    module: nn.Linear
    names: list[str]
    weight: Weight
    layer: BsrLinear

    @property
    def device(self) -> str:
        """Where the layer computes: "cpu" or "cuda"."""
        return str(self.module.weight.device.type)


def convert_(
    model: nn.Module,
    config: BsrConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    executor: Executor | None = None,
    progress: Callable[[float], object] | None = None,
) -> tuple[Conversion, ...]:
    """Replace nn.Linear layers of `model` by BsrLinear, in place; what became of each, in the model's order.

    All-zero blocks of a weight are absent: prune first (bsrgen.prune).  filter_fn(module, name) says which layers to
    take, None means every nn.Linear (not subclasses: others read their weight; a filter that wants them gets them).
    A layer that is predicted to gain less than config.min_speedup stays as it is.  A weight that something else
    uses too, tied embeddings for one, is copied: from then on the two are apart.

    executor: any concurrent.futures.Executor compiles, one of processes into the store; None: threads on all cores.
    progress is told the share done, 0 to 1.  Layers of one pattern share a kernel, layers of one weight its
    values.  Logs each layer (logger "bsrgen").

    Errors, before any layer is changed: ArgumentTypeError, ArgumentError (a model that is itself an nn.Linear, pending
    pruning masks, meta tensors), UnsupportedError, and those of bsrgen.compile.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, BsrConfig):
        raise ArgumentTypeError(f"convert_({type(model).__name__}, {type(config).__name__}): a module and a BsrConfig")
    chosen = _chosen(model, filter_fn)
    jobs = [_Job(m, names, w, layer) for m, names in chosen for w, layer in [_prepared(m, names[0], config)]]
    speedups = _compiled(jobs, config, executor, progress)
    done = []
    shared: dict[int, Any] = {}
    for job, speedup in zip(jobs, speedups, strict=True):
        good = speedup >= config.min_speedup
        for name in job.names if good else ():
            _put(model, name, job.layer)
        if good:
            job.layer.values = shared.setdefault(id(job.module.weight), job.layer.values)
        done.append(Conversion(job.names[0], good, job.weight.pattern.density, speedup, job.layer if good else None))
        _log.info("%s", done[-1])
    return tuple(done)


def load_(model: nn.Module, state: Mapping[str, Any], config: BsrConfig) -> None:
    """Load the state dict of a converted model into a dense one, in place: its nn.Linear layers whose patterns are in
    `state` become BsrLinear.  Nothing is compiled before the first call.

    model: the architecture, weights of no matter; it may be on the meta device.  Block shapes are those of `state`.
    The tensors of `state` are copied, and with their types and devices become the model's.
    Errors: ArgumentError, PatternError; RuntimeError of torch where names or shapes do not match.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, BsrConfig):
        raise ArgumentTypeError(
            f"load_({type(model).__name__}, ..., {type(config).__name__}): a module and a BsrConfig"
        )
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and f"{name}.crow_indices" in state:
            lacks = [part for part in ("values", "col_indices") if f"{name}.{part}" not in state]
            if lacks:
                raise ArgumentError(f"state has {name}.crow_indices and no {name}.{lacks[0]}")
            values, crow, col = (state[f"{name}.{part}"] for part in ("values", "crow_indices", "col_indices"))
            if values.ndim != 3:
                raise ArgumentError(f"{name}.values has shape {tuple(values.shape)}, expected (nnzb, R, C)")
            shape, block = (module.out_features, module.in_features), (int(values.shape[1]), int(values.shape[2]))
            pattern = Pattern(shape, block, host("crow_indices", crow), host("col_indices", col))
            weight = Weight(pattern, np.zeros((pattern.nnzb, *block), np.float32))
            bias = None if module.bias is None else np.zeros(module.out_features, np.float32)
            layers[name] = BsrLinear(weight, config, bias, device=values.device, dtype=values.dtype)
            layers[name].train(module.training)
    for name, layer in layers.items():
        _put(model, name, layer)
    copies: dict[Any, Any] = {}  # tensors that share memory go on doing so
    own = {
        name: copies.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype), t.detach().clone())
        if isinstance(t, torch.Tensor) else t for name, t in state.items()
    }  # fmt: skip
    model.load_state_dict(own, assign=True)


def _chosen(model: nn.Module, filter_fn: Any) -> list[tuple[nn.Linear, list[str]]]:
    """The layers to convert and all their names."""
    found: dict[int, tuple[nn.Linear, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        wanted = type(module) is nn.Linear if filter_fn is None else filter_fn(module, name)
        if wanted and isinstance(module, nn.Linear):
            if not name:
                raise ArgumentError("the model itself is an nn.Linear: use BsrLinear.from_linear(model, config)")
            found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _prepared(module: nn.Linear, name: str, config: BsrConfig) -> tuple[Weight, BsrLinear]:
    try:
        weight = block_weight(module, config)
        return weight, BsrLinear._of(module, weight, config)
    except (ArgumentError, ArgumentTypeError) as e:
        raise type(e)(f"{name}: {e}") from e


def _compiled(jobs: Sequence[_Job], config: BsrConfig, executor: Any, progress: Any) -> list[float]:
    """Predicted gains over dense; the kernels of all jobs that may gain enough are compiled."""
    if executor is not None and not isinstance(executor, Executor):
        raise ArgumentTypeError(f"executor={executor!r}: a concurrent.futures.Executor, or None for threads")
    gains = [_predicted(job, config) for job in jobs]
    requests = {
        request: job for job, gain in zip(jobs, gains, strict=True) if gain >= config.min_speedup
        for request in job.layer.requests(config.train)
    }  # fmt: skip
    with nullcontext(executor) if executor else ThreadPoolExecutor(parallel_cores()) as pool:
        futures = [pool.submit(build, *request, job.weight.pattern, job.device) for request, job in requests.items()]
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress:
                progress(number / len(futures))
    return [
        job.layer.kernel().verdict.speedup if gain >= config.min_speedup else gain
        for job, gain in zip(jobs, gains, strict=True)
    ]


def _predicted(job: _Job, config: BsrConfig) -> float:
    """The gain, without a compiler, where it may be too small; infinity where that is unlikely."""
    p = job.weight.pattern
    if p.density <= LIKELY_DENSE or config.min_speedup == 0:
        return float("inf")
    x = str(job.module.weight.dtype).removeprefix("torch.")
    problem = as_problem("linear", p, config.weight_dtype(x), x, x, n=config.n, quantize_x=config.quantize_x)
    return predicted_speedup(problem, as_targets(config.target)[0], strict=config.strict)


def _put(model: nn.Module, name: str, layer: BsrLinear) -> None:
    """`layer` under that name."""
    above, _, own = name.rpartition(".")
    parent = model.get_submodule(above)
    setattr(parent, own, layer)
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # else torch's fused path for inference multiplies the dense weights
