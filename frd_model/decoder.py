"""From feature maps to one logit map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import FRDNetConfig

NORM_GROUPS = 8


class DeconvDecoder(nn.Module):
    """Transposed convolutions, ReLU between, each doubling the size: [B, C, h, w] -> [B, 1, 2^n h, 2^n w].

    Args:
        channels: C of the input.
        widths: channels between the n = len(widths) + 1 transposed convolutions.
        kernel: 4 (padding 1), 3 (padding 1, output padding 1) or 2; every one doubles the size exactly.
    """

    def __init__(self, channels: int, widths: Sequence[int], kernel: int) -> None:
        super().__init__()
        padding, extra = {4: (1, 0), 3: (1, 1), 2: (0, 0)}[kernel]
        sizes = [channels, *widths, 1]
        layers: list[nn.Module] = []
        for source, target in pairwise(sizes):
            layers += [nn.ConvTranspose2d(source, target, kernel, 2, padding, extra), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNorm(nn.Sequential):
    """3x3 convolution, GroupNorm (independent of the batch, so batches of one train too), GELU."""

    def __init__(self, source: int, target: int, stride: int = 1) -> None:
        groups = NORM_GROUPS if target % NORM_GROUPS == 0 else 1
        super().__init__(
            nn.Conv2d(source, target, 3, stride, 1, bias=False), nn.GroupNorm(groups, target), nn.GELU()
        )


class PyramidDecoder(nn.Module):
    """All stages summed at the finest one's size, joined by a branch at half resolution on the stem's planes.

    The branch exists because noise and resampling traces live in the highest frequencies, which the encoder's
    first stride of 4 folds away. The result is at half of the image size where the branch exists, else at the
    finest stage's.

    Args:
        channels: of each map, fine to coarse.
        planes: channels of the stem's output.
        config: gives `pyramid_width` and `trace_width`.
    """

    def __init__(self, channels: Sequence[int], planes: int, config: FRDNetConfig) -> None:
        super().__init__()
        width, trace = config.pyramid_width, config.trace_width
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = ConvNorm(width, width)
        self.trace = nn.Sequential(ConvNorm(planes, trace, 2), ConvNorm(trace, trace)) if trace else None
        self.narrow = nn.Conv2d(width, trace, 1) if trace else None
        self.join = ConvNorm(2 * trace, trace) if trace else None
        self.head = nn.Conv2d(trace or width, 1, 1)

    def forward(self, maps: Sequence[Tensor], planes: Tensor) -> Tensor:
        """maps: [B, C_i, h_i, w_i], fine to coarse; planes: [B, P, H, W] -> logits [B, 1, h, w]."""
        x = self.lateral[0](maps[0])
        for project, coarse in zip(list(self.lateral)[1:], maps[1:], strict=True):
            x = x + _resize(project(coarse), x)
        x = self.fuse(x)
        if self.trace is not None and self.narrow is not None and self.join is not None:
            fine = self.trace(planes)
            x = self.join(torch.cat((_resize(self.narrow(x), fine), fine), dim=1))
        return self.head(x)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
