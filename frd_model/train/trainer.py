"""Train FRD-Net: `frd train`, or `Trainer(config).fit()`.

A run is determined by its configuration: data depends on (seed, epoch, index), the learning rate on the step only, and
a resumed run continues bit for bit (on the same machine with as many threads). If it is resumed with more epochs, the
learning rate follows the curve of the longer run from there on: it jumps up, and reaches min_lr at the new end.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import yaml
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import frd_kernels as fk
from frd_model.data.transforms import resize
from frd_model.factory import create_model
from frd_model.losses import FRDLoss
from frd_model.metrics import aggregate, image_metrics
from frd_model.predict import PredictionError, parse_device, predict
from frd_model.weights import save_model

from .config import TrainConfig, from_dict
from .data import (
    Failure,
    collate,
    describe,
    digest,
    failure,
    open_data,
    pairs_of,
    start_worker,
)
from .state import (
    Ema,
    TrainingError,
    check_same_data,
    check_same_run,
    get_rng,
    seed_everything,
    set_rng,
)

WEIGHTS = ("last.pt", "last.safetensors", "best.safetensors")
PANEL = 384


class Trainer:
    """One training run. `fit` trains; call `resume` before it to continue from the output directory.

    Writes to config.output: config.yaml, last.pt (everything to resume from), last.safetensors and
    best.safetensors (the averaged weights where ema is on), and TensorBoard events.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.device = parse_device(config.device)
        seed_everything(config.seed)
        section = config.model
        self.model = create_model(
            section.name, preset=section.preset, pretrained=section.pretrained, **section.options
        ).to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.loss = FRDLoss(config.loss.form, config.loss.edge_weight, bce_weight=config.loss.bce)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=config.optim.betas,
        )
        self.ema = Ema(self.model, config.optim.ema) if config.optim.ema else None
        self.train_data, self.val_data = open_data(config)
        self.steps_per_epoch = math.ceil(len(self.train_data) / config.batch_size)
        warmup = round(config.optim.warmup_epochs * self.steps_per_epoch)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            # timm warns of a cosine over one step, which is that step at the full rate.
            t_initial=max(2, config.epochs * self.steps_per_epoch - warmup),
            lr_min=config.optim.min_lr,
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        # The scheduler has set the learning rate to 0, the start of its warm-up: a step outside `fit` would do nothing.
        self.learning_rate(warmup)
        self.epoch = 0
        self.best = -math.inf
        self.history: list[dict[str, float]] = []
        self.selects = True
        # Photos of each set that could not be used in this process.
        self.bad: dict[str, set[str]] = {"training": set(), "validation": set()}

    def fit(
        self, *, stop_after: int | None = None, max_minutes: float | None = None, overwrite: bool = False
    ) -> dict[str, float]:
        """Train until config.epochs, or until `stop_after` epochs or `max_minutes` have passed in this call.

        overwrite: remove the weights and the state of an earlier run in the output directory.

        Returns the metrics of the last epoch, without those that are undefined on the validation set. Raises
        TrainingError if a loss is not finite, if more photos than `data.max_bad` allows cannot be used, and,
        before any work, if the output directory holds another run; OSError if it cannot be written.
        """
        writer = _summary_writer()
        self._prepare_output(overwrite)
        print(f"training on {describe(self.train_data)}; validation on {describe(self.val_data)}", flush=True)
        self._check_sets()
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        (self.output / "config.yaml").write_text(text, encoding="utf-8")
        started = time.monotonic()
        end = self.config.epochs if stop_after is None else min(self.config.epochs, self.epoch + stop_after)
        with contextlib.closing(writer(str(self.output / "tensorboard"))) as board:
            while self.epoch < end:
                begin = time.monotonic()
                figures = self._train_epoch(board)
                self.epoch += 1
                figures |= self.validate(board)
                figures |= {"epoch": float(self.epoch), "seconds": time.monotonic() - begin}
                self.history.append(figures)
                self._log(board, figures)
                self._save(figures)
                if max_minutes is not None and time.monotonic() - started > 60.0 * max_minutes:
                    print(f"stopped after epoch {self.epoch}: {max_minutes:g} minutes have passed")
                    break
        return self.history[-1] if self.history else {}

    def validate(self, board: Any = None) -> dict[str, float]:
        """Mean metrics of the forged validation images, and the fraction of pixels falsely marked in untouched ones.

        Images are predicted by `predict`, large ones in tiles, with the averaged weights if ema is on. Metrics that
        are undefined on the set are left out.
        """
        rows: list[dict[str, float]] = []
        alarms: list[float] = []
        panels: list[npt.NDArray[np.uint8]] = []
        self.model.eval()
        context = self.ema.swapped_in(self.model) if self.ema else contextlib.nullcontext()
        with context, self._precision():
            for index in tqdm(range(len(self.val_data)), desc="validation", disable=None, leave=False):
                try:
                    image, mask = self.val_data.load(index)
                except (ValueError, OSError) as error:
                    self._skip("validation", failure(self.val_data, index, error))
                    continue
                try:
                    result = predict(image, self.model)
                except PredictionError as error:
                    raise TrainingError(
                        f"validation image {index} after epoch {self.epoch}: {error}; lower optim.lr"
                    ) from None
                if not mask.any():
                    alarms.append(float(result.mask.mean()))
                    continue
                if len(panels) < self.config.images_logged:
                    panels.append(_panel(image, mask, result.probability))
                # The exact AUC sorts all pixels: free the rest of a large photo first.
                probability = result.probability
                del image, result
                rows.append(image_metrics(probability, mask))
                del probability, mask
        self.model.train()
        if board is not None:
            for i, panel in enumerate(panels):
                board.add_image(f"val/{i}", panel, self.epoch, dataformats="HWC")
        figures = {f"val/{k}": float(v) for k, v in aggregate(rows).items()}
        if alarms:
            figures["val/false_alarm"] = sum(alarms) / len(alarms)
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def resume(self) -> None:
        """Continue from last.pt.

        Raises TrainingError if it belongs to another configuration or other files; `frd_model.train.state.FREE` lists
        what may differ.
        """
        path = self.output / "last.pt"
        if not path.exists():
            raise TrainingError(f"nothing to resume: {path} does not exist")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise TrainingError(f"{path} cannot be read as a training state: {_one_line(error)}") from None
        keys = ("config", "model", "optimizer", "ema", "epoch", "best", "history", "rng")
        if not isinstance(state, dict) or any(key not in state for key in keys):
            raise TrainingError(f"{path} cannot be read as a training state: it must hold {', '.join(keys)}")
        saved = from_dict(state["config"])
        check_same_run(saved, self.config)
        check_same_data(state.get("data", {}), self._digests())
        if state["epoch"] > self.config.epochs:
            raise TrainingError(
                f"cannot resume: epochs must be at least the {state['epoch']} that are done, "
                f"got {self.config.epochs}"
            )
        if saved.epochs != self.config.epochs:
            print(
                f"the run now has {self.config.epochs} epochs instead of {saved.epochs}: "
                f"the learning rate follows the new length from epoch {state['epoch'] + 1} on"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.values = {k: v.to(self.device) for k, v in state["ema"]["values"].items()}
            self.ema.updates = state["ema"]["updates"]
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
        set_rng(state["rng"])

    def learning_rate(self, step: int) -> float:
        """Set the optimizer to the learning rate of a step, which depends on the step alone, and return it.

        Linear warm-up, then a half cosine from optim.lr to optim.min_lr over the rest of the run.
        """
        # timm's warm-up is 0 at update 0. Counted from 1, the first step learns and its last step has the full rate.
        self.scheduler.step_update(step + 1 if step < self.scheduler.warmup_t else step)
        return float(self.optimizer.param_groups[0]["lr"])

    def _train_epoch(self, board: Any) -> dict[str, float]:
        self.model.train()
        total, norms = 0.0, 0.0
        first = self.epoch * self.steps_per_epoch
        bar = tqdm(self._batches(), total=self.steps_per_epoch, desc=f"epoch {self.epoch + 1}", disable=None)
        for step, (image, mask) in enumerate(bar, first):
            rate = self.learning_rate(step)
            loss, norm = self._step(image, mask, step)
            total, norms = total + loss, norms + norm
            board.add_scalar("train/loss", loss, step + 1)
            board.add_scalar("train/grad_norm", norm, step + 1)
            board.add_scalar("train/lr", rate, step + 1)
            bar.set_postfix(loss=f"{loss:.3f}")
        return {"train/loss": total / self.steps_per_epoch, "train/grad_norm": norms / self.steps_per_epoch}

    def _step(self, image: torch.Tensor, mask: torch.Tensor, step: int) -> tuple[float, float]:
        """One update from image [B, 3, H, W] and mask [B, 1, H, W]; returns the loss and the gradient's norm."""
        logits = self._forward(image.to(self.device)).float()
        loss = self.loss(logits, mask.to(self.device))["total"]
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {self.epoch + 1}, step {step + 1}; "
                f"last.pt holds the state before this epoch: lower optim.lr or optim.clip_norm"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip = self.config.optim.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient's norm became {norm} in epoch {self.epoch + 1}, step {step + 1}"
            )
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model)
        return value, norm

    def _forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.config.channels_last:
            image = image.to(memory_format=torch.channels_last)
        with self._precision():
            logits: torch.Tensor = self.model(image)
        return logits

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """The backend of the kernels and autocast, as configured."""
        backend = self.config.backend
        with (
            contextlib.nullcontext() if backend == "auto" else fk.use_backend(backend),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"),
        ):
            yield

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.train_data.set_epoch(self.epoch)
        # The order depends on seed and epoch only, so a resumed run sees what an uninterrupted one would.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        loader = DataLoader(
            self.train_data,
            batch_size=self.config.batch_size,
            shuffle=True,
            num_workers=self.config.workers,
            generator=generator,
            collate_fn=collate,
            worker_init_fn=start_worker,
        )
        for image, mask, failures in loader:
            for failed in failures:
                self._skip("training", failed)
            if image is None:
                raise TrainingError(
                    f"no photo for a batch could be read, the last one: {failures[-1].reason}"
                )
            yield image, mask

    def _skip(self, part: str, failed: Failure) -> None:
        """Report a photo that cannot be used, once; TrainingError if there are too many."""
        bad = self.bad[part]
        if failed.name in bad:
            return
        bad.add(failed.name)
        size = len(self.train_data if part == "training" else self.val_data)
        share = self.config.data.max_bad
        tqdm.write(f"skipped {failed.reason} ({len(bad)} of {size} {part} photos)", file=sys.stderr)
        if len(bad) > (max(1, int(share * size)) if share else 0) or len(bad) == size:
            raise TrainingError(
                f"{len(bad)} of {size} {part} photos cannot be used, more than data.max_bad {share:g} allows; "
                f"`frd data check` lists them; the last one: {failed.reason}"
            )

    def _prepare_output(self, overwrite: bool) -> None:
        earlier = [self.output / name for name in WEIGHTS if (self.output / name).exists()]
        # A run that was resumed, or that has trained already, continues in its own output.
        if earlier and self.epoch == 0:
            if not overwrite:
                raise TrainingError(
                    f"output {str(self.output)!r} holds an earlier run ({earlier[0].name}): continue it with --resume, "
                    f"replace it with --overwrite, or choose another --output"
                )
            for path in (*earlier, *self.output.glob("tensorboard/events.out.tfevents.*")):
                path.unlink()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output):
                pass
        except OSError as error:
            raise OSError(
                f"output {str(self.output)!r} must be a directory to write to, got: {error}"
            ) from None

    def _check_sets(self) -> None:
        """Warn before the first epoch about what the data sets cannot teach or measure."""
        training = pairs_of(self.train_data)
        if training is not None and all(pair.mask is None for pair in training.pairs):
            _warn("no training photo has a mask: the network can only learn to mark nothing")
        for part, pairs in (("training", training), ("validation", pairs_of(self.val_data))):
            inverted = pairs.inverted_masks() if pairs is not None else ""
            if inverted:
                _warn(f"{part} set: {inverted}; data.invert_masks turns them round")
        self.selects = self._can_select()
        if not self.selects:
            _warn(
                "no validation photo has both edited and untouched pixels: no best checkpoint can be chosen, "
                "only last.safetensors will be written"
            )

    def _can_select(self) -> bool:
        pairs = pairs_of(self.val_data)
        for index in range(len(self.val_data)):
            if pairs is not None and pairs.pairs[index].mask is None:
                continue
            try:
                mask = self.val_data.load(index)[1]
            except (ValueError, OSError) as error:
                self._skip("validation", failure(self.val_data, index, error))
                continue
            if mask.any() and not mask.all():
                return True
        return False

    def _merit(self, figures: dict[str, float]) -> float | None:
        """The criterion of the best epoch: the mean of AUC and permute-F1, or of the one that is defined."""
        values = [figures.get(name, math.nan) for name in ("val/auc", "val/permute_f1")]
        defined = [value for value in values if math.isfinite(value)]
        return sum(defined) / len(defined) if defined and self.selects else None

    def _digests(self) -> dict[str, str]:
        return {"training": digest(self.train_data), "validation": digest(self.val_data)}

    def _log(self, board: Any, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            board.add_scalar(name, value, self.epoch)
        shown = ("train/loss", "val/auc", "val/permute_f1", "val/f1", "val/false_alarm", "seconds")
        print(
            f"epoch {self.epoch}/{self.config.epochs} "
            + " ".join(
                f"{name.removeprefix('val/')} {figures[name]:.4g}" for name in shown if name in figures
            ),
            flush=True,
        )

    def _save(self, figures: dict[str, float]) -> None:
        merit = self._merit(figures)
        improved = merit is not None and merit > self.best
        if merit is not None and improved:
            self.best = merit
        metadata = {"epoch": self.epoch, "figures": figures, "training": self.config.to_dict()}
        with self.ema.swapped_in(self.model) if self.ema else contextlib.nullcontext():
            save_model(self.model, self.output / "last.safetensors", metadata)
            if improved:
                save_model(self.model, self.output / "best.safetensors", metadata)
        ema = {"values": self.ema.values, "updates": self.ema.updates} if self.ema else None
        state = {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": ema,
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "data": self._digests(),
            "rng": get_rng(),
        }
        temporary = self.output / "last.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.output / "last.pt")


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError("training needs tensorboard: pip install 'frd-kernels[train]'") from None
    return SummaryWriter


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers, with decay, then norms, biases and scales, without."""
    # Without decay timm makes one group, but last.pt has two. 1e-30 changes no weight: 1 - lr * 1e-30 is exactly 1.
    groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay or 1e-30)
    return groups[::-1]


def _panel(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], probability: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """Photo, true mask and probability side by side, uint8 [h, 3 w, 3], with h and w at most PANEL."""
    scale = min(1.0, PANEL / max(mask.shape))
    height, width = (max(1, round(scale * side)) for side in mask.shape)
    image, mask = resize(image, mask, (height, width))
    found = cv2.resize(probability, (width, height), interpolation=cv2.INTER_AREA)
    maps = [
        np.repeat((255 * m.astype(np.float32)).astype(np.uint8)[..., None], 3, axis=2) for m in (mask, found)
    ]
    return np.concatenate([image, *maps], axis=1)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
