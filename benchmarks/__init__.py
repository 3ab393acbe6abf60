"""Compares each part with its alternatives: `python -m benchmarks --help`."""
