"""FRD-Net: composition, every switch, any image size, both backends, compilation, training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import frd_kernels as fk
from frd_model import FRDNet, create_model, save_model
from frd_model.blocks import DivergentICM, FRDBlock, Mixer, most_divergent
from frd_model.config import PRESETS, FRDNetConfig

# Small enough for a test and with blocks that matter: the presets' layer scale of 1e-5 would hide them.
SMALL: dict[str, dict[str, Any]] = {
    "paper": {"blocks": 2, "mlp_ratio": 1.0, "decoder_widths": [16, 16, 8, 8], "layer_scale": 1.0},
    "released": {"blocks": 2, "mlp_ratio": 1.0, "decoder_widths": [16, 16, 8, 8], "layer_scale": 1.0},
    "lite": {"layer_scale": 1.0},
}
PRESET_NAMES = list(SMALL)


def small_model(preset: str, **overrides: Any) -> FRDNet:
    torch.manual_seed(0)
    return create_model("frdnet_mit_b0", preset=preset, **{**SMALL[preset], **overrides}).eval()


def photo(*size: int, seed: int = 1) -> Tensor:
    """Noise over a smooth ramp: content at low and at high frequencies."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 3, *size, generator=generator)
    return noise + torch.linspace(-1, 1, size[1])


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 1), (96, 31)])
def test_logits_have_the_size_of_the_image(preset: str, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = small_model(preset)(photo(*size))
    assert logits.shape == (2, 1, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_odd_sizes_are_extended_by_their_last_pixels(preset: str) -> None:
    model, images = small_model(preset), photo(40, 50)
    extended = F.pad(images, (0, 14, 0, 24), mode="replicate")
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(extended)[..., :40, :50])


def test_images_of_a_batch_do_not_mix() -> None:
    model, images = small_model("lite"), photo(64, 64)
    with torch.no_grad():
        together, alone = model(images), model(images[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"images: must be \[B, 3, H, W\] with H, W >= 1, got \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"got \[1, 1, 8, 8\]"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"got \[1, 3, 0, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "must be floating point, got torch.uint8"),
    ],
)
def test_other_inputs_are_refused(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model("lite")(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "resnet"},
            "name: must be frdnet_ENCODER or segformer_ENCODER, such as frdnet_mit_b2, got 'resnet'",
        ),
        ({"preset": "tiny"}, "preset: must be one of paper, released, lite, got 'tiny'"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_unknown_models_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)


def test_a_block_is_two_scaled_residual_branches_and_a_norm() -> None:
    torch.manual_seed(0)
    block = FRDBlock(16, FRDNetConfig(layer_scale=0.5, variant="released")).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        block.scale2 *= 3
        y = x + 0.5 * block.mixer(F.group_norm(x, 1))
        hidden = torch.einsum("oc,bchw->bohw", block.mlp.fc1.weight.flatten(1), F.group_norm(y, 1))
        hidden = F.gelu(hidden + block.mlp.fc1.bias.view(-1, 1, 1))
        y = y + 1.5 * F.conv2d(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
        torch.testing.assert_close(block(x), F.group_norm(y, 1), rtol=1e-4, atol=1e-5)


def test_the_mixer_clusters_the_first_half_and_differences_the_second() -> None:
    torch.manual_seed(0)
    mixer = Mixer(16, FRDNetConfig()).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        first, second = mixer.enter(x).split(8, dim=1)
        with fk.use_backend("reference"):
            macro = mixer.macro(mixer.icm(first))
            y = second + mixer.dpm.angular.point(F.relu(mixer.dpm.angular.pdc(second)))
            micro = mixer.dpm.central.point(F.relu(mixer.dpm.central.pdc(y)))
        want = mixer.leave(torch.cat((macro, micro), dim=1))
        torch.testing.assert_close(mixer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "present", "absent"),
    [
        ({}, {"ICM", "DPM"}, set()),
        ({"icm": False}, {"DPM"}, {"ICM"}),
        ({"dpm": False}, {"ICM"}, {"DPM", "PDCBlock2d"}),
        ({"icm": False, "dpm": False}, {"Mixer"}, {"ICM", "DPM", "PDCBlock2d"}),
        ({"angular": False}, {"ICM", "PDCBlock2d"}, {"DPM"}),
        ({"central": False}, {"ICM", "PDCBlock2d"}, {"DPM"}),
        ({"blocks": 0}, set(), {"Mixer", "ICM", "DPM"}),
        ({"grids": [[2, 1]]}, {"ICM", "DPM"}, set()),
        ({"icm_centres": "divergent"}, {"DivergentICM", "DPM"}, {"ICM"}),
        ({"norm": "batch"}, {"BatchNorm2d"}, {"GroupNorm"}),
        ({"norm": "none", "layer_scale": None}, {"ICM"}, {"GroupNorm", "BatchNorm2d"}),
    ],
)
def test_every_component_switches_off(overrides: dict[str, Any], present: set[str], absent: set[str]) -> None:
    model = small_model("paper", **overrides)
    kinds = {type(m).__name__ for m in model.modules()}
    assert present <= kinds and not absent & kinds
    with torch.no_grad():
        logits = model(photo(32, 32))
        assert overrides == {} or not torch.equal(logits, small_model("paper")(photo(32, 32)))
    assert logits.shape == (2, 1, 32, 32)


def test_the_remaining_pdc_block_keeps_its_residual() -> None:
    angular = small_model("paper", central=False).blocks[0].mixer.dpm
    central = small_model("paper", angular=False).blocks[0].mixer.dpm
    assert (angular.pdc.kind, angular.residual) == ("angular", True)
    assert (central.pdc.kind, central.residual) == ("central", False)


@pytest.mark.parametrize(
    "overrides",
    [
        {"trace_widths": (), "encoder_input": "planes"},
        {"trace_widths": (16,)},
        {"encoder_input": "planes"},
        {"stem_gain": None},
        {"stem": "none"},
        {"stem_angular": 0},
        {"stages": [2, 4]},
        {"stages": [1, 2, 3]},
        {"encoder": "resnet18"},
        {"icm_alpha": 0.5},
    ],
)
def test_options_of_the_small_net(overrides: dict[str, Any]) -> None:
    model = FRDNet(PRESETS["lite"].replace(**overrides)).eval()
    with torch.no_grad():
        assert model(photo(40, 64)).shape == (2, 1, 40, 64)
    if "icm_alpha" in overrides:
        assert model.blocks[0].mixer.icm.alpha.item() == 0.5


@pytest.mark.parametrize(("kernel", "skip"), [(2, False), (3, True), (4, False)])
def test_every_transposed_convolution_doubles_the_size(kernel: int, skip: bool) -> None:
    model = small_model("paper", decoder_kernel=kernel, decoder_skip=skip)
    with torch.no_grad():
        assert model.logits(photo(64, 96)).shape == (2, 1, 64, 96)


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize(
    # Both sum in another order. In float64 that is far below any gap between two cosines of random data, so
    # labels agree; in float32 an error of 1e-6 per layer grows over the residual stack and its norms.
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 2e-3)],
)
def test_fused_and_reference_give_the_same_logits(preset: str, dtype: torch.dtype, tolerance: float) -> None:
    model, images = small_model(preset).to(dtype), photo(160, 192).to(dtype)
    with torch.no_grad():
        fused = model(images)
        with fk.use_backend("reference"):
            reference = model(images)
        scale = reference.std().item()
        without = copy.deepcopy(model)
        without.blocks = without.blocks[:1]
        effect = (without(images) - reference).abs().max().item()
    assert effect > 0.1 * scale, "the blocks must matter, else this compares nothing"
    torch.testing.assert_close(fused, reference, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_channels_last_gives_the_same_logits(preset: str) -> None:
    model, images = small_model(preset), photo(64, 64)
    with torch.no_grad():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=0, atol=2e-3 * plain.std().item())


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [*((preset, {}) for preset in PRESET_NAMES), ("paper", {"icm_centres": "divergent"})],
)
def test_every_parameter_gets_a_gradient(preset: str, overrides: dict[str, Any]) -> None:
    model = small_model(preset, **overrides).train()
    model(photo(64, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # Paper: keys learn through the dense similarities of the dispatch alone (no gradient through labels).
    silent = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert silent == []


def divergent_by_hand(icm: DivergentICM, x: Tensor) -> Tensor:
    """The formula in loops over tokens and centres, for grids that divide the sides. [B, C, H, W] -> the same."""
    out = torch.empty_like(x)
    for b, image in enumerate(x):
        tokens, (height, width) = image.flatten(1).T, image.shape[1:]
        product = torch.eye(len(tokens), dtype=x.dtype)
        for project, (rows, columns) in zip(icm.rounds, icm.grids, strict=True):
            keys, values = project(tokens)
            bins = [
                [r * width + c for r in range(height) for c in range(width)
                 if (r * rows // height, c * columns // width) == (i, j)]
                for i in range(rows) for j in range(columns)
            ]  # fmt: skip
            pooled = torch.stack([keys[own].mean(0) for own in bins])
            cosines = torch.stack([F.cosine_similarity(key, pooled, dim=1) for key in keys])
            labels = cosines.argmax(1)
            tokens = torch.stack([
                (values[own].mean(0) + values[labels == o].sum(0)) / (1 + (labels == o).sum())
                for o, own in enumerate(bins)
            ])  # fmt: skip
            product, (height, width) = product @ cosines, (rows, columns)
        pairs = [(i, j) for i in range(len(tokens)) for j in range(i + 1, len(tokens))]
        alike = [F.cosine_similarity(tokens[i], tokens[j], dim=0).item() for i, j in pairs]
        pair = list(pairs[alike.index(min(alike))])
        dispatched = torch.sigmoid(icm.alpha * product[:, pair] + icm.beta) @ tokens[pair]
        out[b] = dispatched.T.unflatten(1, image.shape[1:])
    return out


@pytest.mark.parametrize("grids", [((4, 4), (2, 2)), ((4, 2),)])
def test_divergent_centres_are_the_formula(grids: tuple[tuple[int, int], ...]) -> None:
    torch.manual_seed(0)
    icm = DivergentICM(6, grids=grids).double()
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    variables = [x, *icm.parameters()]
    out, want = icm(x), divergent_by_hand(icm, x)
    torch.testing.assert_close(out, want)
    grads = torch.autograd.grad((out * weight).sum(), variables)
    want_grads = torch.autograd.grad((want * weight).sum(), variables)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad)


def test_divergent_centres_choose_per_image_and_the_first_of_equal_pairs() -> None:
    centres = torch.tensor([[[1.0, 0], [1, 0.1], [-2, 0], [0, 1]], [[0, 1], [1, 0], [0, 2], [3, 0]]])
    assert most_divergent(centres).tolist() == [[0, 2], [0, 1]]


def test_divergent_centres_replace_the_last_round() -> None:
    icm = small_model("paper", icm_centres="divergent").blocks[0].mixer.icm
    assert icm.grids == ((8, 8), (4, 4)) and icm.alpha.item() == 1 / 64
    with torch.autocast("cpu", torch.bfloat16):
        assert small_model("paper", icm_centres="divergent")(photo(64, 64)).isfinite().all()


def test_a_configuration_without_the_choice_of_centres_is_the_default() -> None:
    old = {k: v for k, v in PRESETS["paper"].to_dict().items() if k != "icm_centres"}
    assert FRDNetConfig.from_dict(old) == PRESETS["paper"] and PRESETS["paper"].icm_centres == "last"


def test_the_small_net_learns_to_see_noise() -> None:
    torch.manual_seed(0)
    model = create_model("frdnet_mit_b0", preset="lite").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 8:40, 8:40] = 1
    mask[1, :, 20:60, 24:56] = 1
    images = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64) + 0.3 * mask * torch.randn(2, 3, 64, 64)
    losses = []
    for _ in range(25):
        loss = F.binary_cross_entropy_with_logits(model(images), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.build
@pytest.mark.timeout(1200)  # g++ compiles for two minutes, on a machine that is busy for five
def test_compiles_whole() -> None:
    model, images = small_model("lite"), photo(64, 64)[:1]
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-3)


def test_a_net_without_an_image_head_takes_the_other_weights(tmp_path):
    net = create_model("frdnet_mit_b0", preset="lite", image_head=True)
    save_model(net, tmp_path / "with.safetensors")
    loaded = create_model("frdnet_mit_b0", preset="lite", pretrained=tmp_path / "with.safetensors")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), net.eval()(images))
    save_model(loaded, tmp_path / "without.safetensors")
    with pytest.warns(UserWarning, match="has no image head; the model's own keeps its weights"):
        again = create_model(
            "frdnet_mit_b0", preset="lite", image_head=True, pretrained=tmp_path / "without.safetensors"
        )
    with torch.no_grad():
        assert torch.equal(again.eval()(images), net(images))


