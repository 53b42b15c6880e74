"""Benchmarks: what makes the tables (benchmarks/README.md).  Run from a checkout; not installed."""
