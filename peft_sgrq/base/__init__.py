"""The model beneath the adapter: whether it is the right one, and what it needs done to it."""
