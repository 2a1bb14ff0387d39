"""Merging adapters into checkpoints on the disk, and checking the result; no model is built."""
