"""Text and tasks, and what a model makes of them."""
