"""Weights on disk: what is written comes back, damage is named, nothing is unpickled."""

import io
import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as safetensors
import scipy.sparse as sp

from bsrgen.errors import ArgumentError, ArgumentTypeError, BsrgenError, PatternError, StoreError
from bsrgen.files import read_weight, write_weight
from bsrgen.pattern import Weight, as_weight, random_weight


@pytest.fixture
def weight():
    return random_weight(3, (10, 7), (4, 3), 0.5)


def same(a, b):
    assert a.pattern.difference(b.pattern) is None
    assert a.digest == b.digest


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("shape", [(10, 7), (0, 7), (10, 0), (8, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8"])
def test_round_trip(tmp_path, suffix, shape, dtype):
    weight = random_weight(3, shape, (4, 3), 0.5, dtype=dtype)
    path, again = tmp_path / f"W{suffix}", tmp_path / f"again{suffix}"
    write_weight(path, weight)
    write_weight(str(again), weight)
    assert path.read_bytes() == again.read_bytes()
    same(read_weight(path), weight)
    same(read_weight(str(path), blocksize=(2, 2)), as_weight(weight, blocksize=(2, 2), dtype=None))


def test_bfloat16(tmp_path, weight):
    half = Weight(weight.pattern, weight.data.astype(ml_dtypes.bfloat16))
    write_weight(tmp_path / "W.safetensors", half)
    same(read_weight(tmp_path / "W.safetensors"), half)
    with pytest.raises(ArgumentTypeError, match=r"cannot hold bfloat16; write \.safetensors"):
        write_weight(tmp_path / "W.npz", half)


def test_several_in_one_file(tmp_path, weight):
    dense = np.eye(4, dtype=np.float32)
    p = weight.pattern
    tensors = {"up.values": weight.data, "up.crow_indices": p.indptr, "up.col_indices": p.indices.astype(np.int64)}
    path = tmp_path / "W.safetensors"
    safetensors.save_file(tensors | {"down": dense, "bias": np.ones(3)}, path, {"bsr.up.shape": "[10, 7]"})
    same(read_weight(path), weight)
    same(read_weight(path, key="up"), weight)
    same(read_weight(path, key="down", blocksize=(2, 2)), as_weight(dense, blocksize=(2, 2)))
    with pytest.raises(ArgumentError, match=r"W\.safetensors: W has no blocks of its own"):
        read_weight(path, key="down")
    with pytest.raises(ArgumentError, match=r"has no matrix 'bias' \(it has: down, up\)"):
        read_weight(path, key="bias")
    safetensors.save_file({"a": dense, "b": dense}, path)
    with pytest.raises(ArgumentError, match=r"holds 2 matrices; choose one with key= \(it has: a, b\)"):
        read_weight(path, blocksize=(2, 2))
    np.savez(tmp_path / "W.npz", a=dense, b=dense)
    same(read_weight(tmp_path / "W.npz", key="b", blocksize=(2, 2)), as_weight(dense, blocksize=(2, 2)))
    with pytest.raises(ArgumentError, match="key="):
        read_weight(tmp_path / "W.npz", blocksize=(2, 2))


@pytest.mark.parametrize("form", ["bsr", "csr", "csc", "coo", "dia"])
@pytest.mark.parametrize("make", [sp.coo_array, sp.coo_matrix])
def test_scipy_files(tmp_path, form, make):
    dense = np.triu(np.ones((6, 4)))
    sp.save_npz(tmp_path / "W.npz", make(dense).asformat(form))
    weight = read_weight(tmp_path / "W.npz", blocksize=(3, 2))
    np.testing.assert_array_equal(weight.todense(), dense)
    assert weight.data.dtype == np.float64
    if form != "bsr":
        with pytest.raises(ArgumentError, match="blocksize="):
            read_weight(tmp_path / "W.npz")


def test_npy(tmp_path):
    for dtype, kept in (("int8", "int8"), ("int64", "float32"), (">f2", "float16"), ("float64", "float64")):
        dense = np.eye(4, dtype=dtype)
        np.save(tmp_path / "W.npy", dense)
        same(read_weight(tmp_path / "W.npy", blocksize=(2, 2)), as_weight(dense, blocksize=(2, 2), dtype=kept))
    with pytest.raises(ArgumentError, match="leave key='a' out"):
        read_weight(tmp_path / "W.npy", key="a", blocksize=(2, 2))


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    bomb = np.array([[Bomb()]], object)
    np.save(tmp_path / "a.npy", bomb)
    np.savez(tmp_path / "b.npz", bomb)
    np.savez(tmp_path / "c.npz", data=bomb, indices=[0], indptr=[0, 1], shape=(1, 1))
    np.savez(tmp_path / "d.npz", format=bomb, data=[1.0])
    bomb.dump(tmp_path / "e.npy")
    for path in tmp_path.iterdir():
        with pytest.raises(PatternError, match=path.name):
            read_weight(path, blocksize=(1, 1))


def test_no_such_file(tmp_path, weight):
    for name in ("W.npz", "W.npy", "W.safetensors"):
        with pytest.raises(ArgumentError, match=f"{name}: cannot be read: No such file"):
            read_weight(tmp_path / name)
        (tmp_path / "folder" / name).mkdir(parents=True)
        with pytest.raises(ArgumentError, match="Is a directory"):
            read_weight(tmp_path / "folder" / name)
    for name in ("W.mtx", "W"):
        with pytest.raises(ArgumentError, match=r"one of \.npz, \.npy, \.safetensors"):
            read_weight(tmp_path / name)
    with pytest.raises(ArgumentError, match=r"one of \.npz, \.safetensors"):
        write_weight(tmp_path / "W.npy", weight)
    for name in ("W.npz", "W.safetensors"):
        with pytest.raises(StoreError, match="No such file"):
            write_weight(tmp_path / "nowhere" / name, weight)


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
def test_damaged_files(tmp_path, weight, suffix):
    path = tmp_path / f"W{suffix}"
    if suffix == ".npy":
        np.save(path, weight.todense())
    else:
        write_weight(path, weight)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    cases = [b"", b"\0" * 64, b"not a file", good[::-1]] + [good[:n] for n in range(1, len(good), 37)]
    for _ in range(100):
        flipped = bytearray(good)
        for at in rng.integers(0, len(good), 3):
            flipped[at] ^= 1 << rng.integers(8)
        cases.append(bytes(flipped))
    refused = []
    for case in cases:
        path.write_bytes(case)
        try:
            read_weight(path, blocksize=(2, 2))  # a flipped value reads as another value
        except BsrgenError as e:
            refused.append(str(e))
    assert len(refused) >= len(cases) - 100
    assert all(path.name in message for message in refused)


def npz_of(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def huge_npy(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def zipped(name, data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def tensors_of(shape, **tensors):
    parts = {"values": np.ones((1, 2, 2), np.float32), "crow_indices": np.array([0, 1]), "col_indices": np.array([0])}
    named = {f"w.{k}": v for k, v in (parts | tensors).items()}
    return safetensors.save(named, {} if shape is None else {"bsr.w.shape": shape})


PARTS = {"data": np.ones((1, 2, 2)), "indices": [0], "indptr": [0, 1], "shape": (2, 2)}
HOSTILE = {
    "no shape.npz": npz_of(**{k: v for k, v in PARTS.items() if k != "shape"}),
    "column.npz": npz_of(**PARTS | {"indices": [7]}),
    "scalar shape.npz": npz_of(**PARTS | {"shape": 3}),
    "float shape.npz": npz_of(**PARTS | {"shape": (2.0, 2.0)}),
    "huge shape.npz": npz_of(**PARTS | {"shape": (2**40, 2)}),
    "unknown format.npz": npz_of(**PARTS | {"format": np.array(b"elf")}),
    "not a format.npz": npz_of(**PARTS | {"format": [1.0, 2.0]}),
    "scipy column.npz": npz_of(**PARTS | {"format": np.array(b"bsr"), "indices": [-7]}),
    "scipy indptr.npz": npz_of(**PARTS | {"format": np.array(b"csr"), "indptr": [0, 9, 1]}),
    "empty.npz": npz_of(),
    "text inside.npz": zipped("W.npy", b"hello"),
    "huge array.npz": zipped("W.npy", huge_npy((2**40, 2))),
    "overflow.npy": huge_npy((2**40, 2**40)),
    "huge array.npy": huge_npy((2**30, 2**10)),
    "strings.npy": npz_of(),
    "no metadata.safetensors": tensors_of(None),
    "words.safetensors": tensors_of("two by two"),
    "one number.safetensors": tensors_of("2"),
    "floats.safetensors": tensors_of("[2.0, 2]"),
    "three.safetensors": tensors_of("[2, 2, 2]"),
    "negative.safetensors": tensors_of("[-2, 2]"),
    "huge.safetensors": tensors_of(json.dumps([2**70, 2])),
    "deep.safetensors": tensors_of("[" * 100_000),
    "column.safetensors": tensors_of("[2, 2]", col_indices=np.array([5])),
    "short.safetensors": tensors_of("[2, 2]", crow_indices=np.array([0])),
    "float index.safetensors": tensors_of("[2, 2]", col_indices=np.array([0.0])),
    "nothing.safetensors": safetensors.save({}),
    "header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    with pytest.raises(BsrgenError, match=name):
        read_weight(path, blocksize=(1, 1))
