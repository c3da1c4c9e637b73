"""The pruning stages, and quantization to 4 or 8 bits that keeps zeros."""
