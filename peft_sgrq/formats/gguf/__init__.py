"""GGUF, the format of llama.cpp: block types, the file, packed layers, loading and writing."""

from peft_sgrq.formats.gguf.weight import GGUFWeight

WEIGHTS = (GGUFWeight,)
STORED = ()  # a file is no folder of tensors: checkpoint/gguf.py
