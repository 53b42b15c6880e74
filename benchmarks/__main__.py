"""python -m benchmarks GRID... | VERB ...; the verbs are below.  --help after each."""

import sys

from benchmarks import accuracy, decoder, encoder, fit, pit, report, run, sampled
from benchmarks.gpu import take

VERBS = {
    "gpu": take.main, "sampled": sampled.main, "pit": pit.main, "encoder": encoder.main, "decoder": decoder.main,
    "accuracy": accuracy.main, "fit": fit.main, "report": report.main,
}  # fmt: skip

if __name__ == "__main__":
    verb = VERBS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if verb is None:
        run.main(prog_name="python -m benchmarks")
    else:
        verb(sys.argv[2:], prog_name=f"python -m benchmarks {sys.argv[1]}")
