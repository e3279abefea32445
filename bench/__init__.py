"""Benchmarks: `python -m bench` prints the table and draws it, `pytest bench` is the quick part."""
