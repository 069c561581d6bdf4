"""The clustering layers of Context-Cluster (CoC) and FEC, drop-in: their arguments, parameters and results."""

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
    """How images become tokens: B images are cut into regions, whose channels are cut into heads.

    The batch of the tokens counts image, region, head, in this order. Regions take one copy of the image, and
    one back; heads take none for a contiguous image (they are strides), for a channels_last one a copy of what
    is cut.
    """

    rows: int  # of regions
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
        """The results of the tokens' batch as [B, regions, heads, ...]: copies, since the backward needs its own."""
        images = found.labels.size(0) // (self.regions * self.heads)
        shape = images, self.regions, self.heads
        return ClusterResult(*(torch.unflatten(t, 0, shape).clone() for t in found))


def _split(x: torch.Tensor, fold_w: int, fold_h: int, heads: int) -> _Split:
    # As in both sources, there are regions only where both sides are cut.
    rows, columns = (fold_w, fold_h) if min(fold_w, fold_h) > 1 else (1, 1)
    untraced(_check_fold, x, rows, columns)
    return _Split(rows, columns, heads, _is_channels_last(x))


def _check_fold(x: torch.Tensor, rows: int, columns: int) -> None:
    if x.size(2) % rows or x.size(3) % columns:
        raise ValueError(
            f"x must have a size that the fold ({rows}, {columns}) divides, got {list(x.shape[2:])}"
        )


def _is_channels_last(x: torch.Tensor) -> bool:
    if is_transformed():  # a batched tensor does not tell
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _check_image(x: torch.Tensor, channels: int, mask: torch.Tensor | None) -> None:
    untraced(_check_shapes, x, channels, mask)


