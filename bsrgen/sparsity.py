"""Sparsity: which weights of a model become kernels, and how; read from a TOML file."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from bsrgen.errors import ArgumentError

Names = str | tuple[str, ...]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What [default], [[layer]] and [[fuse]] may say; None is left to the next one, in the end to bsrgen.compile."""

    blocksize: tuple[int, int] | str | None = None  # [32, 1] or "32x1"
    density: float | None = None  # prune by magnitude to it; without, all-zero blocks are absent
    balanced: bool | None = None  # prune each block row to the same number of blocks
    bias: bool | None = None  # True unless said otherwise: X.bias beside X.weight is added
    epilogue: tuple[str, ...] | None = None  # after the bias
    dtype: str | None = None
    x_dtype: str | None = None
    out_dtype: str | None = None
    quantize_x: bool | None = None
    n: int | None = None
    tune: Literal["off", "model", "measure"] | None = None
    strict: bool | None = None


class Layer(_Table, frozen=True, kw_only=True):
    """Each tensor whose name matches is one kernel, called as the tensor without ".weight"."""

    match: str
    skip: bool = False


class Fuse(_Table, frozen=True, kw_only=True):
    """Tensors that share X, one pattern for each, in one kernel, for every text that the asterisks stand for: Q, K and
    V, or with the epilogue "swiglu" gate and up.  The kernel's name has the same asterisks."""

    match: tuple[str, ...]
    name: str


class Sparsity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole file.  An asterisk matches any text.  The first table that matches a tensor takes it, [[fuse]] before
    [[layer]]; tensors that none matches are left out."""

    default: _Table = _Table()
    layer: tuple[Layer, ...] = ()
    fuse: tuple[Fuse, ...] = ()
    target: Names = "native"
    backend: str = "auto"


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to be: its name, the tensors it is made of, and what the tables say of it."""

    name: str
    tensors: tuple[str, ...]
    blocksize: tuple[int, int] | None
    density: float | None
    balanced: bool
    bias: bool
    epilogue: tuple[str, ...]
    options: dict[str, Any]  # of bsrgen.compile


def read_sparsity(path: str | Path) -> Sparsity:
    """The tables of a TOML file.  ArgumentError says which field is wrong."""
    try:
        return msgspec.toml.decode(Path(path).read_bytes(), type=Sparsity)
    except OSError as e:
        raise ArgumentError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise ArgumentError(f"{path}: not a table of layers: {e}") from e


def jobs_of(sparsity: Sparsity, names: Iterable[str]) -> list[Job]:
    """The kernels that the tables make of tensors with these names, in the order of the names.

    ArgumentError where a table matches nothing, a fused tensor is missing, or two kernels have one name.
    """
    names = list(names)
    left, jobs = dict.fromkeys(names), []
    for fuse in sparsity.fuse:
        found = list(_fused(fuse, left))
        if not found:
            raise ArgumentError(f"[[fuse]] {fuse.name!r}: no tensor matches {fuse.match[0]!r}" if fuse.match else
                                f"[[fuse]] {fuse.name!r}: match names no tensors")  # fmt: skip
        for name, tensors in found:
            jobs.append(_job(name, tensors, sparsity, fuse))
            for tensor in tensors:
                left.pop(tensor, None)
    used = set()
    for tensor in left:
        table = next((layer for layer in sparsity.layer if _pattern(layer.match).match(tensor)), None)
        used.add(table)
        if table is not None and not table.skip:
            jobs.append(_job(tensor.removesuffix(".weight"), (tensor,), sparsity, table))
    for layer in sparsity.layer:
        if layer not in used:
            raise ArgumentError(f"[[layer]] match={layer.match!r}: no tensor is left that it matches")
    jobs.sort(key=lambda job: names.index(job.tensors[0]))
    twice = {job.name for job in jobs if [other.name for other in jobs].count(job.name) > 1}
    if twice or not jobs:
        raise ArgumentError(f"two kernels are called {min(twice)!r}" if twice else "the tables choose no tensor")
    return jobs


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(r"\A" + "(.*)".join(re.escape(part) for part in text.split("*")) + r"\Z")


def _fused(fuse: Fuse, left: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and tensors of each group."""
    for tensor in list(left):
        hit = _pattern(fuse.match[0]).match(tensor) if fuse.match else None
        if hit is None:
            continue
        group = tuple(_filled(text, hit.groups(), fuse) for text in fuse.match)
        missing = [name for name in group if name not in left]
        if missing:
            raise ArgumentError(f"[[fuse]] {fuse.name!r}: {tensor!r} is there, {missing[0]!r} is not")
        yield _filled(fuse.name, hit.groups(), fuse), group


def _filled(text: str, stars: tuple[str, ...], fuse: Fuse) -> str:
    parts = text.split("*")
    if len(parts) != len(stars) + 1:
        raise ArgumentError(f"[[fuse]] {fuse.name!r}: {text!r} must have {len(stars)} asterisks, as {fuse.match[0]!r}")
    return parts[0] + "".join(star + part for star, part in zip(stars, parts[1:], strict=True))


def _job(name: str, tensors: tuple[str, ...], sparsity: Sparsity, table: Layer | Fuse) -> Job:
    said = {
        field: value if (value := getattr(table, field)) is not None else getattr(sparsity.default, field)
        for field in _Table.__struct_fields__
    }
    own = ("blocksize", "density", "balanced", "bias", "epilogue")
    options = {field: value for field, value in said.items() if field not in own and value is not None}
    target = sparsity.target if isinstance(sparsity.target, str) else tuple(sparsity.target)
    options |= {"target": target, "backend": sparsity.backend}
    epilogue, bias = tuple(said["epilogue"] or ()), said["bias"] is not False
    blocksize = _blocksize(said["blocksize"])
    return Job(name, tensors, blocksize, said["density"], bool(said["balanced"]), bias, epilogue, options)


def _blocksize(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, str):
        return value if value is None else (value[0], value[1])
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", value)
    if found is None:
        raise ArgumentError(f"blocksize={value!r}: rows x columns, as '32x1' or [32, 1]")
    return int(found[1]), int(found[2])
