"""python -m benchmarks GRID... | accuracy | fit FILE... | report FILE... | sampled   (--help after each)."""

import sys

from benchmarks import accuracy, fit, report, run, sampled

VERBS = {"accuracy": accuracy.main, "fit": fit.main, "report": report.main, "sampled": sampled.main}

if __name__ == "__main__":
    verb = VERBS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if verb is None:
        run.main(prog_name="python -m benchmarks")
    else:
        verb(sys.argv[2:], prog_name=f"python -m benchmarks {sys.argv[1]}")
