"""Rotated models, models quantized at few bits, and bits by layer; all by compressed-tensors."""
