"""The MiT encoder against a plain forward pass over the original checkpoint's names, and its loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from frd_model.encoder import MIT_SIZES, MixTransformer, create_encoder
from frd_model.weights import load_encoder_weights

State = dict[str, Tensor]
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)


def original_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``mit_b*.pth``, spelled out."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(where: str, *weight: int) -> None:
        shapes[f"{where}.weight"] = weight
        shapes[f"{where}.bias"] = weight[:1]

    depths, dims = MIT_SIZES[name]
    for i in range(4):
        d, source = dims[i], (3, *dims)[i]
        kernel = 7 if i == 0 else 3
        layer(f"patch_embed{i + 1}.proj", d, source, kernel, kernel)
        layer(f"patch_embed{i + 1}.norm", d)
        layer(f"norm{i + 1}", d)
        for j in range(depths[i]):
            at = f"block{i + 1}.{j}"
            layer(f"{at}.norm1", d)
            layer(f"{at}.norm2", d)
            layer(f"{at}.attn.q", d, d)
            layer(f"{at}.attn.kv", 2 * d, d)
            layer(f"{at}.attn.proj", d, d)
            if REDUCTIONS[i] > 1:
                layer(f"{at}.attn.sr", d, d, REDUCTIONS[i], REDUCTIONS[i])
                layer(f"{at}.attn.norm", d)
            layer(f"{at}.mlp.fc1", 4 * d, d)
            layer(f"{at}.mlp.dwconv.dwconv", 4 * d, 1, 3, 3)
            layer(f"{at}.mlp.fc2", d, 4 * d)
    return shapes


def random_state(name: str, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in original_shapes(name).items():
        scale = (shape[1:] and torch.tensor(shape[1:]).prod().item() ** -0.5) or 0.1
        state[key] = scale * torch.randn(shape, generator=generator)
        if len(shape) == 1 and "norm" in key and key.endswith("weight"):
            state[key] += 1
    return state


def plain_forward(state: State, name: str, x: Tensor) -> list[Tensor]:
    """MiT from its definition, straight from the original names; attention as softmax(q k^T) v."""

    def linear(at: str, t: Tensor) -> Tensor:
        return t @ state[f"{at}.weight"].T + state[f"{at}.bias"]

    def norm(at: str, t: Tensor, eps: float) -> Tensor:
        return F.layer_norm(t, t.shape[-1:], state[f"{at}.weight"], state[f"{at}.bias"], eps)

    def conv(at: str, t: Tensor, stride: int, padding: int, groups: int = 1) -> Tensor:
        return F.conv2d(t, state[f"{at}.weight"], state[f"{at}.bias"], stride, padding, groups=groups)

    def to_tokens(t: Tensor) -> Tensor:
        return t.flatten(2).transpose(1, 2)

    maps = []
    for i, depth in enumerate(MIT_SIZES[name].depths):
        x = conv(f"patch_embed{i + 1}.proj", x, 4 if i == 0 else 2, 3 if i == 0 else 1)
        b, d, h, w = x.shape
        t = norm(f"patch_embed{i + 1}.norm", to_tokens(x), 1e-5)
        for j in range(depth):
            at = f"block{i + 1}.{j}"
            y = norm(f"{at}.norm1", t, 1e-6)
            source = y
            if REDUCTIONS[i] > 1:
                shrunk = conv(
                    f"{at}.attn.sr", y.transpose(1, 2).reshape(b, d, h, w), stride=REDUCTIONS[i], padding=0
                )
                source = norm(f"{at}.attn.norm", to_tokens(shrunk), 1e-5)
            size = d // HEADS[i]
            q = linear(f"{at}.attn.q", y)
            k, v = linear(f"{at}.attn.kv", source).split(d, dim=-1)
            heads = []
            for n in range(HEADS[i]):
                own = slice(n * size, (n + 1) * size)
                scores = q[..., own] @ k[..., own].transpose(1, 2) / size**0.5
                heads.append(scores.softmax(-1) @ v[..., own])
            t = t + linear(f"{at}.attn.proj", torch.cat(heads, -1))
            y = linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", t, 1e-6))
            y = conv(f"{at}.mlp.dwconv.dwconv", y.transpose(1, 2).reshape(b, 4 * d, h, w), 1, 1, groups=4 * d)
            t = t + linear(f"{at}.mlp.fc2", F.gelu(to_tokens(y)))
        x = norm(f"norm{i + 1}", t, 1e-6).transpose(1, 2).reshape(b, d, h, w)
        maps.append(x)
    return maps


def huggingface_state(state: State) -> State:
    """The same weights as Hugging Face's SegformerForImageClassification names them."""
    layers = {
        "norm1": "layer_norm_1",
        "norm2": "layer_norm_2",
        "attn.q": "attention.self.query",
        "attn.proj": "attention.output.dense",
        "attn.sr": "attention.self.sr",
        "attn.norm": "attention.self.layer_norm",
        "mlp.fc1": "mlp.dense1",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
        "mlp.fc2": "mlp.dense2",
    }
    renamed = {}
    for key, tensor in state.items():
        where, leaf = key.rsplit(".", 1)
        if where.startswith("patch_embed"):
            stage, layer = int(where[11]) - 1, where[13:]
            layer = {"proj": "proj", "norm": "layer_norm"}[layer]
            renamed[f"segformer.encoder.patch_embeddings.{stage}.{layer}.{leaf}"] = tensor
        elif where.startswith("norm"):
            renamed[f"segformer.encoder.layer_norm.{int(where[4]) - 1}.{leaf}"] = tensor
        else:
            block, number, layer = where.split(".", 2)
            at = f"segformer.encoder.block.{int(block[5]) - 1}.{number}"
            if layer == "attn.kv":
                half = len(tensor) // 2
                renamed[f"{at}.attention.self.key.{leaf}"] = tensor[:half].clone()
                renamed[f"{at}.attention.self.value.{leaf}"] = tensor[half:].clone()
            else:
                renamed[f"{at}.{layers[layer]}.{leaf}"] = tensor
    renamed["classifier.weight"] = torch.zeros(1000, 256)
    renamed["classifier.bias"] = torch.zeros(1000)
    return renamed


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("source", ["original", "original in a checkpoint", "huggingface", "safetensors"])
def test_loaded_weights_compute_the_definition(tmp_path: Path, source: str, images: Tensor) -> None:
    state = random_state("mit_b0")
    path = tmp_path / "weights.bin"
    if source == "huggingface":
        torch.save(huggingface_state(state), path)
    elif source == "safetensors":
        save_file(huggingface_state(state), path)
    elif source == "original":
        torch.save({**state, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    encoder = MixTransformer("mit_b0").eval()
    load_encoder_weights(encoder, path)
    with torch.no_grad():
        got = encoder(images)
    want = plain_forward(state, "mit_b0", images)
    assert [list(m.shape[1:]) for m in got] == [[32, 16, 24], [64, 8, 12], [160, 4, 6], [256, 2, 3]]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(MIT_SIZES))
def test_every_size_holds_the_original_names(name: str) -> None:
    with torch.device("meta"):
        encoder = MixTransformer(name)
    assert sum(p.numel() for p in encoder.parameters()) == sum(
        torch.Size(shape).numel() for shape in original_shapes(name).values()
    )


def test_unused_stages_are_not_built_and_their_weights_ignored(tmp_path: Path, images: Tensor) -> None:
    state = random_state("mit_b0")
    torch.save(state, tmp_path / "mit_b0.pth")
    encoder = MixTransformer("mit_b0", stages=(1, 3)).eval()
    load_encoder_weights(encoder, tmp_path / "mit_b0.pth")
    assert (encoder.channels, encoder.reductions, len(encoder.stages)) == ((32, 160), (4, 16), 3)
    want = plain_forward(state, "mit_b0", images)
    with torch.no_grad():
        for a, b in zip(encoder(images), (want[0], want[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_further_input_planes_start_silent(tmp_path: Path, images: Tensor) -> None:
    torch.save(random_state("mit_b0"), tmp_path / "mit_b0.pth")
    plain, wide = MixTransformer("mit_b0", stages=(1,)), MixTransformer("mit_b0", in_channels=5, stages=(1,))
    for encoder in (plain.eval(), wide.eval()):
        load_encoder_weights(encoder, tmp_path / "mit_b0.pth")
    with torch.no_grad():
        got = wide(torch.cat((images, torch.randn(2, 2, 64, 96)), dim=1))[0]
        torch.testing.assert_close(got, plain(images)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("block1.0.attn.q.weight"), "1 missing parameters (block1.0.attn.q.weight)"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected parameters (extra)"),
        (
            lambda s: s.update({"norm4.bias": torch.zeros(7)}),
            "norm4.bias: shape [256] is needed, got [7]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    state = random_state("mit_b0")
    change(state)
    path = tmp_path / "mit_b0.pth"
    torch.save(state, path)
    with pytest.raises(ValueError) as caught:
        load_encoder_weights(MixTransformer("mit_b0"), path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_sizes_do_not_load(tmp_path: Path) -> None:
    torch.save(random_state("mit_b0"), tmp_path / "mit_b0.pth")
    with pytest.raises(ValueError, match=r"shape \[64, 3, 7, 7\] is needed, got \[32, 3, 7, 7\]"):
        load_encoder_weights(MixTransformer("mit_b1"), tmp_path / "mit_b0.pth")


def test_a_timm_backbone_serves_as_encoder(tmp_path: Path, images: Tensor) -> None:
    encoder = create_encoder("resnet18", 3, (2, 5), 0.1).eval()
    with torch.no_grad():
        maps = encoder(images)
    assert [tuple(m.shape) for m in maps] == [(2, 64, 16, 24), (2, 512, 2, 3)]
    assert (encoder.channels, encoder.reductions) == ((64, 512), (4, 32))
    torch.save(random_state("mit_b0"), tmp_path / "mit_b0.pth")
    with pytest.raises(ValueError, match="encoder weights fit a MiT only, got TimmEncoder"):
        load_encoder_weights(encoder, tmp_path / "mit_b0.pth")


def test_unknown_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder: timm gives no maps .* of 'mit_b9'"):
        create_encoder("mit_b9", 3, (4,), 0.1)
    with pytest.raises(ValueError, match=r"stages: mit_b0 has stages 1 to 4, got \(5,\)"):
        create_encoder("mit_b0", 3, (5,), 0.1)
