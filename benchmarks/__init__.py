"""Benchmarks of frd_kernels and frd_model, run from a source checkout: `python -m benchmarks --help`."""
