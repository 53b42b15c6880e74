"""A pattern as a PNG file: white is empty, black is stored."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from bsrgen.pattern import Pattern

MAX_PIXELS = 2048  # of a side
MIN_PIXELS = 256  # a smaller matrix is magnified


def png(pattern: Pattern, limit: int = MAX_PIXELS) -> bytes:
    """An 8-bit grey PNG of M x K pixels; what does not fit `limit` is drawn in tiles of blocks, grey by their fill."""
    p = pattern
    (high, tall), (wide, broad) = _scale(p.block_rows, p.R, limit), _scale(p.block_cols, p.C, limit)
    h, w = max(1, -(-p.block_rows // high)), max(1, -(-p.block_cols // wide))
    stored = np.bincount(p.rows // high * w + p.indices // wide, minlength=h * w).reshape(h, w)
    fill = stored / (high * wide)
    grey = np.where(stored, 200 - 200 * np.minimum(fill, 1), 255).astype(np.uint8)  # one block of many is still seen
    zoom = max(1, MIN_PIXELS // max(h * tall, w * broad))
    return _encode(grey.repeat(tall * zoom, 0).repeat(broad * zoom, 1))


def _scale(blocks: int, edge: int, limit: int) -> tuple[int, int]:
    """(blocks of a tile, pixels of a tile) along one side."""
    if blocks > limit:
        return -(-blocks // limit), 1
    return 1, max(1, min(edge, limit // max(blocks, 1)))


def _encode(grey: NDArray[np.uint8]) -> bytes:
    """PNG (ISO/IEC 15948): signature, IHDR, one IDAT of rows that each begin with filter 0, IEND."""
    h, w = grey.shape
    rows = np.zeros((h, w + 1), np.uint8)
    rows[:, 1:] = grey
    header = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
