"""Folders of checkpoints: where they are found, what is in them, how they are written."""
