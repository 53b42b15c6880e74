"""Block shape, sparsity, quality and latency of whole encoders beside each other, as one page.

    python examples/bert/study.py small /tmp/small       # minutes
    python examples/bert/study.py full /tmp/full         # hours; a run that is stopped goes on with the next point
    python examples/bert/study.py full /tmp/full --only '80$' --minutes 0 --seconds 12    # those of 80 %, untrained

Two models: MiniLM, pruned layer after layer against the dense one (obs.py) and distilled for some minutes, or as long
as recover.py has done it in FOLDER/minilm-RxC-PERCENT; and one of BERT-base's shape with random weights, for latency
alone.  Each point is a JSON file; its contenders are timed in alternation, in one run.  Quality is judged on passages
that no weight was fitted to: the mean cosine to the dense model's embeddings, and how far a search among the passages
finds the same.
"""

import argparse
import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from contenders import TYPES, Embed, converted, peers
from model import Encoder, Shape, minilm
from obs import Block
from page import write
from recover import Text, recover, start, texts

import bsrgen.integrations.torch as bt
from bsrgen.bench.clock import at_their_best, measure, peer_threads

BLOCKS = ((1, 1), (4, 4), (16, 16), (32, 1), (1, 32), (32, 32), (64, 64))
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BERT_BASE = Shape(12, 768, 12, 3072, 30522, 512, 1e-12)
TOKENS, BATCHES = 128, (1, 16)
QUERIES, TOP = 128, 10

Rivals = Callable[[], dict[str, Embed]]


@dataclass(frozen=True)
class Point:
    """One model, pruned."""

    model: str
    block: Block
    sparsity: float

    def __str__(self) -> str:
        return f"{self.model}-{self.block[0]}x{self.block[1]}-{self.sparsity:.0%}".rstrip("%")


@dataclass(frozen=True)
class Size:
    """How much of the study: points, layers of the random model, passages, minutes of training, seconds of timing."""

    minilm: tuple[tuple[Block, float], ...]
    random: tuple[tuple[Block, float], ...]
    layers: int
    training: int
    minutes: float
    seconds: float


EVERY = tuple(itertools.product(BLOCKS, SPARSITIES))
SIZES = {
    "small": Size((((32, 1), 0.8), ((16, 16), 0.8)), (((32, 1), 0.8),), 2, 2_000, 1.0, 10.0),
    "full": Size(EVERY, EVERY, 12, 25_000, 10.0, 60.0),
}


def student(
    point: Point, dense: Encoder, text: Text | None, folder: Path, minutes: float
) -> tuple[Encoder, dict[str, float]]:
    """The pruned model, its zeros stored, and how long it was trained."""
    if text is None:
        model = copy.deepcopy(dense)
        bt.prune_(model.layers, point.block, 1 - point.sparsity)
        return model, {}
    run = start(dense, text, 1 - point.sparsity, point.block, folder / str(point), step=1.0)
    if run.wall_s < 60 * minutes:
        recover(run, dense, text, folder / str(point), folder / "aims", 60 * minutes)
    model = copy.deepcopy(dense)
    model.load_state_dict(run.dense())
    return model, {"steps": run.steps, "cpu_minutes": round(run.cpu_s / 60, 1)}


def quality(embed: Embed, dense: torch.Tensor, text: Text) -> dict[str, float]:
    """Of embeddings beside the dense ones [passages, hidden]: each query looks among the other passages."""
    with torch.inference_mode():
        found = torch.cat([embed(*batch) for batch in text.near]).float()
    order = torch.randperm(len(dense), generator=torch.Generator().manual_seed(0))
    ranks = [(rows[order[:QUERIES]] @ rows[order[QUERIES:]].T).topk(TOP).indices for rows in (found, dense)]
    same = (ranks[0][:, :, None] == ranks[1][:, None, :]).any(-1).float().mean()
    first = (ranks[0][:, 0] == ranks[1][:, 0]).float().mean()
    return {"cosine": float((found * dense).sum(-1).mean()), "top 1": float(first), "top 10": float(same)}


def sentences(batch: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(vocabulary, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def times(models: dict[str, Embed], vocabulary: int, seconds: float, threads: int) -> dict[str, Any]:
    """Milliseconds, best and median, and gains over torch's eager float32, by batch and contender."""
    found: dict[str, Any] = {}
    for batch in BATCHES:
        calls = {name: partial(model, *sentences(batch, vocabulary)) for name, model in models.items()}
        with torch.inference_mode():
            taken = measure(
                calls, rounds=None, seconds=seconds, cpus=None if threads == 1 else (),
                settle_s=0.0 if threads == 1 else 5e-3,
            )  # fmt: skip
        found[str(batch)] = {
            name: {"best_ms": t.min_s * 1e3, "median_ms": t.median_s * 1e3, "gain": t.ratio(taken["torch f32"])}
            for name, t in taken.items()
        }
    return found


def points(size: Size) -> Iterator[Point]:
    for model in ("minilm", "random"):
        for block, sparsity in getattr(size, model):
            yield Point(model, block, sparsity)


def take(
    point: Point, dense: Encoder, rivals: Rivals, text: Text | None, folder: Path, size: Size, threads: int
) -> dict[str, Any]:
    """All that is known of a point."""
    model, trained = student(point, dense, text, folder, size.minutes)
    ours = {f"bsrgen {name}": converted(model, point.block, name) for name in TYPES}
    judged = {}
    if text is not None:
        with torch.inference_mode():
            goals = torch.cat([dense(*batch) for batch in text.near])
        judged = {name: quality(embed, goals, text) for name, embed in ours.items()}
    else:
        arguments = sentences(1, dense.words.num_embeddings)
        with torch.inference_mode():
            for name, embed in ours.items():
                off = 1 - float((embed(*arguments).float() * model(*arguments)).sum())
                assert off < 0.02, (point, name, off)
    taken = times(rivals() | ours, dense.words.num_embeddings, size.seconds, threads)
    return asdict(point) | {"trained": trained, "quality": judged, "times": taken, "layers": len(dense.layers)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="of training MiniLM at each point")
    parser.add_argument("--seconds", type=float, help="of timing a model at each point and batch")
    parser.add_argument("--only", default="", help="regular expression: of the points, as their files are named")
    arguments = parser.parse_args()
    at_their_best(arguments.threads)
    folder, given = arguments.folder, {name: getattr(arguments, name) for name in ("minutes", "seconds")}
    size = replace(SIZES[arguments.size], **{name: value for name, value in given.items() if value is not None})
    chosen = [point for point in points(size) if re.search(arguments.only, str(point))]
    if not chosen:
        parser.error(f"no point is called {arguments.only!r}: such as {next(points(size))}")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with peer_threads(arguments.threads):
        now = ""
        for point in chosen:
            kept = folder / f"{point}.json"
            if kept.exists():
                continue
            if point.model != now:
                now, real = point.model, point.model == "minilm"
                dense = minilm() if real else Encoder(replace(BERT_BASE, layers=size.layers)).eval()
                text = texts(folder, size.training) if real else None
                rivals = cache(partial(peers, dense, sentences(1, 1000)))
            taken = take(point, dense, rivals, text, folder, size, arguments.threads)
            kept.write_text(json.dumps(taken, indent=1))
            print(kept)
    print(write(folder, [folder / f"{point}.json" for point in chosen], arguments.threads))


if __name__ == "__main__":
    main()
