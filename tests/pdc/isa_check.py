"""A program: checks the difference convolution and the block with the CPU kernels that FRD_CPU_ISA selects, and
prints their name. test_isa.py runs it, as the choice is made once a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import DTYPES, KINDS, LAYOUTS, block_operands, in_double, off_the_kink

import frd_kernels as fk
from frd_kernels import _C, reference

# channels, height, width, stride: fewer than a vector holds, a rest, whole vectors and a rest
SHAPES = [(3, 5, 19, 1), (19, 6, 7, 2), (33, 9, 17, 1)]


def check(
    function: Callable[..., torch.Tensor],
    oracle: Callable[..., torch.Tensor],
    operands: dict[str, torch.Tensor],
    **options: Any,
) -> None:
    operands = {name: operand.requires_grad_() for name, operand in operands.items()}
    exact_operands = in_double(operands)
    out, exact = function(**operands, **options), oracle(**exact_operands, **options)
    grad = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, list(operands.values()), grad)]
    wanted = [exact, *torch.autograd.grad(exact, list(exact_operands.values()), grad.double())]
    for name, value, truth in zip(("out", *operands), found, wanted, strict=True):
        # In 16 bit the block rounds the gradient between its two halves.
        bound = 16 * torch.finfo(out.dtype).eps * (truth.abs().max().item() + 4)
        error = (value.double() - truth).abs().max().item()
        assert error <= bound, (function.__name__, name, out.dtype, options, error, bound)


def check_weight(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3, 3, 3).to(dtype)
    exact = reference.pdc_weight(weight.double(), kind=kind, theta=0.7)
    error = (fk.pdc_weight(weight, kind=kind, theta=0.7).double() - exact).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps, ("pdc_weight", dtype, kind, error)


def main() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        for kind in KINDS:
            check_weight(kind, dtype)
            for layout in LAYOUTS:
                for channels, height, width, stride in SHAPES:
                    shape = (2, channels, 20, height, width)
                    draw = partial(block_operands, *shape, stride=stride, dtype=dtype, layout=layout)
                    options: dict[str, Any] = {"kind": kind, "theta": 0.7, "stride": stride}
                    operands = off_the_kink(draw, **options)
                    check(fk.pdc_block, reference.pdc_block, operands, **options)
                    renamed = {"x": "x", "weight": "pdc_weight", "bias": "pdc_bias"}
                    operands = {name: operands[source].detach() for name, source in renamed.items()}
                    check(fk.pdc2d, reference.pdc2d, operands, padding=1, groups=channels, **options)
    print(_C.cpu_isa())


if __name__ == "__main__":
    main()
