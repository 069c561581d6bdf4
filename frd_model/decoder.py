"""Decoders: feature maps to one map of logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import FRDNetConfig
from .stem import ConvNorm


class DeconvDecoder(nn.Module):
    """n transposed convolutions with ReLU between them. [B, C, h, w] -> [B, 1, 2^n h, 2^n w].

    Args:
        channels: C of the input.
        widths: channels between the n = len(widths) + 1 transposed convolutions.
        kernel: 4 (padding 1), 3 (padding 1, output padding 1) or 2; each doubles the size exactly.
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


class PyramidDecoder(nn.Module):
    """Sum all maps at the finest resolution, then fuse with the first map of the trace branch, if there is one.

    The logits have half the image's size with a trace branch, otherwise the size of the finest stage.

    Args:
        channels: of the encoder's maps, fine to coarse.
        config: gives `pyramid_width` and `trace_widths`.
    """

    def __init__(self, channels: Sequence[int], config: FRDNetConfig) -> None:
        super().__init__()
        width, traces = config.pyramid_width, config.trace_widths
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (*traces[1:], *channels))
        self.fuse = ConvNorm(width, width)
        self.narrow = nn.Conv2d(width, traces[0], 1) if traces else None
        self.join = ConvNorm(2 * traces[0], traces[0]) if traces else None
        features = traces[0] if traces else width
        self.head = nn.Conv2d(features, 1, 1)
        self.image_head = ImageHead(features) if config.image_head else None

    def forward(self, maps: Sequence[Tensor], traces: Sequence[Tensor]) -> Tensor:
        """maps: [B, C_i, h_i, w_i] and traces, both fine to coarse -> logits [B, 1, h, w]."""
        return self.head(self.features(maps, traces))

    def with_score(self, maps: Sequence[Tensor], traces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `forward`, and the image's logit [B]."""
        x = self.features(maps, traces)
        logits = self.head(x)
        assert self.image_head is not None
        return logits, self.image_head(x, logits)

    def features(self, maps: Sequence[Tensor], traces: Sequence[Tensor]) -> Tensor:
        """What the head sees, [B, C, h, w]."""
        sources = [*traces[1:], *maps]
        x = self.lateral[0](sources[0])
        for project, coarse in zip(list(self.lateral)[1:], sources[1:], strict=True):
            x = x + _resize(project(coarse), x)
        x = self.fuse(x)
        if self.narrow is not None and self.join is not None:
            x = self.join(torch.cat((_resize(self.narrow(x), traces[0]), traces[0]), dim=1))
        return x


class ImageHead(nn.Module):
    """Features [B, C, h, w] and logits [B, 1, h, w] -> one logit per image [B].

    Features are averaged over the image, and over its most suspicious part by the softmax of the map's logits, so that
    a small edit is not lost in the mean. The map itself gets no gradient from here.
    """

    def __init__(self, channels: int, hidden: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * channels + 1, hidden)
        self.fc2 = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        flat, map_ = x.flatten(2).float(), logits.detach().flatten(2).float()
        weight = map_.softmax(dim=2)
        suspicious = (flat * weight).sum(dim=2)
        # The softmax's own average is the height of the map's peak.
        peak = (map_ * weight).sum(dim=2)
        pooled = torch.cat((flat.mean(dim=2), suspicious, peak), dim=1)
        out: Tensor = self.fc2(F.gelu(self.fc1(pooled.to(self.fc1.weight.dtype))))
        return out.squeeze(1)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
