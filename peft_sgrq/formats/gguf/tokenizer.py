"""The tokenizer that transformers rebuilds from a GGUF file: where it is not that of the file."""

from __future__ import annotations

import json
import warnings
from typing import Any

from peft_sgrq.formats.gguf.file import GGUFFile


def without_tokens_beyond(tokenizer: Any, rows: int) -> Any:
    """Takes tokens off a tokenizer that the embedding has no row for.

    transformers 5.23 gives every vocabulary of GPT-2's kind a token `<|endoftext|>`, behind the last one if the file
    has none (`AutoTokenizer.from_pretrained(folder, gguf_file=...)`, then `len(tokenizer)`). With such a tokenizer
    beside an adapter, `AutoPeftModelForCausalLM` wants to add a row to the embedding, which is packed.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Changed in place.
        rows (`int`): Of the embedding.
    """
    from tokenizers import Tokenizer

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in backend["added_tokens"] if token["id"] < rows]
    if len(kept) < len(backend["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**backend, "added_tokens": kept}))
    return tokenizer


def warn_of_tokenizer(file: GGUFFile) -> None:
    """Warns if transformers rebuilds another tokenizer than llama.cpp has: an adapter learns on other ids then."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind = file.metadata.get("tokenizer.ggml.pre")
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and kind not in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2"):
        warnings.warn(
            f"transformers does not know how llama.cpp splits text for this vocabulary (tokenizer.ggml.pre is {kind!r}"
            ") and splits it as GPT-2 does: some texts get other token ids than llama.cpp gives them. Train with the "
            "tokenizer of the original model, `AutoTokenizer.from_pretrained(ORIGINAL)`."
        )
