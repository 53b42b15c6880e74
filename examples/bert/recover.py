"""MiniLM pruned by blocks, layer after layer against the dense model, then distilled at its fixed pattern.

    python examples/bert/recover.py /tmp/minilm --density 0.2 --minutes 80

Stops and goes on: the folder holds the last checkpoint, the teacher's states and the log (JSON lines).  The loss is the
relative distance of the states after layers 2, 4, 6 and of the embeddings.  The student's layers are BsrLinear: what is
stored alone is trained, and forward and both gradients are products with the stored blocks.  A step of 512 tokens at
80 % sparse 32x1 takes 0.091 s so, 0.133 s with dense products (medians, bfloat16, one core of Zen 5).
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
from obs import STEP, Block, prune
from text import Batch, batches, installed, passages
from tokenizers import Tokenizer
from torch import Tensor

import bsrgen.integrations.torch as bt

UNSEEN = "networkx"  # a package whose text is for judging alone
STATES = (2, 4, 6)  # that the student is held to
HELD, TOKENS = 512, 128  # passages that no weight is fitted to, and tokens at most of each
BATCH = 512  # tokens
EVERY_S = 120.0  # between checkpoints
CALIBRATION = 42  # batches that pruning sees
RATE, WORDS_RATE, WARM = 4e-4, 2e-4, 100  # Adam's rates at their peak, and steps until there
EMBEDDING = 4.0  # weight of 1 - cosine


@dataclass
class Text:
    """Batches to learn from, and two to judge by: passages of the same packages, and of one never seen."""

    training: list[Batch]
    near: list[Batch]
    far: list[Batch]


def texts(folder: Path, training: int = 60_000) -> Text:
    """From the packages that are installed, kept in the folder."""
    kept = folder / "text.pt"
    if not kept.exists():
        far = passages((UNSEEN,), library=False)
        near = [t for t in passages(tuple(set(installed()) - {UNSEEN, "bsrgen"})) if t not in set(far)]
        torch.save((near, far[:HELD]), kept)
    near, far = torch.load(kept)
    tokenizer = Tokenizer.from_file(str(files() / "tokenizer.json"))
    learn = batches(tokenizer, near[HELD : HELD + training], None, TOKENS, BATCH)
    return Text(learn, batches(tokenizer, near[:HELD], 32, TOKENS), batches(tokenizer, far, 32, TOKENS))


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
    """All that a checkpoint holds.  student: pruned, its zeros stored; from then on its linear layers are BsrLinear."""

    student: Encoder
    block: Block
    adam: torch.optim.Optimizer = field(init=False)
    words: torch.optim.Optimizer = field(init=False)
    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        bt.convert_(self.student.layers, bt.BsrConfig(self.block, n=BATCH, min_speedup=0))
        self.student.words.sparse = True
        rest = [p for name, p in self.student.named_parameters() if name != "words.weight"]
        self.adam = torch.optim.Adam(rest, RATE, betas=(0.9, 0.98), fused=True)
        self.words = torch.optim.SparseAdam([self.student.words.weight], WORDS_RATE)

    def dense(self) -> dict[str, Tensor]:
        """The state of the student with its zeros stored."""
        state = self.student.state_dict()
        for name, module in self.student.named_modules():
            if isinstance(module, bt.BsrLinear):
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
                state |= {f"{name}.{key}": value for key, value in module.to_linear().state_dict().items()}
        return state

    def save(self, path: Path) -> None:
        state = {"student": self.dense(), "adam": self.adam.state_dict(), "words": self.words.state_dict()}
        state |= {name: getattr(self, name) for name in ("block", "steps", "wall_s", "cpu_s")}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    @classmethod
    def load(cls, path: Path, student: Encoder) -> "Run":
        """The run of a checkpoint, in `student`."""
        state = torch.load(path)
        if "block" not in state:
            raise SystemExit(f"{path} is of an older version of this script: begin in another folder")
        student.load_state_dict(state["student"])
        run = cls(student, state["block"])
        run.adam.load_state_dict(state["adam"])
        run.words.load_state_dict(state["words"])
        run.steps, run.wall_s, run.cpu_s = (state[name] for name in ("steps", "wall_s", "cpu_s"))
        return run


def start(teacher: Encoder, text: Text, density: float, block: Block, folder: Path, step: float = STEP) -> Run:
    """The run that the folder holds, or a new one: the student pruned and not yet trained."""
    student = copy.deepcopy(teacher)
    if (folder / "run.pt").exists():
        return Run.load(folder / "run.pt", student)
    some = text.training[:: max(len(text.training) // CALIBRATION, 1)]
    cpu = time.process_time()
    prune(student, teacher, some, density, block, step)
    run = Run(student, block)
    run.cpu_s = time.process_time() - cpu
    folder.mkdir(parents=True, exist_ok=True)
    run.save(folder / "run.pt")
    return run


def order(count: int, seed: int = 0) -> Iterator[int]:
    """Indices of batches, each epoch shuffled anew."""
    while True:
        yield from torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        seed += 1


def recover(run: Run, teacher: Encoder, text: Text, folder: Path, known: Path, seconds: float) -> None:
    """Train until the run has taken that long; rates rise for WARM steps and fall to zero at the end.

    folder: of the run's checkpoint and log; known: of the teacher's states.
    """
    known.mkdir(parents=True, exist_ok=True)
    held = {name: getattr(text, name)[::4] for name in ("near", "far")}  # judging all takes as long as 20 steps
    with torch.inference_mode():
        goals = {name: [teacher(*batch) for batch in some] for name, some in held.items()}
    begun, cpu = time.monotonic() - run.wall_s, time.process_time() - run.cpu_s
    average, told, indices = 0.0, 0.0, order(len(text.training), run.steps)
    while True:
        run.wall_s, run.cpu_s = time.monotonic() - begun, time.process_time() - cpu
        left = 1 - run.wall_s / seconds
        if run.wall_s - told > EVERY_S or run.steps == 0 or left <= 0:
            told = run.wall_s
            run.save(folder / "run.pt")
            tell(run, average, {n: cosine(run.student, held[n], goals[n]) for n in held}, folder)
        if left <= 0:
            return
        i = next(indices)
        value = loss(
            run.student, text.training[i], aims(teacher, text.training[i], known / f"{len(text.training)}-{i}.pt")
        )
        value.backward()
        for optimizer, peak in ((run.adam, RATE), (run.words, WORDS_RATE)):
            optimizer.param_groups[0]["lr"] = peak * min((run.steps + 1) / WARM, left, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        run.steps += 1
        average += (value.item() - average) / min(run.steps, 50)


def tell(run: Run, average: float, cosines: dict[str, float], folder: Path) -> None:
    """A line of the log."""
    figures = {"minutes": run.wall_s / 60, "cpu_minutes": run.cpu_s / 60, "loss": average} | cosines
    line = json.dumps({"steps": run.steps} | {name: round(value, 4) for name, value in figures.items()})
    print(line, flush=True)
    with (folder / "log.jsonl").open("a") as log:
        log.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block", type=int, nargs=2, default=(32, 1))
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    folder, teacher = arguments.folder, minilm()
    folder.mkdir(parents=True, exist_ok=True)
    text = texts(folder)
    run = start(teacher, text, arguments.density, tuple(arguments.block), folder)
    recover(run, teacher, text, folder, folder / "aims", 60 * arguments.minutes)


if __name__ == "__main__":
    main()
