"""16 bit: at most twice the error of the eager form in the same dtype, of every result and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk

from .. import backends
from .cases import (
    VARIANTS,
    Case,
    Grid,
    clear_case,
    clear_tokens,
    map_projections,
    on_device,  # noqa: F401  an autouse fixture
)

OP = "icm"

# 16-bit similarities make no mistake about labels that are this clear, so the eager form is no easy baseline.
CLEAR = 0.02
Form = Callable[..., list[torch.Tensor]]


def eager_round(
    keys: torch.Tensor,
    values: torch.Tensor,
    hw: Grid,
    grid: Grid,
    gate: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A round as CoC and FEC write it, in the dtype of its inputs: centres, similarities, one-hot mask."""

    def pool(tokens: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, hw), grid).flatten(2).transpose(1, 2)

    similarity = F.normalize(keys, dim=2) @ F.normalize(pool(keys), dim=2).transpose(1, 2)
    if gate is not None:
        similarity = torch.sigmoid(gate[1] + gate[0] * similarity)
    mask = F.one_hot(similarity.argmax(2), similarity.size(2)).to(similarity.dtype)
    weights = mask if gate is None else mask * similarity
    centres = (pool(values) + weights.transpose(1, 2) @ values) / (1 + weights.sum(1)).unsqueeze(2)
    return centres, similarity, mask


def eager_icm(
    x: torch.Tensor, maps: list[Any], *, variant: str, alpha: Any, beta: Any, grids: list[Grid], hw: Grid
) -> torch.Tensor:
    tokens, product = x, None
    for t, (grid, projection) in enumerate(zip(grids, maps, strict=True)):
        keys = values = tokens
        if projection is not None:
            keys, values = F.linear(tokens, *projection[:2]), F.linear(tokens, *projection[2:])
        gate = None if variant == "paper" else (alpha[t], beta[t])
        tokens, similarity, mask = eager_round(keys, values, hw, grid, gate)
        matrix = similarity if gate is None else similarity * mask
        product, hw = matrix if product is None else product @ matrix, grid
    return (torch.sigmoid(alpha * product + beta) if variant == "paper" else product) @ tokens


def measured(form: Form, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results in float64, and behind them the gradients of the inputs for a loss of fixed weights."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = [result.double() for result in form(*leaves)]
    loss = sum((r * torch.linspace(-1, 1.5, r.size(-1), dtype=r.dtype).cos()).sum() for r in results)
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return results + [grad.double() for grad in grads]


def compare(kernel: Form, eager: Form, exact: Form, inputs: list[torch.Tensor]) -> list[tuple[float, float]]:
    """Squared errors of the kernel and of the eager form, for each result and gradient."""
    found, baseline = measured(kernel, inputs), measured(eager, inputs)
    wanted = measured(exact, [t.double() for t in inputs])
    errors = []
    for number, (a, b, c) in enumerate(zip(found, baseline, wanted, strict=True)):
        ours, theirs = (a - c).norm().item(), (b - c).norm().item()
        errors.append((ours**2, theirs**2))
        if number < len(wanted) - len(inputs):
            assert theirs <= 0.05 * c.norm().item(), "the eager form mistakes a label"
    return errors


def assert_at_most_twice(draws: list[list[tuple[float, float]]]) -> None:
    """Over all draws together: alpha's and beta's gradients are numbers, which one draw may get right by luck."""
    for number, errors in enumerate(zip(*draws, strict=True)):
        ours, theirs = (sum(part) ** 0.5 for part in zip(*errors, strict=True))
        assert ours <= 2 * theirs, f"tensor {number}: error {ours}, of the eager form {theirs}"


def draws_of(backend: str) -> range:
    return range(1 if backends.is_slow(backend, OP) else 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregate", ["count", "similarity"])
def test_cluster(backend: str, aggregate: str, dtype: torch.dtype) -> None:
    hw, grid = (13, 11), (3, 2)

    def op(cluster: Callable[..., fk.ClusterResult]) -> Form:
        def form(k: torch.Tensor, v: torch.Tensor, alpha: Any, beta: Any) -> list[torch.Tensor]:
            return list(cluster(k, v, grid, hw, aggregate=aggregate, alpha=alpha, beta=beta)[::2])

        return form

    def eager(k: torch.Tensor, v: torch.Tensor, *gate: torch.Tensor) -> list[torch.Tensor]:
        form = gate if aggregate == "similarity" else None
        centres, similarity, mask = eager_round(k, v, hw, grid, form)
        return [centres, (similarity * mask).sum(2)]

    gate = [torch.tensor(1.5), torch.tensor(-0.25)]
    draws = []
    for _ in draws_of(backend):
        tokens = clear_tokens(hw, grid, 16, dtype, CLEAR, noise=0.5)
        draws.append(compare(op(fk.cluster), eager, op(fk.reference.cluster), [*tokens, *gate]))
    assert_at_most_twice(draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projected", ["none", "biases"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_icm(backend: str, variant: str, projected: str, dtype: torch.dtype) -> None:
    assert_at_most_twice([icm_errors(variant, projected, dtype) for _ in draws_of(backend)])


def icm_errors(variant: str, projected: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    case = Case((12, 10), [(4, 2), (2, 2), (2, 1)], 32, projected)
    x, maps, options = clear_case(case, variant, dtype, clear=CLEAR, noise=0.5)
    inputs = [x, options["alpha"], options["beta"]]
    map_projections(lambda p: inputs.append(p) or p, maps)

    def op(icm: Callable[..., torch.Tensor]) -> Form:
        def form(x: torch.Tensor, alpha: Any, beta: Any, *parameters: torch.Tensor) -> list[torch.Tensor]:
            rest = iter(parameters)
            made = map_projections(lambda _: next(rest), maps)
            return [icm(x, made, **options | {"alpha": alpha, "beta": beta})]

        return form

    return compare(op(fk.icm), op(eager_icm), op(fk.reference.icm), inputs)
