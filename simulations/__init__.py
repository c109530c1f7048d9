"""Whole federations on one machine: generated institutions, comparisons, benchmarks."""
