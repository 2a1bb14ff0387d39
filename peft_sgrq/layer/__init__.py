"""One adapted layer: the trained numbers, the formula, forward and merge."""
