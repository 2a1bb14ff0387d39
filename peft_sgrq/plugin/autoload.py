"""Registers SGRQ without an `import peft_sgrq`, so that adapters load wherever the package is installed.

PEFT has no plug-in mechanism, but it imports bitsandbytes, and bitsandbytes calls the entry points of the group
`bitsandbytes.backends`. Ours is `hook`. It must not raise: bitsandbytes would fail to import for everybody.
`PEFT_SGRQ_AUTOLOAD=0` switches it off; an explicit `import peft_sgrq` works either way.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


def hook() -> None:
    """The entry point: registers now if PEFT is there, else as soon as it has been imported."""
    if os.environ.get("PEFT_SGRQ_AUTOLOAD", "1").lower() in ("0", "false", "off", "no"):
        _forget_package()
    elif "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    try:
        from peft_sgrq.plugin.registration import register

        register()
    except Exception:
        logger.debug("peft_sgrq was not registered by itself; `import peft_sgrq` does it.", exc_info=True)
        _forget_package()


def _forget_package() -> None:
    # It was imported only to reach this hook. Imported again by somebody who wants it, it registers, or says why not.
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_sgrq"]:
        del sys.modules[name]


class _AfterPeft(MetaPathFinder):
    """Finds `peft` by the other finders, and has SGRQ registered when it has been executed."""

    # Others may ask all finders as well (wrapt's does; a second import of bitsandbytes makes a second of these), so
    # that this one is asked while it asks.
    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft" or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)  # looked for without being imported, too: transformers asks whether it is there
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
