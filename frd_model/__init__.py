"""FRD-Net, image manipulation localization on the kernels of :mod:`frd_kernels`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = [
    "PRESETS",
    "FRDNet",
    "FRDNetConfig",
    "create_model",
    "inspect_photo",
    "load_model",
    "predict",
    "save_model",
]

_HOME = {
    "PRESETS": ".config",
    "FRDNet": ".frdnet",
    "FRDNetConfig": ".config",
    "create_model": ".factory",
    "inspect_photo": ".provenance",
    "load_model": ".weights",
    "predict": ".predict",
    "register_timm": ".timm_models",
    "save_model": ".weights",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule `predict` binds it here, over the public function of the same name.
        if name == "predict" and isinstance(value, ModuleType):
            value = value.predict
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    # Lazy, so that `frd --help` and the data commands start without torch and timm.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


sys.modules[__name__].__class__ = _Package
