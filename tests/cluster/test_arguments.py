"""Bad arguments of the clustering and the ICM: one line that names the argument, the rule and what came."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import frd_kernels as fk

OP = "icm"

ops = torch.ops.frd
INTS = torch.ones(2, 12, 4, dtype=torch.int64)
MASK = torch.ones(2, 12, dtype=torch.bool)
CLUSTER: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": "x"}, TypeError, "k must be a tensor, got str"),
    ({"v": None}, TypeError, "v must be a tensor, got NoneType"),
    ({"k": torch.ones(12, 4)}, ValueError, "k must be [B, N, C], got [12, 4]"),
    ({"v": torch.ones(2, 3, 4, 4)}, ValueError, "v must be [B, N, C], got [2, 3, 4, 4]"),
    ({"k": INTS}, ValueError, "k must be float32, float64, float16 or bfloat16, got [2, 12, 4] int64 on cpu"),
    ({"k": torch.ones(2, 0, 4)}, ValueError, "k must have at least one token and one channel, got [2, 0, 4]"),
    (
        {"v": torch.ones(2, 12, 0)},
        ValueError,
        "v must have at least one token and one channel, got [2, 12, 0]",
    ),
    (
        {"v": torch.ones(2, 12, 5)},
        ValueError,
        "v must have k's shape, dtype and device, got [2, 12, 5] float32 on cpu for k [2, 12, 4] float32 on cpu",
    ),
    (
        {"v": torch.ones(2, 12, 4).double()},
        ValueError,
        "v must have k's shape, dtype and device, got [2, 12, 4] float64",
    ),
    (
        {"v": torch.ones(2, 12, 4, device="meta")},
        ValueError,
        "v must have k's shape, dtype and device, got [2, 12, 4] float32 on meta",
    ),
    ({"grid": (0, 2)}, ValueError, "grid must be (rows, columns) of at least 1, got (0, 2)"),
    ({"grid": (2, -1)}, ValueError, "grid must be (rows, columns) of at least 1, got (2, -1)"),
    ({"grid": [2]}, ValueError, "grid must be (rows, columns) of at least 1, got (2,)"),
    ({"hw": (3, 5)}, ValueError, "hw must be (H, W) with H * W = 12 tokens, got (3, 5)"),
    ({"hw": (-3, -4)}, ValueError, "hw must be (H, W) with H * W = 12 tokens, got (-3, -4)"),
    ({"hw": (12,)}, ValueError, "hw must be (H, W) with H * W = 12 tokens, got (12,)"),
    ({"aggregate": "mean"}, ValueError, "aggregate must be 'count' or 'similarity', got 'mean'"),
    ({"alpha": "1"}, TypeError, "alpha must be a number or a tensor, got str"),
    ({"beta": True}, TypeError, "beta must be a number or a tensor, got bool"),
    ({"alpha": torch.ones(2)}, ValueError, "alpha must be a number or a tensor of 1 elements, got shape [2]"),
    (
        {"beta": torch.ones(1, 1)},
        ValueError,
        "beta must be a number or a tensor of 1 elements, got shape [1, 1]",
    ),
    ({"beta": torch.tensor(1)}, ValueError, "beta must be of a floating dtype, got torch.int64"),
    ({"mask": [True] * 12}, TypeError, "mask must be a tensor or None, got list"),
    ({"mask": MASK[:, :4]}, ValueError, "mask must be bool [2, 12] on cpu, got [2, 4] bool on cpu"),
    ({"mask": MASK.float()}, ValueError, "mask must be bool [2, 12] on cpu, got [2, 12] float32 on cpu"),
    ({"mask": MASK.to("meta")}, ValueError, "mask must be bool [2, 12] on cpu, got [2, 12] bool on meta"),
]
DISPATCH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"centres": None}, TypeError, "centres must be a tensor, got NoneType"),
    ({"centres": torch.ones(4, 6)}, ValueError, "centres must be [B, O, C], got [4, 6]"),
    (
        {"centres": INTS},
        ValueError,
        "centres must be float32, float64, float16 or bfloat16, got [2, 12, 4] int64",
    ),
    (
        {"centres": torch.ones(2, 0, 6)},
        ValueError,
        "centres must have at least one centre and one channel, got [2, 0, 6]",
    ),
    ({"labels": [0] * 12}, TypeError, "labels must be a tensor, got list"),
    ({"labels": INTS}, ValueError, "labels must be [B, N] for centres [2, 4, 6], got [2, 12, 4]"),
    ({"labels": INTS[:1, :, 0]}, ValueError, "labels must be [B, N] for centres [2, 4, 6], got [1, 12]"),
    ({"labels": INTS[:, :0, 0]}, ValueError, "labels must be [B, N] for centres [2, 4, 6], got [2, 0]"),
    (
        {"labels": INTS[:, :5, 0]},
        ValueError,
        "labels and similarity must have one shape, got [2, 5] and [2, 12]",
    ),
    ({"labels": MASK}, ValueError, "labels must be int64 or int32, got [2, 12] bool on cpu"),
    (
        {"labels": INTS[..., 0].to("meta")},
        ValueError,
        "labels must be on the device of centres, cpu, got [2, 12] int64 on meta",
    ),
    ({"similarity": 1.0}, TypeError, "similarity must be a tensor, got float"),
    ({"similarity": INTS}, ValueError, "similarity must be [B, N] for centres [2, 4, 6], got [2, 12, 4]"),
    ({"similarity": MASK}, ValueError, "similarity must be of a floating dtype, got [2, 12] bool on cpu"),
]


def assert_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "error", "message"), CLUSTER)
def test_cluster(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.randn(2, 12, 4)
    arguments = {"k": x, "v": x, "grid": (2, 2), "hw": (3, 4)} | changes
    assert_refused(lambda: fk.cluster(**arguments), error, message)


@pytest.mark.parametrize(("changes", "error", "message"), DISPATCH)
def test_dispatch(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"centres": torch.ones(2, 4, 6), "labels": INTS[..., 0], "similarity": torch.ones(2, 12)}
    assert_refused(lambda: fk.dispatch(**arguments | changes), error, message)


def test_labels_out_of_range_are_refused_on_the_cpu() -> None:
    for label in (-2, 4, 2**31 - 1):
        labels = torch.tensor([[0, label, 3]])
        with pytest.raises(ValueError, match=f"labels must lie in -1 .. 3, got {label}"):
            fk.dispatch(torch.ones(1, 4, 6), labels, torch.ones(1, 3))


W, B = torch.ones(4, 4), torch.ones(4)
ICM: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"x": torch.ones(2, 4, 3, 4)}, ValueError, "x must be [B, N, C], got [2, 4, 3, 4]"),
    ({"x": INTS}, ValueError, "x must be float32, float64, float16 or bfloat16, got [2, 12, 4] int64"),
    (
        {"x": torch.ones(2, 12, 0)},
        ValueError,
        "x must have at least one token and one channel, got [2, 12, 0]",
    ),
    ({"grids": []}, ValueError, "grids must hold at least one (rows, columns), got none"),
    ({"grids": [(2, 2), (0, 1)]}, ValueError, "grids must be (rows, columns) of at least 1, got (0, 1)"),
    ({"hw": (12, 2)}, ValueError, "hw must be (H, W) with H * W = 12 tokens, got (12, 2)"),
    ({"variant": "code"}, ValueError, "variant must be 'paper' or 'released', got 'code'"),
    ({"alpha": None}, TypeError, "alpha must be a number or a tensor, got NoneType"),
    ({"alpha": torch.ones(2)}, ValueError, "alpha must be a number or a tensor of 1 elements, got shape [2]"),
    (
        {"beta": torch.ones(3), "variant": "released"},
        ValueError,
        "beta must be a number or a tensor of 1 or 2 elements, got shape [3]",
    ),
    ({"beta": torch.tensor([1])}, ValueError, "beta must be of a floating dtype, got torch.int64"),
    ({"projections": [None]}, ValueError, "projections must have one entry for each of the 2 grids, got 1"),
    (
        {"projections": [None, (W, B, W)]},
        ValueError,
        "projections[1] must be (Wk, bk, Wv, bv) or None, got 3 entries",
    ),
    (
        {"projections": [(None, B, W, B), None]},
        TypeError,
        "projections[0]: Wk must be a tensor, got NoneType",
    ),
    ({"projections": [(W, 0.0, W, B), None]}, TypeError, "projections[0]: bk must be a tensor, got float"),
    (
        {"projections": [(W, B, W[:3], B), None]},
        ValueError,
        "projections[0]: Wv must be [4, 4] for x's channels, got [3, 4]",
    ),
    (
        {"projections": [None, (W, B, W, W)]},
        ValueError,
        "projections[1]: bv must be [4] for x's channels, got [4, 4]",
    ),
    (
        {"projections": [None, (W.half(), B, W, B)]},
        ValueError,
        "projections[1]: Wk must have x's dtype and device, got [4, 4] float16 on cpu",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), ICM)
def test_icm(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(2, 12, 4), "projections": None, "alpha": 1.0, "beta": 0.0}
    arguments |= {"grids": [(2, 2), (2, 1)], "hw": (3, 4)} | changes
    assert_refused(lambda: fk.icm(**arguments), error, message)


def test_layer() -> None:
    assert_refused(lambda: fk.ICM(0), ValueError, "channels must be a positive int, got 0")
    assert_refused(
        lambda: fk.ICM(4, variant="code"), ValueError, "variant must be 'paper' or 'released', got 'code'"
    )
    assert_refused(
        lambda: fk.ICM(4, ()), ValueError, "grids must hold at least one (rows, columns), got none"
    )
    layer = fk.ICM(4)
    assert_refused(lambda: layer(torch.ones(2, 12, 4)), ValueError, "x must be [B, 4, H, W], got [2, 12, 4]")
    assert_refused(
        lambda: layer(torch.ones(2, 5, 3, 4)), ValueError, "x must be [B, 4, H, W], got [2, 5, 3, 4]"
    )


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8], ids=lambda t: t.__name__)
@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16], ids=lambda t: t.__name__)
def test_numbers_of_numpy(backend: str, integer: Any, number: Any) -> None:
    x = torch.randn(2, 12, 4)
    for aggregate in ("count", "similarity"):
        plain = fk.cluster(x, x, (2, 2), (3, 4), aggregate=aggregate, alpha=0.5, beta=0.25)
        grid, hw = (integer(2), integer(2)), np.array([3, 4], dtype=integer)
        found = fk.cluster(x, x, grid, hw, aggregate=aggregate, alpha=number(0.5), beta=number(0.25))
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    for variant in ("paper", "released"):
        options: dict[str, Any] = {
            "variant": variant,
            "grids": np.array([(2, 2), (2, 1)], dtype=integer),
            "hw": hw,
        }
        found = fk.icm(x, None, alpha=number(0.5), beta=number(0.25), **options)
        options |= {"grids": [(2, 2), (2, 1)], "hw": (3, 4)}
        assert torch.equal(found, fk.icm(x, None, alpha=0.5, beta=0.25, **options))


@pytest.mark.parametrize("integer", [np.int8, np.uint8])
def test_small_integers_of_numpy_do_not_overflow(backend: str, integer: Any) -> None:
    """Sides of 16 and 12 fit into 8 bits, their products do not."""
    x = torch.randn(1, 256, 4)
    grid, hw = np.array([16, 12], dtype=integer), np.array([16, 16], dtype=integer)
    counts = []
    for sides, size in ((grid, hw), ((16, 12), (16, 16))):
        with FlopCounterMode(display=False) as counter:
            found = fk.cluster(x, x, sides, size)
            paper = fk.icm(x, None, alpha=0.1, beta=0.0, grids=[sides, (2, 1)], hw=size)
            released = fk.icm(
                x, None, variant="released", alpha=1.0, beta=0.0, grids=[sides, (2, 1)], hw=size
            )
        counts.append((counter.get_total_flops(), *found, paper, released))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*counts, strict=True))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8], ids=lambda t: t.__name__)
def test_layers_take_integers_of_numpy(integer: Any) -> None:
    three, four, two = integer(3), integer(4), integer(2)
    layers = [
        (fk.ICM(four, [(three, two), (two, two)]), fk.ICM(4, [(3, 2), (2, 2)])),
        (fk.ContextCluster(four, three, *[two] * 6), fk.ContextCluster(4, 3, *[2] * 6)),
        (fk.FECCluster(four, three, *[two] * 6), fk.FECCluster(4, 3, *[2] * 6)),
        (fk.ClusterPool(two, four, three, None, two, two), fk.ClusterPool(2, 4, 3, None, 2, 2)),
    ]
    for layer, plain in layers:
        layer.load_state_dict(plain.state_dict(), strict=True)
        x = torch.randn(1, 4, 8, 8)
        assert repr(layer) == repr(plain) and torch.equal(layer(x), plain(x))
        kept = [value for value in vars(layer).values() if not isinstance(value, (dict, tuple, str))]
        assert not any(isinstance(value, np.generic) for value in kept)


@pytest.mark.parametrize(
    "bad", [True, 2.0, np.bool_(True), np.float32(2), np.float64(2), "2", None], ids=repr
)
def test_nothing_else_counts_as_an_integer(bad: Any) -> None:
    x = torch.randn(2, 2, 4)
    calls = {
        "channels": lambda: fk.ICM(bad),
        "dim": lambda: fk.ContextCluster(bad, 4),
        "head_dim": lambda: fk.FECCluster(4, 4, head_dim=bad),
        "embed_dim": lambda: fk.ClusterPool(2, 4, bad),
        "grids": lambda: fk.ICM(4, [(2, bad)]),
        "grid": lambda: fk.cluster(x, x, (bad, 1), (2, 1)),
        "hw": lambda: fk.icm(x, None, alpha=1.0, beta=0.0, grids=[(1, 1)], hw=(bad, 1)),
    }
    for name, call in calls.items():
        assert_refused(call, ValueError, f"{name} must be ")


@pytest.mark.parametrize("bad", [True, np.bool_(True), "1", None, np.ones(1), 1j], ids=repr)
def test_nothing_else_counts_as_a_number(bad: Any) -> None:
    x = torch.randn(2, 2, 4)
    refused = f"must be a number or a tensor, got {type(bad).__name__}"
    assert_refused(lambda: fk.cluster(x, x, (1, 1), (2, 1), alpha=bad), TypeError, f"alpha {refused}")
    options: dict[str, Any] = {"alpha": 1.0, "beta": bad, "grids": [(1, 1)], "hw": (2, 1)}
    assert_refused(lambda: fk.icm(x, None, **options), TypeError, f"beta {refused}")


def test_cluster_operator() -> None:
    """The operators check for themselves what their kernels rely on."""
    x, one, sizes = torch.randn(2, 12, 4), torch.ones(1), ([2, 2], [3, 4])

    def forward(
        k: Any = x,
        v: Any = x,
        mask: Any = None,
        alpha: Any = one,
        grid: Any = (2, 2),
        hw: Any = (3, 4),
        aggregate: int = 1,
    ) -> Any:
        return ops.cluster(k, v, mask, alpha, one, grid, hw, aggregate)

    for changes, message in [
        ({"k": x[0]}, "k must be [B, N, C], got 2-D"),
        ({"k": INTS}, "k must be float32"),
        ({"v": x[:1]}, "v must have the shape and dtype of its input"),
        ({"mask": MASK[:1]}, "mask must be bool [2, 12]"),
        ({"mask": MASK.int()}, "mask must be bool [2, 12]"),
        ({"hw": (3, 5)}, "hw must be (H, W) with H * W = 12 tokens"),
        ({"grid": (0, 2)}, "a grid must be (rows, columns) of at least 1"),
        ({"aggregate": 2}, "aggregate must be 0 (count) or 1 (similarity), got 2"),
        ({"alpha": torch.ones(2)}, "alpha must be [1] in the compute dtype"),
        ({"alpha": one.double()}, "alpha must be [1] in the compute dtype"),
    ]:
        assert_refused(lambda changes=changes: forward(**changes), ValueError, message)

    centres, labels, similarity, _counts, saved = forward()
    good = {"centres": centres, "similarity": similarity, "labels": labels, "saved": saved}
    for changes, message in [
        ({"labels": labels.long()}, "labels must be the contiguous int32 [B, N] of the forward pass"),
        ({"saved": saved[:, 1:]}, "saved must be what the forward pass returned"),
        ({"centres": centres[:, 1:]}, "grad_centres must be [B, O, C]"),
        ({"similarity": similarity[:, 1:]}, "grad_similarity must be [B, N]"),
    ]:
        a = good | changes

        def backward(a: dict[str, Any] = a) -> Any:
            given = a["centres"], a["similarity"], x, x, one, one, a["labels"], a["saved"]
            return ops.cluster_backward(*given, *sizes, 1)

        assert_refused(backward, ValueError, message)


def test_icm_operator() -> None:
    x, one = torch.randn(2, 12, 4), torch.ones(1)
    none = [torch.empty(0)] * 4

    def forward(
        maps: Any = none, alpha: Any = one, grids: Any = (2, 2), hw: Any = (3, 4), variant: int = 0
    ) -> Any:
        return ops.icm(x, maps, alpha, one, grids, hw, variant)

    for changes, message in [
        ({"variant": 2}, "variant must be 0 (paper) or 1 (released), got 2"),
        ({"grids": (2, 2, 2)}, "grids must hold pairs (rows, columns)"),
        ({"grids": (2, 2, 0, 1)}, "a grid must be (rows, columns) of at least 1"),
        ({"hw": (4, 4)}, "hw must be (H, W) with H * W = 12 tokens"),
        ({"maps": none[1:]}, "projections must be 4 tensors for each of the 1 grids, got 3"),
        ({"maps": [W, B, W.half(), B]}, "projections[2] must have x's dtype"),
        ({"maps": [W, B, W, torch.ones(3)]}, "projections[3] must be [C] with C = 4"),
        ({"maps": [W, B, torch.ones(4, 3), B]}, "projections[2] must be [C, C] with C = 4"),
        ({"alpha": torch.ones(2)}, "alpha must be [1] in the compute dtype"),
    ]:
        assert_refused(lambda changes=changes: forward(**changes), ValueError, message)

    out, labels, saved = forward()
    for grad, kept, message in [
        (out[:1], saved, "grad must have the shape and dtype of its input"),
        (out.half(), saved, "grad must have the shape and dtype of its input"),
        (out, saved.double(), "saved must be what the forward pass returned"),
    ]:
        given = grad, x, none, one, one, labels, kept, (2, 2), (3, 4), 0
        assert_refused(lambda given=given: ops.icm_backward(*given), ValueError, message)


def test_cluster_dispatch_operator() -> None:
    good = {
        "centres": torch.ones(2, 4, 6),
        "labels": torch.zeros(2, 12, dtype=torch.int32),
        "similarity": torch.ones(2, 12),
    }
    for changes, message in [
        ({"centres": torch.ones(2, 6)}, "centres must be [B, O, C] with at least one centre and one channel"),
        ({"labels": INTS[..., 0]}, "labels must be int32 [B, N] with the batch of centres"),
        ({"labels": good["labels"][:1]}, "labels must be int32 [B, N] with the batch of centres"),
        ({"similarity": torch.ones(2, 11)}, "similarity must have the shape of labels in the compute dtype"),
        (
            {"similarity": torch.ones(2, 12).half()},
            "similarity must have the shape of labels in the compute dtype",
        ),
        ({"labels": good["labels"] + 4}, "labels must lie in -1 .. 3, got 4"),
    ]:
        given = (good | changes).values()
        assert_refused(lambda given=given: ops.cluster_dispatch(*given, False), ValueError, message)
        assert_refused(
            lambda given=given: ops.cluster_dispatch_backward(torch.ones(2, 12, 6), *given),
            ValueError,
            message,
        )
    for grad in (torch.ones(2, 12, 5), torch.ones(2, 11, 6), torch.ones(2, 12, 6).half()):
        assert_refused(
            lambda grad=grad: ops.cluster_dispatch_backward(grad, *good.values()),
            ValueError,
            "grad must be [B, N, C] in the dtype of centres",
        )
