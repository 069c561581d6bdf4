"""Predicting with a model that others use: its mode, state, dtype and wrappers; several threads."""

from __future__ import annotations

import copy
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from frd_model import create_model, predict
from frd_model.eval_view import eval_view


class Net(nn.Module):
    """Batch statistics, dropout, a shared module, a list that is no ModuleList, a lock: logits [B, 1, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = self.norm
        self.steps = [self.conv, self.norm, nn.ReLU()]
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(4, 1, 1)
        self.lock = threading.Lock()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for step in self.steps:
            x = step(x)
        return self.head(self.drop(self.again(x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(4, 3, 16, 16))  # running statistics of its own
    net.calls = 0
    return net


PHOTO = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def expected(net: nn.Module) -> np.ndarray:
    net.eval()
    got = predict(PHOTO, net).probability
    net.train()
    return got


def test_a_model_in_training_is_left_alone(net: Net) -> None:
    want = expected(net)
    net.drop.eval()  # modes that differ
    modes = {name: module.training for name, module in net.named_modules()}
    state = {k: v.clone() for k, v in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    net.calls = 0
    got = predict(PHOTO, net).probability
    np.testing.assert_array_equal(got, want)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert net.calls == 0


def test_the_view_shares_parameters_and_buffers(net: Net) -> None:
    view = eval_view(net)
    for (name, own), (_, other) in zip(net.state_dict().items(), view.state_dict().items(), strict=True):
        assert own.data_ptr() == other.data_ptr(), name
    assert view.norm is view.again is view.steps[1]
    assert not any(module.training for module in view.modules())
    net.eval()
    assert eval_view(net) is net


def test_training_goes_on_after_a_prediction(net: Net) -> None:
    other = copy.copy(net)
    predict(PHOTO, net)
    assert other.norm is net.norm
    loss = net(torch.randn(2, 3, 16, 16)).square().mean()
    loss.backward()
    assert net.conv.weight.grad is not None and net.conv.weight.grad.abs().sum() > 0


def test_hooks_parametrizations_and_replaced_methods_count(net: Net) -> None:
    nn.utils.parametrizations.weight_norm(net.conv)
    seen = []
    net.head.register_forward_hook(lambda module, inputs, output: seen.append(module.training) or output + 1)
    net.forward = types.MethodType(lambda self, x: Net.forward(self, x) * 0.5, net)
    want = expected(net)
    seen.clear()
    np.testing.assert_array_equal(predict(PHOTO, net).probability, want)
    assert seen == [False]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
@pytest.mark.parametrize("training", [False, True])
def test_wrapped_models(net: Net, wrap, training: bool) -> None:
    want = expected(net)
    wrapped = wrap(net, backend="eager") if wrap is torch.compile else wrap(net)
    wrapped.train(training)
    got = predict(PHOTO, wrapped).probability
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert wrapped.training is training and net.norm.training is training


def test_distributed_and_traced_models(net: Net, tmp_path) -> None:
    want = expected(net)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        np.testing.assert_array_equal(predict(PHOTO, wrapped).probability, want)
        assert net.training and wrapped.training
    finally:
        torch.distributed.destroy_process_group()
    traced = torch.jit.trace(net.eval(), torch.zeros(1, 3, 70, 90))
    traced.train()
    np.testing.assert_allclose(predict(PHOTO, traced).probability, want, atol=1e-6)
    assert traced.training


@pytest.mark.parametrize("training", [False, True])
def test_threads_agree(training: bool) -> None:
    torch.manual_seed(0)
    model = create_model(
        "frdnet_mit_b0", preset="lite", stages=(1, 2), blocks=1, pyramid_width=8, trace_widths=(8, 8)
    )
    want = predict(PHOTO, model).probability
    model.train(training)
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: predict(PHOTO, model).probability, range(8)):
            np.testing.assert_array_equal(got, want)
    assert all(m.training is training for m in model.modules())
    assert list(warnings.filters) == filters


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.02)]
)
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = create_model(
        "frdnet_mit_b0", preset="lite", stages=(1, 2), blocks=1, pyramid_width=8, trace_widths=(8, 8)
    )
    want = predict(PHOTO, model).probability
    model = model.to(dtype)
    got = predict(PHOTO, model)
    assert got.probability.dtype == np.float32
    np.testing.assert_allclose(got.probability, want, atol=tolerance)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_another_device_takes_a_copy() -> None:
    """The meta device stands for any other: the model must not be moved there."""
    net = Net()
    view = eval_view(net, "meta")
    assert all(t.is_meta for t in view.state_dict().values())
    assert not any(t.is_meta for t in net.state_dict().values())
    assert isinstance(view.conv.weight, nn.Parameter) and view.steps[0] is view.conv
