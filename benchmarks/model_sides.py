"""FRD-Net with our layers and with the eager forms of the same weights, and the gate between them.

A residual scale of 1e-5, as training starts with, would hide any error of the FRD blocks from the logits, so the
scales are 1 here. The arg-max of the clustering makes the output jump: images in which float64 finds a token whose two
best cosines nearly tie are passed over, as rounding would decide there, in our layers and in the eager ones alike.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frd_kernels as fk
from frd_kernels.icm.reference import cosines
from frd_model import FRDNet, create_model

from . import eager
from .cases import LAYOUTS
from .gate import FLOOR, GateError, relative_error

VARIANTS = {"paper": "frdnet_mit_b2", "released": "frdnet_mit_b2", "lite": "frdnet_mit_b0"}
OPS = ("pdc2d", "pdc_weight", "pdc_block", "icm")
# For each `variant` of the ICM its eager forms, the one that its authors or users write first.
ICM_FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "released": {"eager": eager.icm_products, "eager, gather and scatter_add": eager.icm_gather},
    "paper": {"eager": eager.icm_dense},
}
FOLDED = "folded"
NEAR_TIE = 1e-5  # a difference of cosines that float32 might turn round
SMALLEST = 256  # pixels of a side
SMALL_GRIDS = ((2, 2), (2, 1), (1, 1))
TRIES = 64  # images drawn before giving up

# What no net that computes the right thing reaches. Far above a kernel's cap, since the library's layers around ours
# err too: GroupNorm on the CPU sums a channels_last image in one chain, so that its error grows with the pixels (2e-5
# at 1024 x 1024, ours and eager alike), and in 16 bit all roundings of a net add up to some hundredths.
CAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Of gradients: a ReLU of the decoder whose input the last bit puts on the other side of zero changes what flows into
# every layer before it, in the eager net by the same amount (nearly 1e-2 was seen, equal on both sides to 1e-7).
GRADIENT_CAP = {torch.float32: 5e-2, torch.bfloat16: 2e-1}


def build_model(variant: str, seed: int = 0, /, **overrides: Any) -> FRDNet:
    """The preset with random weights, in eval mode, without stochastic depth; overrides as in `create_model`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"drop_path": 0.0, "layer_scale": 1.0, **overrides}
        model = create_model(VARIANTS[variant], preset=variant, **options)
    return model.eval()


class EagerICM(nn.Module):
    """An `fk.ICM` computed by one of the eager forms. [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, icm: fk.ICM, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.icm, self.form = icm, form

    def forward(self, x: Tensor) -> Tensor:
        rounds: list[Any] = list(self.icm.rounds)
        projections = [(p.key.weight, p.key.bias, p.value.weight, p.value.bias) for p in rounds]
        return self.form(x, projections, self.icm.alpha, self.icm.beta, self.icm.grids)


class EagerDPM(nn.Module):
    """An `fk.DPM` in eager PyTorch. [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, dpm: fk.DPM) -> None:
        super().__init__()
        self.dpm = dpm

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.dpm.angular, self.dpm.central
        weights = first.pdc.weight, first.point.weight, second.pdc.weight, second.point.weight
        return eager.dpm(x, *weights)


class EagerStemPDC(nn.Module):
    """A dense, replicate-padded `fk.PDC2d` in eager PyTorch. [B, C, H, W] -> [B, O, H, W]."""

    def __init__(self, pdc: fk.PDC2d) -> None:
        super().__init__()
        if pdc.kind not in ("angular", "central") or pdc.groups != 1 or pdc.bias is not None:
            raise ValueError(f"pdc must be a dense angular or central layer without bias, got {pdc}")
        self.pdc = pdc

    def forward(self, x: Tensor) -> Tensor:
        weight = self.pdc.weight
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        if self.pdc.kind == "angular":
            return F.conv2d(padded, eager.angular_weight(weight))
        return F.conv2d(padded, weight) - F.conv2d(x, weight.sum((2, 3), keepdim=True))


def swap_layers(model: nn.Module, form: Callable[..., Tensor]) -> None:
    """Puts eager layers in the place of ours, in this model; layers that were folded before stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, fk.ICM):
                setattr(parent, name, EagerICM(child, form))
            elif isinstance(child, fk.DPM) and isinstance(child.angular, fk.PDCBlock2d):
                setattr(parent, name, EagerDPM(child))
        if isinstance(parent, nn.ModuleList):
            for index, child in enumerate(parent):
                if isinstance(child, fk.PDC2d):
                    parent[index] = EagerStemPDC(child)


def rivals_of(model: FRDNet, training: bool = False) -> dict[str, FRDNet]:
    """Name -> a copy of the model in eager PyTorch, the headline first; `folded`, in which the difference
    convolutions were turned into plain ones beforehand, is for inference only."""
    forms = ICM_FORMS[model.config.variant]
    found = {}
    for name, form in forms.items():
        found[name] = copy.deepcopy(model)
        swap_layers(found[name], form)
    if not training:
        found[FOLDED] = fk.convert.fold(model)
        swap_layers(found[FOLDED], list(forms.values())[-1])
    return found


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """16 bit is what autocast makes of a float32 net, as users run it."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


