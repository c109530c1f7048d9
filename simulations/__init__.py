"""Whole federations on one machine: generated institutions, comparisons, benchmarks."""

import common  # noqa: F401 - first, since it keeps the libraries from calling home
