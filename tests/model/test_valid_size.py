"""Batches of padded images: nets and loss compute as if each image came without its margins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frd_model import FRDNet, create_model
from frd_model.losses import FORMS, FRDLoss

SMALL: dict[str, Any] = {"blocks": 1, "layer_scale": 1.0}
NETS: dict[str, dict[str, Any]] = {
    "lite": {"preset": "lite"},
    "paper": {"preset": "paper", "decoder_widths": (8, 8), "drop_path": 0.0},
    "released": {"preset": "released", "decoder_widths": (8, 8), "drop_path": 0.0},
    "batch": {"preset": "paper", "norm": "batch", "decoder_widths": (8, 8), "drop_path": 0.0},
}
# The first two take 96 x 96 pixels in strides of 32.
SIZES = [(70, 90), (96, 65), (33, 1), (128, 100)]


def make(name: str, **overrides: Any) -> FRDNet:
    torch.manual_seed(0)
    return create_model("frdnet_mit_b0", **{**NETS[name], **SMALL, **overrides}).double()


def padded(sizes: list[tuple[int, int]], margin: float) -> Tensor:
    images = torch.full((len(sizes), 3, 128, 100), margin, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator, dtype=torch.float64)
    return images


@pytest.mark.parametrize("name", NETS)
def test_logits_and_gradients_are_those_of_the_images_alone(name: str) -> None:
    net = make(name).train(name != "batch")
    images, weights = padded(SIZES, float("nan")), padded(SIZES, 0.0)[:, :1]
    logits = net(images, torch.tensor(SIZES))
    (logits * weights).sum().backward()
    together = {
        key: parameter.grad for key, parameter in net.named_parameters() if parameter.grad is not None
    }
    net.zero_grad()
    for i, (height, width) in enumerate(SIZES):
        alone = net(images[i : i + 1, :, :height, :width])
        torch.testing.assert_close(logits[i : i + 1, :, :height, :width], alone)
        assert (logits[i, :, height:] == -30).all() and (logits[i, :, :, width:] == -30).all()
        (alone * weights[i : i + 1, :, :height, :width]).sum().backward()
    assert together
    for key, gradient in together.items():
        torch.testing.assert_close(
            gradient, net.get_parameter(key).grad, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_margins_have_no_gradient() -> None:
    images = padded(SIZES, 0.0).requires_grad_()
    make("lite")(images, torch.tensor(SIZES)).sum().backward()
    assert images.grad is not None
    for gradient, (height, width) in zip(images.grad, SIZES, strict=True):
        assert gradient[:, :height, :width].abs().sum() > 0
        assert not gradient[:, height:].any() and not gradient[:, :, width:].any()


def test_full_images_are_computed_as_without_valid_size() -> None:
    net, images = make("lite").eval(), padded([(128, 100)] * 2, 0.0)
    with torch.no_grad():
        assert torch.equal(net(images), net(images, torch.tensor([(128, 100)] * 2, dtype=torch.int32)))


def test_a_margin_changes_the_result_without_valid_size() -> None:
    net, images = make("lite").eval(), padded([(70, 90)], 0.0)
    with torch.no_grad():
        difference = (net(images) - net(images, torch.tensor([(70, 90)])))[:, :, :70, :90].abs().max()
    assert difference > 1e-2


def test_batch_statistics_need_images_that_are_computed_together() -> None:
    net, images = make("batch").train(), padded(SIZES, 0.0)
    with pytest.raises(
        NotImplementedError, match=r"valid_size: batch normalisation .* got 4; .* norm='group'"
    ):
        net(images, torch.tensor([(70, 90), (96, 33), (33, 1), (128, 100)]))
    assert net(images[:2], torch.tensor(SIZES[:2])).shape == (2, 1, 128, 100)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([(1, 1)], TypeError, "valid_size: must be an integer tensor, got list"),
        (torch.ones(2, 2), TypeError, "valid_size: must be an integer tensor, got torch.float32"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.ones(1, 2, dtype=torch.int64), ValueError, r"valid_size: must be \[2, 2\], got \[1, 2\]"),
        (
            torch.tensor([[1, 1], [129, 1]]),
            ValueError,
            r"between 1 and the images' 128 x 100, got \[129, 1\]",
        ),
        (torch.tensor([[1, 0], [1, 1]]), ValueError, r"got \[1, 0\]"),
        (torch.tensor([[1, 1], [-1, 1]]), ValueError, r"got \[-1, 1\]"),
    ],
)
def test_wrong_sizes(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make("lite")(padded(SIZES[:2], 0.0), value)


def valid_pixels(sizes: list[tuple[int, int]], height: int, width: int) -> Tensor:
    valid = torch.zeros(len(sizes), 1, height, width, dtype=torch.bool)
    for pixels, (rows, columns) in zip(valid, sizes, strict=True):
        pixels[:, :rows, :columns] = True
    return valid


@pytest.mark.parametrize("form", FORMS)
def test_loss_of_padded_images_is_that_of_the_images(form: str) -> None:
    """The mask touches the border to the margin, which is no edge."""
    logits = torch.randn(2, 1, 20, 30, dtype=torch.float64).requires_grad_()
    mask = torch.zeros(2, 1, 20, 30, dtype=torch.float64)
    mask[0, :, 8:, 20:] = 1
    mask[1, :, 5:15, 10:20] = 1
    loss = FRDLoss(form, edge_width=5, bce_weight=0.7)
    expected = loss(logits, mask)
    expected_gradient = torch.autograd.grad(expected["total"], logits)[0]
    wide = F.pad(logits, (0, 10, 0, 12), value=float("nan"))
    # Marks in the margin do not count either.
    found = loss(wide, F.pad(mask, (0, 10, 0, 12), value=1.0), valid_pixels([(20, 30)] * 2, 32, 40))
    assert found.keys() == expected.keys()
    for key, term in found.items():
        torch.testing.assert_close(term, expected[key])
    torch.testing.assert_close(torch.autograd.grad(found["total"], logits)[0], expected_gradient)


def test_cross_entropy_is_the_mean_over_the_pixels_of_all_images() -> None:
    sizes = [(4, 9), (8, 5)]
    logits, mask = torch.randn(2, 1, 8, 10), torch.randint(2, (2, 1, 8, 10)).float()
    valid = valid_pixels(sizes, 8, 10)
    found = FRDLoss(bce_weight=1.0)(logits, mask, valid)["bce"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits[valid], mask[valid]))


def test_wrong_valid_pixels() -> None:
    logits = torch.zeros(1, 1, 4, 4)
    for valid in (torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="valid must be bool of the shape of logits"):
            FRDLoss()(logits, logits, valid)
