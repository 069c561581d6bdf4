"""Mix Transformer (MiT) encoders on timm's layers, and any timm backbone under the same interface.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
Transformers", NeurIPS 2021.
An encoder maps images ``[B, in_channels, H, W]`` to a list of maps ``[B, channels[i], H / reductions[i], W /
reductions[i]]``, one for each stage in use, coarse ones last.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from frd_kernels._torch_internals import is_transforming


class MiTSize(NamedTuple):
    """Depth and width of the four stages of one MiT."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]


MIT_SIZES: dict[str, MiTSize] = {
    "mit_b0": MiTSize((2, 2, 2, 2), (32, 64, 160, 256)),
    "mit_b1": MiTSize((2, 2, 2, 2), (64, 128, 320, 512)),
    "mit_b2": MiTSize((3, 4, 6, 3), (64, 128, 320, 512)),
    "mit_b3": MiTSize((3, 4, 18, 3), (64, 128, 320, 512)),
    "mit_b4": MiTSize((3, 8, 27, 3), (64, 128, 320, 512)),
    "mit_b5": MiTSize((3, 6, 40, 3), (64, 128, 320, 512)),
}
HEADS = (1, 2, 5, 8)
KEY_REDUCTIONS = (8, 4, 2, 1)
MLP_RATIO = 4


def tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C], row-major."""
    return x.flatten(2).transpose(1, 2)


def image(x: Tensor, h: int, w: int) -> Tensor:
    """[B, h * w, C] -> [B, C, h, w], a channels_last view."""
    return torch.unflatten(x.transpose(1, 2), 2, (h, w))


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then LayerNorm. [B, C, H, W] -> [B, h * w, D], h, w."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        h, w = x.shape[-2:]
        return self.norm(tokens(x)), h, w


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k') v of q, k, v [B, heads, N, d] -> [B, heads, N, d]."""
    # The fused kernel has no forward-mode derivative, vmap loops over it, and operation counters on a torch.jit.trace
    # do not see its two products.
    if is_transforming():
        return torch.softmax(scale * q @ k.transpose(-2, -1), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class ReducedAttention(nn.Module):
    """Self-attention with keys and values from a map that is `reduction` times smaller. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.heads, d // self.heads).transpose(1, 2)
        if self.sr is not None and self.norm is not None:
            x = self.norm(tokens(self.sr(image(x, h, w))))
        k, v = self.kv(x).view(b, -1, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(q, k, v, self.scale)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class MixMLP(nn.Module):
    """Linear, depthwise 3x3 convolution (which encodes position), GELU, linear. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = self.dwconv(image(self.fc1(x), h, w))
        return self.fc2(F.gelu(tokens(x)))


class MiTBlock(nn.Module):
    """Attention and MLP, each pre-normalised and residual. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReducedAttention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MixMLP(dim, MLP_RATIO * dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), h, w))
        return x + self.drop_path(self.mlp(self.norm2(x), h, w))


class MiTStage(nn.Module):
    """Patch embedding, blocks, LayerNorm. [B, C, H, W] -> [B, D, H / stride, W / stride]."""

    def __init__(self, in_channels: int, dim: int, index: int, drop_paths: list[float]) -> None:
        super().__init__()
        kernel, stride = (7, 4) if index == 0 else (3, 2)
        self.patch_embed = PatchEmbed(in_channels, dim, kernel, stride)
        self.blocks = nn.ModuleList(
            MiTBlock(dim, HEADS[index], KEY_REDUCTIONS[index], rate) for rate in drop_paths
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x, h, w = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, h, w)
        return image(self.norm(x), h, w)


class MixTransformer(nn.Module):
    """MiT-B0 ... B5.

    Args:
        name: a key of :data:`MIT_SIZES`.
        in_channels: planes of the input.
        stages: stages to return, counted from 1; stages after the last one are not built.
        drop_path: stochastic-depth rate of the last block of the whole network.
    """

    def __init__(
        self, name: str, in_channels: int = 3, stages: tuple[int, ...] = (1, 2, 3, 4), drop_path: float = 0.1
    ) -> None:
        super().__init__()
        if name not in MIT_SIZES:
            raise ValueError(f"name: must be one of {', '.join(MIT_SIZES)}, got {name!r}")
        if not stages or min(stages) < 1 or max(stages) > 4:
            raise ValueError(f"stages: {name} has stages 1 to 4, got {stages}")
        depths, dims = MIT_SIZES[name]
        self.name = name
        self.stages_used = tuple(stages)
        self.channels = tuple(dims[s - 1] for s in stages)
        self.reductions = tuple(2 ** (s + 1) for s in stages)
        last = sum(depths) - 1
        rates = [drop_path * i / last for i in range(last + 1)]
        self.stages = nn.ModuleList()
        for i in range(max(stages)):
            first = sum(depths[:i])
            source = in_channels if i == 0 else dims[i - 1]
            self.stages.append(MiTStage(source, dims[i], i, rates[first : first + depths[i]]))
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if number in self.stages_used:
                maps.append(x)
        return maps


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TimmEncoder(nn.Module):
    """A timm backbone as an encoder. `stages` are the numbers of its feature maps, from 1."""

    def __init__(self, name: str, in_channels: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.name = name
        indices = tuple(s - 1 for s in stages)
        try:
            body: Any = timm.create_model(
                name, pretrained=False, features_only=True, in_chans=in_channels, out_indices=indices
            )
        # timm raises many types for backbones without feature maps.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"encoder: timm gives no maps {stages} of {name!r}: {reason}") from error
        self.body = body
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        self.reductions: tuple[int, ...] = tuple(body.feature_info.reduction())
        self.channels_last_axis = str(getattr(body, "output_fmt", "NCHW")).upper().endswith("NHWC")

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last_axis else list(maps)


def create_encoder(
    name: str, in_channels: int, stages: tuple[int, ...], drop_path: float
) -> MixTransformer | TimmEncoder:
    """A MiT for a name in :data:`MIT_SIZES`, otherwise a timm backbone, which ignores `drop_path`."""
    if name in MIT_SIZES:
        return MixTransformer(name, in_channels, stages, drop_path)
    return TimmEncoder(name, in_channels, stages)
