"""Makes PEFT know the tuner type SGRQ.

PEFT dispatches on a closed enum. A real member is inserted, since transformers reads `peft_type.value` and plain
strings fail there; then PEFT's own `register_peft_method` does the rest.
"""

from __future__ import annotations

from typing import Any

NAME = "SGRQ"

_registering = False


def register() -> None:
    """Registers SGRQ with PEFT; does nothing if that has been done.

    Imports submodules of PEFT only: the autoload hook may run while `peft` itself is being imported.

    Raises:
        ImportError: If the installed PEFT has a tuner of this name of its own.
    """
    global _registering
    if _registering:
        return
    _registering = True
    try:
        _register()
    finally:
        _registering = False


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    if NAME in PeftType.__members__:
        owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(NAME))
        if owner is not None and owner.__module__.partition(".")[0] == __name__.partition(".")[0]:
            return
        if owner is not None or not getattr(PeftType(NAME), "_from_peft_sgrq", False):
            raise ImportError(
                f"The installed PEFT has a tuner type {NAME} of its own ({owner}), which peft-sgrq would hide; "
                "uninstall peft-sgrq to use PEFT's, or install an older PEFT to use peft-sgrq."
            )
    # Before the member is made, so that a failing import leaves nothing half registered.
    from peft_sgrq.adapter.card import write_model_card
    from peft_sgrq.base.workarounds.gptqmodel_few_cores import give_gptqmodel_workers
    from peft_sgrq.config import SGRQConfig
    from peft_sgrq.model import SGRQModel

    if NAME not in PeftType.__members__:
        _insert_member(PeftType, NAME)
    give_gptqmodel_workers()
    SGRQConfig.written_beside.append(write_model_card)
    register_peft_method(name=NAME.lower(), config_cls=SGRQConfig, model_cls=SGRQModel, prefix=SGRQModel.prefix)


def _insert_member(enum_class: Any, name: str) -> None:
    """Adds the member `name` with the value `name` to a str enum, as `enum` itself does it in Python 3.10 to 3.14."""
    member: Any = str.__new__(enum_class, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    member._from_peft_sgrq = True
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    type.__setattr__(enum_class, name, member)
