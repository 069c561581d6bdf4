"""The oracle of the clustering: against the equations written out with loops, in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk
from frd_kernels.cluster.reference import icm, icm_folded, pool

Matrix = list[list[float]]
Grid = tuple[int, int]

# image, grid: bins that divide the image, overlap, outnumber the pixels, and are a single one
ROUNDS: list[tuple[Grid, Grid]] = [
    ((4, 6), (2, 3)),
    ((5, 7), (3, 4)),
    ((7, 3), (2, 2)),
    ((2, 3), (4, 5)),
    ((1, 5), (1, 2)),
    ((3, 3), (1, 1)),
    ((1, 1), (1, 1)),
]
RELEASED_GATES = ([1.3, -0.7, 2.0, 0.4], [0.2, 0.1, -0.3, 0.0])


def bins(size: int, count: int) -> list[range]:
    """From floor(i * size / count) to ceil((i + 1) * size / count)."""
    return [range(i * size // count, math.ceil((i + 1) * size / count)) for i in range(count)]


def plain_pool(rows: Matrix, hw: Grid, grid: Grid) -> Matrix:
    means = []
    for ys in bins(hw[0], grid[0]):
        for xs in bins(hw[1], grid[1]):
            inside = [rows[y * hw[1] + x] for y in ys for x in xs]
            means.append([sum(column) / len(inside) for column in zip(*inside, strict=True)])
    return means


def plain_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (max(math.hypot(*a), 1e-12) * max(math.hypot(*b), 1e-12))


def plain_round(
    keys: Matrix, values: Matrix, hw: Grid, grid: Grid, gate: tuple[float, float] | None
) -> tuple[Matrix, Matrix, list[int]]:
    """New centres, similarities [N][O] and labels; the gate (alpha, beta) makes FEC's form CoC's."""
    similarity = [[plain_cosine(key, centre) for centre in plain_pool(keys, hw, grid)] for key in keys]
    if gate is not None:
        alpha, beta = gate
        similarity = [[1 / (1 + math.exp(-beta - alpha * s)) for s in row] for row in similarity]
    labels = [row.index(max(row)) for row in similarity]
    centres = []
    for o, total in enumerate(plain_pool(values, hw, grid)):
        weight_sum = 1.0
        for n, value in enumerate(values):
            if labels[n] == o:
                weight = 1.0 if gate is None else similarity[n][o]
                total = [t + weight * v for t, v in zip(total, value, strict=True)]
                weight_sum += weight
        centres.append([t / weight_sum for t in total])
    return centres, similarity, labels


def project(rows: Matrix, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
    offsets = [0.0] * len(weight) if bias is None else bias.tolist()
    return [
        [
            o + sum(w * x for w, x in zip(ws, row, strict=True))
            for ws, o in zip(weight.tolist(), offsets, strict=True)
        ]
        for row in rows
    ]


def projections(channels: int, rounds: int) -> list[tuple[torch.Tensor | None, ...] | None]:
    """With biases, without one, without both, and no projection at all."""
    made: list[tuple[torch.Tensor | None, ...] | None] = []
    for keep in [(True, True), (False, True), (False, False)][: max(rounds - 1, 1)]:
        weights = torch.randn(2, channels, channels, dtype=torch.float64)
        biases = [torch.randn(channels, dtype=torch.float64) if k else None for k in keep]
        made.append((weights[0], biases[0], weights[1], biases[1]))
    return (made + [None] * rounds)[:rounds]


@pytest.mark.parametrize(("hw", "grid"), ROUNDS)
@pytest.mark.parametrize("gate", [None, (1.0, 0.0), (-1.5, 0.5)], ids=["fec", "coc", "coc-flipped"])
def test_cluster_is_the_equations(hw: Grid, grid: Grid, gate: tuple[float, float] | None) -> None:
    k, v = torch.randn(2, 2, hw[0] * hw[1], 3, dtype=torch.float64)
    options = {} if gate is None else {"aggregate": "similarity", "alpha": gate[0], "beta": gate[1]}
    found = fk.reference.cluster(k, v, grid, hw, **options)
    assert found.labels.dtype == torch.int64 and found.counts.dtype == torch.int32
    for b in range(2):
        centres, similarity, labels = plain_round(k[b].tolist(), v[b].tolist(), hw, grid, gate)
        assert found.labels[b].tolist() == labels
        assert found.counts[b].tolist() == [labels.count(o) for o in range(len(centres))]
        own = [row[label] for row, label in zip(similarity, labels, strict=True)]
        close(found.similarity[b], own)
        close(found.centres[b], centres)


def close(found: torch.Tensor, wanted: list[float] | Matrix) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_cluster_by_hand() -> None:
    """Two rows of two pixels, one centre per column: the last pixel looks like the first column."""
    k = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [3.0, 1.0]]])
    v = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    found = fk.reference.cluster(k, v, (1, 2), (2, 2))
    assert found.labels.tolist() == [[0, 1, 0, 0]]  # pooled keys (1.5, 0) and (1.5, 2)
    assert found.counts.tolist() == [[3, 1]]
    close(found.centres[0].double(), [[(2 + 1 + 3 + 4) / 4], [(3 + 2) / 2]])
    torch.testing.assert_close(found.similarity[0], torch.tensor([1, 0.8, 1, 3 / math.sqrt(10)]))


GRIDS: list[tuple[Grid, list[Grid]]] = [
    ((4, 6), [(2, 3)]),
    ((5, 4), [(3, 3), (2, 1)]),
    ((6, 5), [(4, 4), (3, 2), (2, 1)]),
    ((3, 3), [(4, 3), (2, 2), (3, 1), (1, 2)]),
]


def plain_rounds(
    x: Matrix,
    maps: list[tuple[torch.Tensor | None, ...] | None],
    hw: Grid,
    grids: list[Grid],
    gates: list[tuple[float, float] | None],
) -> tuple[list[torch.Tensor], list[list[int]], torch.Tensor]:
    """The similarities and labels of every round, and the last centres."""
    tokens, similarities, labels = x, [], []
    for grid, gate, maps_t in zip(grids, gates, maps, strict=True):
        keys = values = tokens
        if maps_t is not None:
            keys, values = project(tokens, maps_t[0], maps_t[1]), project(tokens, maps_t[2], maps_t[3])
        tokens, similarity, found = plain_round(keys, values, hw, grid, gate)
        similarities.append(torch.tensor(similarity, dtype=torch.float64))
        labels.append(found)
        hw = grid
    return similarities, labels, torch.tensor(tokens, dtype=torch.float64)


@pytest.mark.parametrize(("hw", "grids"), GRIDS)
@pytest.mark.parametrize("projected", [False, True])
def test_icm_paper_is_equations_1_to_4(hw: Grid, grids: list[Grid], projected: bool) -> None:
    x = torch.randn(2, hw[0] * hw[1], 3, dtype=torch.float64)
    maps = projections(3, len(grids)) if projected else [None] * len(grids)
    out = fk.reference.icm(
        x, maps if projected else None, variant="paper", alpha=0.4, beta=-0.2, grids=grids, hw=hw
    )
    for b in range(2):
        matrices, _labels, last = plain_rounds(x[b].tolist(), maps, hw, grids, [None] * len(grids))
        for n, row in enumerate(matrices[0]):
            for matrix in matrices[1:]:
                row = sum(s * matrix[o] for o, s in enumerate(row))
            weights = [1 / (1 + math.exp(0.2 - 0.4 * s)) for s in row.tolist()]
            wanted = sum(w * last[j] for j, w in enumerate(weights))
            torch.testing.assert_close(out[b, n], wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("hw", "grids"), GRIDS)
@pytest.mark.parametrize("projected", [False, True])
def test_icm_released_is_the_chain_of_masked_similarities(
    hw: Grid, grids: list[Grid], projected: bool
) -> None:
    """The oracle gathers along each token's chain; the authors multiply masked dense matrices."""
    x = torch.randn(2, hw[0] * hw[1], 3, dtype=torch.float64)
    rounds = len(grids)
    maps = projections(3, rounds) if projected else [None] * rounds
    alpha, beta = (torch.tensor(values[:rounds], dtype=torch.float64) for values in RELEASED_GATES)
    out = fk.reference.icm(
        x, maps if projected else None, variant="released", alpha=alpha, beta=beta, grids=grids, hw=hw
    )
    for b in range(2):
        gates = list(zip(alpha.tolist(), beta.tolist(), strict=True))
        matrices, labels, last = plain_rounds(x[b].tolist(), maps, hw, grids, gates)
        masked = [
            m * F.one_hot(torch.tensor(own), m.size(1)) for m, own in zip(matrices, labels, strict=True)
        ]
        wanted = functools.reduce(torch.matmul, masked) @ last
        torch.testing.assert_close(out[b], wanted, rtol=1e-11, atol=1e-11)
        by_gather = []
        for n in range(hw[0] * hw[1]):
            weight, at = 1.0, n
            for matrix, own in zip(matrices, labels, strict=True):
                weight, at = weight * matrix[at, own[at]], own[at]
            by_gather.append(weight * last[at])
        torch.testing.assert_close(torch.stack(by_gather), wanted, rtol=1e-12, atol=1e-12)


