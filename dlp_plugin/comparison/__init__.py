"""Methods, sparsities and pruners on one model."""
