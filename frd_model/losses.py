"""The loss of FRD-Net: region dice and edge dice (paper, Eq. 8 and 9), in both published forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMS = ("paper", "released")

# Avoids 0/0 in the dice of Eq. 9: an empty prediction of an empty mask costs 0. Far smaller than one pixel.
DICE_EPS = 1e-6


def _check_width(width: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width must be an int, got {type(width).__name__}")
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width must be odd and at least 1, got {width}")


def _cross_max(x: Tensor, width: int) -> Tensor:
    """Maximum of x [B,C,H,W] under a width x width cross; pixels outside the image do not count."""
    pad = width // 2
    row = F.max_pool2d(x, (1, width), stride=1, padding=(0, pad))
    column = F.max_pool2d(x, (width, 1), stride=1, padding=(pad, 0))
    return torch.maximum(row, column)


def _morphological_gradient(x: Tensor, width: int, name: str, valid: Tensor | None = None) -> Tensor:
    _check_width(width)
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B,1,H,W], got shape {tuple(x.shape)}")
    if valid is None:
        return _cross_max(x, width) + _cross_max(-x, width)
    # As max_pool2d treats what is beyond the image.
    low = float("-inf")
    gradient = _cross_max(x.where(valid, low), width) + _cross_max((-x).where(valid, low), width)
    return gradient.where(valid, 0.0)


def soft_edge_map(probability: Tensor, width: int = 7) -> Tensor:
    """Morphological gradient (dilation minus erosion) of probability [B,1,H,W] under a width x width cross.

    Differentiable almost everywhere; equal to `edge_map` on values in {0, 1}.
    """
    return _morphological_gradient(probability, width, "probability")


def edge_map(mask: Tensor, width: int = 7) -> Tensor:
    """Edge band of a binary mask [B,1,H,W] in {0, 1}: dilation minus erosion with a width x width cross.

    Equal, at the image borders too, to OpenCV's `dilate - erode` with `MORPH_CROSS`. Boolean and integer
    masks give float32, floating masks keep their dtype.
    """
    mask = mask if mask.is_floating_point() else mask.float()
    return _morphological_gradient(mask.detach(), width, "mask")


def dice_loss(probability: Tensor, mask: Tensor, form: str = "paper") -> Tensor:
    """Dice loss of two tensors of the same shape, with sums over the whole batch; 0-d, in [0, 1].

    `paper` is Eq. 9: 1 - 2 sum(pm) / (sum(p) + sum(m)). `released` squares the denominator's terms and
    smooths with 1.
    """
    return _dice(*_dice_sums(probability, mask, form), form)


def _dice_sums(probability: Tensor, mask: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the dice before smoothing."""
    overlap = 2 * (probability * mask).sum()
    if form == "paper":
        return overlap, probability.sum() + mask.sum()
    return overlap, (probability * probability).sum() + (mask * mask).sum()


def _dice(overlap: Tensor, size: Tensor, form: str) -> Tensor:
    smooth = DICE_EPS if form == "paper" else 1
    return 1 - (overlap + smooth) / (size + smooth)


def _cross_entropy(logits: Tensor, mask: Tensor, valid: Tensor | None, focal: float) -> Tensor:
    """Mean over the valid pixels of (1 - p_t)^focal * -log p_t, p_t the probability of what is true."""
    if valid is None and not focal:
        return F.binary_cross_entropy_with_logits(logits, mask)
    each = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    if focal:
        # Not 0, where the gradient of a power below 1 is infinite.
        each = each * (1 - torch.exp(-each)).clamp_min(1e-12) ** focal
    return each.mean() if valid is None else each.where(valid, 0.0).sum() / valid.sum()


