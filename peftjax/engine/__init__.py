"""Runs a model's program again with factors at the linear uses of its weights."""
