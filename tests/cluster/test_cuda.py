"""What only the CUDA forward of the clustering has: two sizes of its teams of blocks, memory outside the shared one,
a limit of rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from frd_kernels.backend import PROVIDERS

from .. import backends
from .cases import VARIANTS, Case, clear_case, clear_tokens

NAME = "cuda" if torch.cuda.is_available() else backends.EMULATED
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        NAME not in PROVIDERS or bool(PROVIDERS[NAME].problem), reason="needs a GPU or the emulator"
    ),
]
CASES = [
    Case((8, 9), [(4, 4), (3, 2), (2, 1)], 32, "biases"),  # by the tensor cores
    Case((5, 7), [(3, 3), (5, 4), (2, 3)], 10, "mixed"),
    Case((4, 3), [(2, 2), (2, 1)], 1200, "none"),  # tiles of tokens outside the shared memory
    Case((26, 25), [(25, 25), (3, 2)], 100, "none"),  # sums over clusters outside it
]


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    backends.prepare(NAME)


@pytest.fixture(params=["H100", "A100"], autouse=True)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Teams of eight blocks, or of one, where the GPU is emulated."""
    if NAME == "cuda" and request.param == "A100":
        pytest.skip("there is one GPU")
    monkeypatch.setenv("FRD_EMULATED_GPU", request.param)
    return str(request.param)


def call(name: str, op: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """The operator on a backend's device; its results on the CPU."""

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(backends.device_of(name))
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [place(part) for part in value]
        return value

    found = getattr(getattr(torch.ops, PROVIDERS[name].namespace), op)(*map(place, arguments))
    return tuple(part.cpu() if isinstance(part, torch.Tensor) else part for part in found)


def operands(x: torch.Tensor, maps: list[Any], options: dict[str, Any]) -> list[Any]:
    flat: list[torch.Tensor] = []
    for projection in maps:
        parts = projection or [x.new_empty(0)] * 4
        flat += [x.new_zeros(x.size(2)) if part is None else part for part in parts]
    gates = [
        options[name].reshape(-1).to(torch.promote_types(x.dtype, torch.float32))
        for name in ("alpha", "beta")
    ]
    grids = [side for grid in options["grids"] for side in grid]
    return [x, flat, *gates, grids, list(options["hw"]), VARIANTS.index(options["variant"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_icm_agrees_with_the_cpu(case: Case, variant: str, dtype: torch.dtype) -> None:
    """Labels, output and what is kept."""
    arguments = operands(*clear_case(case, variant, dtype, noise=0.5))
    out, labels, saved = call(NAME, "icm", *arguments)
    wanted_out, wanted_labels, wanted_saved = call("cpu", "icm", *arguments)
    assert torch.equal(labels, wanted_labels)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(out, wanted_out, rtol=max(ulp, 1e-5), atol=1e-5)
    torch.testing.assert_close(saved, wanted_saved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cpu_takes_the_gradient_of_its_forward(variant: str) -> None:
    arguments = operands(*clear_case(CASES[0], variant))
    out, labels, saved = call(NAME, "icm", *arguments)
    kept = call("cpu", "icm", *arguments)
    grad = torch.randn(out.shape)
    found, wanted = (
        call("cpu", "icm_backward", grad, *arguments[:4], *parts, *arguments[4:])
        for parts in ((labels, saved), kept[1:])
    )
    for part, other in zip(
        (found[0], *found[1], *found[2:]), (wanted[0], *wanted[1], *wanted[2:]), strict=True
    ):
        torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("aggregate", [0, 1])
def test_masked_tokens_hold_anything(aggregate: int) -> None:
    k, v = clear_tokens((7, 9), (3, 4), 64, torch.float32, 1e-4)
    mask = torch.rand(2, 63) < 0.7
    mask[1, :9] = False
    spoiled = [torch.where(mask.unsqueeze(2), t, float("nan")) for t in (k, v)]
    rest = (mask, torch.tensor([2.0]), torch.tensor([0.5]), [3, 4], [7, 9], aggregate)
    found = call(NAME, "cluster", *spoiled, *rest)
    wanted = call("cpu", "cluster", k, v, *rest)
    assert torch.equal(found[3], wanted[3])
    for part, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-5)


def test_more_rounds_than_the_arguments_hold_are_refused() -> None:
    x = torch.randn(1, 4, 3)
    gates = torch.ones(1), torch.zeros(1)
    call(NAME, "icm", x, [x.new_empty(0)] * 32, *gates, [2, 2] * 8, [2, 2], 0)
    with pytest.raises(ValueError, match="at most 8 rounds"):
        call(NAME, "icm", x, [x.new_empty(0)] * 36, *gates, [2, 2] * 9, [2, 2], 0)
