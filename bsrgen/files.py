"""Weights on disk: .npz, .npy, .safetensors and .onnx.  Data never becomes code: nothing is unpickled."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bsrgen.errors import ArgumentError, ArgumentTypeError, BsrgenError, PatternError, StoreError
from bsrgen.onnx_graph import known_graph
from bsrgen.pattern import Weight, as_weight

_PARTS = ("values", "crow_indices", "col_indices")  # torch's words; metadata "bsr.<key>.shape" is a JSON list [M, K]


def read_weight(
    path: str | Path,
    *,
    key: str | None = None,
    blocksize: tuple[int, int] | None = None,
    otherwise: tuple[int, int] | None = None,
) -> Weight:
    """The weight in a file, in its own type where that is one of DTYPES, else in float32.

    .npz: scipy.sparse.save_npz, or arrays data, indices, indptr and shape, or a dense array; .npy: a dense array;
    .safetensors: <key>.values, <key>.crow_indices, <key>.col_indices and metadata bsr.<key>.shape, or a dense tensor;
    .onnx: the constant that a MatMul or Gemm multiplies with, turned where need be so that it is [M, K].
    `key` may be left out where the file holds one matrix.  `blocksize`, `otherwise` as in as_weight.
    """
    with _reading(path) as path:
        W, shape = _READERS[path.suffix](path, key)
        return as_weight(W, blocksize=blocksize, shape=shape, dtype=None, otherwise=otherwise)


@contextmanager
def _reading(path: str | Path) -> Iterator[Path]:
    """The path of a file that has a reader; all that goes wrong inside becomes an error of ours that names it."""
    path = Path(path)
    if path.suffix not in _READERS:
        raise ArgumentError(f"{path}: a weight is one of {', '.join(_READERS)}")
    try:
        yield path
    except BsrgenError as e:
        raise type(e)(f"{path}: {e}") from e
    except OSError as e:
        raise ArgumentError(f"{path}: cannot be read: {e.strerror or e}") from e
    except Exception as e:  # whatever a damaged file makes of numpy, zipfile, zlib, json and safetensors
        raise PatternError(f"{path}: damaged or not a {path.suffix} file: {e}") from e


def matrix_names(path: str | Path) -> list[str | None]:
    """The keys of all matrices in a file, for read_weight one by one; [None] for the one of a file without names.

    A .safetensors file gives its block-sparse matrices, or where it has none every 2-D tensor; an .npz file of plain
    arrays gives every 2-D array; an .onnx file the weights of its MatMul and Gemm nodes, by the names that they had in
    the checkpoint where the bias or the node's path tells, else by their own (onnx_graph.py).
    """
    with _reading(path) as path:
        return _NAMES[path.suffix](path) if path.suffix in _NAMES else [None]


def model_matrices(path: str | Path) -> list[str]:
    """The names of all matrices of a model's file, block-sparse and dense, in order of their names."""
    with _reading(path) as path:
        if path.suffix != ".safetensors":
            return sorted(name for name in matrix_names(path) if name is not None)
        from safetensors import safe_open

        with path.open("rb"), safe_open(path, "np") as file:
            return sorted(set.union(*_matrices(file)))


def read_matrix(path: str | Path, key: str | None) -> Any:
    """A matrix of a file as it is: dense ones as arrays, block-sparse ones as Weights.  `key` as in read_weight."""
    with _reading(path) as path:
        W, shape = _READERS[path.suffix](path, key)
        return W if shape is None else as_weight(W, shape=shape, dtype=None)


def read_vector(path: str | Path, key: str) -> Any:
    """A 1-D array of a model's file, or None where it holds none of that name."""
    with _reading(path) as path:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return arrays[key] if key in arrays.files and arrays[key].ndim == 1 else None
        if path.suffix == ".onnx":
            return _onnx_bias(path, key)
        from safetensors import safe_open

        with path.open("rb"), safe_open(path, "np") as file:
            found = key in file.keys() and len(file.get_slice(key).get_shape()) == 1  # noqa: SIM118  not a mapping
            return file.get_tensor(key) if found else None


def write_weight(path: str | Path, weight: Weight, key: str = "weight") -> None:
    """Write `weight` for read_weight, the same bytes every time; `key` names it in a .safetensors file."""
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ArgumentError(f"{path}: a weight is written as one of {', '.join(_WRITERS)}")
    try:
        _WRITERS[path.suffix](path, weight, key)
    except OSError as e:
        raise StoreError(f"{path}: cannot be written: {e.strerror or e}") from e


def _only(names: list[str], key: str | None) -> str:
    """`key`, or the one name there is."""
    if key is None and len(names) == 1:
        return names[0]
    if key in names:
        return str(key)
    listed = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
    asked = f"has no matrix {key!r}" if key is not None else f"holds {len(names)} matrices; choose one with key="
    raise ArgumentError(f"{asked} (it has: {listed or 'none'})")


