"""The bases the tests run on, and what tests do with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_sgrq import SGRQConfig
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

VOCABULARY = 259  # 256 bytes, <s>, </s>, <pad>
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Base:
    """A quantization of the tiny models: `quant` is nf4, fp4, int8 or dense."""

    quant: str
    nested: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.quant}{'-nested' if self.nested else ''}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        if self.quant == "dense":
            return None
        if self.quant == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant,
            bnb_4bit_use_double_quant=self.nested,
            bnb_4bit_compute_dtype=self.dtype,
        )

    def load(self, directory: Path | str) -> Any:
        """The model in eval mode, quantized on the fly, with bitsandbytes' CPU repacking off."""
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=self.dtype, **({"quantization_config": self.quantization} if self.quantization else {})
        )
        disable_cpu_packing(model)
        return model.eval()


DTYPES = (torch.float32, torch.bfloat16)
BASES = [  # of codes, kinds of scales and dtypes each pair
    Base("nf4", False, torch.float32),
    Base("nf4", True, torch.bfloat16),
    Base("fp4", False, torch.bfloat16),
    Base("fp4", True, torch.float32),
    *(Base(quant, False, dtype) for quant in ("int8", "dense") for dtype in DTYPES),
]
NF4 = Base("nf4", False, torch.float32)
NF4_NESTED = Base("nf4", True, torch.float32)
INT8 = Base("int8", False, torch.float32)
DENSE = Base("dense", False, torch.float32)


TRAINING: dict[str, Any] = {  # arguments of every trainer in the tests
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text, 259 tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _save_llama(directory: Path, hidden: int, initializer_range: float) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=initializer_range,  # larger than usual, so that a change of scales shows in the logits
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_tiny_llama(directory: Path) -> Path:
    """Saves a random float32 Llama: hidden 64, intermediate 128, 2 blocks, 4 heads of which 2 key-value."""
    return _save_llama(directory, hidden=64, initializer_range=0.2)


def save_small_llama(directory: Path) -> Path:
    """Saves a random float32 Llama wide enough for groups of 128: hidden 256, intermediate 512, 2 blocks."""
    return _save_llama(directory, hidden=256, initializer_range=0.1)


def save_tiny_gpt2(directory: Path) -> Path:
    """Saves a random float32 GPT-2: width 64, 1 block."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=1,
        n_head=2,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def adapted(base: Base, directory: Path | str, random: bool = True, **config: Any) -> PeftModel:
    """The base with an adapter in eval mode, its deltas random unless told; ratio 0.5 leaves groups unselected."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"ratio": 0.5, "init_weights": not random, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(base.load(directory), SGRQConfig(**settings)).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def train_steps(model: Any, ids: torch.Tensor, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few AdamW steps on one batch; the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            assert all(parameter.grad is not None for parameter in parameters), "a delta without a gradient"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
