"""One GPU, in one command, offline: `python -m benchmarks.gpu --help`."""
