"""Tiny random models of many architectures: with tied tensors, and with names nested otherwise on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tr

from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
_IMAGE = {"image_token_index": 127}


def _t5() -> Any:
    config = tr.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return tr.T5ForConditionalGeneration(config)


def _bert() -> Any:
    settings = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return tr.BertForMaskedLM(tr.BertConfig(**settings))


def _qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope}
    return tr.Qwen2VLForConditionalGeneration(tr.Qwen2VLConfig(text_config=text, vision_config=vision))


def _gemma3(tied: bool = True) -> Any:
    return tr.Gemma3ForConditionalGeneration(
        tr.Gemma3Config(
            vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=tr.Gemma3TextConfig(**TEXT, head_dim=16),
            mm_tokens_per_image=4,
            tie_word_embeddings=tied,
            **_IMAGE,
        )
    )


def _llava(tied: bool = False) -> Any:
    return tr.LlavaForConditionalGeneration(
        tr.LlavaConfig(
            vision_config=tr.CLIPVisionConfig(**VISION, projection_dim=64),
            text_config=tr.LlamaConfig(**TEXT),
            image_seq_length=4,
            vision_feature_layer=-1,
            tie_word_embeddings=tied,
            **_IMAGE,
        )
    )


def _paligemma() -> Any:
    return tr.PaliGemmaForConditionalGeneration(
        tr.PaliGemmaConfig(
            vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=64),
            text_config=tr.GemmaConfig(**TEXT, head_dim=16),
            projection_dim=64,
            hidden_size=64,
            **_IMAGE,
        )
    )


def _idefics3() -> Any:
    config = tr.Idefics3Config(vision_config=VISION, text_config=tr.LlamaConfig(**TEXT), image_token_id=127)
    return tr.Idefics3ForConditionalGeneration(config)


def _internvl() -> Any:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}
    config = tr.InternVLConfig(vision_config=vision, text_config=tr.Qwen2Config(**TEXT), image_token_id=127)
    return tr.InternVLForConditionalGeneration(config)


def _mistral3() -> Any:
    vision = tr.PixtralVisionConfig(**VISION)
    config = tr.Mistral3Config(vision_config=vision, text_config=tr.MistralConfig(**TEXT, head_dim=16), **_IMAGE)
    return tr.Mistral3ForConditionalGeneration(config)


def _llama(tied: bool = True) -> Any:
    return tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT, tie_word_embeddings=tied))


def _gpt2() -> Any:
    config = tr.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.2)
    return tr.GPT2LMHeadModel(config)


TIED: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bart": lambda: tr.BartForConditionalGeneration(tr.BartConfig(**SEQ2SEQ)),
    "t5": _t5,
    "bert": _bert,
    "gemma3": _gemma3,
    "llava": lambda: _llava(tied=True),
}
COMPOSITE: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "idefics3": _idefics3,
    "qwen2-vl": _qwen2_vl,
    "internvl": _internvl,
    "mistral3": _mistral3,
}


def save(make: Callable[[], Any], directory: Path) -> Path:
    """Saves a random model."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 10)  # biases of zero would hide that one is lost
    model.save_pretrained(directory)
    return directory


def load(directory: Path, **kwargs: Any) -> Any:
    """The model of a checkpoint, by the class its config names, in float32."""
    name = tr.AutoConfig.from_pretrained(directory).architectures[0]
    model = getattr(tr, name).from_pretrained(directory, dtype=torch.float32, **kwargs)
    disable_cpu_packing(model)
    return model.eval()


def in_nf4(directory: Path, out: Path) -> Path:
    """The checkpoint quantized to nf4."""
    quantization = tr.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    load(directory, quantization_config=quantization).save_pretrained(out)
    return out


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Logits of fixed ids; of an encoder and a decoder, both are given them."""
    ids = torch.randint(3, 120, (2, 10), generator=torch.Generator().manual_seed(1))
    ids[:, :3] = torch.tensor([3, 5, 7])  # the rows that tests train
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=ids, **more).logits


def train_randomly(model: Any) -> Any:
    """Stands for training: all trainable parameters but the deltas, which are random already, are moved."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "sgrq_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.eval()
