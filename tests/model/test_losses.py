import math

import cv2
import numpy as np
import pytest
import torch

from frd_model.losses import FRDLoss, dice_loss, edge_map, soft_edge_map


def random_mask(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], 1, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear") > 0.5).float()


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("shape", [(1, 1, 32, 48), (3, 1, 17, 5), (2, 1, 1, 9), (1, 1, 64, 64)])
def test_edge_map_equals_opencv(shape, width):
    mask = random_mask(shape)
    kernel = cv2.getStructuringElement(cv2.MORPH_CROSS, (width, width))
    ours = edge_map(mask, width).numpy()
    for one, got in zip(mask.numpy(), ours, strict=True):
        image = one[0].astype(np.uint8)
        want = cv2.dilate(image, kernel) - cv2.erode(image, kernel)
        np.testing.assert_array_equal(got[0], want)


def test_edge_map_of_single_pixel_and_borders():
    mask = torch.zeros(1, 1, 9, 9)
    mask[0, 0, 4, 4] = 1
    cross = torch.zeros(9, 9)
    cross[4, 1:8] = cross[1:8, 4] = 1
    assert torch.equal(edge_map(mask)[0, 0], cross)
    assert edge_map(torch.ones(1, 1, 9, 9)).sum() == 0
    assert edge_map(torch.ones(1, 1, 9, 9, dtype=torch.bool)).dtype == torch.float32


@pytest.mark.parametrize("form", ["paper", "released"])
def test_terms_by_the_formula(form):
    logits = torch.randn(2, 1, 24, 20, generator=torch.Generator().manual_seed(1))
    mask = random_mask((2, 1, 24, 20), 2)
    got = FRDLoss(form, edge_weight=0.5, edge_width=5)(logits, mask)
    p, m = logits.sigmoid().double().numpy(), mask.double().numpy()
    kernel = cv2.getStructuringElement(cv2.MORPH_CROSS, (5, 5))

    def gradient(x):
        return np.stack([[cv2.dilate(i[0], kernel) - cv2.erode(i[0], kernel)] for i in x])

    def dice(a, b):
        if form == "paper":
            return 1 - 2 * (a * b).sum() / (a.sum() + b.sum())
        return 1 - (2 * (a * b).sum() + 1) / ((a**2).sum() + (b**2).sum() + 1)

    band = gradient(m)
    edge = dice(gradient(p), band) if form == "paper" else dice(p * band, m * band)
    assert got["region"].item() == pytest.approx(dice(p, m), abs=1e-6)
    assert got["edge"].item() == pytest.approx(edge, abs=1e-6)
    assert got["total"].item() == pytest.approx(dice(p, m) + 0.5 * edge, abs=2e-6)
    assert all(term.dim() == 0 for term in got.values())


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("value", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_finite_for_empty_and_full_masks(form, value, fill):
    logits = torch.full((1, 1, 16, 16), value, requires_grad=True)
    terms = FRDLoss(form, bce_weight=0.5)(logits, torch.full((1, 1, 16, 16), fill))
    terms["total"].backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(logits.grad).all()
    if (value < 0 and fill == 0) or (value > 0 and fill == 1):
        assert terms["region"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gradient(form):
    logits = torch.randn(1, 1, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = random_mask((1, 1, 7, 6), 4)
    loss = FRDLoss(form, edge_width=3, bce_weight=0.3)
    assert torch.autograd.gradcheck(lambda x: loss(x, mask)["total"], logits.requires_grad_())


def test_descent_reaches_the_mask():
    mask = random_mask((2, 1, 32, 32), 5)
    logits = torch.zeros(2, 1, 32, 32, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.3)
    loss = FRDLoss("paper", bce_weight=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(logits, mask)["total"].backward()
        optimizer.step()
    assert ((logits > 0) == (mask > 0)).float().mean() > 0.99


def test_fp32_under_autocast():
    logits = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    mask = random_mask((1, 1, 64, 64), 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = FRDLoss()(logits, mask)
    want = FRDLoss()(logits.float(), mask)
    assert terms["total"].dtype == torch.float32
    assert all(torch.equal(terms[k], want[k]) for k in want)


def test_soft_edge_map_follows_the_prediction():
    p = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(8), requires_grad=True)
    soft = soft_edge_map(p, 3)
    assert (soft >= 0).all() and (soft <= 1).all()
    soft.sum().backward()
    assert p.grad.abs().sum() > 0
    assert dice_loss(soft.detach(), soft.detach(), "released") < 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FRDLoss("soft"), "form must be one of paper, released, got 'soft'"),
        (lambda: FRDLoss(edge_weight=-1.0), "edge_weight must be at least 0 and finite, got -1.0"),
        (lambda: FRDLoss(edge_width=4), "width must be odd and at least 1, got 4"),
        (lambda: edge_map(torch.zeros(4, 4)), r"must be \[B,1,H,W\], got shape \(4, 4\)"),
        (lambda: FRDLoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)), "logits must be"),
        (
            lambda: FRDLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5)),
            "mask must have the shape of logits",
        ),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_focal_and_image_terms_by_hand():
    logits = torch.tensor([[[[2.0, -1.0]]], [[[0.5, -3.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]], dtype=torch.float64)
    image = torch.tensor([1.5, -0.5], dtype=torch.float64)
    loss = FRDLoss("paper", bce_weight=1.0, focal=2.0, image_weight=0.3)
    terms = loss(logits, mask, image_logits=image)
    right = torch.where(mask > 0, logits.sigmoid(), 1 - logits.sigmoid())
    torch.testing.assert_close(terms["bce"], ((1 - right) ** 2 * -right.log()).mean())
    torch.testing.assert_close(
        terms["image"], -(image[0].sigmoid().log() + (1 - image[1].sigmoid()).log()) / 2
    )
    whole = terms["region"] + terms["edge"] + terms["bce"] + 0.3 * terms["image"]
    torch.testing.assert_close(terms["total"], whole)
    halves = [loss.sums(logits[i : i + 1], mask[i : i + 1], image_logits=image[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(loss.from_sums(halves[0] + halves[1])["total"], whole)
    with pytest.raises(ValueError, match="image_logits must be given where image_weight is not 0"):
        loss(logits, mask)
    with pytest.raises(ValueError, match="and only there"):
        FRDLoss()(logits, mask, image_logits=image)
    with pytest.raises(ValueError, match="image_logits must be"):
        loss(logits, mask, image_logits=image[:1])


@pytest.mark.parametrize("focal", [0.5, 1.0, 2.0])
def test_focal_of_pixels_that_are_certain(focal):
    logits = torch.tensor([[[[40.0, -40.0, 20.0, 0.0]]]], requires_grad=True)
    mask = torch.tensor([[[[1.0, 0.0, 1.0, 1.0]]]])
    FRDLoss("released", bce_weight=1.0, focal=focal)(logits, mask)["bce"].backward()
    # d/dz of (1 - p)^focal * -log p at p = 1/2, a quarter of the mean
    slope = -(0.5**focal) * (focal * 0.5 * math.log(2) + 0.5) / 4
    torch.testing.assert_close(
        logits.grad.flatten(), torch.tensor([0.0, 0.0, 0.0, slope]), atol=1e-6, rtol=1e-5
    )
