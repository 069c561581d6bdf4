"""What a function or layer returns is the caller's own: writing into it reaches no input, and no backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import frd_kernels as fk

Call = tuple[Callable[..., Any], list[torch.Tensor]]
GRIDS = ((2, 2), (2, 1))
MEMORY = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "relu_": lambda y: y.relu_(),
    "+= 1": lambda y: y.__iadd__(1),
    "mul_": lambda y: y.mul_(2),
    "zero_": lambda y: y.zero_(),
    "item": lambda y: y.__setitem__((0, 0), 7),
}


def functions(image: torch.Tensor) -> Iterator[tuple[str, Call]]:
    depthwise, dense = torch.randn(8, 1, 3, 3), torch.randn(4, 8, 3, 3)
    centres, point = torch.randn(2, 4, 8), torch.randn(8, 8, 1, 1)
    mask, similarity = torch.rand(2, 36) < 0.7, torch.rand(2, 36)
    tokens = image.flatten(2).transpose(1, 2)
    for kind in ("vanilla", "angular", "radial"):
        pdc: dict[str, Any] = {"kind": kind, "padding": 1}
        yield f"pdc2d {kind}", (lambda x, w, o=pdc: fk.pdc2d(x, w, groups=8, **o), [image, depthwise])
        yield (
            f"pdc2d {kind} unbatched",
            (lambda x, w, o=pdc: fk.pdc2d(x, w, groups=8, **o), [image[0], depthwise]),
        )
        yield f"pdc2d {kind} dense", (lambda x, w, o=pdc: fk.pdc2d(x, w, **o), [image, dense])
        yield f"pdc_weight {kind}", (lambda w, k=kind: fk.pdc_weight(w, kind=k), [dense])
        yield (
            f"pdc_block {kind}",
            (
                lambda x, w, p, k=kind: fk.pdc_block(x, w, p, kind=k, residual=x),
                [image, depthwise, point],
            ),
        )
    yield "pdc_weight theta 0", (lambda w: fk.pdc_weight(w, kind="central", theta=0.0), [dense])
    for aggregate in ("count", "similarity"):
        for given in (None, mask):
            options: dict[str, Any] = {"aggregate": aggregate, "mask": given, "alpha": 0.5}
            name = f"cluster {aggregate} {'masked' if given is not None else ''}"
            yield name, (lambda k, v, o=options: fk.cluster(k, v, (2, 2), (6, 6), **o), [tokens, tokens + 1])
    labels = torch.randint(0, 4, (2, 36))
    for first in (False, True):
        for of in (labels, labels.int()):
            yield (
                f"dispatch {first} {of.dtype}",
                (
                    lambda c, s, f=first, o=of: fk.dispatch(c, o, s, channels_first=f),
                    [centres, similarity],
                ),
            )
    for variant in ("paper", "released"):
        for maps in (None, [(torch.eye(8), None, torch.eye(8), torch.zeros(8))] * 2):
            icm: dict[str, Any] = {
                "variant": variant,
                "alpha": 1.0,
                "beta": 0.0,
                "grids": GRIDS,
                "hw": (6, 6),
            }
            yield f"icm {variant} {maps is None}", (lambda x, m=maps, o=icm: fk.icm(x, m, **o), [tokens])


def layers(image: torch.Tensor) -> Iterator[tuple[str, Call]]:
    made: dict[str, nn.Module] = {
        "PDC2d": fk.PDC2d(8, 8, padding=1, groups=8),
        "PDC2d dense": fk.PDC2d(8, 4, padding=1, kind="vanilla"),
        "PDC2d frozen": fk.PDC2d(8, 4, padding=1, kind="vanilla").requires_grad_(False).freeze(),
        "PDC2d reflect": fk.PDC2d(8, 8, padding=1, padding_mode="reflect", groups=8),
        "PDCBlock2d": fk.PDCBlock2d(8, 8, kind="ad", residual=True),
        "DPM": fk.DPM(8),
        "ICM": fk.ICM(8, GRIDS),
        "ICM released": fk.ICM(8, GRIDS, "released"),
        "ContextCluster": fk.ContextCluster(8, 8, heads=2, head_dim=4),
        "ContextCluster whole": fk.ContextCluster(8, 8, fold_w=1, fold_h=1, heads=2, head_dim=4),
        "ContextCluster centres": fk.ContextCluster(8, 8, heads=2, head_dim=4, return_center=True),
        "ContextCluster dense": fk.ContextCluster(8, 8, heads=2, head_dim=4, dispatch="dense"),
        "FECCluster": fk.FECCluster(8, 8, heads=2, head_dim=4),
        "ClusterPool": fk.ClusterPool(2, 8, 8),
        "ClusterPool folded": fk.ClusterPool(2, 8, 8, fold_w=3, fold_h=3),
    }
    for name, layer in made.items():
        yield name, (layer, [image])
        if name in ("ContextCluster", "ContextCluster dense", "FECCluster", "ClusterPool"):
            yield f"{name} clusters", (lambda x, layer=layer: flat(layer(x, return_clusters=True)), [image])
    for name in ("ICM", "ICM released", "DPM"):
        for inner in made[name].modules():
            inner.register_forward_hook(lambda *_: None)
        yield f"{name} composed", (made[name], [image])


def flat(outputs: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, ...]:
    return outputs[0], *outputs[1]


def calls(memory: str) -> dict[str, Call]:
    torch.manual_seed(0)
    image = torch.randn(2, 8, 6, 6).contiguous(memory_format=MEMORY[memory])
    return dict(functions(image)) | dict(layers(image))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", calls("contiguous"))
@pytest.mark.parametrize("implementation", ["by default", "reference"])
def test_outputs_may_be_written_into(implementation: str, name: str, memory: str) -> None:
    function, given = calls(memory)[name]
    if implementation == "reference":
        with fk.use_backend("reference"):
            check(function, given)
    else:
        check(function, given)


def check(function: Callable[..., Any], given: list[torch.Tensor]) -> None:
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            for index in range(len(outputs(function, given))):
                for write in WRITES.values():
                    check_write(function, given, index, write, mode is torch.enable_grad)


def outputs(function: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    found = function(*inputs)
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def check_write(
    function: Callable[..., Any],
    given: list[torch.Tensor],
    index: int,
    write: Callable[[torch.Tensor], Any],
    learns: bool,
) -> None:
    """The gradients of all outputs but the written one are those without the write."""
    inputs = [t.clone().requires_grad_(learns) for t in given]
    kept = [t.detach().clone() for t in inputs]
    found = outputs(function, inputs)
    memory = {t.untyped_storage().data_ptr() for t in (*inputs, *parameters(function))}
    assert found[index].untyped_storage().data_ptr() not in memory
    untouched = [t.detach().clone() for t in found]
    write(found[index])
    for i, output in enumerate(found):
        assert i == index or torch.equal(output, untouched[i])
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    if not learns:
        return
    after, before = gradients(found, inputs, index), gradients(outputs(function, inputs), inputs, index)
    for a, b in zip(after, before, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    if found[index].requires_grad:
        found[index].sum().backward()


def parameters(function: Callable[..., Any]) -> list[torch.Tensor]:
    return list(function.parameters()) if isinstance(function, nn.Module) else []


def gradients(
    found: tuple[torch.Tensor, ...], inputs: list[torch.Tensor], left_out: int
) -> tuple[torch.Tensor | None, ...]:
    total = sum(
        (t.square().sum() for i, t in enumerate(found) if i != left_out and t.requires_grad), torch.zeros(())
    )
    if not total.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", ["ICM", "dispatch True torch.int64", "icm paper True", "pdc_block radial"])
def test_outputs_of_a_compiled_call_may_be_written_into(name: str) -> None:
    torch.compiler.reset()
    function, given = calls("contiguous")[name]
    inputs = [t.clone().requires_grad_() for t in given]
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    wanted = function(*inputs)
    for y in (found, wanted):
        y += 1
        y.mul_(2)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)
