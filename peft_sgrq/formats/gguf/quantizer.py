"""GGUF files through transformers' own `from_pretrained`, with weights that stay packed.

`from_pretrained(folder, gguf_file=...)` is served by the quantizer registered for GGUF, and the name cannot be taken
twice. So a subclass stands in its place, which makes that one unless it is given our config.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.utils.quantization_config import GgufConfig

from peft_sgrq.formats.gguf.file import FLOATS, GGUFFile, TensorInfo
from peft_sgrq.formats.gguf.layers import GGUFEmbedding, GGUFHead, GGUFLinear, GGUFTiedHead, Source, dequantized
from peft_sgrq.formats.gguf.names import Place, check_complete, find_places, tensor_processor
from peft_sgrq.formats.gguf.rope import FACTORS, divide_frequencies, uses_factors, warn_of_scaling

logger = logging.getLogger(__name__)


class SGRQGgufConfig(GgufConfig):
    """Loads a GGUF file with its weights packed, so that their scales can be tuned.

    Args:
        sub_blocks (`bool`): Whether the sub-blocks of K-quants and IQ4_XS (16 or 32 columns) have scales of their own
            to train; `False` trains one scale for each 256 columns.
        gguf_file (`str` or `None`): Filled in by `from_pretrained(..., gguf_file=...)`.

    Example:
        ```py
        >>> from peft_sgrq import SGRQGgufConfig
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(
        ...     "folder", gguf_file="model.Q4_K_M.gguf", quantization_config=SGRQGgufConfig()
        ... )
        ```
    """

    def __init__(self, gguf_file: str | None = None, sub_blocks: bool = True, **kwargs: Any) -> None:
        super().__init__(gguf_file=gguf_file)
        self.sub_blocks = sub_blocks
        self.tokenizer: str | None = kwargs.get("tokenizer")  # a digest, known when the file is read

    def to_dict(self) -> dict[str, Any]:
        found = {"quant_method": "gguf", "gguf_file": self.gguf_file, "tokenizer": self.tokenizer}
        return found if self.sub_blocks else {**found, "sub_blocks": False}


class PackedGgufQuantizer(GgufHfQuantizer):
    """A quantizer for GGUF files whose weights stay packed and can be trained; transformers' own for other configs."""

    def __new__(cls, *args: Any, **kwargs: Any) -> GgufHfQuantizer:
        if args and not isinstance(args[0], SGRQGgufConfig):
            return GgufHfQuantizer(*args, **kwargs)
        return super().__new__(cls)

    def read_header(self, gguf_file: str) -> None:
        from transformers.integrations.gguf import is_gguf_arch_supported

        self.file = GGUFFile(gguf_file)
        if is_gguf_arch_supported(self.file.architecture):
            raise ValueError(
                f"{gguf_file} holds a model of the architecture {self.file.architecture!r}, which transformers loads "
                "in a way that peft-sgrq does not know yet, expected another; use a model of another architecture."
            )
        self.quantization_config.gguf_file = os.path.basename(gguf_file)
        self.quantization_config.tokenizer = self.file.tokenizer_digest()

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        # transformers' own advises float32, which is that of its kernels.
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        return self.dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.places = find_places(self.file, model)
        check_complete(self.file, self.places, model)
        self.packed: dict[str, str] = {}  # tensor -> parameter
        compute = self.dtype or torch.get_default_dtype()
        for name, place in self.places.items():
            layer = _packed_module(model, self.file, self.file.tensors[name], place, self.quantization_config, compute)
            if layer is not None:
                module = place.parameter.removesuffix(".weight")
                model.set_submodule(module, layer)
                self.packed[name] = f"{module}.{layer.stored_name}"
                if isinstance(layer, GGUFEmbedding) and layer is model.get_input_embeddings() and self.file.tied:
                    _pack_tied_head(model, layer)
        _tell(self.file, {*self.places, *([FACTORS] if uses_factors(self.file, model) else [])}, self.packed)
        warn_of_scaling(self.file, model.config)

    def get_state_dict(self, checkpoint_file: str, model: nn.Module) -> dict[str, torch.Tensor]:
        processor = tensor_processor(self.file, model.config)
        state: dict[str, torch.Tensor] = {}
        for name, place in self.places.items():
            if name in self.packed:
                packed = self.file.blocks(name)
                state[self.packed[name]] = packed if place.rows is None else packed[place.rows]
            else:
                state.update(dense_tensors(self.file, name, place, processor))
        return state

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        divide_frequencies(self.file, model)
        return model

    @property
    def is_trainable(self) -> bool:
        return True


