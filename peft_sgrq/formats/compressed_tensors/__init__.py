"""compressed-tensors."""
