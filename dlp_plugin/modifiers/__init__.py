"""The allocation modifiers: they score blocks, make a plan, and set the stages' sparsities."""
