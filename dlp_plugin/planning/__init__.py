"""From scores to sparsities, and the plan as data."""
