"""An edge net in the manner of PiDiNet (Su et al., ICCV 2021) whose difference convolutions are `frd_kernels.PDC2d`.

    python examples/pidinet.py                                   # random weights
    python examples/pidinet.py --checkpoint table5_pidinet.pth   # PiDiNet's own, converted or not

Prints the time of the net, of its folded form (plain convolutions only) and of eager PyTorch, and by how much their
logits differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import frd_kernels as fk
from frd_kernels import convert

DILATIONS = (5, 7, 9, 11)


class Block(nn.Module):
    """Depthwise PDC -> ReLU -> 1x1, plus the input. A block that changes the width halves the map first."""

    def __init__(self, source: int, target: int, kind: str, halve: bool) -> None:
        super().__init__()
        self.conv1 = fk.PDC2d(source, source, padding=1, groups=source, bias=False, kind=kind)
        self.conv2 = nn.Conv2d(source, target, 1, bias=False)
        self.shortcut = nn.Conv2d(source, target, 1) if halve else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return x + self.conv2(F.relu(self.conv1(x)))
        x = F.max_pool2d(x, 2)
        return self.shortcut(x) + self.conv2(F.relu(self.conv1(x)))


class Context(nn.Module):
    """The compact dilation convolution module: a 1x1 to few channels, then four dilated 3x3, summed."""

    def __init__(self, source: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(source, width, 1)
        for i, d in enumerate(DILATIONS, start=1):
            self.add_module(f"conv2_{i}", nn.Conv2d(width, width, 3, padding=d, dilation=d, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(x))
        return self.conv2_1(x) + self.conv2_2(x) + self.conv2_3(x) + self.conv2_4(x)


class Attention(nn.Module):
    """The compact spatial attention module: one weight in (0, 1) for each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(F.relu(x))).sigmoid()


class Reduce(nn.Module):
    """1x1 to one channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class EdgeNet(nn.Module):
    """Images [B, 3, H, W] with H, W >= 8 -> logits [B, 5, H, W]: edges by stages 1 to 4, and by all of them.

    Args:
        config: of `convert.pidinet_kinds`, the kind of each difference convolution.
        width: channels of the first stage: 60, 30 (small) or 20 (tiny).
        context: channels of the dilation modules: 24, 12 or 8; 0 for none (PiDiNet-L).
        attention: whether the attention modules are there (not in PiDiNet-L).
    """

    def __init__(
        self,
        config: str | Sequence[str] = "carv4",
        width: int = 60,
        context: int = 24,
        attention: bool = True,
    ) -> None:
        super().__init__()
        kinds = convert.pidinet_kinds(config)
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.init_block = fk.PDC2d(3, width, padding=1, bias=False, kind=kinds["init_block"])
        self.stages: list[list[str]] = [[], [], [], []]
        for name, kind in list(kinds.items())[1:]:
            block, stage = name.removesuffix(".conv1"), int(name[5]) - 1
            halve = stage > 0 and not self.stages[stage]
            source = widths[stage - 1] if halve else widths[stage]
            self.add_module(block, Block(source, widths[stage], kind, halve))
            self.stages[stage].append(block)
        self.dilations = nn.ModuleList(Context(w, context) for w in widths if context)
        sides = [context] * 4 if context else widths
        self.attentions = nn.ModuleList(Attention(w) for w in sides if attention)
        self.conv_reduces = nn.ModuleList(Reduce(w) for w in sides)
        self.classifier = nn.Conv2d(4, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.init_block(images)
        sides = []
        for i, blocks in enumerate(self.stages):
            for block in blocks:
                x = self.get_submodule(block)(x)
            side = self.dilations[i](x) if len(self.dilations) else x
            side = self.attentions[i](side) if len(self.attentions) else side
            side = self.conv_reduces[i](side)
            sides.append(F.interpolate(side, images.shape[2:], mode="bilinear", align_corners=False))
        maps = torch.cat(sides, dim=1)
        return torch.cat((maps, self.classifier(maps)), dim=1)


def load(checkpoint: Mapping[str, Any], config: str = "carv4") -> EdgeNet:
    """The net of a checkpoint of PiDiNet, converted to plain convolutions or not, with the modules that it has."""
    state = convert.from_pidinet(checkpoint, config)
    context = state.get("dilations.0.conv1.weight")
    net = EdgeNet(
        config,
        width=len(state["init_block.weight"]),
        context=0 if context is None else len(context),
        attention="attentions.0.conv1.weight" in state,
    )
    net.load_state_dict(state)
    return net.eval()


@torch.inference_mode()
def compare(net: nn.Module, images: Tensor, seconds: float) -> list[tuple[str, float, float]]:
    """For each form of the net: name, milliseconds (median), and its largest difference from the net's logits."""

    def eager(images: Tensor) -> Tensor:
        with fk.use_backend("reference"):
            return net(images)

    forms: dict[str, Callable[[Tensor], Tensor]] = {"PDC2d": net, "folded": convert.fold(net), "eager": eager}
    expected = net(images)
    rows = []
    for name, form in forms.items():
        error = (form(images) - expected).abs().max().item()
        timer = Timer(
            "form(images)", globals={"form": form, "images": images}, num_threads=torch.get_num_threads()
        )
        rows.append((name, 1e3 * timer.blocked_autorange(min_run_time=seconds).median, error))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a .pth of PiDiNet; default: random weights")
    parser.add_argument(
        "--config", default="carv4", help="kinds of the layers (default: carv4, PiDiNet's own)"
    )
    parser.add_argument(
        "--width", type=int, default=60, help="channels of the first stage, without --checkpoint"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(321, 481), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure each form for")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.checkpoint is None:
        net = EdgeNet(args.config, args.width, round(0.4 * args.width)).eval()
    else:
        net = load(torch.load(args.checkpoint, map_location="cpu", weights_only=True), args.config)
    images = torch.randn(1, 3, *args.size)
    with torch.inference_mode():
        largest = net(images).abs().max().item()
    count = sum(p.numel() for p in net.parameters())
    print(f"{count / 1e3:.0f} k parameters, {args.size[0]}x{args.size[1]}, {torch.get_num_threads()} threads")
    print(f"{'form':8} {'ms':>8}   max difference (largest logit {largest:.3g})")
    for name, milliseconds, error in compare(net, images, args.seconds):
        print(f"{name:8} {milliseconds:8.1f}   {error:.1e}")


if __name__ == "__main__":
    main()
