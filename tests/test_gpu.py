"""What a GPU can get wrong although the results are right once: equal bits in every run and on another stream, CUDA
graphs with old and new data, memory that is kept. The few calls are also what compute-sanitizer looks into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import frd_kernels as fk

from .cluster.cases import Case, clear_case, clear_tokens, map_projections
from .pdc.cases import LAYOUTS, block_operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RUNS = 20
# Cycles for which the default stream is busy: 10 and 100 ms at 2 GHz.
BUSY = (20_000_000, 200_000_000)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# An absolute cap of the relative error, for outputs and gradients.
CAP = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Tensors = list[torch.Tensor]


class Call:
    """An operation over leaves; `function(module, *inputs)` by `fk` or `fk.reference`."""

    def __init__(self, inputs: Tensors, function: Callable[..., torch.Tensor]) -> None:
        self.inputs, self.function = inputs, function
        with torch.no_grad():
            self.grad = torch.randn_like(function(fk.reference, *inputs))

    def run(self, module: Any = fk, inputs: Tensors | None = None) -> Tensors:
        """The output, and the gradients of all inputs. The loss has a square: a random gradient alone would let those
        of scalars cancel."""
        leaves = [x.detach().requires_grad_() for x in inputs or self.inputs]
        out = self.function(module, *leaves)
        grad = self.grad.to(out.dtype) + out.detach()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def pdc2d(kind: str, layout: str, depthwise: bool, dtype: torch.dtype) -> Call:
    x = torch.randn(2, 16, 9, 11).contiguous(memory_format=LAYOUTS[layout]).to(dtype)
    weight = torch.randn(16, 1 if depthwise else 16, 3, 3).to(dtype) / 3
    options = {"kind": kind, "padding": 1, "groups": 16 if depthwise else 1}
    return Call([x, weight], lambda module, x, weight: module.pdc2d(x, weight, **options))


def pdc_weight(kind: str, dtype: torch.dtype) -> Call:
    weight = torch.randn(24, 8, 3, 3).to(dtype)
    return Call([weight], lambda module, weight: module.pdc_weight(weight, kind=kind))


def pdc_block(kind: str, layout: str, dtype: torch.dtype) -> Call:
    operands = block_operands(2, 32, 32, 9, 11, layout=layout, dtype=dtype)
    # Far from 0, where a rounding would open or close the ReLU.
    operands["pdc_bias"] = 8 + operands["pdc_bias"].abs()
    names = list(operands)

    def function(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
        found = dict(zip(names, inputs, strict=True))
        x, weight, point = (found.pop(name) for name in ("x", "pdc_weight", "point_weight"))
        return module.pdc_block(x, weight, point, kind=kind, **found)

    return Call(list(operands.values()), function)


def cluster(aggregate: str, dtype: torch.dtype) -> Call:
    hw, grid = (8, 8), (2, 2)
    keys, values = clear_tokens(hw, grid, 16, dtype, 2e-2, noise=0.5)
    options = {"alpha": 1.5, "beta": 0.25} if aggregate == "similarity" else {}

    def function(module: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        found = module.cluster(keys, values, grid, hw, aggregate=aggregate, **options)
        return module.dispatch(found.centres, found.labels, found.similarity)

    return Call([keys, values], function)


def icm(variant: str, dtype: torch.dtype, projected: str = "biases") -> Call:
    case = Case((8, 8), [(4, 4), (2, 1)], 32, projected)
    x, maps, options = clear_case(case, variant, dtype, clear=2e-3, noise=0.3)
    flat: Tensors = [x]
    map_projections(lambda tensor: flat.append(tensor) or tensor, maps)
    gates = [options.pop(name).to(dtype) for name in ("alpha", "beta")]

    def function(module: Any, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *weights, alpha, beta = rest
        rounds = [tuple(weights[i : i + 4]) for i in range(0, len(weights), 4)]
        return module.icm(x, rounds or None, alpha=alpha, beta=beta, **options)

    return Call([*flat, *gates], function)


CALLS: dict[str, Callable[[torch.dtype], Call]] = {
    **{
        f"pdc2d {kind} {layout}": lambda dtype, k=kind, m=layout: pdc2d(k, m, True, dtype)
        for kind in ("angular", "central", "radial", "vanilla")
        for layout in LAYOUTS
    },
    "pdc2d dense": lambda dtype: pdc2d("angular", "nchw", False, dtype),
    **{f"pdc_weight {kind}": lambda dtype, k=kind: pdc_weight(k, dtype) for kind in ("angular", "radial")},
    **{
        f"pdc_block {kind} {layout}": lambda dtype, k=kind, m=layout: pdc_block(k, m, dtype)
        for kind, layout in (("angular", "nchw"), ("central", "channels_last"))
    },
    **{f"cluster {form}": lambda dtype, f=form: cluster(f, dtype) for form in ("count", "similarity")},
    **{f"icm {variant}": lambda dtype, v=variant: icm(v, dtype) for variant in ("paper", "released")},
    "icm without projections": lambda dtype: icm("paper", dtype, "none"),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["cuda", "cuda_chain", "triton"])
def on_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if problem := fk.backend.PROVIDERS[request.param].problem:
        pytest.skip(problem)
    with fk.use_backend(request.param), torch.device("cuda"):
        yield request.param


@pytest.fixture(params=list(CALLS))
def call(request: pytest.FixtureRequest, on_backend: str, dtype: torch.dtype) -> Call:
    return CALLS[request.param](dtype)


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        integers = INTEGERS[a.element_size()]
        assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Tensors]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call.run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = call.run()
    return graph, results


def assert_right(call: Call, dtype: torch.dtype) -> None:
    exact = call.run(fk.reference, [x.double() for x in call.inputs])
    for found, expected in zip(call.run(), exact, strict=True):
        scale = expected.norm().clamp_min(1e-12)
        assert float((found.double() - expected).norm() / scale) <= CAP[dtype]


def test_outputs_and_gradients_are_right(call: Call, dtype: torch.dtype, poisoned: None) -> None:
    assert_right(call, dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("on_backend", ["cuda", "cuda_chain"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_under_the_sanitizer(call: Call, dtype: torch.dtype) -> None:
    assert_right(call, dtype)


def test_bits_repeat(call: Call, poisoned: None) -> None:
    expected = call.run()
    for _ in range(RUNS):
        assert_same_bits(call.run(), expected)


def test_another_stream(call: Call) -> None:
    """A kernel that runs on the default stream instead would come too late: that one is busy."""
    expected, stream = call.run(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Takes the memory that the stream will need.
        call.run()
    for cycles in BUSY:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        with torch.cuda.stream(stream):
            found = [tensor.clone() for tensor in call.run()]
        stream.synchronize()
        busy = not torch.cuda.default_stream().query()
        torch.cuda.synchronize()
        if busy:
            assert_same_bits(found, expected)
            return
    pytest.fail("the call has waited for the default stream")


def test_a_graph_with_old_and_new_data(call: Call, poisoned: None) -> None:
    graph, results = captured(call)
    expected = call.run()
    for new_data in (False, True):
        if new_data:
            for x in call.inputs:
                x.mul_(0.75)
            expected = call.run()
        for tensor in results:
            tensor.fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(results, expected)


def test_replays_keep_no_memory(call: Call) -> None:
    graph, _ = captured(call)

    def in_use() -> tuple[int, int]:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.memory_allocated(), total - free

    graph.replay()
    before = in_use()
    for _ in range(RUNS):
        graph.replay()
    assert all(after <= used for after, used in zip(in_use(), before, strict=True))
