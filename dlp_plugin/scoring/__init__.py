"""Activations and weights to a block's score."""