def _check_shapes(x: torch.Tensor, channels: int, mask: torch.Tensor | None) -> None:
    if x.dim() != 4 or x.size(1) != channels:
        raise ValueError(f"x must be [B, {channels}, H, W], got {list(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (x.size(0), *x.shape[2:])):
        wanted = [x.size(0), *x.shape[2:]]
        raise ValueError(f"mask must be bool {wanted}, got {list(mask.shape)} {mask.dtype}")


def _select(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros for what is masked: a NaN there would reach the gradients of the projections' weights."""
    return x if mask is None else torch.where(mask.unsqueeze(1), x, 0)


def _select_tokens(similarity: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
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


# What looks at sizes, layouts or optional arguments is one node in a graph of torch.fx, which knows none of them.
for _name in (
    "_check_image",
    "_pooled_grid",
    "_select",
    "_select_tokens",
    "_split",
    "_sum",
    "_with_clusters",
    "dispatch_to_all",
):
    torch.fx.wrap(_name)


class _Cluster(nn.Module):
    """What the two Clusters share: everything but the weights of the means and the way back."""

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
        # In the order of the sources: one seed gives the same parameters, one optimiser state fits.
        self.f = nn.Conv2d(dim, heads * head_dim, 1, **factory)
        self.proj = nn.Conv2d(heads * head_dim, out_dim, 1, **factory)
        self.v = nn.Conv2d(dim, heads * head_dim, 1, **factory)
        self.sim_alpha = nn.Parameter(torch.ones(1, **factory))
        self.sim_beta = nn.Parameter(torch.zeros(1, **factory))

    def reset_parameters(self) -> None:
        """Sets the parameters to their initial values."""
        for module in (self.f, self.proj, self.v):
            if hasattr(module, "reset_parameters"):  # another module may be in its place
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

    def _back(
        self,
        found: ClusterResult,
        keys: torch.Tensor,
        hw: tuple[int, int],
        mask: torch.Tensor | None,
        channels_first: bool,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Tokens of the result and the size of their image."""
        out = api.dispatch(found.centres, found.labels, found.similarity, channels_first=channels_first)
        return out, hw

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, return_clusters: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ClusterResult]:
        """x [B, dim, H, W] -> [B, out_dim, H, W].

        Args:
            x: contiguous or channels_last; the result is laid out likewise.
            mask: bool [B, H, W], true for the pixels that take part; the others get what `proj` makes of zeros,
                and pass no gradient, whatever they hold.
            return_clusters: also return the ClusterResult, its tensors as [B, regions, heads, ...]. Its
                similarities are those the dispatch multiplies with.
        """
        _check_image(x, self.dim, mask)
        split = _split(x, self.fold_w, self.fold_h, self.heads)
        # The 1x1 projections do not mix pixels, so that the image is cut once before them, not thrice behind.
        regions = split.fold(_select(x, mask))
        hw = (regions.size(2), regions.size(3))
        keys, values = split.tokens(self.f(regions)), split.tokens(self.v(regions))
        tokens_mask = split.mask(mask)
        found = self._round(keys, values, hw, tokens_mask)
        tokens, size = self._back(found, keys, hw, tokens_mask, split.channels_first)
        out = split.unfold(self.proj(split.image(tokens, size[0], size[1])))
        return _with_clusters(out, split, found, return_clusters)


class ContextCluster(_Cluster):
    """The `Cluster` of Context-Cluster (CoC): loads its state dict, computes what it computes.

    Similarities s = sigmoid(sim_beta + sim_alpha * cosine) weigh a cluster's values, (pooled + sum s v) /
    (1 + sum s), and its centre's way back, s times the own centre. (Until May 2023 the source divided by
    1 + count; its checkpoints were replaced then.) Unlike there, the arg-max does not see the rounding of the
    sigmoid: similarities that differ do not tie.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
        proposal_w: rows of centres in each region.
        proposal_h: columns of centres.
        fold_w: rows of regions; where `fold_w` or `fold_h` is 1, the image is one region.
        fold_h: columns of regions.
        heads: each clusters channels of its own.
        head_dim: channels of a head.
        return_center: the result is the image of the centres, [B, out_dim, regions' rows * proposal_w, ...].
        dispatch: "masked": each token gets its own centre (the source). "dense": it gets all centres of its
            region, each times its similarity, in plain PyTorch; the N x O similarities are stored.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        f: keys, nn.Conv2d(dim, heads * head_dim, 1).
        v: values, likewise.
        proj: nn.Conv2d(heads * head_dim, out_dim, 1).
        sim_alpha: [1], initially 1.
        sim_beta: [1], initially 0.
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

    def _back(
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
        return super()._back(found, keys, hw, mask, channels_first)


class FECCluster(_Cluster):
    """The `Cluster` of FEC: loads its state dict, computes what it computes.

    Means over counts, (pooled + sum v) / (1 + count), and each token gets its own centre times the similarity
    sigmoid(sim_beta + sim_alpha * cosine), over which the arg-max is taken: a negative sim_alpha joins tokens
    with the least similar centres. Unlike there, the arg-max does not see the rounding of the sigmoid.

    Args and attributes as of `ContextCluster`.
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
        order = self.sim_alpha.detach()  # only its sign counts, which has no gradient
        found = api.cluster(keys, values, self.proposal, hw, alpha=order, mask=mask)
        cosine = found.similarity
        alpha, beta = (t.to(cosine.dtype) for t in (self.sim_alpha, self.sim_beta))
        return found._replace(similarity=_select_tokens(torch.sigmoid(beta + alpha * cosine), mask))


class ClusterPool(nn.Module):
    """The `ClusterPool` of FEC, which reduces an image to its centres: loads its state dict, computes what it
    computes.

    The centres of one round of clustering with raw cosines and means over counts, (H / stride) x (W / stride)
    of them, go through a GroupNorm, and a strided convolution of the image is added. Like there, `conv_f` only
    decides who joins whom and gets no gradient.

    Args:
        stride: of the pooling. `conv_skip` always halves the image, so that 2 is what fits.
        in_chans: channels of the input.
        embed_dim: channels of the output.
        norm_layer: without effect, as there.
        fold_w: rows of regions; where `fold_w` or `fold_h` is 1, the image is one region.
        fold_h: columns of regions.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        norm2: nn.GroupNorm(1, embed_dim).
        conv_f: keys, nn.Conv2d(in_chans, embed_dim, 1).
        conv_v: values, likewise.
        conv_skip: nn.Conv2d(in_chans, embed_dim, 3, stride=2, padding=1).
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
            x: contiguous or channels_last; the result is laid out likewise.
            mask: bool [B, H, W], true for the pixels that take part; the others count as zeros for
                `conv_skip`, are in no centre, and pass no gradient, whatever they hold.
            return_clusters: also return the ClusterResult, its tensors as [B, regions, 1, ...].
        """
        _check_image(x, self.in_chans, mask)
        split = _split(x, self.fold_w, self.fold_h, 1)
        x = _select(x, mask)
        regions = split.fold(x)
        hw = (regions.size(2), regions.size(3))
        grid = _pooled_grid(hw, self.stride)
        with torch.no_grad():
            keys = split.tokens(self.conv_f(regions))
        found = api.cluster(keys, split.tokens(self.conv_v(regions)), grid, hw, mask=split.mask(mask))
        centres = self.norm2(split.unfold(split.image(found.centres, grid[0], grid[1])))
        out = _sum(self.conv_skip(x), centres, self.stride)
        return _with_clusters(out, split, found, return_clusters)
