"""Recovery: scales set so that the quantized model computes again what the model did before it was quantized."""
