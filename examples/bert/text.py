"""Text that is on every machine: docstrings of the library and of installed packages, as passages and batches."""

import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

PACKAGES = ("numpy", "scipy", "torch")
APART = {"site-packages", "test", "tests", "testing", "idlelib"}  # folders of files with little prose
LEAST, MOST = 40, 600  # characters of a passage

Batch = tuple[Tensor, Tensor]  # ids and live [batch, tokens]


def installed() -> tuple[str, ...]:
    """Names of the packages beside numpy, ascending."""
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    return tuple(sorted(p.parent.name for p in Path(spec.origin).parents[1].glob("*/__init__.py")))


def passages(packages: tuple[str, ...] = PACKAGES, library: bool = True) -> list[str]:
    """Distinct paragraphs of prose, in an order that is random but always the same for the same files."""
    roots = [Path(sysconfig.get_path("stdlib"))] if library else []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            roots.append(Path(spec.origin).parent)
    files = {p for root in roots for p in root.rglob("*.py") if not APART & set(p.relative_to(root).parts)}
    found = {text for path in sorted(files) for doc in _docstrings(path) for text in _prose(doc)}
    ordered = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    random.Random(0).shuffle(ordered)
    return ordered


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(errors="replace"))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _prose(docstring: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(paragraph.split())[:MOST]
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(text) >= LEAST and ">>>" not in text and letters > 0.8 * len(text):
            yield text


def batches(tokenizer: Tokenizer, texts: list[str], size: int | None, tokens: int, most: int = 0) -> list[Batch]:
    """Batches of `size` texts of like length, cut at `tokens` tokens; of size None: of about `most` tokens."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens)
    encoded = sorted((one.ids for one in tokenizer.encode_batch(texts)), key=len)
    found, i = [], 0
    while i < len(encoded):
        count = size or max(most // len(encoded[i]), 1)
        found.append(_batch(encoded[i : i + count]))
        i += count
    return found


def _batch(encoded: list[list[int]]) -> Batch:
    longest = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in encoded])
    return ids, torch.tensor([[i < len(row) for i in range(longest)] for row in encoded])
