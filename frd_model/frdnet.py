"""FRD-Net (AAAI 2026): an encoder, FRD blocks on its coarsest map, and a decoder to one logit per pixel."""

from __future__ import annotations

import json
import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .blocks import FRDBlock
from .config import FRDNetConfig
from .decoder import DeconvDecoder, PyramidDecoder
from .encoder import create_encoder
from .hub import CARD, CONFIG, WEIGHTS, local_file, parse
from .score import ScoreRule
from .stem import PDCStem, TraceBranch

#: The logit of pixels outside the valid size: a probability of 1e-13, finite in half precision.
OUTSIDE = -30.0
#: True while `frd_model.export` traces a program of torch.export for images of every size.
every_side: ContextVar[bool] = ContextVar("every_side", default=False)


class FRDNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="frd-kernels",
    pipeline_tag="image-segmentation",
    tags=["image-manipulation-localization"],
    model_card_template=CARD,
):
    """Image manipulation localization.

    `save_pretrained(folder)` and `push_to_hub("owner/name")` of huggingface_hub write model.safetensors, a file of
    :func:`save_model`, and config.json.

    Args:
        config: see :class:`FRDNetConfig`.

    Shape: images [B, 3, H, W], ImageNet-normalised -> logits [B, 1, H, W]; their sigmoid is the probability
    that a pixel was manipulated. Any H, W >= 1: the image is padded on the right and at the bottom, by
    repeating its last column and row, to multiples of the encoder's coarsest stride (32), and the logits are
    cropped back.

    A batch of images of several sizes, each padded to [H, W] on the right and at the bottom, comes with `valid_size`,
    integers [B, 2]: the height and width of each image itself. Logits and gradients are then those of the images
    without the margins, whose content is never read; in the margins the logits are -30 and have no gradient. Images
    that take equally many multiples of the stride are computed together, others one after the other.

    Raises:
        ValueError: images are not [B, 3, H, W] with H, W >= 1; valid_size is not [B, 2] within the images.
        TypeError: images are not floating point, valid_size is not an integer tensor.
        NotImplementedError: training with batch normalisation on images that are not computed together; a score of
            images with a valid_size.
    """

    #: How :func:`predict` scores and judges photos, from the checkpoint; None: not calibrated. It holds for the weights
    #: that it was measured with: `train()` and other weights remove it.
    score_rule: ScoreRule | None = None

    def __init__(self, config: FRDNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = (
            PDCStem(config.stem_central, config.stem_angular, config.stem_gain)
            if config.stem == "pdc"
            else None
        )
        planes = 3 if self.stem is None else self.stem.channels
        self.trace = TraceBranch(planes, config.trace_widths) if config.trace_widths else None
        at_half_size = config.encoder_input == "trace"
        encoder_channels = config.trace_widths[0] if at_half_size else planes
        self.encoder = create_encoder(config.encoder, encoder_channels, config.stages, config.drop_path)
        channels = self.encoder.channels
        scale = 2 if at_half_size else 1
        self.multiple = max(32, scale * max(self.encoder.reductions))
        # MiT's first stage reduces its keys 8 times at 1/4 of the input's size, so a side has 32 pixels or more.
        self.min_side = 32 * scale
        self.blocks = nn.ModuleList(FRDBlock(channels[-1], config) for _ in range(config.blocks))
        self.decoder: nn.Module
        if config.decoder == "deconv":
            source = channels[-1] * (2 if config.decoder_skip else 1)
            self.decoder = DeconvDecoder(source, config.decoder_widths, config.decoder_kernel)
        else:
            self.decoder = PyramidDecoder(channels, config)

    def train(self, mode: bool = True) -> FRDNet:
        if mode:
            self.score_rule = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.score_rule = None
        super()._load_from_state_dict(*args)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> FRDNet:
        """A net in eval mode, with its `score_rule`.

        Args:
            name: ``owner/name`` on the Hub, or whatever :func:`load_model` takes; a local file or folder goes first.
            revision: branch, tag or commit on the Hub.
            map_location: device of the net.
            token, cache_dir, force_download, local_files_only: of `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError, ValueError: see :func:`load_model`.
            NotImplementedError: called on a class derived from FRDNet.
        """
        from .weights import load_model

        if cls is not FRDNet:
            raise NotImplementedError(
                f"from_pretrained: makes an FRDNet, got {cls.__name__}; build one and use load_weights"
            )
        source = parse(name)
        if source is None and not os.path.exists(os.path.expanduser(name)):
            source = parse(f"hf://{name}") if str(name).count("/") == 1 else None
        if source is not None and revision is not None:
            source = source._replace(revision=revision)
        file = local_file(
            source or name,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return load_model(file, map_location)

    def _save_pretrained(self, save_directory: Path) -> None:
        from .weights import save_model

        save_model(self, save_directory / WEIGHTS)
        text = json.dumps(self.config.to_dict(), indent=2)
        (save_directory / CONFIG).write_text(text + "\n", encoding="utf-8")

    def with_score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 1, H, W] as `forward` gives them, and one logit per image [B]: that it was edited anywhere.

        Raises ValueError if the configuration has no `image_head`.
        """
        result: tuple[Tensor, Tensor] = self(images, score=True)
        return result

    def forward(self, images: Tensor, valid_size: Tensor | None = None, score: bool = False) -> Any:
        _check_images(images)
        # torch.fx traces the arguments that are left out as Proxies.
        if isinstance(valid_size, torch.fx.Proxy):
            valid_size = None
        if not isinstance(score, torch.fx.Proxy) and score:
            if not self.config.image_head:
                raise ValueError("image_head: must be true in the configuration for a score, got False")
            if valid_size is not None:
                raise NotImplementedError(
                    "valid_size: must be None for a score, got sizes; score each image alone"
                )
            x = _pad(images, self.multiple, self.min_side)
            with_score: Any = self.decoder.with_score
            logits, image_logits = with_score(*self._maps(x))
            return _fit(logits, x, images), image_logits
        if valid_size is not None:
            return self._without_margins(images, _sizes(valid_size, images))
        x = _pad(images, self.multiple, self.min_side)
        return _fit(self.logits(x), x, images)

    def _without_margins(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Logits of images [B, 3, H, W] of which each has its own size; OUTSIDE elsewhere.

        Crops instead of masks: bins of the clustering, borders of convolutions and interpolations depend on where the
        image ends, and margins cost no time.
        """
        groups: dict[tuple[int, ...], dict[int, Tensor]] = {}
        for i, (height, width) in enumerate(sizes):
            x = _pad(images[i : i + 1, :, :height, :width], self.multiple, self.min_side)
            groups.setdefault(tuple(x.shape[2:]), {})[i] = x
        if len(groups) > 1 and any(isinstance(m, _BatchNorm) and m.training for m in self.modules()):
            raise NotImplementedError(
                "valid_size: batch normalisation in training needs images of one size, got "
                f"{len(groups)}; resize or crop them, or use norm='group'"
            )
        found: dict[int, Tensor] = {}
        for group in groups.values():
            x = torch.cat(list(group.values()))
            found.update(zip(group, _fit(self.logits(x), x, x), strict=True))
        rows, columns = images.shape[2:]
        return torch.stack(
            [
                F.pad(found[i][:, :height, :width], (0, columns - width, 0, rows - height), value=OUTSIDE)
                for i, (height, width) in enumerate(sizes)
            ]
        )

    def logits(self, x: Tensor) -> Tensor:
        """Logits at the decoder's resolution, for images whose sides are multiples of `multiple`."""
        maps, traces = self._maps(x)
        if self.config.decoder == "pyramid":
            return self.decoder(maps, traces)
        final = maps[-1]
        return self.decoder(torch.cat((maps[-2], final), dim=1) if self.config.decoder_skip else final)

    def _maps(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the decoder reads: the encoder's maps after the FRD blocks, and those of the trace branch."""
        planes = x if self.stem is None else self.stem(x)
        traces = self.trace(planes) if self.trace is not None else []
        maps = self.encoder(traces[0] if self.config.encoder_input == "trace" else planes)
        final = maps[-1]
        for block in self.blocks:
            final = block(final)
        if self.config.decoder == "pyramid":
            return [*maps[:-1], final], traces
        return [*maps, final], traces


def _check_images(images: Tensor) -> None:
    # Under torch.jit.trace sizes are tensors, and a branch on them would become part of the trace.
    is_image = images.dim() == 4 and (
        torch.jit.is_tracing() or (images.shape[1] == 3 and images.shape[2] >= 1 and images.shape[3] >= 1)
    )
    if not is_image:
        raise ValueError(f"images: must be [B, 3, H, W] with H, W >= 1, got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: must be floating point, got {images.dtype}")


def _sizes(valid_size: Tensor, images: Tensor) -> list[tuple[int, int]]:
    is_integer = isinstance(valid_size, Tensor) and not (
        valid_size.is_floating_point() or valid_size.is_complex() or valid_size.dtype == torch.bool
    )
    if not is_integer:
        got = valid_size.dtype if isinstance(valid_size, Tensor) else type(valid_size).__name__
        raise TypeError(f"valid_size: must be an integer tensor, got {got}")
    if valid_size.shape != (len(images), 2):
        raise ValueError(f"valid_size: must be [{len(images)}, 2], got {list(valid_size.shape)}")
    # One wait for the device.
    sizes = [(int(height), int(width)) for height, width in valid_size.tolist()]
    rows, columns = images.shape[2:]
    wrong = [size for size in sizes if not (1 <= size[0] <= rows and 1 <= size[1] <= columns)]
    if wrong:
        raise ValueError(
            f"valid_size: must lie between 1 and the images' {rows} x {columns}, got {list(wrong[0])}"
        )
    return sizes


def _pad(images: Tensor, multiple: int, min_side: int) -> Tensor:
    below, right = (_missing(side, multiple, min_side) for side in images.shape[-2:])
    if not torch.jit.is_tracing() and not _is_symbolic(images) and not below and not right:
        return images
    return F.pad(images, (0, right, 0, below), mode="replicate")


def _is_symbolic(images: Tensor) -> bool:
    """Whether the images are being exported with symbolic sides."""
    return torch.compiler.is_exporting() and any(isinstance(side, torch.SymInt) for side in images.shape[-2:])


def _missing(side: Any, multiple: int, min_side: int) -> Any:
    """Pixels to pad up to the next multiple that is at least `min_side`."""
    if torch.jit.is_tracing():
        return torch.maximum(-side % multiple, min_side - side)
    if not (torch.compiler.is_exporting() and isinstance(side, torch.SymInt)):
        return max(-side % multiple, min_side - side)
    smallest = -(-min_side // multiple)
    # Counted in multiples, so that torch knows that the encoder's strides divide the sides.
    units: Any = (side + multiple - 1) // multiple
    if smallest > 1:
        units = torch.sym_max(units, smallest)
    if torch.onnx.is_in_onnx_export() or every_side.get():
        # A symbol of its own. Comparisons of an expression in the side are decided by the traced example: torch.export
        # adds a guard for each, ONNX does not check them. Not always, as Inductor on a CPU silently picks a wrong
        # layout for convolutions of such sizes (torch 2.14).
        units = torch.scalar_tensor(units, dtype=torch.int64).item()
        torch._check(units >= smallest)
        torch._check(units * multiple >= side)
    return units * multiple - side


def _fit(logits: Tensor, padded: Tensor, images: Tensor) -> Tensor:
    """Resize the logits to the padded images and crop them to the images."""
    size = padded.shape[-2:]
    if torch.jit.is_tracing() or logits.shape[-2:] != size:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    if _is_symbolic(images):
        # Whether a slice takes the whole axis would be decided by the traced example.
        for axis in (-2, -1):
            logits = logits.index_select(axis, torch.arange(images.shape[axis], device=images.device))
        return logits
    return logits[..., : images.shape[-2], : images.shape[-1]]


# torch.fx traces without sizes: each function that depends on them is one node of its graph.
for _name in ("_check_images", "_pad", "_fit"):
    torch.fx.wrap(_name)
