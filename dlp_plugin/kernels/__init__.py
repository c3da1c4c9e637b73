"""Products with pruned weights as they are stored, on a processor."""
