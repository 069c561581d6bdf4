"""The benchmark's registry: what a case is, which implementations it compares, and the list of all cases.

Each family (`pdc.py`, `pdc_block.py`, `cluster.py`) lists its cases in CASES, for the CPU, and in GPU_CASES.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import frd_kernels as fk

from .baselines import with_indices

Call = Callable[[], Sequence[torch.Tensor]]
Context = Callable[[], contextlib.AbstractContextManager[object]]
Function = Callable[..., torch.Tensor]

FAMILIES = ("pdc", "pdc_block", "cluster")
MODES = ("forward", "forward+backward")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
GPU_BACKENDS = ("cuda", "cuda_chain", "triton")
AUTO = "auto"
GRAPHS = ("graph", "graph, cold L2")
PUBLISHED = "eager, index lists from the host"


@dataclasses.dataclass(frozen=True)
class Case:
    """op x shape x dtype x layout x mode. `build` gets the case itself, so that `dataclasses.replace` is enough to
    measure another shape."""

    op: str
    shape: tuple[int, ...]
    mode: str
    build: Callable[[Case], Impls]
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    device: str = "cpu"
    # Of the image, in standard deviations.
    mean: float = 0.0
    # Modes of torch.compile in which the eager baseline is measured too.
    compiled: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        mean = f" mean {self.mean:g}" if self.mean else ""
        return f"{self.op} [{shape}] {self.dtype_name} {self.layout} {self.mode}{mean}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def backward(self) -> bool:
        return self.mode == "forward+backward"


@dataclasses.dataclass(frozen=True)
class Impls:
    """The implementations of one case over the same tensors. A call returns the output, and in forward+backward the
    gradients of all inputs."""

    # Backend -> call, to be run within `context(backend)`. The ratio is that of the first backend ...
    ours: dict[str, Call]
    # ... to the first baseline.
    baselines: dict[str, Call]
    # In float64.
    oracle: Call
    # A part of the work that no implementation can leave out: timed, not checked.
    lower_bounds: dict[str, Call] = dataclasses.field(default_factory=dict)
    contexts: dict[str, Context] = dataclasses.field(default_factory=dict)
    # The timings of an implementation that does not take part in all of them.
    timings: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # Implementation -> why it is not measured.
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    # Baselines over copies in another layout, which sum in another order: they do not set the allowed error.
    converted: set[str] = dataclasses.field(default_factory=set)

    def context(self, name: str) -> contextlib.AbstractContextManager[object]:
        """The settings that an implementation runs under, entered outside of the timed region."""
        return self.contexts.get(name, contextlib.nullcontext)()

    def calls(self) -> dict[str, Call]:
        return self.ours | self.baselines | self.lower_bounds

    def drop(self, name: str, reason: str) -> None:
        for calls in (self.ours, self.baselines, self.lower_bounds):
            calls.pop(name, None)
        self.left_out[name] = reason


def cases(device: str = "cpu", only: str = "", quick: bool = False) -> list[Case]:
    """The registered cases of a device whose name contains `only`; with `quick` the essential ones."""
    # Here, because the families import this module.
    families = [importlib.import_module(f".{name}", __package__) for name in FAMILIES]
    found = [case for family in families for case in (family.CASES if device == "cpu" else family.GPU_CASES)]
    return [case for case in found if only in case.name and (case.quick or not quick)]


def normal(
    shape: Sequence[int], case: Case, seed: int, scale: float = 1.0, step: float = 0.0, mean: float = 0.0
) -> torch.Tensor:
    """Normal random numbers, rounded to multiples of `step`, in the dtype and on the device of the case; 4-D tensors
    in its layout."""
    generator = torch.Generator(case.device).manual_seed(seed)
    tensor = mean + scale * torch.randn(*shape, generator=generator, device=case.device)
    if step:
        tensor = (tensor / step).round() * step
    tensor = tensor.to(case.dtype)
    return tensor.contiguous(memory_format=LAYOUTS[case.layout]) if tensor.dim() == 4 else tensor


def with_gradients(
    call: Function, inputs: Sequence[torch.Tensor], grad: torch.Tensor | None, mode: str, static: bool = False
) -> Call:
    """A call of `mode` over leaf tensors: returns the output, in forward+backward the gradients too.

    The forward mode runs without autograd, as at inference, and needs no `grad`. `static` promises a compiler that all
    inputs but the first stay where they are, as a module's parameters do, so that it need not copy them.

    Raises:
        ValueError: `mode` is none of MODES.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")

    def forward() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return (call(*inputs),)

    leaves = [x.detach().requires_grad_() for x in inputs]
    if static:
        for parameter in (*inputs[1:], *leaves[1:]):
            torch._dynamo.mark_static_address(parameter)

    def forward_backward() -> Sequence[torch.Tensor]:
        out = call(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return forward if mode == "forward" else forward_backward


def build_impls(
    case: Case,
    inputs: Sequence[torch.Tensor],
    ours: Function,
    baselines: dict[str, Function],
    reference: Function,
    ops: Sequence[str],
    squared: bool = False,
    convolves: bool = True,
) -> Impls:
    """All implementations over the same `inputs`, `reference` over float64 copies; all inputs get gradients.

    The loss is <y, g> with a random g. `squared` adds |y|^2 / 2, for ops with scalar parameters: with g alone their
    gradients, sums over all pixels, cancel to rounding noise. `ops` are the operators that ours calls. The first
    baseline is also measured compiled, and if it `convolves` in the other layout and with cuDNN's search.
    """
    exact_inputs, grad, exact_grad = [x.double() for x in inputs], None, None
    if case.backward:
        with torch.no_grad():
            out = reference(*exact_inputs)
        grad = normal(out.shape, case, seed=0)
        if squared:
            grad = (grad + out).to(case.dtype)
        exact_grad = grad.double()
        del out

    def of_mode(
        call: Function,
        inputs: Sequence[torch.Tensor] = inputs,
        grad: torch.Tensor | None = grad,
        **options: bool,
    ) -> Call:
        return with_gradients(call, inputs, grad, case.mode, **options)

    backends, contexts, left_out = own_backends(case, ops, inputs[0])
    impls = Impls(
        ours=dict.fromkeys(backends, of_mode(ours)),
        baselines={name: of_mode(call) for name, call in baselines.items()},
        oracle=of_mode(reference, exact_inputs, exact_grad),
        contexts=contexts,
        left_out=left_out,
    )
    if PUBLISHED in baselines:
        impls.timings[PUBLISHED] = ("wall",)
    name, first = next(iter(baselines.items()))
    if convolves and case.layout == "nchw":
        copies = [channels_last(x) for x in inputs]
        grad_copy = None if grad is None else channels_last(grad)
        impls.baselines[f"{name} channels_last"] = of_mode(first, copies, grad_copy)
        impls.converted.add(f"{name} channels_last")
    if convolves and case.device == "cuda":
        impls.baselines[f"{name}, cudnn.benchmark"] = impls.baselines[name]
        impls.contexts[f"{name}, cudnn.benchmark"] = cudnn_benchmark
    for form, compiled, timings in compiled_forms(case, first):
        impls.baselines[form] = of_mode(compiled, static=True)
        if timings:
            impls.timings[form] = timings
    return impls


def compiled_forms(case: Case, call: Function) -> Iterator[tuple[str, Function, tuple[str, ...]]]:
    """Name, `call` by torch.compile and its timings; () are all. In mode "max-autotune" the compiler makes CUDA graphs
    of its own, which a capture cannot contain: for graph timings it compiles without them."""
    if case.compiled:
        # Dynamo gives up after a few cases that share a function.
        torch._dynamo.reset()
    if case.compiled and case.device == "cpu":
        # The caches do not know for how many threads code was generated; worker processes would load the machine.
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.force_disable_caches, inductor.compile_threads = True, 1
    for mode in case.compiled:
        forms: dict[str, tuple[str, ...]] = {mode: ()}
        if case.device == "cuda" and mode == "max-autotune":
            forms = {mode: ("wall",), f"{mode}-no-cudagraphs": GRAPHS}
        for form, timings in forms.items():
            yield f"compiled, {form}", torch.compile(call, mode=form, fullgraph=True, dynamic=False), timings


def eager_forms(case: Case, function: Function, kind: str) -> dict[str, Function]:
    """The eager form at its best and, where that differs on a GPU, as it is published."""
    best = with_indices(function, kind, case.device)
    return {"eager": best} if best is function else {"eager": best, PUBLISHED: function}


def folded_forms(case: Case, x: torch.Tensor, call: Function) -> dict[str, Call]:
    """The converted net, in forward mode only because its parameters are others, also in the faster layout."""
    forms = {"folded": with_gradients(call, (x,), None, "forward")}
    if case.layout == "nchw":
        forms["folded channels_last"] = with_gradients(call, (channels_last(x),), None, "forward")
    return forms


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of an image in channels_last; any other tensor as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Lets cuDNN try its algorithms at the first call with a shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def own_backends(
    case: Case, ops: Sequence[str], image: torch.Tensor
) -> tuple[list[str], dict[str, Context], dict[str, str]]:
    """Our backends for the case, the default one first; their settings; and why others are left out."""
    if case.device == "cpu":
        return ["cpu"], {}, {}
    names: list[str] = []
    contexts: dict[str, Context] = {}
    left_out: dict[str, str] = {}
    for name in GPU_BACKENDS:
        provider = fk.backend.PROVIDERS[name]
        refusals = [refusal for op in ops if (refusal := provider.refusal(op, image)) is not None]
        if refusals:
            left_out[name] = refusals[0]
            continue
        names.append(name)
        contexts[name] = functools.partial(fk.use_backend, name)
    chosen = {getattr(fk.backend.select(op, image), "name", "") for op in ops}
    by_namespace = {fk.backend.PROVIDERS[name].namespace: name for name in names}
    if chosen == {""}:
        left_out[AUTO] = "the default on this GPU is the reference"
    elif len(chosen) == 1 and (same := by_namespace.get(*chosen)):
        left_out[AUTO] = f"the same as {same}"
        names.sort(key=lambda name: name != same)
    else:
        names.insert(0, AUTO)
    return names, contexts, left_out


# The taps that a difference convolution really has: the centre of an angular or radial one is zero.
TAPS = {"angular": 8, "central": 9, "radial": 8, "vanilla": 9}
# Centres of the ICM's first round.
FIRST_CENTRES = 64


def min_bytes(case: Case) -> int:
    """The fewest bytes that any implementation moves: every image read once, every result written once. The backward
    pass comes on top; it reads x and dy and writes dx. Data that stays in a cache can beat this, cold data cannot."""
    image = math.prod(case.shape) * case.dtype.itemsize
    op, backward = case.op.split()[0], case.backward
    if op == "pdc_weight":
        outer = 25 if case.op.endswith("radial") else 9
        return math.prod(case.shape[:2]) * case.dtype.itemsize * (9 + outer) * (2 if backward else 1)
    # Two blocks: the second one needs its neighbours' results of the first.
    if op == "dpm":
        return image * (10 if backward else 4)
    # Reads keys and values, writes the dispatched image.
    if op == "cluster":
        return image * (8 if backward else 3)
    return image * (5 if backward else 2)


def min_flops(case: Case) -> int:
    """Of the matrix products; 0 where there are none. For clustering those of the forward pass alone, because few more
    are enough for the backward pass."""
    words = case.op.split()
    passes = 3 if case.backward else 1
    if words[0] == "pdc_weight" or words[-1] == "depthwise":
        return 0
    batch, channels, height, width = case.shape
    pixels = batch * height * width
    square = 2 * pixels * channels * channels
    if words[0] == "pdc":
        return passes * TAPS[words[1]] * square
    if words[0] == "pdc_block":
        return passes * (TAPS[words[1]] + 1) * square
    if words[0] == "dpm":
        return passes * 2 * square
    centres, norms_of_keys = (FIRST_CENTRES, square) if words[0] == "icm" else (0, 0)
    return norms_of_keys + 4 * pixels * channels * centres


def lower_bounds(case: Case, calibration: dict[str, Any], ours_ms: float) -> dict[str, dict[str, Any]]:
    """The roofline: what the bytes and the products take at the rates of `timing.calibrate`. `ratio` is that time over
    ours, as for lower bounds that are timed."""
    milliseconds = {"memory": 1e3 * min_bytes(case) / calibration["copy"]["bytes_per_s"]}
    matrix = calibration["matrix"].get(case.dtype_name)
    if matrix and (flops := min_flops(case)):
        milliseconds["arithmetic"] = 1e3 * flops / matrix["flops_per_s"]
    return {name: {"ms": ms, "ratio": ms / ours_ms} for name, ms in milliseconds.items()}
