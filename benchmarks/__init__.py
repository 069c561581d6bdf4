"""Kernel benchmarks: `python -m benchmarks.cpu` in the source tree, `frd bench` once installed."""
