"""The coordinator: rounds, evaluation, checkpoints, report."""
