"""Weights that are not quantized."""