class Subject:
    """A variant on a device at one size, its images, and what float64 makes of them.

    Below 256 pixels, where the presets' first round would have more centres than tokens, so that every image had ties,
    the grids are small ones.
    """

    def __init__(self, variant: str, size: int, device: str = "cpu", /, **overrides: Any) -> None:
        self.variant, self.size, self.device = variant, size, device
        if size < SMALLEST:
            overrides = {"grids": SMALL_GRIDS, **overrides}
        self.model = build_model(variant, 0, **overrides).to(device)
        self.exact_model = copy.deepcopy(self.model).double()
        self.images: list[Tensor] = []  # [1, 3, size, size], none with a near tie
        self.exact: list[tuple[Tensor, ...]] = []  # logits, then the output of each FRD block
        self.drawn = 0

    def batch(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """The first `count` images, and their exact logits and outputs of the FRD blocks."""
        while len(self.images) < count:
            if self.drawn >= TRIES:
                raise GateError(
                    f"{self.variant} at {self.size}: {TRIES} images drawn, {len(self.images)} without a near tie"
                )
            image = draw_image(self.size, seed=self.drawn).to(self.device)
            self.drawn += 1
            with near_ties(self.exact_model) as gaps, fk.use_backend("reference"):
                outputs = block_outputs(self.exact_model, image.double())
            if min(gaps, default=1.0) > NEAR_TIE:
                self.images.append(image)
                self.exact.append(tuple(outputs))
        exact = [torch.cat(parts) for parts in zip(*self.exact[:count], strict=True)]
        return torch.cat(self.images[:count]), exact

    @staticmethod
    def copy(model: nn.Module) -> nn.Module:
        """A copy with its own weights, which may then be laid out anew or trained."""
        return copy.deepcopy(model)

    def error(
        self, model: nn.Module, count: int, dtype: torch.dtype, layout: str, logits_only: bool = False
    ) -> float:
        """The worst relative error of `model` on the first `count` images."""
        images, exact = self.batch(count)
        with autocast(self.device, dtype):
            outputs = block_outputs(model, images.contiguous(memory_format=LAYOUTS[layout]), logits_only)
        return net_error(outputs, exact[: len(outputs)])


def draw_image(size: int, seed: int) -> Tensor:
    """[1, 3, size, size]: flat tiles under noise, so that the parts of an image differ as those of a photo do."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(1, 3, 8, 8, generator=generator)
    noise = torch.randn(1, 3, size, size, generator=generator)
    return F.interpolate(tiles, size=(size, size), mode="nearest") + 0.3 * noise


def draw_mask(images: Tensor) -> Tensor:
    """[B, 1, H, W]: a rectangle is forged."""
    mask = torch.zeros_like(images[:, :1])
    height, width = images.shape[-2:]
    mask[..., height // 4 : height // 2, width // 4 : 3 * width // 4] = 1
    return mask


def block_outputs(model: nn.Module, images: Tensor, logits_only: bool = False) -> list[Tensor]:
    """Logits, then what each FRD block gives; hooks would break the graph of a compiled model."""
    outputs: list[Tensor] = []
    blocks: Any = () if logits_only else model.blocks
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2].detach())) for block in blocks]
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [logits, *outputs]


def net_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The worst relative error of logits and of block outputs. Logits count from the mean of the exact ones: that of a
    random net is one large constant, beside which every error would look small."""
    mean = exact[0].mean()
    centred = [outputs[0].double() - mean, *outputs[1:]]
    return relative_error(centred, [exact[0] - mean, *exact[1:]])


@contextlib.contextmanager
def near_ties(model: nn.Module) -> Iterator[list[float]]:
    """Collects for each round of each `fk.ICM` that runs the least distance between a token's two best cosines."""
    gaps: list[float] = []

    def watch(icm: fk.ICM, args: tuple[Tensor, ...]) -> None:
        tokens, hw = args[0].flatten(2).transpose(1, 2), tuple(args[0].shape[2:])
        rounds: list[Any] = list(icm.rounds)
        for turn, (projections, grid) in enumerate(zip(rounds, icm.grids, strict=True)):
            keys, values = projections.key(tokens), projections.value(tokens)
            if grid[0] * grid[1] > 1:
                best = cosines(keys, hw, grid).topk(2, dim=-1).values
                gaps.append(float((best[..., 0] - best[..., 1]).min()))
            gate: dict[str, Any] = (
                {"aggregate": "count", "alpha": icm.alpha}
                if icm.variant == "paper"
                else {"aggregate": "similarity", "alpha": icm.alpha[turn], "beta": icm.beta[turn]}
            )
            tokens, hw = fk.reference.cluster(keys, values, grid, hw, **gate).centres, tuple(grid)

    hooks = [m.register_forward_pre_hook(watch) for m in model.modules() if isinstance(m, fk.ICM)]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def check(
    name: str, error: float, peer: float, dtype: torch.dtype, cap: dict[torch.dtype, float] = CAP
) -> None:
    """Raises GateError where an error of ours is over twice that of its peer, the eager net in the same layout, or over
    the cap: what the library's layers cost in that layout is not ours."""
    allowed = min(max(2 * peer, FLOOR[dtype]), cap[dtype])
    if not error <= allowed:
        raise GateError(f"{name}: relative error {error:.2e}, at most {allowed:.2e} is allowed")


def gradient_errors(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error over all parameters of the ICMs, of the DPMs, and of the rest, each as one vector."""
    groups: dict[str, list[str]] = {}
    for name in exact:
        part = next((part for part in ("icm", "dpm") if f".{part}." in name), "rest")
        groups.setdefault(part, []).append(name)
    return {
        part: relative_error(
            [torch.cat([gradients[name].flatten() for name in names])],
            [torch.cat([exact[name].flatten() for name in names])],
        )
        for part, names in groups.items()
    }


def parameter_name(name: str) -> str:
    """A parameter's name in our model, given that in a model with eager layers."""
    for wrapper in (".icm.icm.", ".dpm.dpm."):
        name = name.replace(wrapper, wrapper[:5])
    parts = name.split(".")
    return ".".join(part for i, part in enumerate(parts) if not (part == "pdc" and parts[0] == "stem" and i))


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Name in our model -> gradient of `loss`."""
    named = {parameter_name(name): p for name, p in model.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))
