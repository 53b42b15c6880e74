"""Benchmarks: bsrgen beside other libraries and the machine's ceilings, in alternation in one run."""