class FRDLoss(nn.Module):
    """Region dice + edge_weight * edge dice (Eq. 8), optionally mixed with binary cross-entropy.

    `paper` compares the soft edge map of the prediction with the edge map of the mask; `released` compares
    prediction and mask inside the mask's edge band. Sums run over the whole batch, so false positives in
    an untouched image still raise the loss. `bce_weight` adds the mean cross-entropy: dice alone starts slowly
    from scratch. `focal` weighs each pixel of it by (1 - p_t)^focal (Lin et al., 2017). `image_weight` adds the
    cross-entropy of the images' own logits [B], which are then needed: an image is edited if its mask is not empty.

    Called with logits and mask [B,1,H,W], and optionally `valid`, bool [B,1,H,W]: the pixels that count, for padded
    images; the others are treated as what is beyond the image. Returns 0-d tensors "total", "region", "edge" (and
    "bce" and "image" where their weights are not 0), computed in fp32 (fp64 for fp64 logits) whatever autocast says.
    """

    def __init__(
        self,
        form: str = "paper",
        edge_weight: float = 1.0,
        edge_width: int = 7,
        bce_weight: float = 0.0,
        focal: float = 0.0,
        image_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        for name, weight in (
            ("edge_weight", edge_weight),
            ("bce_weight", bce_weight),
            ("focal", focal),
            ("image_weight", image_weight),
        ):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
        _check_width(edge_width)
        self.form = form
        self.edge_weight = edge_weight
        self.edge_width = edge_width
        self.bce_weight = bce_weight
        self.focal = focal
        self.image_weight = image_weight

    def extra_repr(self) -> str:
        return (
            f"form={self.form!r}, edge_weight={self.edge_weight}, edge_width={self.edge_width}, "
            f"bce_weight={self.bce_weight}, focal={self.focal}, image_weight={self.image_weight}"
        )

    def forward(
        self, logits: Tensor, mask: Tensor, valid: Tensor | None = None, image_logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        return self.from_sums(self.sums(logits, mask, valid, image_logits))

    def sums(
        self, logits: Tensor, mask: Tensor, valid: Tensor | None = None, image_logits: Tensor | None = None
    ) -> Tensor:
        """What the loss is a function of, [7]: sums over the batch, so that those of a batch's parts add up to its own.

        Numerator and denominator of the region's and of the edge's dice, then cross-entropy times images, the images'
        cross-entropy, and images.
        """
        if logits.dim() != 4 or logits.shape[1] != 1:
            raise ValueError(f"logits must be [B,1,H,W], got shape {tuple(logits.shape)}")
        if mask.shape != logits.shape:
            raise ValueError(
                f"mask must have the shape of logits {tuple(logits.shape)}, got {tuple(mask.shape)}"
            )
        if valid is not None and (valid.shape != logits.shape or valid.dtype != torch.bool):
            raise ValueError(
                f"valid must be bool of the shape of logits {tuple(logits.shape)}, got {valid.dtype} "
                f"{tuple(valid.shape)}"
            )
        if (image_logits is None) != (not self.image_weight):
            raise ValueError(
                f"image_logits must be given where image_weight is not 0, and only there, got {self.image_weight} and "
                f"{None if image_logits is None else list(image_logits.shape)}"
            )
        if image_logits is not None and image_logits.shape != (len(logits),):
            raise ValueError(f"image_logits must be [{len(logits)}], got {list(image_logits.shape)}")
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            mask = mask.to(logits.dtype)
            probability = logits.sigmoid()
            if valid is not None:
                probability, mask = probability.where(valid, 0.0), mask.where(valid, 0.0)
            band = _morphological_gradient(mask.detach(), self.edge_width, "mask", valid)
            region = _dice_sums(probability, mask, self.form)
            if self.form == "paper":
                soft = _morphological_gradient(probability, self.edge_width, "probability", valid)
                edge = _dice_sums(soft, band, "paper")
            else:
                edge = _dice_sums(probability * band, mask * band, "released")
            images = torch.full((), len(logits), dtype=logits.dtype, device=logits.device)
            none = images.new_zeros(())
            entropy = _cross_entropy(logits, mask, valid, self.focal) if self.bce_weight else none
            alarm = none
            if image_logits is not None:
                edited = (mask.flatten(1) > 0).any(dim=1).to(logits.dtype)
                alarm = F.binary_cross_entropy_with_logits(image_logits.to(logits.dtype), edited)
            return torch.stack((*region, *edge, entropy * images, alarm * images, images))

    def from_sums(self, sums: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, as `forward` returns it, from its `sums`, or from those of its parts added up."""
        region_overlap, region_size, edge_overlap, edge_size, entropy, alarm, images = sums.unbind()
        region = _dice(region_overlap, region_size, self.form)
        edge = _dice(edge_overlap, edge_size, self.form)
        terms = {"total": region + self.edge_weight * edge, "region": region, "edge": edge}
        if self.bce_weight:
            terms["bce"] = entropy / images
            terms["total"] = terms["total"] + self.bce_weight * terms["bce"]
        if self.image_weight:
            terms["image"] = alarm / images
            terms["total"] = terms["total"] + self.image_weight * terms["image"]
        return terms
