"""Strengths and sparsities judged on the model itself."""
