"""What runs a network for prediction: PyTorch, torch.compile, or an exported copy in onnxruntime or OpenVINO."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import ENGINES, PRECISIONS
from .engine_cache import export_once
from .eval_view import device_of, unwrap
from .exported import ExportedNet, load_exported
from .frdnet import FRDNet
from .predict import has_image_head, parse_device

__all__ = ["Prepared", "has_bf16", "prepare"]

# What "auto" lets bf16 lose: AUC of the score, and share of the pixels that are marked in one precision only.
MOST_AUC, MOST_PIXELS = 0.005, 0.005
# Engines that run the network itself, and not a copy in a file.
IN_TORCH = ("torch", "compile")


class Prepared(nn.Module):
    """A network that `prepare` has made ready, for :func:`frd_model.predict`; always in eval mode.

    Attributes:
        engine, precision: what runs, without "auto".
        config, score_rule: those of the network; None if it has none.
    """

    def __init__(self, net: nn.Module, engine: str, precision: str, source: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.engine = engine
        self.precision = precision
        self.config = getattr(source, "config", None)
        self.score_rule = getattr(source, "score_rule", None)
        super().train(False)

    def train(self, mode: bool = True) -> Prepared:
        if mode:
            raise NotImplementedError(
                "train: a prepared network has no gradients; train the one it was made of"
            )
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] of any floating dtype -> float32 logits [B, 1, H, W]."""
        logits: Tensor = self.net(self._input(images))
        return logits.float()

    def with_score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and image-level logits [B]. ValueError where the network has no image-level head."""
        if not has_image_head(self):
            raise ValueError("image_head: must be true in the configuration for a score, got False")
        with_score: Any = self.net.with_score
        logits, scores = with_score(self._input(images))
        return logits.float(), scores.float()

    def _input(self, images: Tensor) -> Tensor:
        if images.device.type != "cpu" or self.engine not in IN_TORCH:
            return images.to(_dtype(self.precision))
        return images.to(_dtype(self.precision), memory_format=torch.channels_last)


def prepare(
    model: nn.Module,
    engine: str = "auto",
    precision: str = "auto",
    device: str | torch.device | None = None,
    *,
    notify: Callable[[str], object] = warnings.warn,
) -> nn.Module:
    """A copy of a network for prediction, in the engine and precision that suit it. `model` is not changed.

    Args:
        model: an FRDNet or another network of its shapes. One that `prepare` gave is returned as it is, and one of
            `load_exported` stays in its file's engine, "exported".
        engine: "torch" (on a CPU in the channels_last layout); "compile" (torch.compile, which takes a minute or more
            for each size of image; after eight sizes further ones run as in "torch"); "onnxruntime" or "openvino" (an
            FRDNet on the CPU, exported once into the user's cache folder); "auto": torch, which no other was faster
            than by a tenth where it computes in bf16 (docs/predict.md).
        precision: "float32"; "bf16", weights and activations in bfloat16; "auto": bf16 where the hardware multiplies
            it and the network's `score_rule` says that it loses at most 0.005 of the AUC and moves at most 0.5 % of
            the pixels across the threshold (`frd calibrate --bf16`), else float32.
        device: where to run; None takes the model's.
        notify: called with a line before an export.

    Returns:
        A module that :func:`frd_model.predict` takes like an FRDNet, with the attributes of `Prepared`.

    Raises:
        ValueError: an unknown name, a device or engine that cannot be used here.
        NotImplementedError: a precision that the engine does not have.
        ModuleNotFoundError: the engine's package is missing.
        TypeError: no module.
        OSError, RuntimeError: the network cannot be exported.
    """
    for name, value, known in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}; see create_model")
    if isinstance(model, Prepared):
        for name, value, own in (("engine", engine, model.engine), ("precision", precision, model.precision)):
            if value not in ("auto", own):
                raise ValueError(
                    f"{name} must be auto or {own!r}, which the network was prepared for, got {value!r}"
                )
        return model
    if isinstance(model, ExportedNet):
        return _exported(model, engine, precision)
    model = unwrap(model)
    target = device_of(model) if device is None else parse_device(device)
    if precision == "auto":
        has = engine != "onnxruntime" and has_bf16(target)
        precision = "bf16" if has and allows_bf16(model) else "float32"
    return _prepare(model, "torch" if engine == "auto" else engine, precision, target, notify)


def _prepare(
    model: nn.Module, engine: str, precision: str, device: torch.device, notify: Callable[[str], object]
) -> Prepared:
    if engine in IN_TORCH:
        net = _in_torch(model, precision, device)
        if engine == "compile":
            # Inductor has given wrong results for convolutions of symbolic sizes on CPUs (torch 2.14).
            net.compile(dynamic=False)
        return Prepared(net, engine, precision, model)
    if type(model) is not FRDNet or device.type != "cpu":
        got = f"{type(model).__name__} on {device.type}"
        raise ValueError(f"engine {engine} runs an FRDNet on the CPU, got {got}; torch and compile run any")
    if precision == "bf16" and engine != "openvino":
        raise NotImplementedError(f"engine {engine} has no bf16 on CPUs; torch, compile and openvino have it")
    return Prepared(load_exported(export_once(model, engine, notify), precision), engine, precision, model)


def _exported(net: ExportedNet, engine: str, precision: str) -> Prepared:
    if engine != "auto":
        raise ValueError(f"engine must be auto for an exported file, whose format decides, got {engine!r}")
    if precision == "bf16":
        raise ValueError("precision must be float32 or auto for an exported file, got 'bf16'")
    return Prepared(net, "exported", "float32", net)


def has_bf16(device: str | torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware: AVX512-BF16, AMX or Arm's BF16 on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch do not tell.
    flags: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return kind == "cpu" and any(on for flag, on in flags.items() if flag.endswith("bf16"))


def allows_bf16(model: nn.Module) -> bool:
    """Whether the network's score rule says what bf16 changes (`frd calibrate --bf16`), and that it is little."""
    rule = getattr(model, "score_rule", None)
    if rule is None:
        return False
    try:
        found, auc = rule.validation["bf16"], rule.validation["auc"]
        return bool(found["auc"] >= auc - MOST_AUC and found["pixel_difference"] <= MOST_PIXELS)
    # It says nothing, or something else.
    except (KeyError, TypeError):
        return False


def _in_torch(model: nn.Module, precision: str, device: torch.device) -> nn.Module:
    net = copy.deepcopy(model).eval().requires_grad_(False).to(device, _dtype(precision))
    return net.to(memory_format=torch.channels_last) if device.type == "cpu" else net


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
