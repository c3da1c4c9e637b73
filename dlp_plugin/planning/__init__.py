"""Scores to sparsities, and the plan as data."""
