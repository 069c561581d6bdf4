"""FRD-Net in timm's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import is_model, register_model

from .config import NAME_PREFIX
from .encoder import MIT_SIZES
from .factory import create_model
from .frdnet import FRDNet


def register_timm() -> None:
    """Add ``frdnet_mit_b0`` ... ``frdnet_mit_b5`` to timm's registry; a second call changes nothing.

    Then ``timm.create_model("frdnet_mit_b2", preset="paper", ...)`` takes the arguments of
    :func:`frd_model.create_model`; `pretrained` is a file, a folder or ``hf://owner/name``. It is a call of its own
    because importing frd_model does not import timm.
    """
    for encoder in MIT_SIZES:
        if not is_model(NAME_PREFIX + encoder):
            register_model(_entrypoint(NAME_PREFIX + encoder))


def _entrypoint(name: str) -> Callable[..., FRDNet]:
    def create(
        pretrained: Any = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> FRDNet:
        if pretrained is True:
            raise ValueError(
                f"pretrained: {name} has no weights here; give a file, a folder or hf://OWNER/NAME"
            )
        for key, value in (
            ("pretrained_cfg", pretrained_cfg),
            ("pretrained_cfg_overlay", pretrained_cfg_overlay),
            ("cache_dir", cache_dir),
        ):
            if value is not None:
                raise ValueError(f"{key}: must be left out for {name}, got {value!r}")
        return create_model(name, pretrained=pretrained or None, **options)

    create.__name__ = name
    return create
