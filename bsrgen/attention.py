"""Block-sparse attention: which keys a query sees, as a rule; the blocks that hold them and their masks; the kernel.

from bsrgen import attention
k = attention.compile(4096, 64, attention.causal() & attention.sliding_window(512))
y = k(q, key, value)  # [..., 4096, 64] each
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bsrgen import api, build
from bsrgen.arguments import default_threads
from bsrgen.backends import backend_of
from bsrgen.errors import ArgumentError, UnsupportedError
from bsrgen.foreign import count, pair
from bsrgen.operators import ATTENTION, SOFTMAX
from bsrgen.pattern import Pattern
from bsrgen.pattern_compile import compile_pattern
from bsrgen.pattern_kernel import OfPattern
from bsrgen.pattern_problem import Mask, PatternProblem, as_pattern_problem, refuse_values

Array = NDArray[Any]
KEYS_STEP = 16  # keys of a block are whole vectors of every target
MOST_SCORES = 1 << 22  # bytes of the scores of one query that a kernel keeps


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees: allowed(q, k) of positions, arrays that broadcast -> bool.  Rules combine by & and |."""

    name: str
    allowed: Callable[[Array, Array], Array]

    def __and__(self, other: "Rule") -> "Rule":
        if not isinstance(other, Rule):
            return NotImplemented
        return Rule(f"({self} & {other})", lambda q, k: self.allowed(q, k) & other.allowed(q, k))

    def __or__(self, other: "Rule") -> "Rule":
        if not isinstance(other, Rule):
            return NotImplemented
        return Rule(f"({self} | {other})", lambda q, k: self.allowed(q, k) | other.allowed(q, k))

    def __str__(self) -> str:
        return self.name

    def dense(self, queries: int, keys: int) -> Array:
        """bool[queries, keys]: the mask that a dense product would take."""
        q, k = np.arange(queries)[:, None], np.arange(keys)
        return np.asarray(self.allowed(q, k)) & np.ones((queries, keys), bool)


def causal() -> Rule:
    """Keys up to the query itself."""
    return Rule("causal", lambda q, k: k <= q)


def sliding_window(size: int) -> Rule:
    """Keys less than `size` positions away, before or behind; with causal(), the last `size`, its own among them.

    Beltagy, Peters, Cohan, Longformer, arXiv 2004.05150, section 3.1.
    """
    size = count("size", size, 1)
    return Rule(f"sliding_window({size})", lambda q, k: abs(q - k) < size)


def global_(tokens: int) -> Rule:
    """The first `tokens` positions see all keys and are seen by all queries (the same paper; with | ...)."""
    tokens = count("tokens", tokens, 0)
    return Rule(f"global_({tokens})", lambda q, k: (q < tokens) | (k < tokens))


