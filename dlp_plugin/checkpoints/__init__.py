"""Checkpoints on disk: loading, inspecting, packing and saving them."""
