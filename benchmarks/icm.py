"""The ICM with its projections, both variants, against the dense eager forms.

The arg-max makes the output jump: on arbitrary data one token whose two best cosines agree to the last bits, decided
differently in float32 and float64, would make a correct result look wrong, or a rival's error so large that the gate
lets everything pass. So the tokens come in clusters that lie far apart, in every round and for every call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

import frd_kernels as fk

from . import eager
from .cases import MODES, Case, Providers, normal, with_gradients
from .pdc import GPU_LARGE, GPU_SMALL, SHAPES
from .providers import providers

GRIDS = ((8, 8), (4, 4), (2, 1))
RIVALS: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "released": {
        "eager, [B,O,N,C] products": eager.icm_products,
        "eager, gather and scatter_add": eager.icm_gather,
    },
    "paper": {"eager, dense cosines and scatter_add": eager.icm_dense},
}
NOISE = 0.7  # of a token around its prototype, whose entries have unit variance
TARGET = 4.0


def build_icm(case: Case, *, variant: str) -> Providers:
    inputs = data(case, variant)
    sides = providers(
        case,
        inputs=inputs,
        ours=functools.partial(over_tokens, fk.icm, variant),
        rivals={name: functools.partial(over_images, icm) for name, icm in RIVALS[variant].items()},
        reference=functools.partial(over_tokens, fk.reference.icm, variant),
        ops=("icm",),
        squared=True,
    )
    # The norm of every key is needed, so one product of the tokens with a C x C matrix is, whoever computes it.
    image = inputs[0].to(memory_format=torch.channels_last)
    grad = torch.ones_like(image) if case.backward else None
    sides.floors["keys of round 1 alone"] = with_gradients(
        F.conv2d, (image, inputs[1][:, :, None, None]), grad, case.mode
    )
    return sides


def data(case: Case, variant: str) -> tuple[torch.Tensor, ...]:
    """The image, per round Wk, bk, Wv, bv, then alpha and beta."""
    channels = case.shape[1]
    projections = []
    for seed in range(2 * len(GRIDS)):
        projections.append(normal((channels, channels), case, 10 + seed, scale=channels**-0.5))
        projections.append(normal((channels,), case, 20 + seed, scale=0.1))
    gates = 1 if variant == "paper" else len(GRIDS)
    alpha, beta = (torch.full((gates,), value, dtype=case.dtype, device=case.device) for value in (1.0, 0.1))
    return clustered(case), *projections, alpha, beta


def clustered(case: Case, grid: tuple[int, int] = GRIDS[0]) -> torch.Tensor:
    """Images [B, C, H, W]: the pixels of a bin of the grid scatter about the bin's own prototype, each fourth
    one about that of a bin drawn at random."""
    batch, channels, height, width = case.shape
    rows, columns = grid
    generator = torch.Generator(case.device).manual_seed(0)
    prototypes = normal((batch, channels, rows * columns), case, seed=1)
    row = torch.arange(height, device=case.device) * rows // height
    column = torch.arange(width, device=case.device) * columns // width
    labels = (row[:, None] * columns + column).repeat(batch, 1, 1)
    strayed = labels[:, 1::2, 1::2]
    strays = torch.randint(rows * columns, strayed.shape, generator=generator, device=case.device)
    strayed.copy_(strays)
    index = labels.flatten(1)[:, None, :].expand(-1, channels, -1)
    image = prototypes.gather(2, index).unflatten(2, (height, width))
    return image + normal(case.shape, case, seed=2, scale=NOISE)


def split(inputs: Sequence[torch.Tensor]) -> tuple[list[eager.Projection], torch.Tensor, torch.Tensor]:
    """What follows the image in `data`: a tuple for each round, alpha, beta."""
    *projections, alpha, beta = inputs
    wk, bk, wv, bv = (projections[i::4] for i in range(4))
    return list(zip(wk, bk, wv, bv, strict=True)), alpha, beta


def over_tokens(
    icm: Callable[..., torch.Tensor], variant: str, x: torch.Tensor, *inputs: torch.Tensor
) -> torch.Tensor:
    """x [B, C, H, W] through an `icm` over tokens, as `fk.ICM` does it."""
    projections, alpha, beta = split(inputs)
    tokens, hw = x.flatten(2).transpose(1, 2), x.shape[2:]
    out = icm(tokens, projections, variant=variant, alpha=alpha, beta=beta, grids=GRIDS, hw=tuple(hw))
    return out.transpose(1, 2).unflatten(2, hw)


def over_images(icm: Callable[..., torch.Tensor], x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    return icm(x, *split(inputs), GRIDS)


def cases() -> Iterator[Case]:
    for variant in RIVALS:
        build = functools.partial(build_icm, variant=variant)
        for mode in MODES:
            for shape in SHAPES:
                first = (variant, shape) == ("paper", SHAPES[0])
                short = first and mode == "forward"
                compiled = ("default",) if first else ()
                yield Case(
                    f"icm {variant}", shape, mode, build, target=TARGET, short=short, compiled=compiled
                )


def gpu_cases() -> Iterator[Case]:
    """In bfloat16; 256 tokens are a photo of 512x512, 4096 one of 2048x2048."""
    for variant in RIVALS:
        build = functools.partial(build_icm, variant=variant)
        for shape in (GPU_SMALL, (1, 256, 16, 16), GPU_LARGE):
            case = Case(f"icm {variant}", shape, MODES[0], build, dtype=torch.bfloat16, device="cuda")
            for mode in MODES:
                short = variant == "paper" and (shape != GPU_LARGE or mode == "forward")
                compiled: tuple[str, ...] = ("default",) if short and shape == GPU_SMALL else ()
                if compiled and mode == "forward":
                    compiled += ("max-autotune",)
                yield dataclasses.replace(case, mode=mode, short=short, compiled=compiled)
    for dtype in (torch.float32, torch.float16):
        build = functools.partial(build_icm, variant="paper")
        yield Case("icm paper", GPU_SMALL, MODES[0], build, dtype=dtype, device="cuda")


CASES = list(cases())
GPU_CASES = list(gpu_cases())
