"""bitsandbytes nf4 and fp4."""
