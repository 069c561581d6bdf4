"""What the tests of the clustering and of the ICM share: inputs of every layout, data without near ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk

from .. import backends

Grid = tuple[int, int]
VARIANTS = ["paper", "released"]
# Two best similarities that differ by more than this are told apart in float32, in every round.
CLEAR = 3e-6

# [2, 35, 6] with the strides that views make
VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "offset": lambda: torch.randn(4, 40, 9)[1:3, 2:37, 3:9],
    "unaligned": lambda: torch.randn(2 * 35 * 6 + 1)[1:].view(2, 35, 6),
    "every other channel": lambda: torch.randn(2, 35, 12)[:, :, ::2],
    "every other token": lambda: torch.randn(2, 70, 6)[:, ::2],
    "permuted image": lambda: torch.randn(2, 6, 35).transpose(1, 2),
    "slice of an image": lambda: torch.randn(3, 8, 50)[1:, 2:, 3:38].transpose(1, 2),
    "batch innermost": lambda: torch.randn(35, 6, 2).permute(2, 0, 1),
    "expanded batch": lambda: torch.randn(1, 35, 6).expand(2, -1, -1),
}


class Case(NamedTuple):
    """An ICM: its image, its rounds, and which projections they have (a key of PROJECTIONS)."""

    hw: Grid
    grids: list[Grid]
    channels: int
    projected: str


# Per round (key bias, value bias), or None for no projection; rounds beyond the list repeat its last entry.
PROJECTIONS: dict[str, list[tuple[bool, bool] | None]] = {
    "none": [None],
    "biases": [(True, True)],
    "no biases": [(False, False)],
    "mixed": [(True, False), None, (False, True)],
}


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes new tensors where the test's backend computes."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else "reference"
    with torch.device(backends.device_of(name)):
        yield


def laid_out(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Tokens [B, N, C]: so in memory ("tokens"), or a permuted image [B, C, N] ("image")."""
    if layout == "tokens":
        return torch.randn(shape).to(dtype)
    return torch.randn(shape[0], shape[2], shape[1]).to(dtype).transpose(1, 2)


