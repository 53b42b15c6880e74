"""The calibration: what this machine's CPU was measured to do, kept as one strict JSON record beside the store.

`bsrgen doctor --calibrate` writes it, targets.native() lays it over the default rates.  It is data, never code: what is
damaged, of another version or taken on another CPU counts as not being there.
"""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from bsrgen._paths import store_root
from bsrgen.errors import BsrgenError
from bsrgen.machine import cpu_model

FILE = "calibration.json"
SCHEMA = 2
MAX_BYTES = 1 << 16


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fields of Target, in its units; per core.  No fork_s: nothing to fork to.  No dots: the CPU has none."""

    ghz: float
    loads_per_cycle: float
    l2_bytes_per_cycle: float
    l3_bytes_per_cycle: float
    dram_bytes_per_cycle: float
    call_s: float
    fork_s: float | None = None
    bf16_dot_per_cycle: float | None = None
    int8_dot_per_cycle: float | None = None

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.known().items() if not (math.isfinite(value) and value > 0)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not a positive number")

    def known(self) -> dict[str, float]:
        """What was measured, by the name of Target's field."""
        values: dict[str, Any] = msgspec.structs.asdict(self)
        return {name: value for name, value in values.items() if value is not None}


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rates` of the CPU `cpu` at the ISA level `level`, measured on `date` (YYYY-MM-DD)."""

    schema: int
    cpu: str
    level: str
    date: str
    rates: Rates

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}: this bsrgen reads {SCHEMA}")


_DECODER = msgspec.json.Decoder(Calibration)  # made with the module: threads that make the first one together crash


def read() -> tuple[Calibration | None, str]:
    """The record of this user's store, and why there is none that counts: "" where nobody has calibrated."""
    try:
        path = store_root() / FILE
        with path.open("rb") as file:
            record = _DECODER.decode(file.read(MAX_BYTES))
    except FileNotFoundError:
        return None, ""
    except BsrgenError as e:  # nowhere to keep a store
        return None, str(e)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        return None, f"{path} is not a calibration of this bsrgen: {e}"
    if record.cpu != cpu_model():
        return None, f"{path} was taken on another CPU, {record.cpu}"
    return record, ""


def write(record: Calibration, root: Path) -> Path:
    """Put `record` into the store's folder `root` by rename: nobody ever reads half of it.  OSError as it comes."""
    fd, temp = tempfile.mkstemp(prefix=f".{FILE}.", dir=root)
    try:
        with open(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        os.replace(temp, root / FILE)
    except BaseException:
        os.unlink(temp)
        raise
    return root / FILE