def _packed_module(
    model: Any,
    file: GGUFFile,
    info: TensorInfo,
    place: Place,
    config: SGRQGgufConfig,
    dtype: torch.dtype,
) -> GGUFLinear | GGUFEmbedding | None:
    """A module on meta that holds a tensor packed, in place of the one the model has; `None` if it must be dense."""
    if info.kind is None or not place.packable or not place.parameter.endswith(".weight"):
        return None
    owner: Any = model.get_submodule(place.parameter.removesuffix(".weight"))
    source = Source(os.path.abspath(file.path), info.name, place.rows)
    if type(owner) is nn.Linear:
        is_head = owner is model.get_output_embeddings()
        make: Any = functools.partial(GGUFHead, dtype=dtype) if is_head else GGUFLinear
        return make(
            owner.in_features,
            owner.out_features,
            info.ggml_type,
            bias=owner.bias,
            sub_blocks=config.sub_blocks,
            source=source,
            device="meta",
        )
    scale = getattr(owner, "scalar_embed_scale", None)
    # Gemma's embedding multiplies what it looks up by a number; others that do more stay dense.
    if type(owner) is nn.Embedding or (isinstance(owner, nn.Embedding) and isinstance(scale, (int, float))):
        rows, columns = info.shape
        return GGUFEmbedding(
            rows,
            columns,
            info.ggml_type,
            dtype=dtype,
            padding_idx=owner.padding_idx,
            embed_scale=scale,
            source=source,
            device="meta",
        )
    return None


def _pack_tied_head(model: Any, embedding: GGUFEmbedding) -> None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, GGUFTiedHead(embedding, head.bias))
    model.all_tied_weights_keys.pop(f"{name}.weight", None)  # there is no parameter to tie any more


def dense_tensors(file: GGUFFile, name: str, place: Place, processor: Any) -> dict[str, torch.Tensor]:
    """The parameters a tensor makes that does not stay packed, by their names, float32 where they are floats.

    Args:
        file (`GGUFFile`): The file.
        name (`str`): The tensor.
        place (`Place`): Where it goes.
        processor: transformers' processor of the architecture, as `tensor_processor` returns it.
    """
    info = file.tensors[name]
    if info.kind is None:
        values = file.numbers(name)
        values = values.float() if info.ggml_type in FLOATS else values
    else:
        values = dequantized(info.kind, file.blocks(name), torch.float32).view(info.shape)
    kept: dict[str, Any] = {"tensors": {}}
    names = {name: place.parameter}
    result = processor.process(weights=values.numpy(), name=name, parsed_parameters=kept, tensor_key_mapping=names)
    if result.name is None:  # the processor has put it under its own name
        return kept["tensors"]
    return {place.parameter: torch.tensor(result.weights)}


def _tell(file: GGUFFile, places: Collection[str], packed: Collection[str]) -> None:
    """Says which quantized tensors had to be dequantized, and which tensors the model has no place for."""
    dense = [name for name in file.tensors if name in places and name not in packed and file.tensors[name].kind]
    if dense:
        logger.warning(
            "%d quantized tensors of %s are dequantized, as the model does not have them as matrices of a linear "
            "layer or an embedding, and are not tuned: %s%s.",
            len(dense),
            file.path.name,
            ", ".join(dense[:3]),
            " and so on" if len(dense) > 3 else "",
        )
    unused = [name for name in file.tensors if name not in places]
    if unused:
        logger.warning(
            "%d tensors of %s are not used, as transformers has no place for them: %s%s. llama.cpp uses them, so its "
            "results may differ.",
            len(unused),
            file.path.name,
            ", ".join(unused[:3]),
            " and so on" if len(unused) > 3 else "",
        )


AUTO_QUANTIZER_MAPPING["gguf"] = PackedGgufQuantizer
