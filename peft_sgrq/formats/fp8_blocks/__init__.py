"""Fine-grained fp8, a scale for each block."""
