"""Compares each part with its alternatives: `python -m benchmarks --help`."""

import sys
from pathlib import Path

# The registry of the tests also lists the optimizers to measure, and one benchmark
# trains the model of an example.
ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "helpers"), str(ROOT / "examples")]
