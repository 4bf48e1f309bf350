"""Ratios beside hand-written loops and beside other libraries: `python -m benchmarks`."""
