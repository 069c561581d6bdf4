"""Small calls of the clustering and of the ICM, on data whose labels no rounding decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F

from frd_kernels.icm import reference as clustering

from .small_data import UNALIGNED, SmallCall, Source, Tensor, doubled, size

Grid = tuple[int, int]
CLEAR = 2e-5  # two best cosines that differ by more are told apart in float32


def laid_out(source: Source, shape: tuple[int, int, int], layout: str) -> Tensor:
    """Tokens [B, N, C], in memory as they are or as a permuted image."""
    batch, count, channels = shape
    if layout == "image":
        return source.normal(batch, channels, count).transpose(1, 2)
    return source.normal(*shape, layout=layout)


def gap(keys: Tensor, hw: Grid, grid: Grid, mask: Tensor | None = None) -> float:
    """The smallest difference between a token's two best cosines, in float64."""
    if keys.shape[0] == 0 or grid == (1, 1):
        return 1.0
    keys = clustering.select(keys.double(), mask)
    best, second = clustering.cosines(keys, hw, grid, mask).topk(2, dim=2).values.unbind(2)
    apart = best - second
    return float((apart if mask is None else apart[mask]).min())


def clear(draw: Callable[[], list[Tensor]], smallest: Callable[[list[Tensor]], float]) -> list[Tensor]:
    """Draws until no label hangs on a rounding: one more or less would change all that follows."""
    for _ in range(50):
        if smallest(drawn := draw()) > CLEAR:
            return drawn
    raise RuntimeError(f"none of 50 draws has labels that are clear by {CLEAR:g}")


