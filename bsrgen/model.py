"""Model: the kernels of many layers as one folder with one manifest.  Loads without a compiler."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from bsrgen.artifact import Artifact, files_of, read_artifact
from bsrgen.errors import ArtifactCorruptError, ArtifactError
from bsrgen.kernel import Kernel
from bsrgen.loading import kernel_of

MODEL = "model.json"
BESIDE = ("model.onnx", "model.onnx.data", "libbsrgen_onnx.so")  # what a rewritten ONNX model has in its folder
KERNELS = "kernels"  # folder of the artifacts
SCHEMA = 1


class LayerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel of the model."""

    kernel: str  # folder in KERNELS, an artifact of its own; of several layers where all of it is the same
    sha256: str  # of that artifact's manifest
    tensors: tuple[str, ...]  # in the file that the model was compiled from
    density: float  # stored blocks / all blocks
    mass: float  # share of the squared norm of the tensors that is stored
    n: int
    seconds: float  # predicted, or measured where it was tuned, one call of n tokens on one core
    speedup: float  # over a dense product


class ModelRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """model.json."""

    schema: int
    bsrgen: str
    source: str  # sha256 of the file of weights
    layers: dict[str, LayerRecord]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}: this bsrgen reads {SCHEMA}")
        for layer in self.layers.values():
            if layer.kernel in ("", ".", "..") or Path(layer.kernel).name != layer.kernel:
                raise ValueError(f"kernel {layer.kernel!r:.80} is not the name of a folder")

    @property
    def seconds(self) -> float:
        """Predicted time of one call of every kernel, on one core."""
        return sum(layer.seconds for layer in self.layers.values())


class Model(Mapping[str, Kernel]):
    """The kernels of a model by layer name: y = model["encoder.layer.0.output.dense"](x)."""

    def __init__(self, folder: Path, record: ModelRecord, kernels: Mapping[str, Kernel]) -> None:
        self.folder, self.record, self._kernels = folder, record, dict(kernels)

    def __getitem__(self, name: str) -> Kernel:
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)

    @property
    def seconds(self) -> float:
        """Predicted time of one call of every kernel, on one core."""
        return self.record.seconds

    def __repr__(self) -> str:
        return f"<bsrgen.Model of {len(self)} kernels in {self.folder}>"


_DECODER = msgspec.json.Decoder(ModelRecord)  # made with the module: threads that make the first one together crash


def read_record(folder: Path, expect_sha256: str | None = None) -> ModelRecord:
    """model.json of a folder.  ArtifactError, ArtifactCorruptError."""
    try:
        data = (folder / MODEL).read_bytes()
    except OSError as e:
        way = "a model is a folder made by `bsrgen compile WEIGHTS --config TOML -o FOLDER`"
        raise ArtifactError(f"{folder}: no {MODEL} ({e.strerror}); {way}") from e
    digest = hashlib.sha256(data).hexdigest()
    if expect_sha256 is not None and digest != expect_sha256.lower():
        raise ArtifactCorruptError(f"{folder / MODEL}: has sha256 {digest}, expected {expect_sha256}")
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ArtifactError(f"{folder / MODEL}: not a model of this bsrgen: {e}; compile it again") from e


def load_model(
    folder: str | os.PathLike[str], *, threads: int | None = None, expect_sha256: str | None = None
) -> Model:
    """Load all kernels of a model.  Never compiles; every file is checked before anything is mapped.

    threads: default for calls, None means all usable cores.  expect_sha256: of model.json, which holds the digests of
    all artifacts, when the caller knows whose model it must be.
    Errors: ArtifactError, ArtifactCorruptError, IncompatibleCPUError.
    """
    folder = Path(folder).absolute()
    record = read_record(folder, expect_sha256)
    own: dict[str, Artifact] = {}
    kernels: dict[str, Kernel] = {}
    for name, layer in record.layers.items():
        if layer.kernel not in own:
            own[layer.kernel] = read_artifact(folder / KERNELS / layer.kernel, layer.sha256)
        kernels[name] = kernel_of(own[layer.kernel], threads=threads)  # one each: layers are updated one by one
    return Model(folder, record, kernels)


def model_files(folder: Path) -> set[str]:
    """The files of the model in a folder, as its records say.  OSError, ArtifactError."""
    places = {f"{KERNELS}/{layer.kernel}" for layer in read_record(folder).layers.values()}
    return {MODEL, *BESIDE, *(f"{place}/{name}" for place in places for name in files_of(folder / place))}
