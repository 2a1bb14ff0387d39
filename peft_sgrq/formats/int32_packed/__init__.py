"""GPTQ, AWQ and AutoRound: integer codes packed into int32 words."""
