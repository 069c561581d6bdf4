"""Bad arguments of the difference convolution and its layer: the exception, and a line with name, rule and value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import frd_kernels as fk
from frd_kernels import reference

from .cases import message_of, raises

ops = torch.ops.frd
X, DENSE, DEPTHWISE = torch.ones(1, 4, 8, 9), torch.ones(6, 4, 3, 3), torch.ones(4, 1, 3, 3)
NAMES = "'vanilla', 'central', 'angular', 'radial', 'cv', 'cd', 'ad', 'rd'"
PAIR = "must be an int or a pair of ints"

GEOMETRY: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "diagonal"}, ValueError, f"kind must be one of {NAMES}, got 'diagonal'"),
    ({"kind": 2}, ValueError, f"kind must be one of {NAMES}, got 2"),
    ({"kind": ["cd"]}, ValueError, f"kind must be one of {NAMES}, got ['cd']"),
    ({"theta": 1.5}, ValueError, "theta must be in [0, 1], got 1.5"),
    ({"theta": -0.1}, ValueError, "theta must be in [0, 1], got -0.1"),
    ({"theta": float("nan")}, ValueError, "theta must be in [0, 1], got nan"),
    ({"theta": "1"}, TypeError, "theta must be a number in [0, 1], got str"),
    ({"theta": True}, TypeError, "theta must be a number in [0, 1], got bool"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ({"stride": (1, -2)}, ValueError, "stride must be at least 1, got (1, -2)"),
    ({"stride": (1, 1, 1)}, ValueError, f"stride {PAIR}, got (1, 1, 1)"),
    ({"stride": 1.0}, ValueError, f"stride {PAIR}, got 1.0"),
    ({"stride": True}, ValueError, f"stride {PAIR}, got True"),
    ({"stride": "same"}, ValueError, f"stride {PAIR}, got 'same'"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    ({"dilation": None}, ValueError, f"dilation {PAIR}, got None"),
    ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ({"padding": (1, 0.5)}, ValueError, f"padding {PAIR}, got (1, 0.5)"),
    (
        {"padding": "full"},
        ValueError,
        f"padding {PAIR.replace(' or a', ', a')}, 'same' or 'valid', got 'full'",
    ),
    ({"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1, got stride 2"),
    ({"groups": 0}, ValueError, "groups must be a positive int, got 0"),
    ({"groups": 2.0}, ValueError, "groups must be a positive int, got 2.0"),
    ({"groups": True}, ValueError, "groups must be a positive int, got True"),
]

TENSORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.ones(8, 9)}, ValueError, "x must be [B, C, H, W] or [C, H, W], got [8, 9]"),
    (
        {"x": torch.ones(1, 1, 4, 8, 9)},
        ValueError,
        "x must be [B, C, H, W] or [C, H, W], got [1, 1, 4, 8, 9]",
    ),
    ({"x": torch.ones(1, 5, 8, 9)}, ValueError, "x must have weight.shape[1] * groups = 4 channels, got 5"),
    ({"x": X.double()}, ValueError, "x must have the dtype of weight, torch.float32, got torch.float64"),
    ({"x": X.long()}, ValueError, "x must have the dtype of weight, torch.float32, got torch.int64"),
    ({"x": X.to("meta")}, ValueError, "x must be on the device of weight, cpu, got meta"),
    (
        {"x": X[..., :2, :]},
        ValueError,
        "the output would be empty: x is 2x9 with padding (0, 0), dilation (1, 1)",
    ),
    (
        {"x": X, "dilation": 4},
        ValueError,
        "x is 8x9 with padding (0, 0), dilation (4, 4); it must cover a 3x3",
    ),
    ({"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
    (
        {"weight": torch.ones(6, 4, 5, 5)},
        ValueError,
        "weight must be [out_channels, in_channels / groups, 3, 3], got [6, 4, 5, 5]",
    ),
    ({"weight": torch.ones(4, 3, 3)}, ValueError, "in_channels / groups, 3, 3], got [4, 3, 3]"),
    ({"weight": DENSE.int()}, ValueError, "weight must be floating point, got torch.int32"),
    ({"groups": 4}, ValueError, "groups must divide in_channels 4 and out_channels 6, got 4"),
    ({"groups": 2}, ValueError, "x must have weight.shape[1] * groups = 8 channels, got 4"),
    ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
    ({"bias": torch.ones(4)}, ValueError, "bias must be [out_channels] = [6], got [4]"),
    ({"bias": torch.ones(6, 1)}, ValueError, "bias must be [out_channels] = [6], got [6, 1]"),
    (
        {"bias": torch.ones(6).half()},
        ValueError,
        "bias must have the dtype of weight, torch.float32, got torch.float16",
    ),
    (
        {"bias": torch.ones(6, device="meta")},
        ValueError,
        "bias must be on the device of weight, cpu, got meta",
    ),
]


@pytest.mark.parametrize("function", [fk.pdc2d, reference.pdc2d], ids=["pdc2d", "reference.pdc2d"])
@pytest.mark.parametrize(("arguments", "error", "message"), GEOMETRY + TENSORS, ids=message_of)
def test_pdc2d(function: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": DENSE, "kind": "angular"} | arguments
    with raises(error, message):
        function(**arguments)


@pytest.mark.parametrize(
    "function", [fk.pdc_weight, reference.pdc_weight], ids=["pdc_weight", "reference.pdc_weight"]
)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [case for case in GEOMETRY + TENSORS if case[0].keys() <= {"kind", "theta", "weight"}],
    ids=message_of,
)
def test_pdc_weight(function: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        function(**{"weight": DENSE, "kind": "angular"} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *GEOMETRY,
        ({"kernel_size": 5}, ValueError, "kernel_size must be 3, got 5"),
        ({"kernel_size": (3, 1)}, ValueError, "kernel_size must be 3, got (3, 1)"),
        ({"groups": 3}, ValueError, "in_channels must be divisible by groups"),
        ({"groups": 4}, ValueError, "out_channels must be divisible by groups"),
        ({"padding_mode": "mirror"}, ValueError, "got padding_mode='mirror'"),
    ],
    ids=message_of,
)
def test_layer(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        fk.PDC2d(**{"in_channels": 4, "out_channels": 6} | arguments)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8], ids=lambda t: t.__name__)
@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16], ids=lambda t: t.__name__)
def test_numbers_of_numpy(integer: Any, number: Any) -> None:
    one, two, four = integer(1), integer(2), integer(4)
    layer = fk.PDC2d(four, four, integer(3), two, (one, two), one, two, theta=number(0.5))
    plain = fk.PDC2d(4, 4, 3, 2, (1, 2), 1, 2, theta=0.5)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert repr(layer) == repr(plain) and torch.equal(layer(X), plain(X))
    kept = (
        layer.in_channels,
        layer.out_channels,
        layer.groups,
        *layer.stride,
        *layer.padding,
        *layer.dilation,
    )
    assert {type(value) for value in kept} == {int} and type(layer.theta) is float
    layer.stride, layer.groups, layer.theta = (integer(1), integer(1)), integer(2), number(0.25)
    plain.stride, plain.theta = (1, 1), 0.25
    assert torch.equal(layer(X), plain(X)) and torch.equal(layer.to_conv2d()(X), plain.to_conv2d()(X))
    options = {"theta": number(0.5), "stride": two, "dilation": (one, two)}
    wanted = {"theta": 0.5, "stride": 2, "dilation": (1, 2)}
    point = torch.ones(3, 4, 1, 1)
    for _ in range(2):  # the second call is one that has passed the checks
        for function, tensors in (
            (fk.pdc2d, (X, DENSE)),
            (reference.pdc2d, (X, DENSE)),
            (fk.pdc_block, (X, DEPTHWISE, point)),
        ):
            found = function(*tensors, kind="angular", **options)
            assert torch.equal(found, function(*tensors, kind="angular", **wanted))
    assert torch.equal(
        fk.pdc_weight(DENSE, kind="cd", theta=number(0.5)), fk.pdc_weight(DENSE, kind="cd", theta=0.5)
    )
    block = fk.PDCBlock2d(four, two, kind="cd", stride=two, dilation=one, theta=number(0.5), residual=True)
    assert block.shortcut is not None and block.shortcut.stride == (2, 2)
    assert block(X).shape == (1, 2, 4, 5) and fk.DPM(four)(X).shape == X.shape


@pytest.mark.parametrize(
    "bad", [True, 1.0, np.bool_(True), np.float32(1), np.float64(1), np.ones(2, dtype=int)], ids=repr
)
def test_nothing_else_counts_as_an_integer(bad: Any) -> None:
    fk.pdc2d(X, DENSE, kind="cd", stride=(1, 1), padding=(1, 1), dilation=(1, 1))  # what (bad, 1) may equal
    for name in ("stride", "padding", "dilation"):
        for value in (bad, (bad, 1)):
            with pytest.raises(ValueError, match=f"^{name} {PAIR}"):
                fk.pdc2d(X, DENSE, kind="cd", **{name: value})
            with pytest.raises(ValueError, match=f"^{name} {PAIR}"):
                fk.PDC2d(4, 6, **{name: value})
    for name in ("in_channels", "out_channels", "groups"):
        with pytest.raises(ValueError, match=f"^{name} must be a positive int"):
            fk.PDC2d(**{"in_channels": 4, "out_channels": 6, name: bad})
    with pytest.raises(ValueError, match=r"^in_channels must be a positive int"):
        fk.PDCBlock2d(bad, 4, kind="cd")
    with pytest.raises(ValueError, match=r"^channels must be a positive int"):
        fk.DPM(bad)
    with pytest.raises(ValueError, match=r"^groups must be a positive int"):
        fk.pdc2d(X, DENSE, kind="cd", groups=bad)


@pytest.mark.parametrize("bad", [np.bool_(True), np.ones(1), 1j, None], ids=repr)
def test_nothing_else_counts_as_theta(bad: Any) -> None:
    for call in (lambda: fk.PDC2d(4, 6, theta=bad), lambda: fk.pdc_weight(DENSE, kind="cd", theta=bad)):
        with pytest.raises(
            TypeError, match=rf"^theta must be a number in \[0, 1\], got {type(bad).__name__}$"
        ):
            call()


def test_layer_names_a_bad_input() -> None:
    layer = fk.PDC2d(4, 6)
    with raises(ValueError, "x must have weight.shape[1] * groups = 4 channels, got 5"):
        layer(torch.ones(1, 5, 8, 8))
    with raises(ValueError, "x must have the dtype of weight, torch.float32, got torch.float64"):
        layer(X.double())
    layer.stride = (0, 1)
    with raises(ValueError, "stride must be at least 1, got (0, 1)"):
        layer(X)


@pytest.mark.parametrize(
    ("mode", "kind", "options", "message"),
    [
        ("reflect", "angular", {"padding": 4}, "'reflect' cannot pad 4 pixels by 4 on a side"),
        (
            "reflect",
            "radial",
            {"padding": (1, 3)},
            "by 4 on a side (kind radial, padding (1, 3), dilation (1, 1))",
        ),
        ("circular", "central", {"padding": 5}, "'circular' cannot pad 4 pixels by 5 on a side"),
        ("circular", "radial", {"padding": 3, "dilation": 2}, "by 5 on a side (kind radial, padding (3, 3)"),
    ],
)
def test_layer_names_a_padding_that_the_image_has_no_pixels_for(
    mode: str, kind: str, options: dict[str, Any], message: str
) -> None:
    layer = fk.PDC2d(1, 1, padding_mode=mode, kind=kind, **options)
    with raises(ValueError, message):
        layer(torch.ones(1, 1, 4, 4))


DEPTHWISE_ARGUMENTS: dict[str, Any] = {
    "x": X,
    "weight": DEPTHWISE,
    "bias": None,
    "kind": 2,
    "theta": 1.0,
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "pdc2d: x must be [B, C, H, W], got 3-D"),
        ({"weight": DENSE}, "pdc2d: depthwise weight must be [4, 1, 3, 3], got 4-D with first size 6"),
        ({"weight": DEPTHWISE.half()}, "pdc2d: weight must have the dtype and device of x"),
        ({"bias": torch.ones(3)}, "pdc2d: bias must be [4]"),
        ({"bias": torch.ones(4).half()}, "pdc2d: bias must have the dtype and device of x"),
        (
            {"x": X.int(), "weight": DEPTHWISE.int()},
            "x must be float32, float64, float16 or bfloat16, got Int",
        ),
        ({"kind": 4}, "pdc2d: kind must be 0 (vanilla) to 3 (radial), got 4"),
        ({"stride": [1]}, "pdc2d: stride, padding and dilation must be pairs"),
        ({"stride": [0, 1]}, "pdc2d: stride and dilation must be at least 1, got 0 and 1"),
        ({"padding": [0, -1]}, "pdc2d: padding must be at least 0, got -1"),
        ({"padding": [-2, 0], "kind": 3}, "pdc2d: padding must be at least -1, got -2"),
        ({"dilation": [9, 1]}, "pdc2d: the output would be empty: height 8, padding 1, dilation 9"),
    ],
    ids=message_of,
)
def test_operator(arguments: dict[str, Any], message: str) -> None:
    """The public functions never get this far; other callers of torch.ops.frd do."""
    with raises(ValueError, message):
        ops.pdc2d_depthwise(**DEPTHWISE_ARGUMENTS | arguments)


@pytest.mark.parametrize(
    "grad", [torch.ones(1, 4, 8, 8), torch.ones(1, 4, 8, 9).half()], ids=["shape", "dtype"]
)
def test_backward_operator(grad: torch.Tensor) -> None:
    options = {name: value for name, value in DEPTHWISE_ARGUMENTS.items() if name != "bias"}
    message = "pdc2d: grad must have the shape of the output, [1, 4, 8, 9], and the dtype and device of x"
    with raises(ValueError, message):
        ops.pdc2d_depthwise_backward(grad, **options, need_dx=True, need_dw=True)


def test_autocast_mixes_floating_point_only() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fk.pdc2d(X.half(), DENSE, kind="angular").dtype == torch.bfloat16
        with raises(ValueError, "x must have the dtype of weight, torch.float32, got torch.int64"):
            fk.pdc2d(X.long(), DENSE, kind="angular")
