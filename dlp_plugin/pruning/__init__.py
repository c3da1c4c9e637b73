"""The pruning stages, and 4 bits that keep zeros."""
