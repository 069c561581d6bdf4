"""Train FRD-Net: `frd train`, or `Trainer(config).fit()`.

A run is determined by its configuration: data depends on (seed, epoch, index), the learning rate on the step only, and
a resumed run continues bit for bit (on the same machine with as many threads), in mid-epoch too. If it is
resumed with more epochs, the learning rate follows the curve of the longer run from there on: it jumps up, and reaches
min_lr at the new end. Several processes, started by torchrun, divide each batch and compute the same steps as one. The
best weights are chosen on the validation set; no test set is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
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
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from frd_model.data.transforms import resize
from frd_model.factory import create_model
from frd_model.metrics import aggregate, image_metrics
from frd_model.output import one_line
from frd_model.predict import PredictionError, predict
from frd_model.weights import save_model

from . import processes
from .config import TrainConfig, from_dict
from .data import (
    Failure,
    collate,
    count_photos,
    describe,
    digest,
    failure,
    open_data,
    pairs_of,
    start_worker,
)
from .sampler import StepSampler
from .state import (
    Ema,
    Tally,
    TrainingError,
    check_apart,
    check_same_data,
    check_same_run,
    get_rng,
    seed_everything,
    set_rng,
    write_state,
)
from .update import Updater

WEIGHTS = ("last.pt", "last.safetensors", "best.safetensors")
PANEL = 384
ADVICE = "lower optim.lr or optim.clip_norm"


class Trainer:
    """One training run. `fit` trains; call `resume` before it to continue from the output directory.

    Writes to config.output: config.yaml, last.pt (everything to resume from), last.safetensors and
    best.safetensors (the averaged weights where ema is on), and TensorBoard events.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.device = processes.own_device(config.device)
        self.is_first = processes.rank() == 0
        seed_everything(config.seed)
        section = config.model
        self.model = create_model(
            section.name,
            preset=section.preset,
            pretrained=section.pretrained,
            encoder_weights=section.encoder_weights,
            **section.options,
        ).to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if not self.is_first:
            # The first weights are the same in all processes, what the steps draw is not.
            seed_everything((config.seed + processes.rank()) % 2**32)
        self.updater = Updater(self.model, config, self.device)
        self.optimizer = self.updater.optimizer
        self.ema = Ema(self.model, config.optim.ema) if config.optim.ema else None
        self.train_data, self.val_data = open_data(config)
        check_apart(self.train_data, self.val_data)
        self.sampler = StepSampler(
            self.train_data, config.batch_size, config.seed, processes.rank(), processes.world()
        )
        self.loader = self._loader()
        self.steps_per_epoch = self.sampler.steps
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
        # Epochs that are done, and steps of the next one.
        self.epoch = self.step = 0
        self.tally = Tally()
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
        TrainingError if `max_nonfinite` steps in a row, or all of an epoch, had no finite loss and gradient, if more
        photos than `data.max_bad` allows cannot be used, and, before any work, if the output directory holds another
        run; OSError if it cannot be written.
        """
        writer = _summary_writer()
        if self.is_first:
            self._prepare_output(overwrite)
            sets = f"training on {describe(self.train_data)}; validation on {describe(self.val_data)}"
            print(f"{sets}{_processes()}", flush=True)
            self._check_sets()
            text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            (self.output / "config.yaml").write_text(text, encoding="utf-8")
        self.selects = processes.agree(self.selects)
        started = self.saved = time.monotonic()
        end = self.config.epochs if stop_after is None else min(self.config.epochs, self.epoch + stop_after)
        with contextlib.ExitStack() as stack:
            board = None
            if self.is_first:
                # Events of steps that a killed run did not save are hidden.
                done = self.epoch * self.steps_per_epoch + self.step
                log = writer(str(self.output / "tensorboard"), purge_step=done + 1 if done else None)
                board = stack.enter_context(contextlib.closing(log))
            while self.epoch < end:
                begin = time.monotonic()
                figures = self._train_epoch(board)
                self.epoch, self.step, self.tally = self.epoch + 1, 0, Tally(row=self.tally.row)
                figures |= self.validate(board)
                figures |= {"epoch": float(self.epoch), "seconds": time.monotonic() - begin}
                self.history.append(figures)
                self._log(board, figures)
                self._save(figures)
                late = max_minutes is not None and time.monotonic() - started > 60.0 * max_minutes
                if processes.agree(late):
                    if self.is_first:
                        print(f"stopped after epoch {self.epoch}: {max_minutes:g} minutes have passed")
                    break
        return self.history[-1] if self.history else {}

    def validate(self, board: Any = None) -> dict[str, float]:
        """Mean metrics of the forged validation images, and the fraction of pixels falsely marked in untouched ones.

        Images are predicted by `predict`, large ones in tiles, with the averaged weights if ema is on. Metrics that
        are undefined on the set are left out. Processes divide the images and return the same metrics.
        """
        rows: dict[int, dict[str, float]] = {}
        alarms: dict[int, float] = {}
        panels: list[npt.NDArray[np.uint8]] = []
        self.model.eval()
        context = self.ema.swapped_in(self.model) if self.ema else contextlib.nullcontext()
        share = range(processes.rank(), len(self.val_data), processes.world())
        with context, self.updater.precision():
            for index in tqdm(share, desc="validation", disable=self._hides_bars, leave=False):
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
                    alarms[index] = float(result.mask.mean())
                    continue
                if len(panels) < self.config.images_logged:
                    panels.append(_panel(image, mask, result.probability))
                # The exact AUC sorts all pixels: free the rest of a large photo first.
                probability = result.probability
                del image, result
                rows[index] = image_metrics(probability, mask)
                del probability, mask
        self.model.train()
        if board is not None:
            for i, panel in enumerate(panels):
                board.add_image(f"val/{i}", panel, self.epoch, dataformats="HWC")
        # In the order of the set, so that the means are the same for any number of processes.
        every, false = _merged(processes.gather(rows)), _merged(processes.gather(alarms))
        figures = {f"val/{k}": float(v) for k, v in aggregate(every).items()}
        if false:
            figures["val/false_alarm"] = sum(false) / len(false)
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
            raise TrainingError(
                f"{path} cannot be read as a training state: {one_line(error)[:200]}"
            ) from None
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
        for group, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            # How a step is computed belongs to the device, not to the run.
            group["fused"] = own["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.updater.scales and "scaler" in state:
            self.updater.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.values = {k: v.to(self.device) for k, v in state["ema"]["values"].items()}
            self.ema.updates = state["ema"]["updates"]
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
        self.step, self.tally = state.get("step", 0), Tally(**state.get("tally", {}))
        states = [state["rng"], *state.get("other_rngs", [])]
        if processes.rank() < len(states):
            set_rng(states[processes.rank()])

    def learning_rate(self, step: int) -> float:
        """Set the optimizer to the learning rate of a step, which depends on the step alone, and return it.

        Linear warm-up, then a half cosine from optim.lr to optim.min_lr over the rest of the run.
        """
        # timm's warm-up is 0 at update 0. Counted from 1, the first step learns and its last step has the full rate.
        self.scheduler.step_update(step + 1 if step < self.scheduler.warmup_t else step)
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def _hides_bars(self) -> bool | None:
        return None if self.is_first else True

    def _train_epoch(self, board: Any) -> dict[str, float]:
        """The rest of an epoch, from `self.step` on."""
        self.model.train()
        first = self.epoch * self.steps_per_epoch
        pending: list[tuple[int, float, torch.Tensor]] = []
        title = f"epoch {self.epoch + 1}"
        with tqdm(initial=self.step, total=self.steps_per_epoch, desc=title, disable=self._hides_bars) as bar:
            for image, mask in self._batches():
                rate = self.learning_rate(first + self.step)
                pending.append((first + self.step, rate, self._step(image, mask)))
                self.step += 1
                bar.update()
                saves = self.config.save_every and self.step % self.config.save_every == 0
                logs = self.step % self.config.log_every == 0 or self.step == self.steps_per_epoch
                if logs or saves:
                    bar.set_postfix(loss=f"{self._report(board, pending):.3f}")
                    pending.clear()
                if self.step < self.steps_per_epoch and (saves or (logs and self._is_time_to_save())):
                    self._save_state()
        if not self.tally.steps:
            raise TrainingError(f"no step of epoch {self.epoch + 1} had a finite loss and gradient; {ADVICE}")
        return self.tally.figures()

    def _step(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One update; returns the loss and the gradient's norm, on the device."""
        values = self.updater.step(image, mask, self.sampler.is_spare(self.step))
        if self.ema:
            self.ema.update(self.model)
        return values

    def _report(self, board: Any, pending: list[tuple[int, float, torch.Tensor]]) -> float:
        """Fetch the figures of the last steps, in one transfer, count and log them; returns the last loss."""
        values = torch.stack([value for _, _, value in pending]).tolist()
        for (step, rate, _), (loss, norm) in zip(pending, values, strict=True):
            usable = self.tally.add(loss, norm)
            if not usable and self.is_first:
                tqdm.write(
                    f"skipped step {step + 1} of epoch {self.epoch + 1}: loss {loss:g}, gradient norm {norm:g} "
                    f"({self.tally.skipped} in this epoch)",
                    file=sys.stderr,
                )
            if self.tally.row >= self.config.max_nonfinite:
                raise TrainingError(
                    f"{self.tally.row} steps in a row up to step {step + 1} had no finite loss or gradient (the last: "
                    f"loss {loss:g}, norm {norm:g}); {ADVICE}"
                )
            if board is not None:
                board.add_scalar("train/loss", loss, step + 1)
                board.add_scalar("train/grad_norm", norm, step + 1)
                board.add_scalar("train/lr", rate, step + 1)
        return float(values[-1][0])

    def _is_time_to_save(self) -> bool:
        minutes = self.config.save_minutes
        return bool(minutes and processes.agree(time.monotonic() - self.saved > 60.0 * minutes))

    def _loader(self) -> DataLoader[Any]:
        workers = self.config.workers
        return DataLoader(
            self.train_data,
            batch_sampler=self.sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            # Of its own, so that the random numbers of the steps do not depend on it.
            generator=torch.Generator(),
            collate_fn=collate,
            worker_init_fn=start_worker,
        )

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch from `self.step` on."""
        self.train_data.set_epoch(self.epoch)
        self.sampler.set_position(self.epoch, self.step)
        for image, mask, failures in self.loader:
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
        size = count_photos(self.train_data if part == "training" else self.val_data)
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
        if earlier and self.epoch == self.step == 0:
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
        if board is None:
            return
        for name, value in figures.items():
            board.add_scalar(name, value, self.epoch)
        skipped = figures["train/skipped"]
        shown = ("train/loss", "val/auc", "val/permute_f1", "val/f1", "val/false_alarm", "seconds")
        print(
            f"epoch {self.epoch}/{self.config.epochs} "
            + " ".join(
                f"{name.removeprefix('val/')} {figures[name]:.4g}" for name in shown if name in figures
            )
            + (f" skipped steps {skipped:g}" if skipped else ""),
            flush=True,
        )

    def _save(self, figures: dict[str, float]) -> None:
        merit = self._merit(figures)
        improved = merit is not None and merit > self.best
        if merit is not None and improved:
            self.best = merit
        if self.is_first:
            metadata = {"epoch": self.epoch, "figures": figures, "training": self.config.to_dict()}
            with self.ema.swapped_in(self.model) if self.ema else contextlib.nullcontext():
                save_model(self.model, self.output / "last.safetensors", metadata)
                if improved:
                    save_model(self.model, self.output / "best.safetensors", metadata)
        self._save_state()

    def _save_state(self) -> None:
        """Write last.pt, whole or not at all."""
        rng, *others = processes.gather(get_rng())
        if self.is_first:
            ema = {"values": self.ema.values, "updates": self.ema.updates} if self.ema else None
            state = {
                "config": self.config.to_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.updater.scaler.state_dict(),
                "ema": ema,
                "epoch": self.epoch,
                "step": self.step,
                "tally": dataclasses.asdict(self.tally),
                "best": self.best,
                "history": self.history,
                "data": self._digests(),
                "rng": rng,
                "other_rngs": others,
            }
            write_state(state, self.output / "last.pt")
        self.saved = time.monotonic()


def _merged(parts: list[dict[int, Any]]) -> list[Any]:
    """The values of all processes, by index."""
    return [
        value for _, value in sorted((item for part in parts for item in part.items()), key=lambda i: i[0])
    ]


def _processes() -> str:
    return f"; {processes.world()} processes" if processes.world() > 1 else ""


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError("training needs tensorboard: pip install 'frd-kernels[train]'") from None
    return SummaryWriter


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
