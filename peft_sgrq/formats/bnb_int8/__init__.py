"""bitsandbytes int8."""
