"""What a recipe names: score, allocate, feed."""
