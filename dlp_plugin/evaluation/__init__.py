"""Evaluation of models: perplexity, zero-shot accuracy and speed; reading of text."""
