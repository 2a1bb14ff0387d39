"""Lines that tell how far a training is, for logs, where a bar would be thousands of lines."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SECONDS = 5.0


class ProgressLines(TrainerCallback):
    """Prints the step and the loss every few seconds, and at the first and the last step.

    Args:
        name (`str`): What is trained, to begin a line with.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = self._last = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()
        self._last = self._start - _SECONDS

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss, now = (logs or {}).get("loss"), time.monotonic()
        if loss is None or (now - self._last < _SECONDS and state.global_step < state.max_steps):
            return
        self._last = now
        seconds = now - self._start
        print(
            f"{self._name}: step {state.global_step} of {state.max_steps}, loss {float(loss):.3f}, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
