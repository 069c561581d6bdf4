"""FRD-Net as a model of IMDL-BenCo: importing this module registers it, for `--model FRDNet` in BenCo's scripts.

Run, it starts one of those scripts, unmodified, on the CPU where there is no GPU:

python -m frd_model.integrations.imdl_benco train|test|test_robust|test_complexity|test_save_images|FILE.py FLAGS
torchrun --standalone --nproc_per_node=2 -m frd_model.integrations.imdl_benco train FLAGS
"""

# No `from __future__ import annotations`: BenCo makes flags of the annotations of __init__, and takes them for types.

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from IMDLBenCo.registry import MODELS
except ImportError as error:
    problem = (
        "frd_model.integrations.imdl_benco: needs IMDL-BenCo (pip install imdlbenco requests einops), "
        f"got {error}"
    )
    if __name__ == "__main__":
        sys.exit(problem)
    raise ImportError(problem) from None

from frd_model.config import model_config
from frd_model.frdnet import FRDNet
from frd_model.losses import FRDLoss
from frd_model.weights import load_encoder_weights, load_model, load_weights, save_model

__all__ = ["BencoFRDNet", "main", "to_frd"]

SCRIPTS = ("train", "test", "test_robust", "test_complexity", "test_save_images")
USAGE = f"usage: python -m frd_model.integrations.imdl_benco {'|'.join(SCRIPTS)}|FILE.py FLAGS"


# Forced: as __main__ and under its own name, this module may be imported twice.
@MODELS.register_module(name="FRDNet", force=True)  # type: ignore[untyped-decorator, unused-ignore]
class BencoFRDNet(FRDNet):
    """An FRD-Net with its loss, called as BenCo calls its models; the state dict is that of :class:`FRDNet`.

    Args:
        encoder, preset: name and preset of :func:`frd_model.create_model`.
        pretrained: a checkpoint of the whole net, or ``demo``; empty for none.
        encoder_weights: a file with MiT weights; empty for none.
        loss_form, edge_weight, bce_weight: of :class:`frd_model.losses.FRDLoss`.
        edge_mask_width: BenCo's own flag, the width of the loss's edge band; None for 7.

    Raises:
        ValueError: an unknown name, a value out of its range, a file that does not fit.
    """

    def __init__(
        self,
        encoder: str = "frdnet_mit_b2",
        preset: str = "paper",
        pretrained: str = "",
        encoder_weights: str = "",
        loss_form: str = "released",
        edge_weight: float = 1.0,
        bce_weight: float = 0.0,
        edge_mask_width: int = 7,
    ) -> None:
        super().__init__(model_config(encoder, preset))
        if encoder_weights:
            load_encoder_weights(self.encoder, encoder_weights)
        if pretrained:
            load_weights(self, pretrained)
        # BenCo hands over None where its flag is not given.
        self.loss = FRDLoss(loss_form, edge_weight, edge_mask_width or 7, bce_weight)

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        mask: Tensor,
        shape: Tensor | None = None,
        shape_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One of BenCo's batches to its dict of results.

        Args:
            image: [B, 3, H, W], ImageNet-normalised.
            mask: [B, 1, H, W] in {0, 1}, of any dtype.
            shape: integers [B, 2], height and width of each image before padding or cropping to [H, W].
            shape_mask: [B, 1, H, W], above 0 inside the images; given with `--if_padding` only. The margins then have
                no influence on results, loss and gradients.

        Returns:
            ``backward_loss`` 0-d, ``pred_mask`` [B, 1, H, W] float32 probability (0 in margins), ``pred_label`` [B],
            the mean of the image's highest 1 %, which is `frd`'s score without a rule, ``visual_loss``,
            ``visual_image`` (empty).
        """
        valid_size = valid = None
        if shape is not None and shape_mask is not None:
            # Larger images are cropped at their lower right.
            valid_size = shape.minimum(shape.new_tensor(image.shape[2:]))
            valid = shape_mask > 0
        logits = super().forward(image, valid_size)
        terms = self.loss(logits, mask, valid)
        probability = logits.detach().float().sigmoid()
        if valid is not None:
            probability = probability.where(valid, 0.0)
        return {
            "backward_loss": terms["total"],
            "pred_mask": probability,
            "pred_label": _scores(probability, valid),
            "visual_loss": {name: term.detach() for name, term in terms.items()},
            "visual_image": {},
        }


def _scores(probability: Tensor, valid: Tensor | None) -> Tensor:
    """`frd_model.metrics.image_score` of each image."""
    flat = probability.flatten(1)
    inside = list(flat) if valid is None else [p[v] for p, v in zip(flat, valid.flatten(1), strict=True)]
    # While torch.jit.trace runs, as for test_complexity, sizes are tensors.
    return torch.stack([p.topk(max(1, round(0.01 * int(p.shape[0])))).values.mean() for p in inside])


def to_frd(checkpoint: str | Path, out: str | Path, encoder: str, preset: str) -> None:
    """Write BenCo's checkpoint-N.pth as a file of :func:`frd_model.save_model`, which holds its configuration.

    Args:
        encoder, preset: the flags that it was trained with.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it does not hold this net.
    """
    save_model(load_model(checkpoint, model=encoder, preset=preset), out)


def main(argv: list[str]) -> None:
    """Run the script argv[0], one of `SCRIPTS` or a file that `benco init` made, with the flags that follow."""
    if not argv:
        sys.exit(USAGE)
    if argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    script, *flags = argv
    own = script.endswith(".py")
    if not own and script not in SCRIPTS:
        sys.exit(f"script: must be one of {', '.join(SCRIPTS)} or a file *.py, got {script!r}")
    if own and not Path(script).is_file():
        sys.exit(f"{script}: no such file")
    _be_one_process()
    # torch refuses BenCo's checkpoints in --resume otherwise: they hold the flags.
    torch.serialization.add_safe_globals([argparse.Namespace])
    if not torch.cuda.is_available():
        _use_cpu()
        if script != "test_complexity" and not any(flag.partition("=")[0] == "--device" for flag in flags):
            flags += ["--device", "cpu"]
    sys.argv = [script, *flags]
    if own:
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(f"IMDLBenCo.training_scripts.{script}", run_name="__main__", alter_sys=True)


def _be_one_process() -> None:
    """What torchrun would set: BenCo's scripts run in a process group only."""
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        return
    # Port 0: any free one.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _use_cpu() -> None:
    """Replace the functions that the scripts call for a GPU, by name and unconditionally."""
    torch_: Any = torch
    start, ddp = dist.init_process_group, torch.nn.parallel.DistributedDataParallel
    torch_.cuda.set_device = torch_.cuda.synchronize = lambda *_: None
    torch_.Tensor.cuda = lambda self, *_, **__: self
    for name in ("tensor", "zeros"):
        setattr(torch_, name, _on_cpu(getattr(torch, name)))
    torch_.distributed.init_process_group = lambda backend=None, **given: start(backend="gloo", **given)
    torch_.nn.parallel.DistributedDataParallel = lambda module, device_ids=None, **given: ddp(module, **given)
    # Synchronised batch normalisation exists on GPUs only.
    torch_.nn.SyncBatchNorm.convert_sync_batchnorm = lambda module, *_: module


def _on_cpu(make: Any) -> Any:
    """A function that makes tensors, with device="cuda" read as the CPU."""

    def made(*args: Any, **options: Any) -> Any:
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return make(*args, **options)

    return made


if __name__ == "__main__":
    main(sys.argv[1:])
