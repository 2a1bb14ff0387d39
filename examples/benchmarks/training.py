"""Training steps and decoding of a whole model: TRL's SFTTrainer, with each method in turn."""

from __future__ import annotations

import functools
import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from examples.benchmarks.measure import clock, in_turn, kept_bytes, peak_bytes
from examples.benchmarks.methods import adapters, sgrq_name
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

TARGETS = "all-linear"


@functools.cache
def random_llama(width: int) -> str:
    """The directory of a Llama of 4 blocks with random weights, as wide as wanted."""
    directory = tempfile.mkdtemp()
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 64 * 64,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def load(model: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model in NF4, computing in `dtype`; `random-2048` is a random one of that width."""
    if model.startswith("random-"):
        model = random_llama(int(model.removeprefix("random-")))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantization, dtype=dtype, device_map={"": device}
    )
    disable_cpu_packing(loaded)  # the bare base as well: repacked it could not be compared
    return loaded


def texts(tokenizer: Any, count: int, tokens: int) -> Dataset:
    """Rows of random words, as many tokens each; what they say does not matter for a time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, len(tokenizer) - 10, (count, tokens), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def measure_training(
    model: str,
    device: torch.device,
    repeats: int,
    batch: int,
    tokens: int,
    checkpointing: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Times SFTTrainer's training step and the optimizer's, method by method in turn.

    The base is the model of the first trainer with its adapter off, and gradients of its inputs: what all share.

    Args:
        model (`str`): Directory or Hub name.
        device (`torch.device`): Where.
        repeats (`int`): Steps of each method.
        batch, tokens (`int`): Sequences a step, and their length.
        checkpointing (`bool`): Whether activations are checkpointed, TRL's default.
        dtype (`torch.dtype`): What is computed in.

    Returns:
        method -> `forward and backward`, `optimizer`, `step` (seconds), `kept`, `kept by the adapter`, `peak`,
        `optimizer state` (bytes),
        `parameters`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = texts(tokenizer, batch, tokens)
    seconds = clock(device)
    trainers: dict[str, SFTTrainer] = {}
    for name, adapt in adapters(TARGETS).items():
        settings = SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            max_length=tokens,
            gradient_checkpointing=checkpointing,
            bf16=dtype == torch.bfloat16,
            report_to="none",
            use_cpu=device.type == "cpu",
            learning_rate=1e-4,
        )
        trainers[name] = SFTTrainer(
            adapt(load(model, device, dtype)), settings, train_dataset=data, processing_class=tokenizer
        )
        trainers[name].create_optimizer()
        trainers[name].current_gradient_accumulation_steps = 1  # set by `train()`, which is not called here
    batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}

    def step(name: str) -> Mapping[str, float]:
        trainer = trainers[name]
        trainer.model.train()
        inputs = {key: value.to(device) for key, value in batches[name].items()}
        start = seconds()
        trainer.training_step(trainer.model, inputs)
        middle = seconds()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        end = seconds()
        return {"forward and backward": middle - start, "optimizer": end - middle, "step": end - start}

    some = next(iter(trainers.values()))

    def base_step() -> Mapping[str, float]:
        inputs = {key: value.to(device) for key, value in next(iter(batches.values())).items()}
        some.model.train()
        some.model.enable_input_require_grads()
        with some.model.disable_adapter():
            start = seconds()
            with some.compute_loss_context_manager():
                loss = some.compute_loss(some.model, inputs)
            loss.backward()
            end = seconds()
        some.model.disable_input_require_grads()
        return {"step": end - start}

    jobs: dict[str, Callable[[], Mapping[str, float]]] = {"base": base_step}
    jobs |= {name: (lambda name=name: step(name)) for name in trainers}
    result: dict[str, Any] = in_turn(jobs, repeats)
    inputs = {key: value.to(device) for key, value in next(iter(batches.values())).items()}
    some.model.enable_input_require_grads()
    with some.compute_loss_context_manager(), some.model.disable_adapter():
        loss = some.compute_loss(some.model, inputs)
    frozen = kept_bytes(loss, some.model)  # for gradients of inputs alone: the model keeps it whatever is trained
    some.model.disable_input_require_grads()
    del loss
    for name, trainer in trainers.items():
        inputs = {key: value.to(device) for key, value in batches[name].items()}
        trainer.model.train()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        result[name]["kept"] = kept_bytes(loss, trainer.model)
        result[name]["kept by the adapter"] = result[name]["kept"] - frozen
        del loss
        result[name]["peak"] = peak_bytes(lambda name=name: step(name), device)
        states = trainer.optimizer.state.values()
        result[name]["optimizer state"] = sum(
            value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor)
        )
        result[name]["parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return result


@torch.no_grad()
def measure_decoding(model: str, device: torch.device, repeats: int, tokens: int) -> dict[str, Any]:
    """Seconds to decode some tokens greedily: the bare base, LoRA and SGRQ on it, SGRQ merged.

    Args:
        model (`str`): Directory or Hub name.
        device (`torch.device`): Where.
        repeats (`int`): Texts of each.
        tokens (`int`): New tokens of each text.

    Returns:
        name -> `seconds`, and `tokens per second`.
    """
    seconds = clock(device)
    models = {"base": load(model, device)}
    models |= {name: adapt(load(model, device)) for name, adapt in adapters(TARGETS, (0.1, 0.4)).items()}
    models[f"{sgrq_name(0.4)}, merged"] = adapters(TARGETS, (0.4,))[sgrq_name(0.4)](
        load(model, device)
    ).merge_and_unload()
    prompt = torch.arange(10, 26, device=device).unsqueeze(0)

    def decode(each: Any) -> Mapping[str, float]:
        start = seconds()
        each.generate(input_ids=prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return {"seconds": seconds() - start}

    jobs = {name: (lambda each=each: decode(each.eval())) for name, each in models.items()}
    result: dict[str, Any] = in_turn(jobs, repeats)
    for values in result.values():
        values["tokens per second"] = tokens / values["seconds"]["median"]
    del models
    gc.collect()
    return result


def local(path: str) -> str:
    """A path as it is given in results: its last part."""
    return Path(path).name or path