def cluster(
    aggregate: str,
    batch: int,
    hw: Grid,
    grid: Grid,
    channels: int,
    layout: str = "tokens",
    masked: bool = False,
) -> SmallCall:
    shape = (batch, hw[0] * hw[1], channels)

    def draw(source: Source) -> list[Tensor]:
        def once() -> list[Tensor]:
            drawn = [laid_out(source, shape, layout) for _ in range(2)]
            if aggregate == "similarity":
                drawn += [source.normal(1, scale=0.1, mean=mean) for mean in (1.5, -0.4)]
            return [*drawn, source.integers(0, 4, *shape[:2]) > 0] if masked else drawn

        return clear(once, lambda drawn: gap(drawn[0], hw, grid, drawn[-1] if masked else None))

    def function(module: Any, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        named: dict[str, Any] = {"mask": rest[-1]} if masked else {}
        if aggregate == "similarity":
            named |= {"alpha": rest[0], "beta": rest[1]}
        return tuple(module.cluster(k, v, grid, hw, aggregate=aggregate, **named))

    family = f"cluster {aggregate}{', masked' if masked else ''}, {layout}"
    return SmallCall(family, f"{size(shape)} to {size(grid)}", ("cluster",), draw, function)


def dispatch(batch: int, centres: int, channels: int, tokens: int, channels_first: bool) -> SmallCall:
    def draw(source: Source) -> list[Tensor]:
        labels = source.integers(-1, centres, batch, tokens)
        return [source.normal(batch, centres, channels), labels, source.normal(batch, tokens).float()]

    def function(module: Any, *inputs: Tensor) -> Any:
        return module.dispatch(*inputs, channels_first=channels_first)

    family = f"dispatch{', channels first' if channels_first else ''}"
    shape = f"{batch}x{centres}x{channels} to {tokens}"
    return SmallCall(family, shape, ("cluster_dispatch",), draw, function)


def cluster_calls() -> Iterator[SmallCall]:
    for aggregate in ("similarity", "count"):
        for masked in (False, True):
            yield cluster(aggregate, 2, (10, 5), (3, 2), 24, masked=masked)
        yield cluster(aggregate, 1, (16, 16), (8, 8), 64, "image")
        yield cluster(aggregate, 1, (13, 11), (3, 5), 7)
        yield cluster(aggregate, 1, (4, 3), (2, 2), 1200)  # tiles of tokens outside of shared memory
    yield cluster("similarity", 2, (5, 7), (3, 2), 10, UNALIGNED)
    yield cluster("similarity", 1, (1, 1), (1, 1), 3).forward()  # its keys have a gradient of 0
    yield cluster("count", 0, (4, 4), (2, 2), 8)
    yield cluster("similarity", 8, (16, 16), (8, 8), 64, "image")._replace(paper=True)
    yield dispatch(2, 4, 24, 49, False)
    yield dispatch(3, 64, 32, 333, True)
    yield dispatch(1, 100, 7, 50, False)


def project(tokens: Tensor, parameters: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Keys and values."""
    wk, bk, wv, bv = parameters
    return F.linear(tokens, wk, bk), F.linear(tokens, wv, bv)


def icm(
    variant: str,
    batch: int,
    hw: Grid,
    channels: int,
    grids: Sequence[Grid] = ((8, 8), (4, 4), (2, 1)),
    rounds: Sequence[str] = ("biased", "biased", "biased"),
    layout: str = "image",
) -> SmallCall:
    """rounds: the projections of each, "biased", "weights" or "none"."""
    shape, gates = (batch, hw[0] * hw[1], channels), 1 if variant == "paper" else len(grids)
    parts = {"biased": (True, True, True, True), "weights": (True, False, True, False), "none": (False,) * 4}

    def unpacked(inputs: Sequence[Tensor]) -> list[Any]:
        given = iter(inputs)
        taken = [tuple(next(given) if part else None for part in parts[name]) for name in rounds]
        return [None if wk is None else (wk, *rest) for wk, *rest in taken]

    def draw(source: Source) -> list[Tensor]:
        def once() -> list[Tensor]:
            drawn = [laid_out(source, shape, layout)]
            drawn += [source.normal(gates, scale=0.1, mean=0.5), source.normal(gates, scale=0.1, mean=-0.25)]
            for name in rounds:
                for index, part in enumerate(parts[name]):
                    if part:
                        square = (channels, channels) if index % 2 == 0 else (channels,)
                        drawn.append(source.normal(*square, scale=channels**-0.5))
            return drawn

        return clear(once, smallest)

    def smallest(drawn: list[Tensor]) -> float:
        tokens, extent, found = drawn[0].double(), hw, 1.0
        gated: dict[str, Any] = {} if variant == "paper" else {"aggregate": "similarity"}
        alpha, beta = (gate.double() for gate in drawn[1:3])
        for t, (grid, projection) in enumerate(
            zip(grids, unpacked(list(map(doubled, drawn[3:]))), strict=True)
        ):
            keys, values = project(tokens, projection) if projection else (tokens, tokens)
            found = min(found, gap(keys, extent, grid))
            named: dict[str, Any] = {"alpha": alpha[t], "beta": beta[t]} if gated else {}
            tokens, extent = clustering.cluster(keys, values, grid, extent, **gated, **named).centres, grid
        return found

    def function(module: Any, x: Tensor, alpha: Tensor, beta: Tensor, *rest: Tensor) -> Any:
        named: dict[str, Any] = {"variant": variant, "alpha": alpha, "beta": beta, "grids": grids, "hw": hw}
        return module.icm(x, unpacked(rest), **named)

    return SmallCall(f"icm {variant}, {layout}", size(shape), ("icm",), draw, function)


def icm_calls() -> Iterator[SmallCall]:
    for variant in ("paper", "released"):
        yield icm(variant, 2, (8, 8), 16, ((4, 4), (2, 2), (2, 1)))
        yield icm(variant, 1, (16, 16), 64)
        mixed = ("biased", "none", "weights")
        yield icm(variant, 2, (5, 7), 10, ((3, 3), (5, 4), (2, 3)), mixed, "tokens")
        yield icm(variant, 1, (4, 3), 1200, ((2, 2), (2, 1)), ("none", "none"), "tokens")
        yield icm(variant, 1, (16, 16), 256)._replace(paper=True)
