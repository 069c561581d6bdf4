"""Cosine clustering against eager PyTorch: the whole ICM with its projections, in both variants, and one round with its
dispatch as in a block of Context-Cluster, whose keys and values are given.

The arg-max makes the output jump: one token whose two best cosines agree to the last bits, decided differently in
float32 and float64, would make a correct result look wrong, or a baseline's error so large that the gate passes
anything. So the tokens form clusters that lie far apart in every round.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import frd_kernels as fk

from . import baselines
from .gate import one_line
from .pdc import GPU_LARGE, GPU_SMALL, SHAPES
from .registry import MODES, Case, Impls, build_impls, normal, with_gradients

ICM_GRIDS = ((8, 8), (4, 4), (2, 1))
ICM_BASELINES: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "released": {
        "eager, [B,O,N,C] products": baselines.icm_products,
        "eager, gather and scatter_add": baselines.icm_gather,
    },
    "paper": {"eager, dense cosines and scatter_add": baselines.icm_dense},
}
# Of a token around its prototype, whose entries have unit variance.
NOISE = 0.7
# Shape -> grid of centres: regions of 7 x 7 pixels in four heads, and one whole image.
CLUSTER_SHAPES: dict[tuple[int, ...], tuple[int, int]] = {(256, 24, 7, 7): (2, 2), (4, 64, 64, 64): (8, 8)}
CLUSTER_GPU_SHAPES: dict[tuple[int, ...], tuple[int, int]] = {
    (8, 64, size, size): (8, 8) for size in (16, 64, 128)
}
CLUSTER_GRIDS = CLUSTER_SHAPES | CLUSTER_GPU_SHAPES


def build_icm(case: Case, *, variant: str) -> Impls:
    inputs = icm_inputs(case, variant)
    impls = build_impls(
        case,
        inputs=inputs,
        ours=functools.partial(over_tokens, fk.icm, variant),
        baselines={name: functools.partial(over_images, icm) for name, icm in ICM_BASELINES[variant].items()},
        reference=functools.partial(over_tokens, fk.reference.icm, variant),
        ops=("icm",),
        squared=True,
    )
    # The norm of every key is needed, so every implementation multiplies the tokens by one C x C matrix.
    image = inputs[0].to(memory_format=torch.channels_last)
    grad = torch.ones_like(image) if case.backward else None
    impls.lower_bounds["keys of round 1 alone"] = with_gradients(
        F.conv2d, (image, inputs[1][:, :, None, None]), grad, case.mode
    )
    return impls


def icm_inputs(case: Case, variant: str) -> tuple[torch.Tensor, ...]:
    """The image, per round Wk, bk, Wv, bv, then alpha and beta."""
    channels = case.shape[1]
    projections = []
    for seed in range(2 * len(ICM_GRIDS)):
        projections.append(normal((channels, channels), case, 10 + seed, scale=channels**-0.5))
        projections.append(normal((channels,), case, 20 + seed, scale=0.1))
    gates = 1 if variant == "paper" else len(ICM_GRIDS)
    alpha, beta = (torch.full((gates,), value, dtype=case.dtype, device=case.device) for value in (1.0, 0.1))
    return clustered(case), *projections, alpha, beta


def clustered(case: Case, grid: tuple[int, int] = ICM_GRIDS[0]) -> torch.Tensor:
    """Images [B, C, H, W]: the pixels of a bin of the grid scatter about the bin's own prototype, every fourth pixel
    about that of a random bin."""
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


def split(inputs: Sequence[torch.Tensor]) -> tuple[list[baselines.Projection], torch.Tensor, torch.Tensor]:
    """What follows the image in `icm_inputs`: a tuple for each round, alpha, beta."""
    *projections, alpha, beta = inputs
    wk, bk, wv, bv = (projections[i::4] for i in range(4))
    return list(zip(wk, bk, wv, bv, strict=True)), alpha, beta


def over_tokens(
    icm: Callable[..., torch.Tensor], variant: str, x: torch.Tensor, *inputs: torch.Tensor
) -> torch.Tensor:
    """x [B, C, H, W] through an `icm` over tokens, as `fk.ICM` does it."""
    projections, alpha, beta = split(inputs)
    tokens, hw = x.flatten(2).transpose(1, 2), x.shape[2:]
    out = icm(tokens, projections, variant=variant, alpha=alpha, beta=beta, grids=ICM_GRIDS, hw=tuple(hw))
    return out.transpose(1, 2).unflatten(2, hw)


def over_images(icm: Callable[..., torch.Tensor], x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    return icm(x, *split(inputs), ICM_GRIDS)


def build_cluster(case: Case) -> Impls:
    grid = CLUSTER_GRIDS.get(case.shape, (2, 2))
    gates = [torch.full((1,), value, dtype=case.dtype, device=case.device) for value in (1.0, 0.1)]
    impls = build_impls(
        case,
        inputs=(clustered(case, grid), normal(case.shape, case, seed=3), *gates),
        ours=functools.partial(cluster_and_dispatch, fk, grid),
        baselines={
            "eager, [B,O,N,C] products": functools.partial(baselines.cluster_products, grid),
            "eager, gather and scatter_add": functools.partial(baselines.cluster_gather, grid),
        },
        reference=functools.partial(cluster_and_dispatch, fk.reference, grid),
        ops=("cluster", "cluster_dispatch"),
        squared=True,
        convolves=False,
    )
    if case.device == "cuda" and not case.backward:
        add_flash_kmeans(impls, clustered(case, grid), grid)
    return impls


def cluster_and_dispatch(
    module: Any,
    grid: tuple[int, int],
    keys: torch.Tensor,
    values: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """keys, values [B, C, H, W] -> [B, C, H, W] by `module`: frd_kernels, or its reference."""
    k, v = (image.flatten(2).transpose(1, 2) for image in (keys, values))
    hw = tuple(keys.shape[2:])
    found = module.cluster(k, v, grid, hw, aggregate="similarity", alpha=alpha, beta=beta)
    out = module.dispatch(found.centres, found.labels, found.similarity, channels_first=True)
    return out.transpose(1, 2).unflatten(2, hw)


def add_flash_kmeans(impls: Impls, keys: torch.Tensor, grid: tuple[int, int]) -> None:
    """One iteration of flash-kmeans by cosine, where it is installed: assignment and new centres of the keys alone.

    It computes less than ours (no values, no similarity, no dispatch) and reads its stopping rule on the host, so it
    counts as a lower bound and has no graph. Its labels have to agree with the oracle's.
    """
    if importlib.util.find_spec("flash_kmeans") is None:
        impls.left_out["flash-kmeans"] = "not installed"
        return
    tokens = keys.flatten(2).transpose(1, 2).contiguous()
    centres = F.adaptive_avg_pool2d(keys, grid).flatten(2).transpose(1, 2).contiguous()
    try:
        from flash_kmeans import batch_kmeans_Cosine

        def call() -> tuple[torch.Tensor, ...]:
            found = batch_kmeans_Cosine(tokens, centres.shape[1], max_iters=1, init_centroids=centres)
            return tuple(found[:2])

        labels = call()[0]
    # Whatever another library, of any version, raises.
    except Exception as error:
        impls.left_out["flash-kmeans"] = one_line(error)
        return
    hw = (keys.shape[2], keys.shape[3])
    same = (labels == fk.reference.cluster(tokens.double(), tokens.double(), grid, hw).labels).float().mean()
    if same < 0.99:
        impls.left_out["flash-kmeans"] = f"only {100 * float(same):.1f} % of its labels are the oracle's"
        return
    impls.lower_bounds["flash-kmeans"] = call
    impls.timings["flash-kmeans"] = ("wall",)


def cases() -> Iterator[Case]:
    shape: tuple[int, ...]
    for variant in ICM_BASELINES:
        build = functools.partial(build_icm, variant=variant)
        for mode in MODES:
            for shape in SHAPES:
                first = (variant, shape) == ("paper", SHAPES[0])
                quick = first and mode == "forward"
                compiled = ("default",) if first else ()
                yield Case(f"icm {variant}", shape, mode, build, quick=quick, compiled=compiled)
    for mode in MODES:
        for shape in CLUSTER_SHAPES:
            yield Case("cluster", shape, mode, build_cluster)


def gpu_cases() -> Iterator[Case]:
    """In bfloat16 unless said; 256 tokens are a photo of 512x512, 4096 one of 2048x2048."""
    shape: tuple[int, ...]
    for variant in ICM_BASELINES:
        build = functools.partial(build_icm, variant=variant)
        for shape in (GPU_SMALL, (1, 256, 16, 16), GPU_LARGE):
            case = Case(f"icm {variant}", shape, MODES[0], build, dtype=torch.bfloat16, device="cuda")
            for mode in MODES:
                quick = variant == "paper" and (shape != GPU_LARGE or mode == "forward")
                compiled: tuple[str, ...] = ("default",) if quick and shape == GPU_SMALL else ()
                if compiled and mode == "forward":
                    compiled += ("max-autotune",)
                yield dataclasses.replace(case, mode=mode, quick=quick, compiled=compiled)
    for dtype in (torch.float32, torch.float16):
        build = functools.partial(build_icm, variant="paper")
        yield Case("icm paper", GPU_SMALL, MODES[0], build, dtype=dtype, device="cuda")
    for index, shape in enumerate(CLUSTER_GPU_SHAPES):
        case = Case("cluster", shape, MODES[0], build_cluster, dtype=torch.bfloat16, device="cuda")
        for mode in MODES:
            yield dataclasses.replace(case, mode=mode, quick=index == 1)


CASES = list(cases())
GPU_CASES = list(gpu_cases())
