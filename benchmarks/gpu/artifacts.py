"""Kernels of points, made ahead: compiled where there is nvcc, carried in a folder, loaded where there is a GPU.

The weights in them are zeros, so that a packed artifact takes some 300 KB; the values come with `update`.
"""

import atexit
import hashlib
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.points import Point
from bsrgen import __version__, api
from bsrgen.loading import load
from bsrgen.pattern import Weight

PRESET = 3  # of xz: higher ones take seconds for a few percent


@dataclass(frozen=True, slots=True)
class Makes:
    """How kernels are made: for which target, by which tuning, and the folder of those made ahead, if any."""

    target: str | tuple[str, ...]
    tune: str = "model"
    folder: Path | None = None
    mode: str = "static"

    def place(self, point: Point) -> Path | None:
        """Where the packed artifact of a point lies or would."""
        if self.folder is None:
            return None
        what = f"{__version__} {api._own_digest()} {self.target} {self.tune} {self.mode} {point!r}"
        return self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.tar.xz"

    def make(self, point: Point) -> Path:
        """A folder with the artifact of a point: from the folder of those made ahead, else compiled, and put there."""
        made = tempfile.mkdtemp(prefix="bsrgen-gpu-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)  # kernels read in it as long as they live
        target = Path(made) / "kernel"
        place = self.place(point)
        if place is not None and place.is_file():
            with tarfile.open(place) as packed:
                packed.extractall(target, filter="data")
            return target
        empty = point.weight()
        weight = Weight(empty.pattern, np.zeros_like(empty.data))
        options: dict[str, Any] = {"dtype": point.dtype, "n": point.n, "backend": "cuda", "tune": self.tune}
        options["mode"] = self.mode
        api.compile(weight, point.operator, target=self.target, **options).save(target)
        if place is not None:
            pack(target, place)
        return target

    def kernel(self, folder: Path, weight: Weight) -> Any:
        """The kernel in `folder` with the values of `weight`."""
        kernel = load(folder)
        kernel.update(weight)
        return kernel


def pack(folder: Path, place: Path) -> None:
    """`folder` as one file, put there by rename."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temp = place.with_suffix(f".{os.getpid()}.tmp")
    with tarfile.open(temp, "w:xz", preset=PRESET) as packed:
        for path in sorted(folder.iterdir()):
            packed.add(path, path.name)
    temp.replace(place)
