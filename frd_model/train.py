"""Train FRD-Net: `frd train`, or `Trainer(config).fit()`.

A run is a function of its configuration: data depends on (seed, epoch, index), the learning rate on the step
alone, and a resumed run continues bit for bit (same machine, same thread count).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import frd_kernels as fk
from frd_model.checkpoints import parse_device
from frd_model.frdnet import create_model
from frd_model.losses import FRDLoss
from frd_model.metrics import aggregate, image_metrics
from frd_model.train_config import TrainConfig, from_dict
from frd_model.train_data import open_training_data, open_validation_data
from frd_model.weights import save_model


class TrainingError(RuntimeError):
    """Training cannot go on: a non-finite loss, or a state that does not belong to this run."""


class Ema:
    """Exponential moving average of a model's parameters and buffers.

    The decay starts low and rises to its full value, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move every average towards the model's current value."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1.0 - decay)
            else:
                self.values[name].copy_(value)

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model holds the averages; afterwards its own values again."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(own)


class Trainer:
    """One training run. `fit` trains; `resume` first takes up the last state of the output directory.

    Writes to config.output: config.yaml, last.pt (everything to resume from), last.safetensors and
    best.safetensors (the averaged weights where ema is on), and TensorBoard events.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.device = parse_device(config.device)
        _seed_everything(config.seed)
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
        self.train_data = open_training_data(config)
        self.val_data = open_validation_data(config)
        self.steps_per_epoch = math.ceil(len(self.train_data) / config.batch_size)
        self.epoch = 0
        self.best = -math.inf
        self.history: list[dict[str, float]] = []

    def fit(self, *, stop_after: int | None = None, max_minutes: float | None = None) -> dict[str, float]:
        """Train until config.epochs, or until `stop_after` epochs or `max_minutes` have passed in this call.

        Returns the validation figures of the last epoch. Raises TrainingError when a loss is not finite.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        (self.output / "config.yaml").write_text(text, encoding="utf-8")
        started = time.monotonic()
        end = self.config.epochs if stop_after is None else min(self.config.epochs, self.epoch + stop_after)
        with contextlib.closing(SummaryWriter(str(self.output / "tensorboard"))) as board:
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
        """Mean figures of the forged validation images, and the share of pixels falsely marked in untouched ones.

        With the averaged weights where ema is on.
        """
        self.model.eval()
        context = self.ema.swapped_in(self.model) if self.ema else contextlib.nullcontext()
        rows: list[dict[str, float]] = []
        alarms: list[float] = []
        panels: list[torch.Tensor] = []
        with context, torch.inference_mode():
            for image, mask in DataLoader(self.val_data, batch_size=1):
                probability = self._forward(image.to(self.device)).float().sigmoid().cpu()
                if not mask.any():
                    alarms.append(float((probability > 0.5).float().mean()))
                    continue
                rows.append(image_metrics(probability[0, 0].numpy(), mask[0, 0].numpy() > 0.5))
                if len(panels) < self.config.images_logged:
                    panels.append(_panel(image, mask, probability))
        self.model.train()
        if board is not None:
            for i, panel in enumerate(panels):
                board.add_image(f"val/{i}", panel, self.epoch)
        figures = {f"val/{k}": float(v) for k, v in aggregate(rows).items()}
        if alarms:
            figures["val/false_alarm"] = sum(alarms) / len(alarms)
        return figures

    def resume(self) -> None:
        """Take up the state in last.pt. Raises TrainingError when it belongs to another configuration."""
        path = self.output / "last.pt"
        if not path.exists():
            raise TrainingError(f"nothing to resume: {path} does not exist")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise TrainingError(f"{path} cannot be read as a training state: {_one_line(error)}") from None
        _check_same_run(from_dict(state["config"]), self.config)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.values = {k: v.to(self.device) for k, v in state["ema"]["values"].items()}
            self.ema.updates = state["ema"]["updates"]
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
        _set_rng(state["rng"])

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a half cosine from lr to min_lr over the rest of the run."""
        optim = self.config.optim
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return optim.lr * (step + 1) / warmup
        total = max(1, self.config.epochs * self.steps_per_epoch - warmup)
        progress = min(1.0, (step - warmup) / total)
        return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1.0 + math.cos(math.pi * progress))

    def _train_epoch(self, board: Any) -> dict[str, float]:
        self.model.train()
        total, norms = 0.0, 0.0
        step = self.epoch * self.steps_per_epoch
        bar = tqdm(self._batches(), total=self.steps_per_epoch, desc=f"epoch {self.epoch + 1}", disable=None)
        for image, mask in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            loss, norm = self._step(image, mask, step)
            total, norms, step = total + loss, norms + norm, step + 1
            board.add_scalar("train/loss", loss, step)
            board.add_scalar("train/grad_norm", norm, step)
            board.add_scalar("train/lr", self.optimizer.param_groups[0]["lr"], step)
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
        backend = self.config.backend
        with (
            contextlib.nullcontext() if backend == "auto" else fk.use_backend(backend),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"),
        ):
            logits: torch.Tensor = self.model(image)
        return logits

    def _batches(self) -> DataLoader[Any]:
        self.train_data.set_epoch(self.epoch)
        # The order is a function of seed and epoch, so a resumed run sees what an unbroken one would.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        return DataLoader(
            self.train_data,
            batch_size=self.config.batch_size,
            shuffle=True,
            num_workers=self.config.workers,
            generator=generator,
        )

    def _log(self, board: Any, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            board.add_scalar(name, value, self.epoch)
        shown = ("train/loss", "val/auc", "val/permute_f1", "val/f1", "seconds")
        print(
            f"epoch {self.epoch}/{self.config.epochs} "
            + " ".join(
                f"{name.removeprefix('val/')} {figures[name]:.4g}" for name in shown if name in figures
            ),
            flush=True,
        )

    def _save(self, figures: dict[str, float]) -> None:
        merit = (figures["val/auc"] + figures["val/permute_f1"]) / 2
        improved = merit > self.best
        self.best = max(self.best, merit)
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
            "rng": _get_rng(),
        }
        temporary = self.output / "last.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.output / "last.pt")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _get_rng() -> dict[str, Any]:
    """RNG states as tensors and plain values, which torch.load reads with weights_only=True."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": (version, list(internal), gauss_next),
    }


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _check_same_run(saved: TrainConfig, wanted: TrainConfig) -> None:
    """What may differ in a resumed run: where it runs and what it shows, nothing it depends on."""
    free = ("output", "device", "workers", "images_logged", "backend")
    theirs, ours = saved.to_dict(), wanted.to_dict()
    for key in ours:
        if key not in free and theirs[key] != ours[key]:
            raise TrainingError(
                f"cannot resume: {key} was {theirs[key]!r} in the saved run, now {ours[key]!r}"
            )


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers decay; norms, biases and scales do not."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _panel(image: torch.Tensor, mask: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """Photo, truth and probability side by side, [3, H, 3 W] in [0, 1]."""
    low, high = image.amin(), image.amax()
    photo = (image[0].cpu() - low) / (high - low).clamp(min=1e-6)
    return torch.cat([photo, mask[0].float().expand_as(photo), probability[0].expand_as(photo)], dim=2)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
