"""MiniLM pruned to 32x1 blocks in rounds, distilled from the dense model between and after them.

    python examples/bert/recover.py /tmp/minilm --density 0.2 --minutes 80

Stops and goes on: the folder holds the last checkpoint, the teacher's states and the log (JSON lines).  The loss is the
relative distance of the states after layers 2, 4, 6 and of the embeddings.  Products are dense in bfloat16: there the
pattern may still change, and on a core with AVX512_BF16 they take little longer than sparse ones with their gradients.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from model import Encoder, embedding, files, minilm
from obs import curvatures, linears, prune
from text import Batch, batches, installed, passages
from tokenizers import Tokenizer
from torch import Tensor

UNSEEN = "networkx"  # a package whose text is for judging alone
STATES = (2, 4, 6)  # that the student is held to
TOKENS = 128  # at most, of a passage
BATCH = 1536  # tokens
ROUNDS = (0.25, 0.55, 0.8, 1.0)  # of the way to the density, in logarithms
PRUNING = 0.2  # the share of the time in which rounds come
RATE, WORDS_RATE = 1e-3, 3e-4
EMBEDDING = 4.0  # weight of 1 - cosine


@dataclass
class Text:
    """Batches to learn from, and two to judge by: passages of the same packages, and of one never seen."""

    training: list[Batch]
    near: list[Batch]
    far: list[Batch]


def texts(folder: Path, training: int = 25_000, held: int = 512) -> Text:
    """From the packages that are installed, kept in the folder."""
    kept = folder / "text.pt"
    if not kept.exists():
        far = passages((UNSEEN,), library=False)
        near = [t for t in passages(tuple(set(installed()) - {UNSEEN, "bsrgen"})) if t not in set(far)]
        torch.save((near[: training + held], far[:held]), kept)
    near, far = torch.load(kept)
    tokenizer = Tokenizer.from_file(str(files() / "tokenizer.json"))
    learn = batches(tokenizer, near[held : held + training], None, TOKENS, BATCH)
    return Text(learn, batches(tokenizer, near[:held], 32, TOKENS), batches(tokenizer, far, 32, TOKENS))


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def aims(teacher: Encoder, batch: Batch, kept: Path) -> list[Tensor]:
    """The teacher's states for a batch, computed once."""
    if not kept.exists():
        with torch.no_grad(), half():
            states = teacher.states(*batch)
        torch.save([states[i].half() for i in STATES], kept)
    return [state.float() for state in torch.load(kept)]


def loss(student: Encoder, batch: Batch, goals: list[Tensor]) -> Tensor:
    ids, live = batch
    with half():
        states = student.states(ids, live)
    mask = live.unsqueeze(-1)
    far = [
        ((states[i].float() - goal) * mask).square().sum() / (goal * mask).square().sum()
        for i, goal in zip(STATES, goals, strict=True)
    ]
    cosine = (embedding(states[-1].float(), live) * embedding(goals[-1], live)).sum(-1).mean()
    return sum(far) / len(far) + EMBEDDING * (1 - cosine)


def cosine(model: Encoder, held: list[Batch], goals: list[Tensor]) -> float:
    with torch.inference_mode(), half():
        return float(torch.cat([(model(*b).float() * g).sum(-1) for b, g in zip(held, goals, strict=True)]).mean())


@dataclass
class Run:
    """All that a checkpoint holds."""

    student: Encoder
    masks: dict[str, Tensor]
    adam: torch.optim.Optimizer = field(init=False)
    words: torch.optim.Optimizer = field(init=False)
    round: int = 0
    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        self.student.words.sparse = True
        rest = [p for name, p in self.student.named_parameters() if name != "words.weight"]
        self.adam = torch.optim.Adam(rest, RATE, betas=(0.9, 0.98), fused=True)
        self.words = torch.optim.SparseAdam([self.student.words.weight], WORDS_RATE)

    def save(self, path: Path) -> None:
        state = {"student": self.student.state_dict(), "adam": self.adam.state_dict(), "words": self.words.state_dict()}
        state |= {name: getattr(self, name) for name in ("masks", "round", "steps", "wall_s", "cpu_s")}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path)
        for name in ("student", "adam", "words"):
            getattr(self, name).load_state_dict(state.pop(name))
        for name, value in state.items():
            setattr(self, name, value)