def attention_blocks(rule: Rule | Array, queries: int, keys: int, blocksize: tuple[int, int]) -> tuple[Pattern, Mask]:
    """The blocks of which an element counts, and the masks of those of which not all do, equal ones kept once.

    rule: a Rule, or bool[queries, keys].
    """
    R, C = blocksize
    rows, cols = -(-queries // R), -(-keys // C)
    k, known = np.arange(cols * C), dict[bytes, int]()
    found, kinds = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
    for i in range(rows):
        q, here = np.arange(i * R, (i + 1) * R)[:, None], min(R, queries - i * R)
        strip = np.zeros((R, cols * C), bool)
        strip[:here, :keys] = rule.allowed(q[:here], k[:keys]) if isinstance(rule, Rule) else rule[i * R : i * R + here]
        blocks = strip.reshape(R, cols, C).transpose(1, 0, 2)
        stored = np.flatnonzero(blocks.any(axis=(1, 2)))
        masks: list[Array] = list(np.packbits(blocks[stored], axis=2, bitorder="little"))
        whole: Array = np.all(blocks[stored, :here], axis=(1, 2))
        number = [0 if w else known.setdefault(m.tobytes(), len(known) + 1) for w, m in zip(whole, masks, strict=True)]
        found.append(stored)
        kinds.append(np.array(number, np.uint32))
    indptr = np.cumsum([stored.size for stored in found])
    bits = np.frombuffer(b"".join(known), np.uint8).reshape(len(known), R, -(-C // 8))
    pattern = Pattern((queries, keys), blocksize, indptr, np.concatenate(found).astype(np.int32))
    return pattern, Mask(np.concatenate(kinds), bits)


def compile(
    tokens: int | tuple[int, int],
    head: int,
    rule: Rule | Array,
    *,
    blocksize: tuple[int, int] = (64, 64),
    dtype: DTypeLike = "float32",
    backend: str = "auto",
    target: str | tuple[str, ...] = "native",
    threads: int | None = None,
) -> OfPattern:
    """The kernel Y = softmax(scale * Q @ K.T where `rule` allows it) @ V of heads of `head` elements.

    y = k(q, key, value, scale=...): q, y [..., tokens, head], key, value the same; tokens=(queries, keys) where they
    differ.  Leading axes are heads and batches, free at each call.  scale: 1 / sqrt(head) unless given.  A query that
    sees no key gives zeros.  Numerics are fixed: scores and their largest of all keys of a query, e^(score - largest)
    within 1 ulp (runtime/bsrgen_math.h), sums in float32 (float64 for float64), results in that type.
    rule: causal(), sliding_window(w), global_(n), their & and |, or bool[queries, keys].  Only blocks of which an
    element counts are computed, elements that do not count are masked; Inf or NaN in the values of such keys may show.
    backend: "c", or "cuda" for arrays of a GPU, whose softmax goes along with the sums: exponentials are CUDA's.
    blocksize: queries x keys, keys in multiples of 16.  dtype: float32, float64, bfloat16 or float16, of Q, K and V.
    Errors: ArgumentError, ArgumentTypeError, UnsupportedError, BuildError, StoreError.
    """
    pattern, mask = _blocks(tokens, rule, blocksize)
    sample = as_pattern_problem(ATTENTION.name, pattern, dtype, head=count("head", head, 1), mask=mask)
    return _kernel(sample, backend, target, threads)


def compile_softmax(
    tokens: int | tuple[int, int],
    rule: Rule | Array,
    *,
    blocksize: tuple[int, int] = (64, 64),
    dtype: DTypeLike = "float32",
    backend: str = "auto",
    target: str | tuple[str, ...] = "native",
    threads: int | None = None,
) -> OfPattern:
    """The kernel of the softmax alone, over elements that `rule` allows: p = k(s, scale=...), [..., nnzb, R, C] both.

    Arguments, numerics and errors are those of `compile`; p is zero where an element does not count.  The stored
    blocks are k.pattern: `bsrgen.compile(k.pattern, "sddmm")` gives scores in that order.
    """
    pattern, mask = _blocks(tokens, rule, blocksize)
    return _kernel(as_pattern_problem(SOFTMAX.name, pattern, dtype, mask=mask), backend, target, threads)


def _kernel(sample: PatternProblem, backend: str, target: str | tuple[str, ...], threads: int | None) -> OfPattern:
    refuse_values(sample.operator.name, backend, {})
    targets = backend_of(backend, "static").targets(target)
    default_threads(threads)
    build.prepare_calls()
    return compile_pattern(sample, targets, api._own_digest(), threads)


def _blocks(tokens: int | tuple[int, int], rule: Rule | Array, blocksize: tuple[int, int]) -> tuple[Pattern, Mask]:
    """attention_blocks, its arguments checked."""
    both = tokens if isinstance(tokens, (tuple, list)) else (count("tokens", tokens, 0),) * 2
    (queries, keys), (R, C) = pair("tokens", both, 0), pair("blocksize", blocksize, 1)
    if C % KEYS_STEP:
        raise UnsupportedError(f"blocksize={blocksize}: attention takes blocks of keys in multiples of {KEYS_STEP}")
    if not isinstance(rule, Rule):
        rule = np.asarray(rule)
        if rule.dtype != bool or rule.shape != (queries, keys):
            raise ArgumentError(f"rule of {rule.dtype}{list(rule.shape)}: a Rule, or bool[{queries}, {keys}]")
    if keys * 8 > MOST_SCORES:
        raise UnsupportedError(f"{keys} keys: scores of a query are kept, of at most {MOST_SCORES // 8}")
    return attention_blocks(rule, queries, keys, (R, C))
