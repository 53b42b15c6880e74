"""Prints the loops of the assembly that hold products: python proto/asm.py KIND R C element T rows cc"""
import re
import sys
from bsrgen.pattern import random_weight
import build, packing

kind, R, C, e, T, V, cc = sys.argv[1:8]
w = random_weight(1, (768, 768), (int(R), int(C)), 0.2)
e = {"bf16": packing.BF16, "int8": packing.INT8}[e]
if kind in ("direct", "joined"):
    plan = packing.Direct(w.pattern, e, int(T), int(V), gathers=kind == "joined")
else:
    plan = packing.Gather(w.pattern, e, kind != "spmm", int(T), int(V), gathers=kind != "whole")
lines = build.assembly(plan, cc).splitlines()
lines = [l for l in lines if not re.match(r"\s*\.(loc|cfi|p2align|file)|\s*#", l)]
labels = {l.split(":")[0]: q for q, l in enumerate(lines) if re.match(r"\.?L?\w+:", l) or re.match(r"\.LBB\w+:", l)}
dots = [q for q, l in enumerate(lines) if "tdp" in l]
loops = set()
for q, l in enumerate(lines):
    m = re.match(r"\s*j\w+\s+(\.L\w+)", l)
    if m and m[1] in labels and labels[m[1]] < q and any(labels[m[1]] < d < q for d in dots):
        loops.add((labels[m[1]], q))
inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] and any(b[0] < d < b[1] for d in dots) for b in loops)]
for a, b in sorted(inner):
    body = lines[a : b + 1]
    spills = [l for l in body if re.search(r"\((%rsp|%rbp)\)", l)]
    print(f"==== {b - a} instructions, {len(spills)} through the stack")
    if "-v" in sys.argv: print("\n".join(body))
    elif spills: print("\n".join(spills))
