"""Search for strengths and sparsities by measuring the pruned model."""