def test_released_pools_halves_in_the_last_round() -> None:
    """The authors pool the 16 row-major tokens of a 4x4 map to two in 1-D: the grid (2, 1), not (1, 2)."""
    tokens = torch.randn(1, 16, 5, dtype=torch.float64)
    halves = F.adaptive_avg_pool1d(tokens.transpose(1, 2), 2).transpose(1, 2)
    torch.testing.assert_close(pool(tokens, (4, 4), (2, 1)), halves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 5).to(dtype)
    half = fk.reference.cluster(x, x, (2, 2), (3, 4), aggregate="similarity")
    full = fk.reference.cluster(x.float(), x.float(), (2, 2), (3, 4), aggregate="similarity")
    assert half.similarity.dtype == torch.float32
    assert torch.equal(half.similarity, full.similarity) and torch.equal(half.labels, full.labels)
    assert torch.equal(half.centres, full.centres.to(dtype))
    options = {"alpha": 0.3, "beta": 0.1, "grids": ((2, 2), (2, 1)), "hw": (3, 4)}
    assert torch.equal(
        fk.reference.icm(x, None, **options), fk.reference.icm(x.float(), None, **options).to(dtype)
    )


@pytest.mark.parametrize(("hw", "grids"), GRIDS)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_folded_projections_change_nothing(hw: Grid, grids: list[Grid], variant: str) -> None:
    x = torch.randn(2, hw[0] * hw[1], 6, dtype=torch.float64, requires_grad=True)
    count = len(grids) if variant == "released" else 1
    gates = [torch.tensor(g[:count], dtype=torch.float64, requires_grad=True) for g in RELEASED_GATES]
    maps = projections(6, len(grids))
    parameters = [p.requires_grad_() for m in maps if m for p in m if p is not None]
    results = []
    for form in (icm, icm_folded):
        out = form(x, maps, variant=variant, alpha=gates[0], beta=gates[1], grids=grids, hw=hw)
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        results.append((out, *torch.autograd.grad(out, [x, *gates, *parameters], weight, allow_unused=True)))
    for plain, folded in zip(*results, strict=True):
        assert (plain is None) == (folded is None)
        if plain is not None:
            torch.testing.assert_close(folded, plain, rtol=1e-10, atol=1e-11)


def test_folded_projections_may_change_the_width() -> None:
    """Keys of 3 channels, then values of 5 that the second round's keys [4, 5] and values [2, 5] read."""
    shapes = [((3, 6), (5, 6)), ((4, 5), (2, 5))]
    maps = [
        tuple(
            torch.randn(*shape, dtype=torch.float64) if shape else None for shape in (key, None, value, None)
        )
        for key, value in shapes
    ]
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    options = {"alpha": 0.5, "beta": 0.1, "grids": [(3, 2), (2, 1)], "hw": (6, 5)}
    plain, folded = (form(x, maps, **options) for form in (icm, icm_folded))
    assert folded.shape == (2, 30, 2)
    torch.testing.assert_close(folded, plain, rtol=1e-11, atol=1e-12)
