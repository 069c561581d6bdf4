"""A small call: the data it computes with, how it is made, and its float64 reference."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import frd_kernels as fk

from ...cases import LAYOUTS, MODES, Call

Tensor = torch.Tensor
UNALIGNED = "unaligned"  # a layout: contiguous, from an address that no vector can be read from


@dataclasses.dataclass(frozen=True)
class Source:
    """Random tensors on the CPU: they are the same ones for every device, and none of its kernels runs for them."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(
        self, *shape: int, scale: float = 1.0, step: float = 0.0, mean: float = 0.0, layout: str = "nchw"
    ) -> Tensor:
        """`step`: what the numbers are multiples of, so that no sum of a few products is rounded."""
        values = mean + scale * torch.randn(*shape, generator=self.generator)
        values = (values / step).round() * step if step else values
        if layout == UNALIGNED:
            return torch.empty(values.numel() + 1, dtype=self.dtype)[1:].view(shape).copy_(values)
        if len(shape) == 4:
            values = values.contiguous(memory_format=LAYOUTS[layout])
        return values.to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


class Built(NamedTuple):
    """A call over `inputs`; it reads what they hold when it is made, and so does the float64 reference."""

    inputs: list[Tensor]
    call: Call
    exact: Call
    fresh: Callable[[int], list[Tensor]]  # seed -> other data for the inputs


class SmallCall(NamedTuple):
    family: str  # what shares its kernels, all but their shapes
    shape: str
    ops: tuple[str, ...]  # as `frd_kernels.backend.PROVIDERS` names them
    draw: Callable[[Source], list[Tensor]]
    function: Callable[..., Any]  # of frd_kernels, or its reference, and of the inputs
    backward: bool = True
    paper: bool = False  # the size of a layer of FRD-Net

    @property
    def name(self) -> str:
        return f"{self.family} [{self.shape}] {MODES[self.backward]}"

    def forward(self) -> SmallCall:
        return self._replace(backward=False)

    def build(self, device: str, dtype: torch.dtype) -> Built:
        """To be called within `use_backend`."""

        def fresh(seed: int) -> list[Tensor]:
            drawn = self.draw(Source(torch.Generator().manual_seed(seed), dtype))
            return [placed(tensor, device) for tensor in drawn]

        inputs, grads = fresh(0), []
        if self.backward:
            noise = Source(torch.Generator().manual_seed(99), dtype)
            with torch.no_grad():
                outs = [out.cpu() for out in floating(self.function(fk, *inputs))]
            # The output itself is part of it: sums over all pixels of the noise alone cancel.
            grads = [placed((out + noise.normal(*out.shape)).to(dtype), device) for out in outs]
        ours = functools.partial(results, functools.partial(self.function, fk), inputs, grads)
        reference = functools.partial(self.function, fk.reference)

        def exact() -> Sequence[Tensor]:
            return results(reference, *([doubled(x) for x in tensors] for tensors in (inputs, grads)))

        return Built(inputs, ours, exact, fresh)


def placed(tensor: Tensor, device: str) -> Tensor:
    """On the device, with the strides and the offset that it has."""
    offset = tensor.storage_offset()
    buffer = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device=device)
    return buffer.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def tensors_of(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def floating(found: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(found) if tensor.is_floating_point()]


def results(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor]:
    """All that `function` returns and, where `grads` of its floating outputs are given, the inputs' gradients."""
    if not grads:
        with torch.no_grad():
            return tensors_of(function(*inputs))
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    found = tensors_of(function(*leaves))
    outs = floating(tuple(found))
    # Copies, for a gradient may be what was given itself, and what a call returns is overwritten.
    given = [grad.to(out.dtype, copy=True) for grad, out in zip(grads, outs, strict=True)]
    gradients = torch.autograd.grad(outs, [x for x in leaves if x.requires_grad], given)
    return [*(tensor.detach() for tensor in found), *gradients]


def size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
