"""Drop-in replacements of the clustering layers of Context-Cluster (CoC, Ma et al., ICLR 2023) and FEC."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn

from .._numbers import parse_count
from .._torch_internals import is_transformed, untraced
from . import api
from .reference import ClusterResult, dispatch_to_all

_DISPATCHES = ("masked", "dense")


class _Split(NamedTuple):
    """How images become tokens: an image is split into rows x columns regions, their channels into heads.

    The batch of the tokens is in the order image, region, head. Splitting into regions copies the image once, and so
    does merging them. Splitting into heads is a view of a contiguous image, and a copy of a channels_last one.
    """

    rows: int
    columns: int
    heads: int
    channels_last: bool

    @property
    def channels_first(self) -> bool:
        return not self.channels_last

    @property
    def regions(self) -> int:
        return self.rows * self.columns

    def fold(self, image: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B * regions, C, h, w]"""
        if self.regions == 1:
            return image
        batch, channels, height, width = image.shape
        h, w = height // self.rows, width // self.columns
        parts = image.reshape(batch, channels, self.rows, h, self.columns, w)
        if self.channels_last:
            parts = parts.permute(0, 2, 4, 3, 5, 1)
            return parts.reshape(batch * self.regions, h, w, channels).permute(0, 3, 1, 2)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch * self.regions, channels, h, w)

    def unfold(self, regions: torch.Tensor) -> torch.Tensor:
        """[B * regions, C, h, w] -> [B, C, H, W]"""
        if self.regions == 1:
            return regions
        batch, channels, h, w = regions.shape
        batch, height, width = batch // self.regions, self.rows * h, self.columns * w
        parts = torch.unflatten(regions, 0, (batch, self.rows, self.columns))
        if self.channels_last:
            parts = parts.permute(0, 1, 4, 2, 5, 3)
            return parts.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)

    def tokens(self, image: torch.Tensor) -> torch.Tensor:
        """[b, heads * C, h, w] -> [b * heads, h * w, C]"""
        batch, channels, h, w = image.shape
        channels //= self.heads
        if self.channels_last:
            rows = image.permute(0, 2, 3, 1).reshape(batch, h * w, self.heads, channels)
            return rows.transpose(1, 2).reshape(batch * self.heads, h * w, channels)
        return image.reshape(batch * self.heads, channels, h * w).transpose(1, 2)

    def image(self, tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """[b * heads, h * w, C] -> [b, heads * C, h, w]"""
        batch, channels = tokens.size(0) // self.heads, tokens.size(2) * self.heads
        if self.channels_last:
            rows = torch.unflatten(tokens, 0, (batch, self.heads)).transpose(1, 2)
            return rows.reshape(batch, h, w, channels).permute(0, 3, 1, 2)
        return tokens.transpose(1, 2).reshape(batch, channels, h, w)

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """[B, H, W] -> [B * regions * heads, h * w]"""
        if mask is None:
            return None
        flat = self.fold(mask.unsqueeze(1)).flatten(2)
        return flat.expand(-1, self.heads, -1).reshape(flat.size(0) * self.heads, flat.size(2))

    def by_image(self, found: ClusterResult) -> ClusterResult:
        """The results as [B, regions, heads, ...]. Copies, since the backward reads the originals."""
        images = found.labels.size(0) // (self.regions * self.heads)
        shape = images, self.regions, self.heads
        return ClusterResult(*(torch.unflatten(t, 0, shape).clone() for t in found))


def _split(x: torch.Tensor, fold_w: int, fold_h: int, heads: int) -> _Split:
    # As in the code of CoC and FEC, there are regions only if both height and width are split.
    rows, columns = (fold_w, fold_h) if min(fold_w, fold_h) > 1 else (1, 1)
    untraced(_check_fold, x, rows, columns)
    return _Split(rows, columns, heads, _is_channels_last(x))


def _check_fold(x: torch.Tensor, rows: int, columns: int) -> None:
    if x.size(2) % rows or x.size(3) % columns:
        raise ValueError(
            f"x must have a size that the fold ({rows}, {columns}) divides, got {list(x.shape[2:])}"
        )


def _is_channels_last(x: torch.Tensor) -> bool:
    # Tensors under vmap do not answer the question below.
    if is_transformed():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _check_image(x: torch.Tensor, channels: int, mask: torch.Tensor | None) -> None:
    untraced(_check_shapes, x, channels, mask)


def _check_shapes(x: torch.Tensor, channels: int, mask: torch.Tensor | None) -> None:
    if x.dim() != 4 or x.size(1) != channels:
        raise ValueError(f"x must be [B, {channels}, H, W], got {list(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (x.size(0), *x.shape[2:])):
        expected = [x.size(0), *x.shape[2:]]
        raise ValueError(f"mask must be bool {expected}, got {list(mask.shape)} {mask.dtype}")


def _zero_masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros in place of masked pixels: a NaN there would reach the gradients of the projections' weights."""
    return x if mask is None else torch.where(mask.unsqueeze(1), x, 0)


def _zero_masked_tokens(similarity: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return similarity if mask is None else torch.where(mask, similarity, 0)


def _pooled_grid(hw: tuple[int, int], stride: int) -> tuple[int, int]:
    untraced(_check_regions, hw, stride)
    return hw[0] // stride, hw[1] // stride


def _check_regions(hw: tuple[int, int], stride: int) -> None:
    if min(hw) < stride:
        raise ValueError(f"x must have regions of at least the stride {stride}, got {tuple(map(int, hw))}")


def _sum(skip: torch.Tensor, centres: torch.Tensor, stride: int) -> torch.Tensor:
    untraced(_check_alike, skip, centres, stride)
    return skip + centres


def _check_alike(skip: torch.Tensor, centres: torch.Tensor, stride: int) -> None:
    if any(a != b and 1 not in (a, b) for a, b in zip(skip.shape, centres.shape, strict=True)):
        raise ValueError(
            f"x must be of a size that the stride {stride} and conv_skip's 2 reduce alike, got "
            f"{list(centres.shape[2:])} centres and {list(skip.shape[2:])} of conv_skip"
        )


def _with_clusters(
    out: torch.Tensor, split: _Split, found: ClusterResult, wanted: bool
) -> torch.Tensor | tuple[torch.Tensor, ClusterResult]:
    return (out, split.by_image(found)) if wanted else out


# Leaves of a torch.fx graph: they look at sizes, layouts or optional arguments, which are unknown while it is traced.
for _name in (
    "_check_image",
    "_pooled_grid",
    "_zero_masked",
    "_zero_masked_tokens",
    "_split",
    "_sum",
    "_with_clusters",
    "dispatch_to_all",
):
    torch.fx.wrap(_name)


class _Cluster(nn.Module):
    """What `ContextCluster` and `FECCluster` share: all but the weights of the means and the dispatch."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        proposal_w: int,
        proposal_h: int,
        fold_w: int,
        fold_h: int,
        heads: int,
        head_dim: int,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.dim = dim = parse_count(dim, "dim")
        self.out_dim = out_dim = parse_count(out_dim, "out_dim")
        self.proposal = parse_count(proposal_w, "proposal_w"), parse_count(proposal_h, "proposal_h")
        self.fold_w, self.fold_h = parse_count(fold_w, "fold_w"), parse_count(fold_h, "fold_h")
        self.heads = heads = parse_count(heads, "heads")
        self.head_dim = head_dim = parse_count(head_dim, "head_dim")
        # In the order of the original code, so that a seed gives the same parameters and optimizer states load.
        self.f = nn.Conv2d(dim, heads * head_dim, 1, **factory)
        self.proj = nn.Conv2d(heads * head_dim, out_dim, 1, **factory)
        self.v = nn.Conv2d(dim, heads * head_dim, 1, **factory)
        self.sim_alpha = nn.Parameter(torch.ones(1, **factory))
        self.sim_beta = nn.Parameter(torch.zeros(1, **factory))

    def reset_parameters(self) -> None:
        """Sets the parameters to their initial values."""
        for module in (self.f, self.proj, self.v):
            # It may have been replaced by another module.
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        nn.init.ones_(self.sim_alpha)
        nn.init.zeros_(self.sim_beta)

    def extra_repr(self) -> str:
        fold = self.fold_w, self.fold_h
        return f"{self.dim}, {self.out_dim}, proposal={self.proposal}, fold={fold}, heads={self.heads}"

    def _round(
        self, keys: torch.Tensor, values: torch.Tensor, hw: tuple[int, int], mask: torch.Tensor | None
    ) -> ClusterResult:
        raise NotImplementedError

    def _to_tokens(
        self,
        found: ClusterResult,
        keys: torch.Tensor,
        hw: tuple[int, int],
        mask: torch.Tensor | None,
        channels_first: bool,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """The tokens of the result [B, N, C], and the size of their image."""
        out = api.dispatch(found.centres, found.labels, found.similarity, channels_first=channels_first)
        return out, hw

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, return_clusters: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ClusterResult]:
        """x [B, dim, H, W] -> [B, out_dim, H, W].

        Args:
            x: contiguous or channels_last; the result has the same layout.
            mask: bool [B, H, W], true for the pixels to cluster. The result at the others, even NaNs, is `proj` of
                zeros, and their gradients are 0.
            return_clusters: returns (result, ClusterResult) with tensors [B, regions, heads, ...]. The similarities
                are the factors of the dispatch.

        Raises:
            ValueError: x or mask has an invalid shape or dtype, or the fold does not divide the size of x.
        """
        _check_image(x, self.dim, mask)
        split = _split(x, self.fold_w, self.fold_h, self.heads)
        # The 1x1 projections do not mix pixels, so the image is split once before them, instead of twice after them.
        regions = split.fold(_zero_masked(x, mask))
        hw = (regions.size(2), regions.size(3))
        keys, values = split.tokens(self.f(regions)), split.tokens(self.v(regions))
        tokens_mask = split.mask(mask)
        found = self._round(keys, values, hw, tokens_mask)
        tokens, size = self._to_tokens(found, keys, hw, tokens_mask, split.channels_first)
        out = split.unfold(self.proj(split.image(tokens, size[0], size[1])))
        return _with_clusters(out, split, found, return_clusters)


class ContextCluster(_Cluster):
    """The layer `Cluster` of Context-Cluster (CoC): the same state dict, the same results.

    With s = sigmoid(sim_beta + sim_alpha * cosine), a centre is (pooled + sum s v) / (1 + sum s) over its tokens, and
    the result at a token is s times its assigned centre. (Until May 2023 the original code divided by 1 + count; its
    checkpoints were replaced then.) One difference: here the arg-max is not affected by the rounding of the sigmoid,
    which can make similarities tie in the original.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
        proposal_w: rows of centres in each region.
        proposal_h: columns of centres.
        fold_w: rows of regions. If `fold_w` or `fold_h` is 1, the image is one region.
        fold_h: columns of regions.
        heads: groups of channels that are clustered independently.
        head_dim: channels of a head.
        return_center: the result is the image of the centres, of all regions: [B, out_dim, rows * proposal_w, ...].
        dispatch: "masked": a token gets its assigned centre, as in the original. "dense": it gets the sum of all
            centres of its region, each times its similarity, in plain PyTorch; the N x O similarities are stored.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        f: keys, nn.Conv2d(dim, heads * head_dim, 1).
        v: values, as f.
        proj: nn.Conv2d(heads * head_dim, out_dim, 1).
        sim_alpha: [1], initially 1.
        sim_beta: [1], initially 0.

    Raises:
        ValueError: an argument is invalid; the message names it, the rule and the value.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        proposal_w: int = 2,
        proposal_h: int = 2,
        fold_w: int = 2,
        fold_h: int = 2,
        heads: int = 4,
        head_dim: int = 24,
        return_center: bool = False,
        *,
        dispatch: str = "masked",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, out_dim, proposal_w, proposal_h, fold_w, fold_h, heads, head_dim, factory)
        if dispatch not in _DISPATCHES:
            raise ValueError(f"dispatch must be 'masked' or 'dense', got {dispatch!r}")
        self.return_center, self.dispatch = return_center, dispatch

    def _round(
        self, keys: torch.Tensor, values: torch.Tensor, hw: tuple[int, int], mask: torch.Tensor | None
    ) -> ClusterResult:
        gate: dict[str, Any] = {"alpha": self.sim_alpha, "beta": self.sim_beta}
        return api.cluster(keys, values, self.proposal, hw, aggregate="similarity", mask=mask, **gate)

    def _to_tokens(
        self,
        found: ClusterResult,
        keys: torch.Tensor,
        hw: tuple[int, int],
        mask: torch.Tensor | None,
        channels_first: bool,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        if self.return_center:
            return found.centres, self.proposal
        if self.dispatch == "dense":
            gate = self.sim_alpha, self.sim_beta
            return dispatch_to_all(keys, found.centres, self.proposal, hw, *gate, mask), hw
        return super()._to_tokens(found, keys, hw, mask, channels_first)


class FECCluster(_Cluster):
    """The layer `Cluster` of FEC: the same state dict, the same results.

    A centre is (pooled + sum v) / (1 + count) over its tokens, and the result at a token is its assigned centre times
    s = sigmoid(sim_beta + sim_alpha * cosine). The arg-max is over s, so that a negative sim_alpha assigns tokens to
    the least similar centre. Here it is not affected by the rounding of the sigmoid.

    Arguments and attributes as for `ContextCluster`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        proposal_w: int = 2,
        proposal_h: int = 2,
        fold_w: int = 2,
        fold_h: int = 2,
        heads: int = 4,
        head_dim: int = 24,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, out_dim, proposal_w, proposal_h, fold_w, fold_h, heads, head_dim, factory)

    def _round(
        self, keys: torch.Tensor, values: torch.Tensor, hw: tuple[int, int], mask: torch.Tensor | None
    ) -> ClusterResult:
        # For means over counts only the sign of alpha has an effect, without a gradient.
        order = self.sim_alpha.detach()
        found = api.cluster(keys, values, self.proposal, hw, alpha=order, mask=mask)
        cosine = found.similarity
        alpha, beta = (t.to(cosine.dtype) for t in (self.sim_alpha, self.sim_beta))
        return found._replace(similarity=_zero_masked_tokens(torch.sigmoid(beta + alpha * cosine), mask))


class ClusterPool(nn.Module):
    """The layer `ClusterPool` of FEC, which reduces an image to its centres: the same state dict, the same results.

    It sums the normalized centres (`norm2`) of one round of clustering, with cosines and means over counts, and a
    strided convolution of the image (`conv_skip`). There are (H / stride) x (W / stride) centres. As in the original,
    `conv_f` only affects the assignment and gets no gradient.

    Args:
        stride: of the pooling. `conv_skip` always has stride 2, so only 2 fits.
        in_chans: channels of the input.
        embed_dim: channels of the output.
        norm_layer: ignored, as in the original.
        fold_w: rows of regions. If `fold_w` or `fold_h` is 1, the image is one region.
        fold_h: columns of regions.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        norm2: nn.GroupNorm(1, embed_dim).
        conv_f: keys, nn.Conv2d(in_chans, embed_dim, 1).
        conv_v: values, as conv_f.
        conv_skip: nn.Conv2d(in_chans, embed_dim, 3, stride=2, padding=1).

    Raises:
        ValueError: an argument is invalid; the message names it, the rule and the value.
    """

    def __init__(
        self,
        stride: int = 4,
        in_chans: int = 5,
        embed_dim: int = 64,
        norm_layer: Any = None,
        fold_w: int = 1,
        fold_h: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stride = parse_count(stride, "stride")
        self.in_chans = in_chans = parse_count(in_chans, "in_chans")
        embed_dim = parse_count(embed_dim, "embed_dim")
        self.fold_w, self.fold_h = parse_count(fold_w, "fold_w"), parse_count(fold_h, "fold_h")
        self.norm2 = nn.GroupNorm(1, embed_dim, **factory)
        self.conv_f = nn.Conv2d(in_chans, embed_dim, 1, **factory)
        self.conv_v = nn.Conv2d(in_chans, embed_dim, 1, **factory)
        self.conv_skip = nn.Conv2d(in_chans, embed_dim, 3, stride=2, padding=1, **factory)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, fold={(self.fold_w, self.fold_h)}"

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, return_clusters: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ClusterResult]:
        """x [B, in_chans, H, W] -> [B, embed_dim, H / stride, W / stride].

        Args:
            x: contiguous or channels_last; the result has the same layout.
            mask: bool [B, H, W], true for the pixels to cluster. The others, even NaNs, are zeros for `conv_skip`,
                enter no centre, and their gradients are 0.
            return_clusters: returns (result, ClusterResult) with tensors [B, regions, 1, ...].

        Raises:
            ValueError: x or mask has an invalid shape or dtype, or the fold or the stride does not fit the size of x.
        """
        _check_image(x, self.in_chans, mask)
        split = _split(x, self.fold_w, self.fold_h, 1)
        x = _zero_masked(x, mask)
        regions = split.fold(x)
        hw = (regions.size(2), regions.size(3))
        grid = _pooled_grid(hw, self.stride)
        with torch.no_grad():
            keys = split.tokens(self.conv_f(regions))
        found = api.cluster(keys, split.tokens(self.conv_v(regions)), grid, hw, mask=split.mask(mask))
        centres = self.norm2(split.unfold(split.image(found.centres, grid[0], grid[1])))
        out = _sum(self.conv_skip(x), centres, self.stride)
        return _with_clusters(out, split, found, return_clusters)
