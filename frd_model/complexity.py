"""Parameters and multiply-accumulates of a model, by the convention that published tables follow.

Counted, as fvcore does: one multiply-accumulate per product term of a convolution, a linear layer or a
matrix product (the two of attention included), and 5 operations for each element of an affine LayerNorm or
GroupNorm. Not counted: element-wise work, softmax, interpolation, pooling. The operators of frd_kernels have
formulas of their own: a difference convolution counts as a plain one, a round of clustering as the product of its
keys and centres.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .frdnet import FRDNet

NORM_OPERATIONS = 5


def count_parameters(module: nn.Module) -> int:
    """Number of parameter elements."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: FRDNet, height: int = 512, width: int = 512) -> dict[str, int]:
    """Multiply-accumulates of one image [1, 3, height, width], in whole and by part.

    The model is left alone: the count runs on a copy, and on shapes only, so it takes no time.

    Returns:
        ``{"total": ..., "stem": ..., "encoder": ..., "blocks": ..., "decoder": ...}``.
    """
    shadow = copy.deepcopy(model).eval()
    fake = FakeTensorMode()
    state: dict[str, Tensor] = {name: fake.from_tensor(value) for name, value in shadow.state_dict().items()}
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.native_layer_norm: _norm_flops,
            torch.ops.aten.native_group_norm: _norm_flops,
        },
    )
    # Fused attention would hide its two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake, counter:
        images = torch.empty(1, 3, height, width, dtype=next(shadow.parameters()).dtype)
        functional_call(shadow, state, (images,))
    by_module = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    macs = {"total": counter.get_total_flops() // 2}
    for part in ("stem", "encoder", "decoder"):
        macs[part] = by_module.get(f"FRDNet.{part}", 0)
    macs["blocks"] = sum(by_module.get(f"FRDNet.blocks.{i}", 0) for i in range(len(model.blocks)))
    return macs


def _norm_flops(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # The counter's unit is half a multiply-accumulate.
    size = shape.shape if isinstance(shape, Tensor) else shape
    return 2 * NORM_OPERATIONS * math.prod(size)


def summary(model: FRDNet, height: int = 512, width: int = 512) -> str:
    """A small table: parameters in millions and multiply-accumulates in billions, by part and in whole."""
    macs = count_macs(model, height, width)
    lines = [f"{'part':<8} {'params M':>9} {'GMAC':>8}   at {height}x{width}"]
    for part in ("stem", "encoder", "blocks", "decoder"):
        module = getattr(model, part)
        if module is not None:
            lines.append(f"{part:<8} {count_parameters(module) / 1e6:9.2f} {macs[part] / 1e9:8.2f}")
    lines.append(f"{'total':<8} {count_parameters(model) / 1e6:9.2f} {macs['total'] / 1e9:8.2f}")
    return "\n".join(lines)
