"""FRD-Net's first training step against float64, and a loss that falls as the reference's does: here on the CPU, on a
GPU where there is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import frd_kernels as fk
from benchmarks import model as nets
from frd_model.losses import FRDLoss

SMALL: dict[str, Any] = {"stages": (1, 2), "trace_widths": (8, 8), "pyramid_width": 8}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
STEPS = 12


@pytest.fixture(scope="module", params=DEVICES)
def subject(request: pytest.FixtureRequest) -> nets.Subject:
    return nets.Subject("lite", 64, request.param, **SMALL)


def backend_of(subject: nets.Subject) -> str:
    """Ours; the reference is what the runs are compared with."""
    if subject.device == "cpu":
        return "cpu"
    return next(name for name in ("cuda", "triton") if not fk.backend.PROVIDERS[name].problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_first_step(subject: nets.Subject, dtype: torch.dtype) -> None:
    error = nets.gradient_error_of(subject, nets.Setting(2, "training step", dtype=dtype))
    with fk.use_backend(backend_of(subject)):
        ours = error(copy.deepcopy(subject.model).train(), "nchw")
    with fk.use_backend("reference"):
        reference = error(copy.deepcopy(subject.model).train(), "nchw")
    assert len(ours) == 3
    for part, value in ours.items():
        nets.check(part, value, reference[part], dtype, nets.GRADIENT_CAP)


def losses_of(subject: nets.Subject, backend: str) -> list[float]:
    """On one batch, with autocast to bfloat16."""
    net = copy.deepcopy(subject.model).train()
    images, _ = subject.batch(2)
    mask, loss = nets.draw_mask(images), FRDLoss(net.config.variant)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    found = []
    with fk.use_backend(backend):
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            with nets.autocast(subject.device, torch.bfloat16):
                logits = net(images)
            total = loss(logits.float(), mask)["total"]
            total.backward()
            optimizer.step()
            found.append(float(total.detach()))
    return found


def test_the_loss_falls_as_the_references_does(subject: nets.Subject) -> None:
    ours, reference = losses_of(subject, backend_of(subject)), losses_of(subject, "reference")
    assert ours[0] == pytest.approx(reference[0], rel=2e-2)
    assert min(ours[-3:]) < 0.9 * ours[0]
    fallen = [series[0] - min(series[-3:]) for series in (ours, reference)]
    assert fallen[0] > 0.7 * fallen[1]