def _read_npz(path: Path, key: str | None) -> tuple[Any, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names = set(arrays.files)
        if key is None and "format" in names:
            from scipy.sparse import load_npz

            return load_npz(path), None
        if key is None and {"data", "indices", "indptr"} <= names:
            if "shape" not in names:
                raise PatternError("the array shape is missing beside data, indices and indptr; add (M, K)")
            return (arrays["data"], arrays["indices"], arrays["indptr"]), arrays["shape"]
        return arrays[_only(arrays.files, key)], None


def _npz_names(path: Path) -> list[str | None]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names = set(arrays.files)
        if "format" in names or {"data", "indices", "indptr"} <= names:
            return [None]
        return [name for name in arrays.files if arrays[name].ndim == 2]


def _read_npy(path: Path, key: str | None) -> tuple[Any, Any]:
    if key is not None:
        raise ArgumentError(f"a .npy file holds one array without a name; leave key={key!r} out")
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False), None


def _read_safetensors(path: Path, key: str | None) -> tuple[Any, Any]:
    import ml_dtypes  # noqa: F401  numpy has to know bfloat16 before safetensors asks for it
    from safetensors import safe_open

    with path.open("rb"):  # OSError as the system says it
        pass
    with safe_open(path, "np") as file:
        notes, (sparse, dense) = file.metadata() or {}, _matrices(file)
        name = _only(sorted(sparse or dense) if key is None else sorted(sparse | dense), key)
        if name not in sparse:
            return file.get_tensor(name), None
        if f"bsr.{name}.shape" not in notes:
            raise PatternError(f"metadata bsr.{name}.shape is missing; it holds [M, K]")
        values, indptr, indices = (file.get_tensor(f"{name}.{part}") for part in _PARTS)
        return (values, indices, indptr), json.loads(notes[f"bsr.{name}.shape"])


def _safetensors_names(path: Path) -> list[str | None]:
    from safetensors import safe_open

    with path.open("rb"):
        pass
    with safe_open(path, "np") as file:
        sparse, dense = _matrices(file)
        return [*sorted(sparse or dense)]


def _read_onnx(path: Path, key: str | None) -> tuple[Any, Any]:
    graph = known_graph(path)
    products = graph.named()
    return graph.weight(products[_only(list(products), key)]), None


def _onnx_names(path: Path) -> list[str | None]:
    return [*sorted(known_graph(path).named())]


def _onnx_bias(path: Path, key: str) -> Any:
    """The bias X.bias of the product X.weight or X."""
    graph, stem = known_graph(path), key.removesuffix(".bias")
    product = next((graph.named()[name] for name in (f"{stem}.weight", stem) if name in graph.named()), None)
    return None if product is None or product.bias is None else graph.array(product.bias).ravel()


def _matrices(file: Any) -> tuple[set[str], set[str]]:
    """Names of the block-sparse matrices and of the other 2-D tensors in an open .safetensors file."""
    names = set(file.keys())
    sparse = {name.removesuffix(".values") for name in names if name.endswith(".values")}
    sparse = {name for name in sparse if all(f"{name}.{part}" in names for part in _PARTS)}
    parts = {f"{name}.{part}" for name in sparse for part in _PARTS}
    return sparse, {name for name in names - parts if len(file.get_slice(name).get_shape()) == 2}


def _write_npz(path: Path, weight: Weight, key: str) -> None:
    if weight.data.dtype.kind not in "fiu":
        raise ArgumentTypeError(f"{path}: .npz cannot hold {weight.data.dtype}; write .safetensors")
    p = weight.pattern
    np.savez(path, data=weight.data, indices=p.indices, indptr=p.indptr, shape=np.array(p.shape))


def _write_safetensors(path: Path, weight: Weight, key: str) -> None:
    from safetensors.numpy import save

    p = weight.pattern
    parts = (weight.data, p.indptr.astype(np.int32), p.indices)  # torch wants both index arrays of one dtype
    tensors = {f"{key}.{part}": array for part, array in zip(_PARTS, parts, strict=True)}
    path.write_bytes(save(tensors, {f"bsr.{key}.shape": json.dumps(p.shape)}))


_READERS: dict[str, Callable[[Path, str | None], tuple[Any, Any]]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
    ".onnx": _read_onnx,
}
_NAMES: dict[str, Callable[[Path], list[str | None]]] = {
    ".npz": _npz_names,
    ".safetensors": _safetensors_names,
    ".onnx": _onnx_names,
}
SUFFIXES = tuple(_READERS)
_WRITERS: dict[str, Callable[[Path, Weight, str], None]] = {".npz": _write_npz, ".safetensors": _write_safetensors}
