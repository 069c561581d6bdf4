"""What in a network depends on where a crop's border runs: the shift test with one part changed at a time.

python -m benchmarks.place --photos DIR --checkpoint demo --out benchmarks/results/demo/place.json

Every photo of 640 x 640 pixels or more gives a view of that size at its own scale: once with a small edit by
`frd_model.data.Forger`, once untouched. Crops of 256 lie in its inner 512 x 512 pixels, so that 64 pixels of true
surroundings are left around each. Nothing is trained: paddings, surroundings and norms change when the network runs.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frd_model import load_model
from frd_model.data.forge import Forger
from frd_model.data.forge_options import ForgeOptions
from frd_model.data.images import read_image, write_json
from frd_model.labelled import Labelled
from frd_model.predict import probability_map
from frd_model.shift_test import Look, ShiftTest, Window, look_with
from frd_model.weights import demo_path

CONTEXT, VIEW = 64, 640
KINDS = ("splicing", "copy_move", "removal")
# Small enough for crops to move, and without a hand-off, which would change the view's size.
SMALL = ForgeOptions(
    area=(0.005, 0.03),
    removal_area=(0.005, 0.03),
    cut_by_frame=False,
    handoff=0.0,
    handoff_resize=0.0,
    handoff_crop=0.0,
)
# The padded convolutions: of the encoder its patch embeddings and depthwise ones, and those of the other parts.
PARTS = ("trace", "patch_embed", "dwconv", "blocks", "decoder")


def views(folder: Path) -> Iterator[Labelled]:
    """An edited and an untouched view of each photo that is large enough."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".jpg", ".png"))
    number, previous = 0, None
    for file in files:
        photo = read_image(file)
        if min(photo.shape[:2]) < VIEW:
            continue
        rng = np.random.default_rng([0, number])
        top, left = (int(rng.integers(n - VIEW + 1)) for n in photo.shape[:2])
        view = np.ascontiguousarray(photo[top : top + VIEW, left : left + VIEW])
        forger, kind = Forger(rng, SMALL), KINDS[number % len(KINDS)]
        for _ in range(20):
            made = forger.forge(view, view if previous is None else previous, kind)
            inner = made.mask.copy()
            inner[2 * CONTEXT : -2 * CONTEXT, 2 * CONTEXT : -2 * CONTEXT] = False
            if not inner.any():
                yield Labelled(file.stem, kind, made.image, made.mask)
                break
        yield Labelled(file.stem, "authentic", forger.authentic(view).image, np.zeros((VIEW, VIEW), np.bool_))
        number, previous = number + 1, view


def padded_by(model: nn.Module, mode: str, parts: Sequence[str] = PARTS) -> nn.Module:
    """A copy in which the convolutions of these parts pad by `mode`. The stem's differences are not among them."""
    changed = copy.deepcopy(model)
    for name, module in changed.named_modules():
        if isinstance(module, nn.Conv2d) and any(module.padding) and _part(name) in parts:
            module.padding_mode = mode
    return changed


def padding_of(model: nn.Module) -> set[str]:
    """The padding modes of the convolutions that `padded_by` changes."""
    padded = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and any(m.padding))
    return {m.padding_mode for n, m in padded if _part(n) in PARTS}


def _part(name: str) -> str:
    pieces = name.split(".")
    return next((p for p in PARTS if p in (pieces if "encoder" in pieces else pieces[:1])), "")


