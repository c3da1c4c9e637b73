"""What makes packed checkpoints known to what runs models: transformers, and vLLM."""
