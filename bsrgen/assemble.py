"""Assemble: a file of weights and tables of layers -> one folder with a kernel for each."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bsrgen import __version__, api
from bsrgen.artifact import Artifact
from bsrgen.errors import ArgumentError, ArgumentTypeError, PatternError
from bsrgen.files import model_matrices, read_matrix, read_vector
from bsrgen.folder import refuse_strangers, replacing
from bsrgen.kernel import Kernel
from bsrgen.machine import parallel_cores
from bsrgen.model import KERNELS, MODEL, SCHEMA, LayerRecord, Model, ModelRecord, load_model, model_files
from bsrgen.pattern import Weight, as_weight
from bsrgen.prune import block_norms, magnitude, masked, mass
from bsrgen.sparsity import Job, Sparsity, jobs_of, read_sparsity


@dataclass(frozen=True, slots=True)
class _Made:
    """A job with its numbers: plain data, so that another process may compile it."""

    job: Job
    weights: tuple[Weight, ...]
    operands: dict[str, Any]
    mass: float


def compile_model(
    weights: str | os.PathLike[str],
    config: str | os.PathLike[str] | Sparsity,
    folder: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    progress: Callable[[float], object] | None = None,
) -> Model:
    """Compile the layers that `config` chooses of a .safetensors, .npz or .onnx file into `folder`; the model, loaded.

    config: a TOML file or a Sparsity (sparsity.py says what its tables mean).  folder: new, empty, or a model, which is
    replaced as a whole.  Any concurrent.futures.Executor compiles, None means threads on all cores; `progress` is told
    the share done, 0 to 1.  Layers whose weight, operands and options are equal share an artifact.
    Errors, before anything is written: ArgumentError, PatternError, UnsupportedError, BuildError, StoreError.
    """
    sparsity = config if isinstance(config, Sparsity) else read_sparsity(Path(config))
    source = Path(weights)
    jobs = jobs_of(sparsity, model_matrices(source))
    return assemble(jobs, source, Path(folder), executor, progress)


def assemble(
    jobs: Sequence[Job], source: Path, folder: Path, executor: Executor | None,
    progress: Callable[[float], object] | None, finish: Callable[[Path, Mapping[str, LayerRecord]], None] | None = None,
) -> Model:  # fmt: skip
    """The kernels of `jobs` in `folder`, which appears as a whole; `finish` may add files to it before."""
    if executor is not None and not isinstance(executor, Executor):
        raise ArgumentTypeError(f"executor={executor!r}: a concurrent.futures.Executor, or None for threads")
    target = folder.resolve()
    refuse_strangers(target, "a model", model_files)
    made = [_prepare(job, source) for job in jobs]
    _build_all(made, executor, progress or (lambda share: None))
    with replacing(target) as new:
        layers = _save_all(made, new / KERNELS)
        record = ModelRecord(SCHEMA, __version__, hashlib.sha256(source.read_bytes()).hexdigest(), layers)
        (new / MODEL).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        if finish:
            finish(new, layers)
    return load_model(target)


def _prepare(job: Job, source: Path) -> _Made:
    """The weights of a job, pruned if the tables say so, and its bias."""
    weights, masses, biases = [], [], []
    for name in job.tensors:
        try:
            weight, kept = _pruned(read_matrix(source, name), job)
        except (ArgumentError, PatternError) as e:
            raise type(e)(f"{name}: {e}") from e
        weights.append(weight)
        masses.append(kept)
        if job.bias and (bias := read_vector(source, f"{name.removesuffix('.weight')}.bias")) is not None:
            biases.append(bias)
    if biases and "bias" in job.epilogue:
        raise ArgumentError(f"{job.name}: its bias is in the file and comes first; leave 'bias' out of epilogue")
    if biases and len(biases) != len(weights):
        raise ArgumentError(f"{job.name}: {len(biases)} of {len(weights)} tensors have a bias; say bias = false")
    operands = {"bias": np.concatenate(biases)} if biases else {}
    return _Made(job, tuple(weights), operands, float(np.mean(masses)))


def _pruned(W: Any, job: Job) -> tuple[Weight, float]:
    """The weight in the job's blocks and the share of its squared norm that is stored."""
    if job.density is None:
        return as_weight(W, blocksize=job.blocksize, dtype=None), 1.0
    if job.blocksize is None or isinstance(W, Weight):
        raise ArgumentError("density= prunes dense tensors in blocks of a given blocksize")
    kept = magnitude(W, job.blocksize, job.density, balanced=job.balanced)
    return (
        as_weight(masked(W, job.blocksize, kept), blocksize=job.blocksize, dtype=None),
        mass(block_norms(W, job.blocksize), kept),
    )


def _compile(made: _Made) -> Kernel:
    epilogue = made.job.epilogue if "bias" not in made.operands else ("bias", *made.job.epilogue)
    W: Any = list(made.weights) if len(made.weights) > 1 else made.weights[0]
    return api.compile(W, epilogue=epilogue, **made.job.options, **made.operands)


def _into_the_store(made: _Made) -> None:
    _compile(made)


def _build_all(made: Sequence[_Made], executor: Executor | None, progress: Callable[[float], object]) -> None:
    with nullcontext(executor) if executor else ThreadPoolExecutor(parallel_cores()) as pool:
        futures = [pool.submit(_into_the_store, one) for one in made]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(number / len(futures))
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _save_all(made: Sequence[_Made], folder: Path) -> dict[str, LayerRecord]:
    """An artifact for each kernel, one for those that are the same; all are in the store by now."""
    layers: dict[str, LayerRecord] = {}
    places: dict[Path, str] = {}
    for one in made:
        kernel = _compile(one)
        place = places.get(kernel.artifact.folder)
        if place is None:
            place = kernel.name if not (folder / kernel.name).exists() else f"{kernel.name}-{len(places)}"
            places[kernel.artifact.folder] = place
            kernel.save(folder / place)
        m, v = kernel.artifact.manifest, kernel.verdict
        layers[one.job.name] = LayerRecord(
            place, Artifact(folder / place, m).sha256, one.job.tensors, kernel.pattern.density, one.mass, m.cost.n,
            m.cost.measured_seconds or m.cost.seconds, v.speedup,
        )  # fmt: skip
    return layers
