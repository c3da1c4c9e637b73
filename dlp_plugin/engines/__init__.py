"""Support for packed checkpoints in transformers and vLLM."""
