"""The sides of a case: our backends, the eager form and what PyTorch can make of it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import frd_kernels as fk

from . import eager
from .cases import Call, Case, Context, Providers, normal, with_gradients

GPU_BACKENDS = ("cuda", "triton")
AUTO = "auto"  # what a user gets who chooses nothing
GRAPHS = ("graph", "graph, cold L2")
PUBLISHED = "eager, index lists from the host"


def providers(
    case: Case,
    inputs: Sequence[torch.Tensor],
    ours: Callable[..., torch.Tensor],
    rivals: dict[str, Callable[..., torch.Tensor]],
    reference: Callable[..., torch.Tensor],
    ops: Sequence[str],
    squared: bool = False,
    convolves: bool = True,
) -> Providers:
    """Every side over the same `inputs`, `reference` over their float64 copies; all inputs get gradients.

    The loss is <y, g> with a random g; `squared` adds |y|^2 / 2, for ops with scalar parameters: their gradients are
    sums over all pixels, which g alone lets cancel to rounding noise. `ops` are the operations that ours consists of.
    The first rival comes in further forms: compiled, and if it `convolves` in the other layout and with cuDNN's search.
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
    backends, contexts, left_out = own_backends(case, ops, inputs[0])
    mine = with_gradients(ours, inputs, grad, case.mode)
    sides = Providers(
        ours=dict.fromkeys(backends, mine),
        rivals={name: with_gradients(call, inputs, grad, case.mode) for name, call in rivals.items()},
        oracle=with_gradients(reference, exact_inputs, exact_grad, case.mode),
        contexts=contexts,
        left_out=left_out,
    )
    if PUBLISHED in rivals:
        sides.timings[PUBLISHED] = ("wall",)
    name, first = next(iter(rivals.items()))
    if convolves and case.layout == "nchw":
        converted = [channels_last(x) for x in inputs]
        given = None if grad is None else channels_last(grad)
        sides.rivals[f"{name} channels_last"] = with_gradients(first, converted, given, case.mode)
        sides.converted.add(f"{name} channels_last")
    if convolves and case.device == "cuda":
        sides.rivals[f"{name}, cudnn.benchmark"] = sides.rivals[name]
        sides.contexts[f"{name}, cudnn.benchmark"] = cudnn_benchmark
    add_compiled(case, sides, first, inputs, grad)
    return sides


def eager_forms(
    case: Case, function: Callable[..., torch.Tensor], kind: str
) -> dict[str, Callable[..., torch.Tensor]]:
    """The eager form at its best and, where a GPU makes that another, as it is published."""
    best = eager.with_indices(function, kind, case.device)
    return {"eager": best} if best is function else {"eager": best, PUBLISHED: function}


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of an image in the other layout; anything else as it is."""
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
    """Our backends for the case, the headline first: what runs by itself, if that is one; their settings; and why
    others are not among them."""
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
        left_out[AUTO] = "nothing of this is proven on this GPU, so that the reference runs"
    elif len(chosen) == 1 and (same := by_namespace.get(*chosen)):
        left_out[AUTO] = f"the same as {same}"
        names.sort(key=lambda name: name != same)
    else:
        names.insert(0, AUTO)
    return names, contexts, left_out


def add_compiled(
    case: Case,
    sides: Providers,
    call: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor | None,
) -> None:
    """The eager form by torch.compile. With "max-autotune" the compiler makes CUDA graphs itself, which cannot be
    captured into ours: there it compiles without them."""
    if not case.compiled:
        return
    torch._dynamo.reset()  # else it gives up after a few cases that share a function
    if case.device == "cpu":
        # Its caches do not know for how many threads the code was made; and its processes would make a machine busy.
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.force_disable_caches, inductor.compile_threads = True, 1
    for mode in case.compiled:
        forms: dict[str, tuple[str, ...]] = {mode: ()}
        if case.device == "cuda" and mode == "max-autotune":
            forms = {mode: ("wall",), f"{mode}-no-cudagraphs": GRAPHS}
        for form, timings in forms.items():
            name = f"compiled, {form}"
            compiled = torch.compile(call, mode=form, fullgraph=True, dynamic=False)
            sides.rivals[name] = with_gradients(compiled, inputs, grad, case.mode, static=True)
            if timings:
                sides.timings[name] = timings


def folded_rivals(
    case: Case, x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Call]:
    """The converted net, forward only since its parameters are others, also in the layout that suits it best."""
    rivals = {"folded": with_gradients(call, (x,), None, "forward")}
    if case.layout == "nchw":
        rivals["folded channels_last"] = with_gradients(call, (channels_last(x),), None, "forward")
    return rivals


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
