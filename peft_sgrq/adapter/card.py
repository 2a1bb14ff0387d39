"""The model card of a saved adapter: what it is, how to load it, how to merge it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from peft_sgrq.base.loading import loading_code
from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.output import written
from peft_sgrq.formats.loading import quantization_code

_BEGIN = "<!-- written by peft_sgrq: begin -->"
_END = "<!-- written by peft_sgrq: end -->"
_PLACE = "path or Hub name of this adapter"
_TEMPLATE_SIGN = "[More Information Needed]"  # in the card PEFT and huggingface_hub start from

_TEXT = """\
{begin}
# {title}

An adapter of `peft_sgrq`, saliency-guided scale tuning: it changes {share}scales of the layers named below
and nothing else of the base model. Merged into the base it gives a model of the same format whose outputs are those
of the adapter, bit for bit.

| | |
|---|---|
| base model | `{base}` |
| quantization of the base | {quantization} |
| ratio of trained scales | {ratio} |
| criterion | {criterion} |
| tuned layers | {layers}: {kinds} |
| trained parameters | {parameters:,} ({adapter_dtype}) |
| size of the adapter | {size} |
{training}
## Load

```python
import peft_sgrq  # registers SGRQ with PEFT
from peft import PeftModel
{loading}
model = PeftModel.from_pretrained(base, "{place}")
```

The adapter fits this base and this quantization of it only; another one is refused.

## Merge

```python
{merging}
```
{saving}{end}
"""


_SAVING = "\n`save_pretrained` cannot save a model of this format so that it loads again; use {}.\n"


def write_model_card(directory: str, config: SGRQConfig) -> None:
    """Writes or updates `README.md` beside the weights of a saved adapter.

    A card that is there keeps its metadata and its text (TRL's, say, or the author's) below a section of ours, which
    is brought up to date at the next save; only the empty template that PEFT fills in is replaced. Where TRL names a
    base that is a folder "None", the name of the folder is put.

    Args:
        directory (`str`): Where the adapter was saved; without adapter weights in it nothing is written.
        config (`SGRQConfig`): The adapter's config.
    """
    weights = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(weights):
        return
    path = Path(directory, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    base = config.base_model_name_or_path
    if base:
        card.data["base_model"] = base
    tags = {"sgrq", "quantization"} | ({f"base_model:adapter:{base}"} if base and not os.path.isdir(base) else set())
    card.data["tags"] = sorted(tags | set(card.data.get("tags") or ()))
    card.text = _with_section(_without_none(card.text, base), _section(weights, config))
    with written(path) as file:
        card.save(file)


def _with_section(text: str, section: str) -> str:
    if _TEMPLATE_SIGN in text:
        return section
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return before + section.rstrip("\n") + after
    return section.rstrip("\n") + "\n\n" + text.lstrip("\n")


def _without_none(text: str, base: str | None) -> str:
    """TRL's text with names for what it knows none of."""
    text = text.replace("[None](https://huggingface.co/None)", f"`{base or 'a model that is not named'}`")
    return text.replace('model="None"', f'model="{_PLACE}"')


def _section(weights: str, config: SGRQConfig) -> str:
    quantization = config.base_quantization
    base = config.base_model_name_or_path or "not recorded"
    tuned = config.selection or config.base_fingerprint or {}
    return _TEXT.format(
        place=_PLACE,
        begin=_BEGIN,
        end=_END,
        title=f"SGRQ adapter for {Path(base).name}",
        base=base,
        quantization=f"`{_quantized_by(quantization)}`" if quantization else "none (dense)",
        share=_share(config),
        ratio=config.ratio if isinstance(config.ratio, str) else f"{config.ratio:g}",
        criterion=config.criterion or ("magnitude" if _share(config) else "none, all are trained"),
        layers=len(tuned),
        kinds=", ".join(dict.fromkeys(f"`{name.rpartition('.')[2]}`" for name in tuned)) or "none",
        parameters=_count_parameters(weights),
        adapter_dtype=config.adapter_dtype,
        size=f"{os.path.getsize(weights) / 1e6:.2f} MB",
        training="".join(f"| {name} | {text} |\n" for name, text in config.trained_with.items()),
        loading=loading_code(config).block(),
        merging="\n".join(_merging(config)),
        saving=_SAVING.format(saved_by) if (saved_by := (quantization or {}).get("saved_by")) else "",
    )


def _merging(config: SGRQConfig) -> list[str]:
    quantization = config.base_quantization
    form = "quantized as the base is" if quantization else "dense, as the base is"
    save = [] if quantization and quantization.get("saved_by") else ['merged.save_pretrained("merged")']
    *lines, last = ["merged = model.merge_and_unload()", *save]
    if (config.auto_mapping or {}).get("online_rotations"):
        return [*lines, f"{last}  # {form}; loads by `peft_sgrq.load_rotated` alone"]
    return [*lines, f"{last}  # {form}; {'loads' if save else 'computes'} without peft_sgrq"]


def _quantized_by(quantization: dict[str, Any]) -> str:
    return str(quantization_code({**quantization, "pre_quantized": False})) or str(quantization.get("quant_method"))


def _share(config: SGRQConfig) -> str:
    if isinstance(config.ratio, str) or config.ratio_pattern:
        return "the most salient "
    return "" if config.ratio == 1 else f"the {config.ratio:.0%} most salient "


def _count_parameters(weights: str) -> int:
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if not name.endswith(".selection")]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
