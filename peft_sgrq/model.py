"""The tuner: which layers get an adapter, and the book-keeping of adapters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import TaskType
from torch import nn

from peft_sgrq.adapter.learning_rate import watch_learning_rate
from peft_sgrq.adapter.renamed_layers import rename_layers, rename_tensors
from peft_sgrq.adapter.starting_point import StartingPoint
from peft_sgrq.adapter.state import adapter_tensors, further_names, named_for, take_over
from peft_sgrq.adapter.stored import check_adapter_file
from peft_sgrq.adapter.targets import (
    TASK_HEADS,
    check_modules_to_save,
    check_targets,
    find_targets,
    name_targets,
    warn_of_dense_base,
    warn_of_fused_experts,
)
from peft_sgrq.adapter.training_record import note_training
from peft_sgrq.adapter.weighted_sum import check_sum, config_of_sum
from peft_sgrq.base.engines import check_engine, check_whole
from peft_sgrq.base.loading import describe_class
from peft_sgrq.base.prepare import prepare_base, writing_scales
from peft_sgrq.base.trainable_kernels import use_trainable_kernels
from peft_sgrq.base.workarounds.compiled_modules import compiled_in_place
from peft_sgrq.base.workarounds.loading_attributes import forget_loading_attributes
from peft_sgrq.base.workarounds.tied_merges import merging_ties, separate_rows
from peft_sgrq.base.workarounds.token_rows import check_token_rows
from peft_sgrq.base.workarounds.trainer_refusal import let_trainers_train
from peft_sgrq.choices import name_in_state_dict, without_wrapper_names
from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.bnb_4bit.nesting import nested_layers
from peft_sgrq.formats.compressed_tensors.weight import keep_compressed
from peft_sgrq.formats.scale_matrix import SERVED_ANEW
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.base_layers import base_layer_of, original_scales, places_of_shared, scaled_weight_of
from peft_sgrq.layer.first_gradients import FirstGradients
from peft_sgrq.layer.linear import SGRQLinear
from peft_sgrq.layer.masks import decode_mask
from peft_sgrq.layer.mixed_batch import adapter_names_for, check_adapter_names
from peft_sgrq.selection.completion import complete_config, select_without_data

logger = logging.getLogger(__name__)


class SGRQModel(BaseTuner):
    """Tunes the quantization scales of a model's linear layers: all of them, or with `ratio` the most salient ones.

    Codes, zero points and all other parameters stay as they are. An adapter holds the relative changes of the
    selected scales; merging writes them into the scales of the quantized base and quantizes nothing again.

    Args:
        model (`nn.Module`): The model to adapt, quantized or not.
        peft_config (`SGRQConfig` or `dict[str, SGRQConfig]`): The adapter's configuration.
        adapter_name (`str`): Its name.
        low_cpu_mem_usage (`bool`): Make empty adapter weights on the meta device, to be loaded into.

    Raises:
        ValueError: If no layer can be adapted, a target cannot, or the model is not the base a saved adapter was
            trained on. The model is as it was then.

    Example:
        ```py
        >>> import peft_sgrq
        >>> from peft import get_peft_model
        >>> model = get_peft_model(model, peft_sgrq.SGRQConfig(task_type="CAUSAL_LM"))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix = "sgrq_"
    tuner_layer_cls = SGRQLinear
    target_module_mapping: dict[str, list[str]] = {}
    # Of the adapter that is being injected: where it starts, and the layers it goes to.
    _starting_point: StartingPoint | None = None
    _found: Mapping[str, ScaledWeight] = MappingProxyType({})
    # Layers that a model has under several names, and where: the modules they are in, and their names there.
    _places: Mapping[nn.Module, list[tuple[nn.Module, str]]] = MappingProxyType({})

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(compiled_in_place(model), *args, **kwargs)

    # injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_engine(model)
        use_trainable_kernels(model)
        # The selection and the fingerprint are written into a copy, so that one config can serve several models.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if config.base_model_name_or_path is None:  # PEFT does not find it in a compiled model
            config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
        # For these tasks PEFT names the heads in the config of the caller, and only after the injection.
        if config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
            heads = TASK_HEADS[config.task_type]
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
        # Read once, so that what is checked is what is written.
        start = StartingPoint(config.init_weights) if isinstance(config.init_weights, str) else None
        self._starting_point, self._places = start, places_of_shared(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._starting_point, self._found, self._places = None, {}, {}
        if start is not None:
            start.write(model, adapter_name)
            config.init_weights = True  # where it is saved, its own deltas say where it is

    def _prepare_adapter_config(self, peft_config: SGRQConfig, model_config: dict[str, Any]) -> SGRQConfig:
        if peft_config.target_modules is None:
            warn_of_fused_experts(self.model)
        return name_targets(self.model, peft_config)

    def _prepare_model(self, peft_config: SGRQConfig, model: nn.Module) -> None:
        # Everything that can be wrong is found here, before the first layer is replaced.
        if peft_config.loaded_from is not None:
            check_adapter_file(peft_config.loaded_from, peft_config.base_fingerprint or ())
        peft_config.renamed_layers = rename_layers(peft_config, model)
        check_modules_to_save(model, peft_config)
        scaled_weights = self._found = find_targets(model, peft_config)
        check_token_rows(model, peft_config, scaled_weights)
        if peft_config.auto_mapping is None:
            peft_config.auto_mapping = describe_class(model)
        check_targets(model, scaled_weights, peft_config)
        if self._starting_point is not None:
            self._starting_point.configure(peft_config, scaled_weights)
        prepare_base(model)
        with original_scales(model):  # whatever is merged into the base
            complete_config(peft_config, model, scaled_weights)
        keep_compressed(model)
        forget_loading_attributes(model)
        if not peft_config.inference_mode:
            warn_of_dense_base(model)
            let_trainers_train(model)
            note_training()
            if peft_config.check_learning_rate:
                watch_learning_rate()

    def _create_and_replace(
        self,
        peft_config: SGRQConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        scaled_weight, base_layer = self._found.get(current_key), base_layer_of(target)
        if scaled_weight is None or scaled_weight.module is not base_layer:
            # The layers are those of a state dict, not of the config.
            scaled_weight = scaled_weight_of(current_key, base_layer, peft_config.group_size)
        selection = peft_config.selection = peft_config.selection or {}
        if current_key not in selection:
            selection |= select_without_data({current_key: scaled_weight}, peft_config)
        units = decode_mask(selection[current_key], scaled_weight.selectable, none=peft_config.zero_points)
        if isinstance(target, SGRQLinear):
            target.update_layer(adapter_name, config=peft_config, units=units)
            return
        layer = SGRQLinear(target, adapter_name, peft_config, units, scaled_weight)
        layer.watch_gradients(current_key, FirstGradients.of(self.model))
        layer.train(target.training)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer made its deltas on the device of its base; PEFT's own would also move the base.
        setattr(parent, child_name, new_module)
        # PEFT knows a layer by the first of its names.
        for module, name in self._places.get(child, ()):
            setattr(module, name, new_module)

    # merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names, safe_merge)
        separate_rows(self.model)
        super().merge_adapter(adapter_names=adapter_names)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        with original_scales(self.model):
            nested = nested_layers(self.model)
        saved_by = {layer.scaled_weight.saved_by for layer in self._layers()} - {None}
        served_anew = any(layer.scaled_weight.served_anew for layer in self._layers())
        ties = merging_ties(self.model) if merge else nullcontext()
        with ties, writing_scales(self.model, "Merging", nested):
            model: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]
                merge=merge, progressbar=progressbar, adapter_names=adapter_names
            )
            for shared, places in places_of_shared(model).items():
                if isinstance(shared, SGRQLinear):
                    for module, name in places:
                        setattr(module, name, shared.get_base_layer())
        FirstGradients.forget(model)
        if merge and served_anew:
            logger.warning(SERVED_ANEW)
        for how in saved_by if merge else ():
            logger.warning("`save_pretrained` cannot save this merged model so that it loads again; use %s.", how)
        return model

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        # Over all layers first, so that none of them is merged if one cannot be.
        check_whole(self.model)
        for layer in self._layers():
            layer.check_base()
            if safe_merge:
                layer.check_finite(adapter_names)

    def _layers(self) -> Iterator[SGRQLinear]:
        return (module for module in self.model.modules() if isinstance(module, SGRQLinear))

    # several adapters

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds an adapter that is the weighted sum of others; it is exact, as adapters add scale by scale.

        Args:
            adapters (`list[str]`): Names of adapters of this model.
            weights (`list[float]`): A weight for each.
            adapter_name (`str`): Name of the new adapter; it selects what any of the others does.

        Raises:
            ValueError: If an adapter does not exist, the new name does already, or the lengths differ.
        """
        check_sum(self.peft_config, adapters, weights, adapter_name)
        self.peft_config[adapter_name] = config_of_sum(self.model, self.peft_config, adapters)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        for layer in self._layers():
            if adapter_name in layer.sgrq_delta:
                layer.add_weighted(adapters, weights, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            compiling = torch.compiler.is_compiling()
            with nullcontext() if compiling else FirstGradients.of(self.model).forward_pass(self.training):
                yield
            return
        check_adapter_names(names, list(self.peft_config), self.training)
        layers = [module for module in self.modules() if isinstance(module, (SGRQLinear, AuxiliaryTrainingWrapper))]
        with adapter_names_for(self.model, layers, names, kwargs.get("num_beams")):
            yield

    # files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SGRQConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        stored = adapter_tensors(model, state_dict, config, f".{cls.prefix}delta.{adapter_name}")
        # A layer with several names is saved under the first, as the config names it.
        again = {f"{name}.{key}" for name in further_names(model) for key in ("weight", "selection")}
        return {key: tensor for key, tensor in selected.items() if key not in again} | stored

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SGRQConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's renaming of the tensors of a file; here they are checked, and the config takes over what they say.

        Raises:
            ValueError: If a tensor does not fit the layer it is for, before any of them is loaded.
        """
        plain = {without_wrapper_names(key): tensor for key, tensor in state_dict.items()}
        tensors = rename_tensors(plain, config.renamed_layers)
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        wrapped = isinstance(getattr(model, "base_model", None), BaseTuner)
        renamed = {named_for(adapter_name, key, wrapped): tensor for key, tensor in renamed.items()}
        taken = take_over(model, config, renamed, f".{cls.prefix}delta.{adapter_name}")
        return {name_in_state_dict(key): tensor for key, tensor in taken.items()}