def test_image_head():
    net = create_model("frdnet_mit_b0", preset="lite", image_head=True).eval()
    images = torch.rand(2, 3, 70, 90)
    with torch.no_grad():
        logits, score = net.with_score(images)
        assert score.shape == (2,) and torch.equal(logits, net(images))
        torch.testing.assert_close(net.with_score(images[1:])[1], score[1:], atol=1e-5, rtol=1e-5)
        assert torch.equal(net(images, score=1)[1], score)
        traced = torch.fx.symbolic_trace(net, {"valid_size": None, "score": True})(images, None, True)
        assert torch.equal(traced[1], score)
        exported = torch.export.export(net, (images,), {"score": True}).module()(images, score=True)
        torch.testing.assert_close(exported[1], score)
    with pytest.raises(NotImplementedError, match="valid_size: must be None for a score, got sizes"):
        net(images, torch.tensor([[70, 90], [40, 50]]), score=True)
    plain = create_model("frdnet_mit_b0", preset="lite")
    with pytest.raises(ValueError, match="image_head: must be true"):
        plain.with_score(images)
    with pytest.raises(ValueError, match="image_head: belongs to the pyramid decoder only"):
        create_model("frdnet_mit_b0", preset="paper", image_head=True)
    net.train()
    net.with_score(images)[1].sum().backward()
    assert net.decoder.head.weight.grad is None, "the map learns from its own loss alone"
