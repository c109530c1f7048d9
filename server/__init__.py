"""The coordinator: rounds, evaluation, checkpoints, report."""

import common  # noqa: F401 - first, since it keeps the libraries from calling home
