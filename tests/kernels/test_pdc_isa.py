"""Each build of the CPU kernels (scalar, AVX2, AVX-512) in a process of its own, against the oracle in float64."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import frd_kernels
from frd_kernels import _C

ISAS = ["scalar", "avx2", "avx512"]

PROGRAM = """
from functools import partial

import torch
import frd_kernels as fk
from frd_kernels import _C, reference

def check(function, oracle, operands, options):
    exact_operands = {n: t.detach().double().requires_grad_() for n, t in operands.items()}
    out, exact = function(**operands, **options), oracle(**exact_operands, **options)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, list(operands.values()), grad)
    theirs = torch.autograd.grad(exact, list(exact_operands.values()), grad.double())
    for name, a, b in zip(["out", *operands], [out, *ours], [exact, *theirs]):
        # 16 bit: the block rounds the gradient between its two halves
        bound = 16 * torch.finfo(out.dtype).eps * (b.abs().max().item() + 4)
        error = (a.double() - b).abs().max().item()
        assert error <= bound, (function.__name__, name, out.dtype, options, error, bound)

def block_operands(channels, height, width, dtype, memory_format):
    x = torch.randn(2, channels, height, width).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    point = torch.randn(20, channels, 1, 1) / channels**0.5
    operands = {"x": x, "pdc_weight": weight, "pdc_bias": bias, "point_weight": point}
    return {name: operand.to(dtype).requires_grad_() for name, operand in operands.items()}

def off_the_kink(draw, options):
    # A hidden value next to 0 would open or close its ReLU with its last bit.
    while True:
        operands = draw()
        x, weight, bias = (operands[n].detach().double() for n in ("x", "pdc_weight", "pdc_bias"))
        hidden = reference.pdc2d(x, weight, bias, padding=1, groups=x.shape[1], **options)
        if (hidden.abs() > 1e-5).all():
            return operands

torch.manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for kind in ("vanilla", "central", "angular", "radial"):
            for channels, height, width, stride in ((3, 5, 19, 1), (19, 6, 7, 2), (33, 9, 17, 1)):
                draw = partial(block_operands, channels, height, width, dtype, memory_format)
                options = {"kind": kind, "theta": 0.7, "stride": stride}
                operands = off_the_kink(draw, options)
                check(fk.pdc_block, reference.pdc_block, operands, options)
                operands = {n: operands[m] for n, m in (("x", "x"), ("weight", "pdc_weight"), ("bias", "pdc_bias"))}
                check(fk.pdc2d, reference.pdc2d, operands, options | {"padding": 1, "groups": channels})
            for theta in (0.7, 1.0):
                weight = torch.randn(5, 3, 3, 3).to(dtype)
                plain = torch.ops.frd.pdc_weight(weight, 2, theta, dtype).double()
                exact = reference.pdc_weight(weight.double(), kind="angular", theta=theta)
                assert (plain - exact).abs().max() <= 16 * torch.finfo(dtype).eps
print(_C.cpu_isa())
"""


@pytest.mark.parametrize("isa", ISAS)
def test_matches_the_oracle(isa: str) -> None:
    if ISAS.index(isa) > ISAS.index(_C.cpu_isa()):
        pytest.skip(f"this CPU has no {isa}, or FRD_CPU_ISA rules it out")
    root = pathlib.Path(frd_kernels.__file__).parents[1]
    environment = os.environ | {"FRD_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=root
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == [isa]
