"""Ratios by layer, found by measuring the loss."""
