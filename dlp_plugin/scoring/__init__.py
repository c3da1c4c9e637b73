"""Block scores, computed from weights and activations."""
