"""How PEFT gets to know SGRQ."""
