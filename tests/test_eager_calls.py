"""The short way of an eager call: what it must not skip, and that the longer way gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import frd_kernels as fk
from frd_kernels import _autograd, _checked_calls

OP = "pdc2d"


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operands(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 6, 7, device=device), torch.randn(4, 1, 3, 3, device=device)


def conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fk.pdc2d(x, weight, kind="angular", padding=1, groups=4)


def through_the_dispatcher(op: Any, *inputs: Any) -> Any:
    return op(*inputs)


@pytest.mark.kernels
def test_gives_the_same_as_the_registered_rules(
    operands: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, gradients and their gradients."""

    def results() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in operands]
        out = conv(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [out, *first, *second]

    short = results()
    assert all(r.requires_grad for r in short[:3])
    for module in ("pdc.ops", "pdc.weight"):
        monkeypatch.setattr(f"frd_kernels.{module}._autograd.call", through_the_dispatcher)
    assert all(torch.equal(a, b) for a, b in zip(short, results(), strict=True))


@pytest.mark.kernels
def test_a_dispatch_mode_sees_the_operator(operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    for learns in (False, True):
        x, weight = operands[0].clone().requires_grad_(learns), operands[1]
        with Recorder() as seen:
            out = conv(x, weight)
        assert any("pdc2d_depthwise" in op for op in seen.ops)
        assert out.requires_grad == learns


@pytest.mark.kernels
def test_transforms_are_refused_as_by_the_operators(operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    """torch.library has no rules for them: a gradient or a tangent must not get lost silently."""
    x, weight = operands
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: conv(x, weight).square().sum())(x)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            conv(forward_ad.make_dual(x, torch.ones_like(x)), weight)
        conv(x, weight)


@pytest.mark.kernels
def test_no_gradient_where_none_is_asked_for(operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = operands[0].requires_grad_(), operands[1].requires_grad_()
    with torch.no_grad():
        assert not conv(x, weight).requires_grad
    with torch.inference_mode():
        assert conv(x, weight).is_inference()
    assert conv(x, weight).requires_grad


@pytest.mark.kernels
def test_autocast_casts_before_the_short_way(device: torch.device) -> None:
    x, weight = torch.randn(2, 4, 6, 7, device=device), torch.randn(4, 1, 3, 3, device=device)
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        out = conv(x, weight)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), [x, weight]))


REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "channels": lambda x, w: conv(x[:, :3], w),
    "dtype": lambda x, w: conv(x, w.double()),
    "stride": lambda x, w: fk.pdc2d(x, w, kind="angular", padding=1, groups=4, stride=0),
    "kind": lambda x, w: fk.pdc2d(x, w, kind="round", padding=1, groups=4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_seen_before_lets_nothing_wrong_pass(name: str) -> None:
    x, weight = torch.randn(2, 4, 6, 7), torch.randn(4, 1, 3, 3)
    for _ in range(2):
        conv(x, weight)
        with pytest.raises(ValueError):
            REFUSED[name](x, weight)


def test_mixed_dtypes_pass_under_autocast_only() -> None:
    x, weight = torch.randn(2, 4, 6, 7), torch.randn(4, 1, 3, 3).bfloat16()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            conv(x, weight)
        with pytest.raises(ValueError, match="dtype"):
            conv(x, weight)


def test_what_was_seen_is_bounded_and_takes_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checked_calls, "_MAX_CALLS", 2)
    monkeypatch.setattr(_checked_calls, "_SEEN", {})
    for size in (5, 6, 7):
        conv(torch.randn(1, 4, size, size), torch.randn(4, 1, 3, 3))
    assert len(_checked_calls._SEEN) <= 2
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3)
    options: dict[str, Any] = {"kind": "angular", "groups": 4, "stride": [1, 2], "padding": [1, 1]}
    for _ in range(2):
        torch.testing.assert_close(fk.pdc2d(x, weight, **options), fk.reference.pdc2d(x, weight, **options))


def test_an_operator_with_lists_of_tensors_keeps_the_registered_rules() -> None:
    assert torch.ops.frd.icm.default not in _autograd._FUNCTIONS
    assert torch.ops.frd.pdc2d_depthwise.default in _autograd._FUNCTIONS
