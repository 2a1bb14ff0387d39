"""The parts of `compare_methods.py`."""
