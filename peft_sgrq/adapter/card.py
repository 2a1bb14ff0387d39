"""The model card of a saved adapter: what it is, how to load it, how to merge it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from peft_sgrq.base.check import auto_class, loading_code, quantization_code

if TYPE_CHECKING:
    from peft_sgrq.config import SGRQConfig

_BEGIN = "<!-- written by peft_sgrq: begin -->"
_END = "<!-- written by peft_sgrq: end -->"
_TEMPLATE_SIGN = "[More Information Needed]"  # in the card PEFT and huggingface_hub start from

_TEXT = """\
{begin}
# {title}

An adapter of `peft_sgrq`, saliency-guided scale tuning: it changes {share}scales of the layers below and
nothing else of the base model. Merged into the base it gives a model of the same format whose outputs are those of the
adapter, bit for bit.

| | |
|---|---|
| base model | `{base}` |
| quantization of the base | {quantization} |
| ratio of trained scales | {ratio} |
| criterion | {criterion} |
| layers | {layers} |
| trained parameters | {parameters:,} ({adapter_dtype}) |
| size of the adapter | {size} |

## Load

```python
# pip install peft-sgrq
import peft_sgrq  # registers SGRQ with PEFT
from peft import PeftModel
from transformers import {auto_class}, BitsAndBytesConfig

base = {loading}
model = PeftModel.from_pretrained(base, "path or Hub name of this adapter")
```

The adapter fits this base and this quantization of it only; another one is refused.

## Merge

```python
merged = model.merge_and_unload()
merged.save_pretrained("merged")  # {merged_format}; loads without peft_sgrq
```
{end}
"""


def write_model_card(directory: str, config: SGRQConfig) -> None:
    """Writes or updates `README.md` beside the weights of a saved adapter.

    A card that is there keeps its metadata and its text (TRL's, say, or the author's) and gets a section of ours, that
    is brought up to date at the next save; only the empty template that PEFT fills in is replaced.

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
    card.text = _with_section(card.text, _section(weights, config))
    beside = path.with_name(".README.md.partial")
    card.save(beside)
    os.replace(beside, path)


def _with_section(text: str, section: str) -> str:
    if _TEMPLATE_SIGN in text:
        return section
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return before + section.rstrip("\n") + after
    return text.rstrip("\n") + "\n\n" + section


def _section(weights: str, config: SGRQConfig) -> str:
    quantization = config.base_quantization
    base = config.base_model_name_or_path or "not recorded"
    return _TEXT.format(
        begin=_BEGIN,
        end=_END,
        title=f"SGRQ adapter for {Path(base).name}",
        base=base,
        quantization=f"`{quantization_code(quantization)}`" if quantization else "none (dense)",
        share=_share(config),
        ratio=config.ratio if isinstance(config.ratio, str) else f"{config.ratio:g}",
        criterion=config.criterion or ("magnitude" if _share(config) else "none, all are trained"),
        layers=len(config.selection or ()),
        parameters=_count_parameters(weights),
        adapter_dtype=config.adapter_dtype,
        size=f"{os.path.getsize(weights) / 1e6:.2f} MB",
        auto_class=auto_class(config),
        loading=loading_code(config),
        merged_format="quantized as the base is" if quantization else "dense, as the base is",
    )


def _share(config: SGRQConfig) -> str:
    if isinstance(config.ratio, str) or config.ratio_pattern:
        return "the most salient "
    return "" if config.ratio == 1 else f"the {config.ratio:.0%} most salient "


def _count_parameters(weights: str) -> int:
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if not name.endswith(".selection")]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
