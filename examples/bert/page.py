"""The points of a study as Markdown tables, plots and one HTML page that needs no other file."""

import base64
import importlib.util
import io
import json
import shlex
import sys
from collections.abc import Iterator
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import torch

import bsrgen
from bsrgen.machine import cpu_model

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2em .7em;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}img{max-width:100%}code{font-size:.9em}"""
NAMES = {"minilm": "all-MiniLM-L6-v2", "random": "BERT-base's shape, random weights"}


Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def label(point: dict[str, Any]) -> str:
    R, C = point["block"]
    return f"{R}x{C} {point['sparsity']:.0%}"


def quality(points: list[dict[str, Any]]) -> Iterator[Table]:
    head = ["pruned", "steps", "CPU-minutes", "kernels", "cosine", "same first", "same first ten"]
    rows = [
        [label(p), str(p["trained"]["steps"]), str(p["trained"]["cpu_minutes"]), name, f"{q['cosine']:.3f}",
         f"{q['top 1']:.0%}", f"{q['top 10']:.0%}"]
        for p in points for name, q in p["quality"].items()
    ]  # fmt: skip
    if rows:
        yield "Quality beside the dense model, on held-out passages", head, rows


def latency(points: list[dict[str, Any]]) -> Iterator[Table]:
    """A table for each model and batch; the gain is the median over rounds."""
    for model, batch in sorted({(p["model"], b) for p in points for b in p["times"]}, key=lambda k: (k[0], int(k[1]))):
        here = [p for p in points if p["model"] == model]
        names = list(here[0]["times"][batch])
        head = ["pruned", *(f"{name}, ms" for name in names)]
        rows = []
        for p in here:
            cells = [f"{t['best_ms']:.2f} ({t['gain']:.2f}x)" for t in (p["times"][batch][name] for name in names)]
            rows.append([label(p), *cells])
        layers = here[0]["layers"]
        yield f"{NAMES[model]}, {layers} layers, {batch} x 128 tokens: best (gain over torch f32, median)", head, rows


def markdown(tables: list[Table]) -> str:
    lines = []
    for title, head, rows in tables:
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def html(tables: list[Table]) -> str:
    parts = []
    for title, head, rows in tables:
        line = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{escape(title)}</h2><table><tr>{line}</tr>{body}</table>")
    return "".join(parts)


def plots(points: list[dict[str, Any]]) -> Iterator[bytes]:
    """For each model, gains of our kernels along sparsity, and for one with quality the cosine along the gain; PNG."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for model in dict.fromkeys(p["model"] for p in points):
        here = [p for p in points if p["model"] == model]
        figure, axes = pyplot.subplots(1, 2 if here[0]["quality"] else 1, figsize=(11, 4), squeeze=False)
        for block in dict.fromkeys(tuple(p["block"]) for p in here):
            mine = sorted((p for p in here if tuple(p["block"]) == block), key=lambda p: p["sparsity"])
            gains = [p["times"]["1"]["bsrgen f32"]["gain"] for p in mine]
            axes[0, 0].plot([p["sparsity"] for p in mine], gains, "o-", label=f"{block[0]}x{block[1]}")
            if mine[0]["quality"]:
                cosines = [p["quality"]["bsrgen f32"]["cosine"] for p in mine]
                axes[0, 1].plot(gains, cosines, "o-", label=f"{block[0]}x{block[1]}")
        axes[0, 0].set(title=f"{NAMES[model]}: a sentence, f32", xlabel="sparsity", ylabel="gain over torch f32")
        axes[0, 0].set_ylim(bottom=0)
        if here[0]["quality"]:
            axes[0, 1].set(title="quality", xlabel="gain over torch f32", ylabel="cosine to dense", ylim=(0, 1))
        axes[0, 0].legend()
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        yield picture.getvalue()


def write(folder: Path, files: list[Path], threads: int) -> Path:
    """folder/report.html and folder/report.md of those points."""
    points = [json.loads(path.read_text()) for path in files]
    tables = [*quality(points), *latency(points)]
    asked = shlex.join("FOLDER" if Path(word) == folder else word for word in sys.argv[1:])
    head = f"`python examples/bert/study.py {asked}`, threads: {threads}; {date.today()}, {cpu_model()}, "
    head += f"torch {torch.__version__}, bsrgen {bsrgen.__version__}"
    (folder / "report.md").write_text(f"# Encoders: block shape, quality, latency\n\n{head}\n\n{markdown(tables)}")
    pictures = "".join(f'<img src="data:image/png;base64,{base64.b64encode(p).decode()}">' for p in plots(points))
    page = f"<!doctype html><meta charset=utf-8><title>Encoders</title><style>{STYLE}</style>"
    page += f"<h1>Encoders: block shape, quality, latency</h1><p>{escape(head)}</p>{pictures}{html(tables)}"
    (folder / "report.html").write_text(page)
    return folder / "report.html"
