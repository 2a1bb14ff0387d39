"""Registers SGRQ without an `import peft_sgrq`, so that adapters load wherever the package is installed.

PEFT has no plug-in mechanism, but it imports bitsandbytes, and bitsandbytes loads the entry points of the group
`bitsandbytes.backends`. Ours is this hook. It runs while bitsandbytes, and often PEFT, is being imported, so it
imports nothing by itself and never raises: bitsandbytes would fail to import for everybody. `PEFT_SGRQ_AUTOLOAD=0`
switches it off; an explicit `import peft_sgrq` works either way.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SWITCH = "PEFT_SGRQ_AUTOLOAD"
_PACKAGE = __name__.partition(".")[0]

logger = logging.getLogger(__name__)


def hook() -> None:
    """The entry point: registers now if PEFT is there, else as soon as it has been imported."""
    try:
        if sys.modules[_PACKAGE].__dict__.get("_explicitly_imported"):
            return  # whoever imported the package is registering
        if os.environ.get(_SWITCH, "1").lower() in ("0", "false", "off", "no"):
            _leave_no_trace()
        elif "peft" in sys.modules:
            _register()
        else:
            sys.meta_path.insert(0, _PeftFinder())
            _leave_no_trace()
    except Exception:
        logger.debug("peft_sgrq was not registered by itself; `import peft_sgrq` does it.", exc_info=True)


def _register() -> None:
    try:
        importlib.import_module(f"{_PACKAGE}.plugin.registration").register()
    except Exception:
        logger.debug("peft_sgrq was not registered by itself; `import peft_sgrq` does it.", exc_info=True)
        _leave_no_trace()  # so that an explicit import tries again and shows the error


def _leave_no_trace() -> None:
    # The package was imported only to reach this hook, and did not register. Forgotten, it is imported anew.
    for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]:
        del sys.modules[name]


class _PeftFinder(MetaPathFinder):
    """Finds `peft` once, by the other finders, and has SGRQ registered when it has been executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