class WholeNorms:
    """GroupNorm statistics of the whole view instead of the crop's own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen, self.known = copy.deepcopy(model), None, {}
        for module in self.model.modules():
            if isinstance(module, nn.GroupNorm):
                module.forward = self._forward(module)  # type: ignore[method-assign]

    def _forward(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            grouped = x.reshape(len(x), norm.num_groups, -1)
            if self.seen is None:
                self.known[norm] = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
            mean, variance = self.known[norm]
            y = ((grouped - mean) / (variance + norm.eps).sqrt()).view_as(x)
            return y * norm.weight[:, None, None] + norm.bias[:, None, None]

        return forward

    def see(self, view: npt.NDArray[np.uint8]) -> None:
        self.seen = None
        probability_map(view, self.model, size="whole")
        self.seen = view


def in_the_view(look: Look, margin: int = 0, see: Callable[[Any], None] | None = None) -> tuple[Look, Any]:
    """`look` at windows of the inner view, widened by `margin` pixels before the net and cut after it."""
    current: dict[str, Any] = {}

    def begin(view: npt.NDArray[np.uint8]) -> None:
        current["view"] = view
        if see is not None:
            see(view)

    def widened(_: npt.NDArray[np.uint8], window: Window) -> npt.NDArray[np.float32]:
        top, left, bottom, right = (v + CONTEXT for v in window)
        found = look(current["view"], Window(top - margin, left - margin, bottom + margin, right + margin))
        return found[margin : found.shape[0] - margin, margin : found.shape[1] - margin]

    return widened, begin


def mirrored(look: Look) -> Look:
    """`look` at the crop with a mirrored border of `CONTEXT` pixels, which is cut off again."""

    def wide(photo: npt.NDArray[np.uint8], window: Window) -> npt.NDArray[np.float32]:
        crop = np.pad(window.of(photo), ((CONTEXT, CONTEXT), (CONTEXT, CONTEXT), (0, 0)), "reflect")
        return look(crop, Window(0, 0, *crop.shape[:2]))[CONTEXT:-CONTEXT, CONTEXT:-CONTEXT]

    return wide


def measure(samples: list[Labelled], look: Look, begin: Callable[[Any], None]) -> dict[str, Any]:
    test = ShiftTest(look)
    inner = slice(CONTEXT, -CONTEXT)
    for s in samples:
        begin(s.image)
        test.add(Labelled(s.name, s.kind, s.image[inner, inner], s.mask[inner, inner]))
    if test.failed:
        raise RuntimeError(f"every crop must be predicted, got {test.failed[0]}")
    return test.summary()


def on_noise(model: nn.Module, images: int = 8, side: int = 256) -> dict[str, float]:
    """Mean probability far from the border and beside it, of noise that is the same everywhere."""
    rng, maps = np.random.default_rng(0), np.zeros((side, side))
    for _ in range(images):
        grey = torch.from_numpy(rng.normal(size=(1, 3, side, side)).astype(np.float32))
        # neighbours depend on each other as in a photo; circular, so that the image has no border of its own
        soft = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), "circular"), 3, 1)[0].permute(1, 2, 0).numpy()
        image = np.clip(np.rint(128 + 60 * soft), 0, 255).astype(np.uint8)
        maps += probability_map(image, model, size="whole") / images
    far = np.zeros((side, side), np.bool_)
    far[64:-64, 64:-64] = True
    beside = np.ones((side, side), np.bool_)
    beside[16:-16, 16:-16] = False
    return {"middle": float(maps[far].mean()), "border": float(maps[beside].mean())}


def _in(model: nn.Module, mode: str, parts: Sequence[str]) -> tuple[Look, Any]:
    return in_the_view(look_with(padded_by(model, mode, parts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, action="append", required=True, metavar="DIR")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    model = load_model(args.checkpoint, "cpu")
    samples = [sample for folder in args.photos for sample in views(folder)]
    other = "zeros" if padding_of(model) == {"replicate"} else "replicate"
    norms, both = WholeNorms(model), WholeNorms(padded_by(model, other))
    variants: dict[str, tuple[Look, Any]] = {
        "as it is": in_the_view(look_with(model)),
        **{
            f"{mode} padding": in_the_view(look_with(padded_by(model, mode)))
            for mode in ("zeros", "replicate", "reflect")
            if padding_of(model) != {mode}
        },
        f"{CONTEXT} pixels of surroundings": in_the_view(look_with(model), CONTEXT),
        f"{CONTEXT} pixels of the crop mirrored": in_the_view(mirrored(look_with(model))),
        "norm statistics of the whole view": in_the_view(look_with(norms.model), 0, norms.see),
        f"{other} padding, norm statistics of the whole view": in_the_view(
            look_with(both.model), 0, both.see
        ),
        **{f"{other} padding in {part} alone": _in(model, other, (part,)) for part in PARTS},
        **{
            f"{other} padding in all but {part}": _in(model, other, [p for p in PARTS if p != part])
            for part in PARTS
        },
    }
    weights = demo_path() if args.checkpoint == "demo" else Path(args.checkpoint)
    result: dict[str, Any] = {
        "checkpoint": args.checkpoint,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "variants": {},
    }
    for name, (look, begin) in variants.items():
        start = time.perf_counter()
        found = measure(samples, look, begin)
        result["variants"][name] = found
        auc, flat = found["forged"]["auc"], found["untouched"]["probability"]
        print(
            f"{name:<55} AUC {auc['middle']['mean']:.4f} {auc['border']['mean']:.4f} {auc['difference']['mean']:+.4f} "
            f"[{auc['difference']['low']:+.3f}, {auc['difference']['high']:+.3f}]  untouched "
            f"{flat['middle']['mean']:.4f} {flat['border']['mean']:.4f}  n {found['forged']['images']}, "
            f"{found['untouched']['images']}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        write_json(args.out, result)
    result["noise"] = {
        mode: on_noise(padded_by(model, mode)) for mode in ("zeros", "replicate", "reflect", "circular")
    }
    print("noise", result["noise"])
    write_json(args.out, result)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
