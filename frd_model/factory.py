"""Create models by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import model_config
from .frdnet import FRDNet
from .weights import load_encoder_weights, load_weights


def create_model(
    name: str = "frdnet_mit_b2",
    preset: str = "paper",
    pretrained: str | Path | None = None,
    encoder_weights: str | Path | None = None,
    **overrides: Any,
) -> FRDNet:
    """An FRD-Net by name.

    Args:
        name: ``frdnet_`` and the encoder: ``mit_b0`` ... ``mit_b5`` or a timm backbone. ``segformer_`` and the encoder
            is the ablation's baseline, without FRD blocks: ``segformer_mit_b2`` has 25.76 M parameters.
        preset: ``paper``, ``released`` or ``lite`` (made for ``frdnet_mit_b0``).
        pretrained: None (random weights), what :func:`frd_model.load_model` takes (a file, a folder, ``hf://owner/name``),
            or ``"demo"``, the weights inside the package.
        encoder_weights: MiT weights in Hugging Face's or the original naming: a file, a folder or
            ``hf://nvidia/mit-b2``, whose licence is printed on stderr at the download.
        overrides: fields of :class:`FRDNetConfig` to change.

    Raises:
        ValueError: unknown name, preset or field, a value out of its range, a file that does not fit.
    """
    config = model_config(name, preset, **overrides)
    model = FRDNet(config)
    if encoder_weights is not None:
        load_encoder_weights(model.encoder, encoder_weights)
    if pretrained is not None:
        load_weights(model, pretrained)
    return model
