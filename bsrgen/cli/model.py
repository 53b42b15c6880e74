"""The folder of a whole model, as compile --config, inspect and verify show it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsrgen.cli.common import duration, facts

if TYPE_CHECKING:
    from bsrgen.model import ModelRecord


def record_of(folder: Path, expect_sha256: str | None = None) -> "ModelRecord | None":
    """The record of a model, None where the folder is none.  ArtifactError, ArtifactCorruptError."""
    from bsrgen.model import MODEL, read_record

    return read_record(folder, expect_sha256) if (folder / MODEL).is_file() else None


def model_document(folder: Path, record: "ModelRecord") -> dict[str, Any]:
    """The layers of a model."""
    import msgspec

    return {"folder": str(folder), "layers": msgspec.to_builtins(record.layers)}


def model_facts(folder: Path, record: "ModelRecord", more: str = "") -> None:
    """The layers of a model for people."""
    rows = [
        (name, f"density {r.density:.3g}, mass {r.mass:.3f}, {duration(r.seconds)} at n = {r.n}, {r.speedup:.2g}x")
        for name, r in record.layers.items()
    ]
    facts(f"{folder}: {len(rows)} kernels, {duration(record.seconds)} for one call of each{more}", rows)
