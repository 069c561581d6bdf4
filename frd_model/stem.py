"""What runs before the encoder: pixel differences of the image, and a shallow high-resolution pyramid on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import frd_kernels as fk


class PDCStem(nn.Module):
    """Concatenate the image and its pixel differences. [B, 3, H, W] -> [B, 3 + central + angular, H, W].

    Differences remove the local mean, so camera noise, resampling and compression are visible to the first layer; a
    plain convolution would first have to learn to subtract the image content. With `gain`, the differences d become
    tanh(gain * d), a smooth form of steganalysis's truncated residuals (Fridrich and Kodovsky, 2012).
    """

    def __init__(self, central: int, angular: int, gain: float | None = None) -> None:
        super().__init__()
        kinds = [(kind, n) for kind, n in (("central", central), ("angular", angular)) if n > 0]
        # With zero padding every border pixel would show a false difference.
        self.layers = nn.ModuleList(
            fk.PDC2d(3, n, padding=1, bias=False, padding_mode="replicate", kind=kind) for kind, n in kinds
        )
        self.channels = 3 + central + angular
        self.gain = None if gain is None else nn.Parameter(torch.full((central + angular,), float(gain)))

    def forward(self, x: Tensor) -> Tensor:
        differences = torch.cat([layer(x) for layer in self.layers], dim=1)
        if self.gain is not None:
            differences = torch.tanh(differences * self.gain.view(-1, 1, 1))
        return torch.cat((x, differences), dim=1)


class ConvNorm(nn.Sequential):
    """3x3 convolution, instance normalisation, GELU.

    Normalising each channel over its own image removes the photo's overall statistics (camera, compression) and keeps
    how each place differs from the rest, which is the trace that an edit leaves.
    """

    def __init__(self, source: int, target: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(source, target, 3, stride, 1, bias=False), nn.GroupNorm(target, target), nn.GELU()
        )


class TraceBranch(nn.Module):
    """A shallow convolutional pyramid on the stem's planes. [B, P, H, W] -> [B, widths[i], H / 2^(i+1), W / 2^(i+1)].

    Traces of noise and resampling are in the highest frequencies, which the encoder's first stride of 4 discards.
    """

    def __init__(self, planes: int, widths: Sequence[int]) -> None:
        super().__init__()
        sources = [planes, *widths[:-1]]
        self.levels = nn.ModuleList(
            nn.Sequential(ConvNorm(source, width, 2), ConvNorm(width, width))
            for source, width in zip(sources, widths, strict=True)
        )

    def forward(self, planes: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            planes = level(planes)
            maps.append(planes)
        return maps
