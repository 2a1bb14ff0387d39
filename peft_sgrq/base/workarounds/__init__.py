"""Workarounds for bugs in other packages: one file each, with the evidence and the name of the test that guards it."""
