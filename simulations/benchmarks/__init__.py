"""Benchmarks: `silotune-sim bench`."""
