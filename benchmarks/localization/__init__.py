"""Methods without training, controls and nets on the same forgeries: `python -m benchmarks localization`."""
