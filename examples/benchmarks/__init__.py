"""Benchmarks: `python -m examples.benchmarks --help`, from the root of the repository."""
