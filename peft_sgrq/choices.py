"""What a config may say: ratios, budgets, criteria and names of layers, and the checks of them."""

from __future__ import annotations

import math

Ratio = float | str
Budget = float | int | str

DEFAULT_RATIO = 1.0  # all scales, PEQA: learnt most in every comparison, docs/results.md
NAMED_RATIOS = ("knee", "global", "layerwise")
DEFAULT_BUDGET = 0.4  # the share of SGR-Q
RECOMMENDED_LEARNING_RATE = 6e-3  # of Adam; relative changes want larger steps than LoRA's matrices
ADAPTER_DTYPES = ("float32", "bfloat16")

WITHOUT_DATA = ("magnitude", "random")
CRITERIA = ("obs", "billm", "diag", "error", "fisher", "gradient", *WITHOUT_DATA)
DEFAULT_CRITERION = "diag"  # no worse than obs when its scales are tuned, at half the cost: docs/selection-results.md
CUSTOM = "custom:"  # what the names of users' functions begin with


def check_ratio(ratio: object, name: str = "ratio") -> None:
    """Refuses what is neither a share in (0, 1] nor one of `NAMED_RATIOS`."""
    names = ", ".join(f'"{known}"' for known in NAMED_RATIOS)
    if isinstance(ratio, str):
        if ratio not in NAMED_RATIOS:
            raise ValueError(f"`{name}` is {ratio!r}, expected a number in (0, 1] or one of {names}.")
        return
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"`{name}` is {ratio!r}, expected a number in (0, 1] or one of {names}; 1.0 is the default.")
    if not (math.isfinite(ratio) and 0 < ratio <= 1):
        raise ValueError(
            f"`{name}` is {ratio}, expected a share of the scales in (0, 1]; 0.4 trains 40 % of them, 1.0 all."
        )


def check_ratio_pattern(pattern: object) -> None:
    """Refuses what is not a dict from module names, or patterns of them, to numbers in (0, 1] or `"knee"`."""
    if not isinstance(pattern, dict):
        raise TypeError(f"`ratio_pattern` is {pattern!r}, expected a dict from module names or patterns to ratios.")
    for key, value in pattern.items():
        if not isinstance(key, str):
            raise TypeError(
                f"`ratio_pattern` has the key {key!r}, expected the name of a module or a pattern of names."
            )
        check_ratio(value, f"ratio_pattern[{key!r}]")
        if value in ("global", "layerwise"):
            raise ValueError(
                f"`ratio_pattern[{key!r}]` is {value!r}, which is about all layers, expected a number in (0, 1] or "
                '"knee"; set `ratio` instead.'
            )


def check_budget(budget: object) -> None:
    """Refuses what is no budget as [`budget_in_scales`] takes it."""
    expected = (
        'expected a share of all scales in (0, 1] such as 0.4, a number of scales as an int, or a size such as "20MB"'
    )
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"`budget` is {budget!r}, {expected}.")
    valid = budget >= 1 if isinstance(budget, int) else True
    if isinstance(budget, float):
        valid = math.isfinite(budget) and 0 < budget <= 1
    if isinstance(budget, str):
        try:
            size_in_bytes(budget, "budget")
        except ValueError:
            valid = False
    if not valid:
        raise ValueError(f"`budget` is {budget!r}, {expected}.")


def size_in_bytes(size: int | str, name: str) -> int:
    """Bytes of a size such as `"20MB"`, `"4GiB"` or a number of bytes; a ValueError names what it is the size of."""
    try:
        if isinstance(size, str) and not size.strip()[:1].isdigit():
            raise ValueError
        from accelerate.utils.modeling import convert_file_size_to_int  # type: ignore[import-untyped]

        if isinstance(size, str) and size.endswith("b"):  # which stands for bits there
            size = size[:-1] + "B"
        found = int(convert_file_size_to_int(size))
    except (ValueError, AttributeError):
        found = 0
    if found <= 0:
        raise ValueError(f'`{name}` is {size!r}, expected a size such as "20MB" or a number of bytes; correct it.')
    return found


def check_criterion(criterion: object) -> None:
    """Refuses what is not the name of a criterion; those of users' functions begin with `custom:`."""
    known = ", ".join(f'"{name}"' for name in CRITERIA)
    if not isinstance(criterion, str):
        raise TypeError(f"`criterion` is {criterion!r}, expected one of {known}, or None for the default.")
    if criterion not in CRITERIA and not criterion.startswith(CUSTOM):
        raise ValueError(
            f"`criterion` is {criterion!r}, expected one of {known}; give a function of your own to `calibrate`."
        )


# What torch.compile, activation checkpointing and FSDP put into the names of the modules they wrap.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def without_wrapper_names(name: str) -> str:
    """The name of a layer as it is in a model that nothing has wrapped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def name_in_state_dict(name: str) -> str:
    """What a state dict calls the layer: activation checkpointing takes its own name out of those, and only it."""
    return name.replace(_WRAPPERS[1], "")