def fresh(teacher: Encoder, R: int) -> Run:
    masks = {n: torch.ones(m.out_features // R, m.in_features, dtype=torch.bool) for n, m in linears(teacher.layers).items()}
    return Run(copy.deepcopy(teacher).train(), masks)


def order(count: int, seed: int = 0) -> Iterator[int]:
    """Indices of batches, each epoch shuffled anew."""
    while True:
        yield from torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        seed += 1


def rate(done: float) -> float:
    """Of the peak, at a share of the time: a short rise, constant while rounds come, then a fall to zero."""
    return min(done / 0.01, 1.0, max((1 - done) / (1 - PRUNING), 0.0)) if done < 1 else 0.0


def recover(run: Run, teacher: Encoder, text: Text, folder: Path, density: float, R: int, seconds: float) -> None:
    """Train for `seconds` in all, rounds of pruning included."""
    elements = {n: m.weight for n, m in linears(run.student.layers).items()}
    ways = [density**part for part in ROUNDS]
    with torch.inference_mode():
        held = {name: [teacher(*b) for b in getattr(text, name)] for name in ("near", "far")}
    masks: list[Tensor] = []
    begun, cpu, judged, kept = time.monotonic() - run.wall_s, time.process_time() - run.cpu_s, 0.0, time.monotonic()
    total, indices = 0.0, order(len(text.training), run.steps)
    while True:
        run.wall_s, run.cpu_s = time.monotonic() - begun, time.process_time() - cpu
        done = run.wall_s / seconds
        due = min(int(done / PRUNING * len(ways)) + 1, len(ways))
        if run.round < due:
            some = [text.training[i] for _, i in zip(range(5), indices)]
            prune(run.student, run.masks, curvatures(run.student, some), ways[run.round], R)
            run.round += 1
            masks = []
        if not masks:
            masks = [run.masks[n].repeat_interleave(R, 0).float() for n in elements]
        if time.monotonic() - kept > 180 or done >= 1:
            run.save(folder / "run.pt")
            kept = time.monotonic()
        if run.wall_s - judged > 60 or run.steps % 400 == 0 or done >= 1:
            line = {"steps": run.steps, "minutes": round(run.wall_s / 60, 2), "cpu_minutes": round(run.cpu_s / 60, 2)}
            line |= {"density": round(float(torch.cat([m.flatten() for m in run.masks.values()]).float().mean()), 4)}
            line |= {name: round(cosine(run.student, getattr(text, name), goals), 4) for name, goals in held.items()}
            line["loss"] = round(total, 4)
            print(json.dumps(line), flush=True)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            judged = run.wall_s
        if done >= 1:
            return
        i = next(indices)
        value = loss(run.student, text.training[i], aims(teacher, text.training[i], folder / "aims" / f"{i}.pt"))
        value.backward()
        for optimizer, top in ((run.adam, RATE), (run.words, WORDS_RATE)):
            optimizer.param_groups[0]["lr"] = top * rate(done)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_([elements[n] for n in run.masks], masks)
        run.steps += 1
        total += (value.item() - total) * (0.02 if run.steps > 50 else 1 / run.steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--rows", type=int, default=32, help="of a block; it is one column wide")
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    (arguments.folder / "aims").mkdir(parents=True, exist_ok=True)
    teacher = minilm()
    run = fresh(teacher, arguments.rows)
    if (arguments.folder / "run.pt").exists():
        run.load(arguments.folder / "run.pt")
    text = texts(arguments.folder)
    recover(run, teacher, text, arguments.folder, arguments.density, arguments.rows, 60 * arguments.minutes)


if __name__ == "__main__":
    main()
