"""Benchmarks on NVIDIA GPUs: ceilings, our kernels and the peers in one process; `python -m benchmarks gpu --help`."""
