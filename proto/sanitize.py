"""A few cases under UBSan: python proto/sanitize.py"""
import tempfile
from pathlib import Path
import numpy as np
import build, test_amx as t
with tempfile.TemporaryDirectory() as d:
    for q, case in enumerate([*t.DIRECT[::4], *t.GATHER[::4]]):
        weight = t.patterns(case[0], case[1])["random"]
        plan = t.direct_plan(case, weight) if q < len(t.DIRECT[::4]) else t.gather_plan(case, weight, bool(q % 2))
        lib = build.emulated(plan, Path(d), "gcc", ("-march=native", "-fsanitize=undefined", "-fno-sanitize-recover=all"))
        for n in (1, 17, 77): t.check(lib, plan, weight, np.random.default_rng(1), n, pad=1)
        print("ok", t.label(case))
