"""The layers of Context-Cluster and FEC: against their dense form written out here, and as modules."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import frd_kernels as fk

from .. import backends
from .cases import on_device  # noqa: F401  an autouse fixture
from .dense import Case, dense_cluster, dense_pool

OP = "cluster"
EVERY = 40  # the layers put together what other tests run on every backend

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


CASES = {
    "even": Case((8, 8), (2, 2), (2, 2), 2, 24),
    "one region": Case((7, 5), (2, 2), (1, 1), 3, 8, 1.7),
    "one side cut": Case((6, 9), (2, 3), (1, 3), 2, 5),  # is no cut at all
    "oblong": Case((12, 10), (2, 3), (3, 2), 2, 6, -1.3),
    "overlapping bins": Case((10, 14), (3, 4), (2, 2), 1, 7, -0.4),
    "more centres than pixels": Case((4, 6), (3, 3), (2, 3), 2, 4, 2.5),
}
KINDS = ["coc", "coc-dense", "coc-centres", "fec"]
DIM, OUT = 6, 5


def layer(kind: str, case: Case, dtype: torch.dtype = torch.float64) -> Any:
    made: Any
    if kind == "fec":
        made = fk.FECCluster(DIM, OUT, *case.proposal, *case.fold, case.heads, case.head_dim, dtype=dtype)
    else:
        form: dict[str, Any] = {"dispatch": "dense"} if kind == "coc-dense" else {}
        made = fk.ContextCluster(
            DIM,
            OUT,
            *case.proposal,
            *case.fold,
            case.heads,
            case.head_dim,
            kind == "coc-centres",
            dtype=dtype,
            **form,
        )
    with torch.no_grad():
        made.sim_alpha.fill_(case.alpha)
        made.sim_beta.fill_(-0.25)
    return made


def image(size: tuple[int, int], layout: str = "nchw", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, DIM, *size, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])


def gradients(out: torch.Tensor, x: torch.Tensor, made: nn.Module) -> list[torch.Tensor]:
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    return list(torch.autograd.grad(loss, [x, *made.parameters()], allow_unused=True, materialize_grads=True))


def assert_exact(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_dense_form(backend: str, kind: str, layout: str, name: str) -> None:
    case = CASES[name]
    made, x = layer(kind, case), image(case.size, layout).requires_grad_()
    out, wanted = made(x), dense_cluster(kind, made, case, x)
    if kind != "coc-centres":
        assert out.shape == (2, OUT, *case.size)
    assert_exact([out, *gradients(out, x, made)], [wanted, *gradients(wanted, x, made)])


@pytest.mark.parametrize("name", ["even", "oblong", "overlapping bins"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_is_the_dense_form(backend: str, kind: str, layout: str, name: str) -> None:
    case = CASES[name]
    made, x = layer(kind, case), image(case.size, layout).requires_grad_()
    mask = torch.rand(2, *case.size) < 0.6
    mask[0, : case.size[0] // 2] = False
    out, wanted = made(x, mask), dense_cluster(kind, made, case, x, mask)
    grads = gradients(out, x, made)
    assert_exact([out, *grads], [wanted, *gradients(wanted, x, made)])
    left_out = ~mask.unsqueeze(1)
    assert (grads[0].masked_select(left_out) == 0).all()
    if kind != "coc-centres":
        bias = made.proj.bias.view(-1, 1, 1).expand_as(out).masked_select(left_out)
        torch.testing.assert_close(out.masked_select(left_out), bias)
    spoilt = torch.where(left_out, float("nan"), x.detach()).requires_grad_()
    again = made(spoilt, mask)
    assert_exact([again, *gradients(again, spoilt, made)], [out, *grads])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_keeps_all_changes_no_bit(backend: str, kind: str) -> None:
    case = CASES["oblong"]
    made, x = layer(kind, case), image(case.size)
    whole = torch.ones(2, *case.size, dtype=torch.bool)
    backends.assert_same_bits(backend, [made(x, whole)], [made(x)])


# image, fold, stride; with a stride of 4 the one centre is added everywhere
POOLS = {
    "whole": ((8, 6), (1, 1), 2),
    "folded": ((8, 12), (2, 3), 2),
    "one side cut": ((4, 10), (1, 2), 2),
    "one centre": ((6, 5), (1, 1), 4),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pool_is_the_dense_form(backend: str, layout: str, name: str, masked: bool) -> None:
    size, fold, stride = POOLS[name]
    made = fk.ClusterPool(stride, DIM, 7, None, *fold, dtype=torch.float64)
    x = image(size, layout).requires_grad_()
    mask = torch.rand(2, *size) < 0.7 if masked else None
    out, wanted = made(x, mask), dense_pool(made, fold, x, mask)
    assert out.shape == (2, 7, -(-size[0] // 2), -(-size[1] // 2))
    assert_exact([out, *gradients(out, x, made)], [wanted, *gradients(wanted, x, made)])
    made(x, mask).sum().backward()
    assert made.conv_f.weight.grad is None and made.conv_f.bias.grad is None
    if mask is not None:
        spoilt = torch.where(mask.unsqueeze(1), x.detach(), float("inf"))
        assert torch.equal(made(spoilt, mask), out)


def test_state_dicts_are_those_of_the_sources() -> None:
    clusters = {
        "sim_alpha": (1,),
        "sim_beta": (1,),
        "f.weight": (96, 32, 1, 1),
        "f.bias": (96,),
        "proj.weight": (64, 96, 1, 1),
        "proj.bias": (64,),
        "v.weight": (96, 32, 1, 1),
        "v.bias": (96,),
    }
    pool = {
        "norm2.weight": (64,),
        "norm2.bias": (64,),
        "conv_f.weight": (64, 32, 1, 1),
        "conv_f.bias": (64,),
        "conv_v.weight": (64, 32, 1, 1),
        "conv_v.bias": (64,),
        "conv_skip.weight": (64, 32, 3, 3),
        "conv_skip.bias": (64,),
    }
    for made, names in (
        (fk.ContextCluster(32, 64), clusters),
        (fk.FECCluster(32, 64), clusters),
        (fk.ClusterPool(2, 32, 64), pool),
    ):
        assert [(name, tuple(t.shape)) for name, t in made.state_dict().items()] == list(names.items())
        made.load_state_dict({name: torch.randn(shape) for name, shape in names.items()}, strict=True)


def test_arguments_stand_where_the_sources_have_them() -> None:
    coc = fk.ContextCluster(4, 5, 3, 2, 6, 7, 8, 9, True)
    assert (coc.proposal, coc.fold_w, coc.fold_h, coc.heads, coc.head_dim) == ((3, 2), 6, 7, 8, 9)
    assert coc.return_center and (coc.sim_alpha, coc.sim_beta) == (1, 0)
    fec = fk.FECCluster(dim=4, out_dim=5, proposal_w=3, proposal_h=2, fold_w=1, fold_h=1, heads=2, head_dim=3)
    assert fec.f.weight.shape == (6, 4, 1, 1) and fec.proj.weight.shape == (5, 6, 1, 1)
    pool = fk.ClusterPool(stride=2, in_chans=4, embed_dim=6, norm_layer=nn.BatchNorm2d, fold_w=2, fold_h=2)
    assert pool.conv_skip.stride == (2, 2) and (pool.fold_w, pool.fold_h, pool.stride) == (2, 2, 2)


def made_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return fk.ClusterPool(2, DIM, 8, dtype=dtype) if name == "pool" else layer(name, CASES["even"], dtype)


MODULES = [*KINDS, "pool"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_16_bit_is_as_near_as_the_dense_form(backend: str, name: str, dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of the dense form, computed in this dtype."""
    made, x = made_of(name).to(dtype), torch.randn(2, DIM, 16, 16).to(dtype)

    def dense(made: Any, x: torch.Tensor) -> torch.Tensor:
        return dense_pool(made, (1, 1), x) if name == "pool" else dense_cluster(name, made, CASES["even"], x)

    found, eager = made(x), dense(made, x)
    exact = dense(copy.deepcopy(made).double(), x.double())
    assert found.dtype == dtype
    assert (found - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_memory_format_is_kept(name: str, layout: str) -> None:
    made = made_of(name)
    out = made(image((8, 8), layout, torch.float32))
    assert out.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize(("layout", "heads"), [("nchw", 4), ("channels_last", 1)])
def test_heads_are_strides(layout: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values reach `cluster` in the memory the projections wrote, and `proj` reads what it wrote."""
    from frd_kernels.cluster import api

    made = fk.ContextCluster(DIM, OUT, 2, 2, 1, 1, heads, 8)
    written, read = [], []
    for conv in (made.f, made.v):
        conv.register_forward_hook(lambda _m, _i, out: written.append(out.data_ptr()))
    cluster, dispatch = api.cluster, api.dispatch

    def watched_cluster(k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
        read.extend([k.data_ptr(), v.data_ptr()])
        return cluster(k, v, *rest, **options)

    def watched_dispatch(*rest: Any, **options: Any) -> torch.Tensor:
        out = dispatch(*rest, **options)
        written.append(out.data_ptr())
        return out

    monkeypatch.setattr(api, "cluster", watched_cluster)
    monkeypatch.setattr(api, "dispatch", watched_dispatch)
    made.proj.register_forward_pre_hook(lambda _m, inputs: read.append(inputs[0].data_ptr()))
    with torch.no_grad():
        made(image((8, 6), layout, torch.float32))
    assert read == written


@pytest.mark.parametrize("name", MODULES)
def test_clusters_are_returned_by_image_region_and_head(name: str) -> None:
    made, x = made_of(name), image((8, 8), dtype=torch.float32)
    mask = torch.rand(2, 8, 8) < 0.7
    out, found = made(x, mask, return_clusters=True)
    assert torch.equal(out, made(x, mask))
    regions, heads, centres, tokens, channels = (1, 1, 16, 64, 8) if name == "pool" else (4, 2, 4, 16, 24)
    assert found.centres.shape == (2, regions, heads, centres, channels)
    assert found.labels.shape == found.similarity.shape == (2, regions, heads, tokens)
    assert found.counts.shape == (2, regions, heads, centres)
    side = 8 if name == "pool" else 4
    for r in range(regions):
        i, j = (0, 0) if name == "pool" else divmod(r, 2)
        kept = mask[:, i * side : i * side + side, j * side : j * side + side].flatten(1)
        for e in range(heads):
            assert torch.equal(found.labels[:, r, e] >= 0, kept)
            assert (found.similarity[:, r, e][~kept] == 0).all()
            assert torch.equal(found.counts[:, r, e].sum(1), kept.sum(1))


@pytest.mark.parametrize("name", MODULES)
def test_autocast(backend: str, name: str) -> None:
    made, x = made_of(name), image((8, 8), dtype=torch.float32).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        out = made(x)
    assert (out.float() - made(x)).norm() < 0.1 * out.float().norm()
    assert all(
        grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(out.float(), x, made)
    )


@pytest.mark.build
@pytest.mark.parametrize(("name", "masked"), [("coc", True), ("fec", False), ("pool", True)])
def test_compile(name: str, masked: bool) -> None:
    """Two sizes in one graph, forward and backward."""
    made = made_of(name)
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in ((2, (8, 8)), (3, (12, 8))):
        x = torch.randn(batch, DIM, *size, requires_grad=True)
        mask = torch.rand(batch, *size) < 0.7 if masked else None
        found, wanted = compiled(x, mask), made(x, mask)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        grads = [gradients(out, x, made) for out in (found, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_empty_batches(name: str) -> None:
    made, x = made_of(name), image((8, 8), dtype=torch.float32)
    wanted, other, buffer = made(x), made_of(name), io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), other):
        assert torch.equal(copied(x), wanted) and repr(copied) == repr(made)
    x = torch.empty(0, DIM, 8, 8, requires_grad=True)
    out = made(x)
    assert out.shape == (0, *wanted.shape[1:])
    assert all(
        grad.shape == t.shape
        for grad, t in zip(gradients(out, x, made), [x, *made.parameters()], strict=True)
    )


@pytest.mark.parametrize("kind", ["coc", "fec"])
def test_gradcheck(kind: str) -> None:
    case = Case((4, 6), (2, 2), (1, 1), 2, 3, 1.5)
    made, x = layer(kind, case), image((4, 6)).requires_grad_()
    assert torch.autograd.gradcheck(made, (x,))


def test_bad_arguments() -> None:
    made, pool = fk.ContextCluster(4, 5), fk.ClusterPool(2, 4, 6)
    for call, message in [
        (lambda: fk.ContextCluster(0, 5), "dim must be a positive int, got 0"),
        (lambda: fk.FECCluster(4, 5, heads=0), "heads must be a positive int, got 0"),
        (lambda: fk.ClusterPool(0), "stride must be a positive int, got 0"),
        (
            lambda: fk.ContextCluster(4, 5, dispatch="soft"),
            "dispatch must be 'masked' or 'dense', got 'soft'",
        ),
        (lambda: made(torch.ones(2, 3, 4, 4)), r"x must be \[B, 4, H, W\], got \[2, 3, 4, 4\]"),
        (lambda: made(torch.ones(2, 4, 5, 4)), r"the fold \(2, 2\) divides, got \[5, 4\]"),
        (lambda: made(torch.ones(2, 4, 4, 4), torch.ones(2, 4, 4)), r"mask must be bool \[2, 4, 4\]"),
        (lambda: pool(torch.ones(2, 4, 1, 4)), r"at least the stride 2, got \(1, 4\)"),
        (
            lambda: pool(torch.ones(2, 4, 7, 8)),
            r"reduce alike, got \[3, 4\] centres and \[4, 4\] of conv_skip",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_guide_runs() -> None:
    """docs/clustering.md, top to bottom, and its replacement of foreign layers."""
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "clustering.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    made = layer("coc", CASES["oblong"])
    foreign = type("Cluster", (nn.Module,), {})()
    for name, child in made.named_children():
        setattr(foreign, name, child)
    foreign.sim_alpha, foreign.sim_beta = made.sim_alpha, made.sim_beta
    foreign.centers_proposal = nn.AdaptiveAvgPool2d(made.proposal)
    for name in ("fold_w", "fold_h", "heads", "head_dim", "return_center"):
        setattr(foreign, name, getattr(made, name))
    net = nn.Sequential(nn.Sequential(foreign))
    names["replace_clusters"](net)
    x = image((12, 10))
    assert torch.equal(net.double()(x), made.float().double()(x))
