"""Which scales are trained: criteria give scores, a ratio gives how many, a mask stores the choice."""
