"""CPU kernels that multiply by packed weights without decoding them first."""
