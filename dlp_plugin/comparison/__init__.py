"""Comparison of methods, sparsities and pruners on one model."""
