"""FRD-Net on timm's backbones and in timm's registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from frd_model import FRDNet, create_model, load_model, register_timm, save_model

TINY = {"stages": (1, 2), "blocks": 1, "pyramid_width": 8, "trace_widths": (8, 8)}


def test_frd_blocks_on_convnext(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model("frdnet_convnext_tiny", blocks=1, decoder_widths=(16, 8, 8, 8))
    images = torch.randn(2, 3, 70, 40)
    logits = net.train()(images)
    assert logits.shape == (2, 1, 70, 40)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    # The blocks run on the backbone's last map, at 1/32.
    body = timm.create_model("convnext_tiny", features_only=True, out_indices=(3,)).eval()
    body.load_state_dict(net.encoder.body.state_dict())
    seen: list[torch.Tensor] = []
    net.eval().blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        before = net(images[:, :, :64, :32])
        torch.testing.assert_close(seen[0], body(images[:, :, :64, :32])[0])
    assert seen[0].shape == (2, 768, 2, 1)
    net.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(FRDNet.from_pretrained(tmp_path)(images[:, :, :64, :32]), before)


def test_the_registry_makes_the_same_net(tmp_path: Path) -> None:
    register_timm()
    register_timm()
    assert timm.list_models("frdnet*") == [f"frdnet_mit_b{i}" for i in range(6)]
    torch.manual_seed(0)
    net = timm.create_model("frdnet_mit_b0", preset="lite", num_classes=None, **TINY)
    torch.manual_seed(0)
    own = create_model("frdnet_mit_b0", "lite", **TINY)
    assert isinstance(net, FRDNet) and net.config == own.config
    for key, value in own.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)
    save_model(own, tmp_path / "net.safetensors")
    for source in (
        {"pretrained": str(tmp_path / "net.safetensors")},
        {"checkpoint_path": tmp_path / "net.safetensors"},
    ):
        again = timm.create_model("frdnet_mit_b0", preset="lite", **source, **TINY)
        for key, value in load_model(tmp_path / "net.safetensors").state_dict().items():
            assert torch.equal(again.state_dict()[key], value)


def test_what_the_registry_cannot_give_is_refused() -> None:
    register_timm()
    with pytest.raises(ValueError, match=r"pretrained: frdnet_mit_b0 has no weights here; give a file"):
        timm.create_model("frdnet_mit_b0", pretrained=True)
    with pytest.raises(ValueError, match=r"pretrained_cfg: must be left out for frdnet_mit_b0, got 'in1k'"):
        timm.create_model("frdnet_mit_b0.in1k")
    with pytest.raises(ValueError, match="unknown field 'num_classes'"):
        timm.create_model("frdnet_mit_b0", num_classes=10)


def test_importing_imports_neither_torch_nor_timm() -> None:
    code = (
        "import sys, frd_model; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
