"""What is measured: a case, its data, and the sides that compute it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], Sequence[torch.Tensor]]
Context = Callable[[], contextlib.AbstractContextManager[object]]
MODES = ("forward", "forward+backward")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclasses.dataclass(frozen=True)
class Providers:
    """The sides of one case, over the same tensors. A call returns what it computed: outputs, and gradients in the
    forward+backward mode."""

    ours: dict[
        str, Call
    ]  # backend -> call; the first one is the headline. To be called within `context(backend)`
    rivals: dict[str, Call]  # name -> call; the first one is what the headline ratio is taken against
    oracle: Call  # float64
    # name -> a part of the work that nobody can leave out, timed beside ours and not checked: it bounds the ratio
    floors: dict[str, Call] = dataclasses.field(default_factory=dict)
    contexts: dict[str, Context] = dataclasses.field(default_factory=dict)
    timings: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )  # of sides that have not all
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)  # side -> why it is not measured
    # Rivals over copies of the tensors in another layout, so that their sums run in another order: checked and timed,
    # but what our error may be is told by those over the same tensors.
    converted: set[str] = dataclasses.field(default_factory=set)

    def context(self, side: str) -> contextlib.AbstractContextManager[object]:
        """The settings that a side runs under: a backend of ours, a flag of the library. Entered outside of what is
        timed."""
        return self.contexts.get(side, contextlib.nullcontext)()

    def drop(self, side: str, reason: str) -> None:
        """Leaves a side out, and says why."""
        for calls in (self.ours, self.rivals, self.floors):
            calls.pop(side, None)
        self.left_out[side] = reason


@dataclasses.dataclass(frozen=True)
class Case:
    """op x shape x dtype x layout x mode, and how to build its providers."""

    op: str
    shape: tuple[int, ...]
    mode: str
    build: Callable[
        [Case], Providers
    ]  # called with the case itself, so that another shape is a `replace` away
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    target: float | None = None  # ratio rival / ours that the project has set itself
    short: bool = False  # part of the short run
    device: str = "cpu"  # or "cuda"
    mean: float = 0.0  # of the image
    compiled: tuple[str, ...] = ()  # modes of torch.compile in which the eager rival is measured too

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


def normal(
    shape: Sequence[int], case: Case, seed: int, scale: float = 1.0, step: float = 0.0, mean: float = 0.0
) -> torch.Tensor:
    """Random normal numbers, rounded to multiples of `step`, in the dtype and on the device of the case; 4-D ones in
    its layout."""
    generator = torch.Generator(case.device).manual_seed(seed)
    tensor = mean + scale * torch.randn(*shape, generator=generator, device=case.device)
    if step:
        tensor = (tensor / step).round() * step
    tensor = tensor.to(case.dtype)
    return tensor.contiguous(memory_format=LAYOUTS[case.layout]) if tensor.dim() == 4 else tensor


def with_gradients(
    call: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor | None,
    mode: str,
    static: bool = False,
) -> Call:
    """A call of `mode` over leaf tensors: returns the output, in forward+backward the gradients too.

    The forward mode runs without autograd, as at inference, and needs no `grad`. `static` tells a compiler that all
    inputs but the first one stay where they are, as the parameters of a module do: it then need not copy them.
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
