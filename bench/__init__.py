"""Benchmarks: `python -m bench` prints and draws the results, `pytest bench` is the quick part."""
