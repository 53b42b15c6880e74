import sys; sys.path.insert(0, "proto")
from pathlib import Path
import numpy as np
from bsrgen.pattern import random_weight
import build, packing
w = random_weight(1, (64, 96), (32, 1), .3)
for plan in (packing.Gather(w.pattern, packing.BF16), packing.Gather(w.pattern, packing.INT8),):
    Path("/tmp/t.c").write_text(build.text(plan)); 
    for cc in ("gcc", "clang-19"): print(cc, len(build.assembly(plan, cc)))
w = random_weight(1, (64, 96), (32, 32), .3)
plan = packing.Direct(w.pattern, packing.BF16)
Path("/tmp/d.c").write_text(build.text(plan)); 
for cc in ("gcc", "clang-19"): print(cc, len(build.assembly(plan, cc)))