def projections(name: str, rounds: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    entries = PROJECTIONS[name]
    made: list[Any] = []
    for entry in (entries + entries[-1:] * rounds)[:rounds]:
        if entry is None:
            made.append(None)
            continue
        weights = (torch.randn(2, channels, channels) / channels**0.5).to(dtype)
        biases = [(torch.randn(channels) / 4).to(dtype) if given else None for given in entry]
        made.append((weights[0], biases[0], weights[1], biases[1]))
    return made


def map_projections(change: Callable[[torch.Tensor], torch.Tensor], maps: list[Any]) -> list[Any]:
    return [m and tuple(p if p is None else change(p) for p in m) for m in maps]


def icm_options(case: Case, variant: str) -> dict[str, Any]:
    """The keyword arguments of `icm`; alpha and beta are exact in 16 bit."""
    options: dict[str, Any] = {"variant": variant, "grids": case.grids, "hw": case.hw}
    if variant == "paper":
        return options | {"alpha": torch.tensor(0.125), "beta": torch.tensor(-0.25)}
    alpha = torch.tensor([1.5, 0.75, -0.5, 2.0])
    beta = torch.tensor([0.25, -0.125, 0.5, 0.0])
    return options | {"alpha": alpha[: len(case.grids)], "beta": beta[: len(case.grids)]}


def gap(similarity: torch.Tensor) -> float:
    """The smallest difference between the two best of O similarities [B, N, O]."""
    if similarity.size(2) == 1 or similarity.numel() == 0:
        return 1.0
    best, second = similarity.topk(2, dim=2).values.unbind(2)
    return (best - second).min().item()


def exact_pool(tokens: torch.Tensor, hw: Grid, grid: Grid) -> torch.Tensor:
    image = tokens.double().transpose(1, 2).unflatten(2, hw)
    return F.adaptive_avg_pool2d(image, grid).flatten(2).transpose(1, 2)


def exact_similarity(
    k: torch.Tensor, hw: Grid, grid: Grid, *, aggregate: str = "count", alpha: Any = 1.0, beta: Any = 0.0
) -> torch.Tensor:
    """[B, N, O] in float64."""
    cosine = F.normalize(k.double(), dim=2) @ F.normalize(exact_pool(k, hw, grid), dim=2).transpose(1, 2)
    return cosine if aggregate == "count" else torch.sigmoid(beta + alpha * cosine)


def smallest_gap(x: torch.Tensor, maps: list[Any], options: dict[str, Any]) -> float:
    """Between the two best similarities of a token, over all rounds of an ICM, in float64."""
    tokens, hw, smallest = x.double(), options["hw"], 1.0
    for t, (grid, projection) in enumerate(zip(options["grids"], maps, strict=True)):
        keys = values = tokens
        if projection is not None:
            wk, bk, wv, bv = (p if p is None else p.double() for p in projection)
            keys, values = F.linear(tokens, wk, bk), F.linear(tokens, wv, bv)
        form: dict[str, Any] = {}
        if options["variant"] == "released":
            form = {"aggregate": "similarity", "alpha": options["alpha"][t], "beta": options["beta"][t]}
        smallest = min(smallest, gap(exact_similarity(keys, hw, grid, **form)))
        tokens, hw = fk.reference.cluster(keys, values, grid, hw, **form).centres, grid
    return smallest


def scattered(
    shape: tuple[int, int, int], hw: Grid, grid: Grid, dtype: torch.dtype, noise: float
) -> torch.Tensor:
    """Tokens [B, N, C] around one direction for each bin."""
    directions = 3 * torch.randn(shape[0], shape[2], *grid)
    smooth = F.interpolate(directions, hw, mode="nearest").flatten(2).transpose(1, 2)
    return (smooth + noise * torch.randn(shape)).to(dtype)


def clear_tokens(
    hw: Grid, grid: Grid, channels: int, dtype: torch.dtype, clear: float, noise: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, N, C] whose labels are beyond doubt."""
    shape = (2, hw[0] * hw[1], channels)
    for _ in range(50):
        k = scattered(shape, hw, grid, dtype, noise)
        if gap(exact_similarity(k, hw, grid)) > clear:
            return k, torch.randn(shape).to(dtype)
    raise AssertionError("no clear data found")


def clear_case(
    case: Case,
    variant: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "tokens",
    clear: float = CLEAR,
    noise: float | None = None,
) -> tuple[torch.Tensor, list[Any], dict[str, Any]]:
    """x [2, N, C], projections and options whose labels are beyond doubt in all rounds: one label more or
    less would change everything behind it. noise: makes x `scattered`."""
    options = icm_options(case, variant)
    shape = (2, case.hw[0] * case.hw[1], case.channels)
    for _ in range(50):
        if noise is None:
            x = laid_out(shape, dtype, layout)
        else:
            x = scattered(shape, case.hw, case.grids[0], dtype, noise)
        maps = projections(case.projected, len(case.grids), case.channels, dtype)
        if smallest_gap(x, maps, options) > clear:
            return x, maps, options
    raise AssertionError("no clear data found")


def run_icm(x: torch.Tensor, maps: list[Any], options: dict[str, Any]) -> list[torch.Tensor]:
    """The output, and the gradients of x, of all projections, of alpha and of beta."""
    inputs = [x.detach().requires_grad_()]

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        inputs.append(tensor.detach().requires_grad_())
        return inputs[-1]

    maps = map_projections(leaf, maps)
    gates = {name: leaf(options[name]) for name in ("alpha", "beta")}
    out = fk.icm(inputs[0], maps, **options | gates)
    loss = (out * torch.linspace(-1, 1, x.size(2), dtype=x.dtype)).sum() + out.square().sum()
    return [out.detach(), *torch.autograd.grad(loss, inputs)]
