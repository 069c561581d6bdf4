"""One optimizer step from one batch: precision, parts, processes, and the guard against non-finite values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import frd_kernels as fk
from frd_model.losses import FRDLoss

from . import processes
from .config import TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
}


class Updater:
    """Updates a model's weights, batch by batch.

    The loss of a batch is not the mean of its parts' losses: dice is a ratio of sums over the batch. So the sums are
    added up over parts and processes first, and each part's gradient is taken with the others' sums as constants;
    the gradients then add up to that of the whole batch.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        section = config.loss
        self.loss = FRDLoss(
            section.form, section.edge_weight, section.edge_width, section.bce, section.focal, section.image
        )
        optim = config.optim
        # A fused step skips itself on the device where a gradient is not finite; others ask the host.
        self.optimizer = OPTIMIZERS[optim.name](
            parameter_groups(model, optim.weight_decay),
            lr=optim.lr,
            betas=optim.betas,
            fused=True if device.type == "cuda" else None,
        )
        # At a scale of 1 the scaler only guards.
        self.scales = config.amp == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self.scales else 1.0)
        self.part: nn.Module = cast(nn.Module, torch.compile(model)) if config.compile else model
        self.whole = self.part
        if processes.world() > 1:
            self.whole = DistributedDataParallel(
                self.part,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def step(self, image: Tensor, mask: Tensor, spare: bool = False) -> Tensor:
        """One step from image [B, 3, H, W] and mask [B, 1, H, W], this process's share of a batch.

        spare: the share is empty; the images keep the processes in step and count for nothing.

        Returns loss and norm of the gradient of the whole batch, [2], on the device: nothing here waits for it. Where
        one of them is not finite the weights stay as they are.
        """
        image = image.to(self.device, non_blocking=True)
        mask = mask.to(self.device, non_blocking=True)
        count = min(self.config.accumulate, len(image))
        parts = list(zip(image.tensor_split(count), mask.tensor_split(count), strict=True))
        self.optimizer.zero_grad(set_to_none=True)
        total = None if count == 1 else self._total(parts, spare)
        for number, (images, masks) in enumerate(parts, 1):
            with self._joined(number == count):
                loss = self._loss(images, masks, spare, total)
                self._backward(loss)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scales else 1.0)
        return torch.stack((loss.detach(), norm))

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """The backend of the kernels and autocast, as configured."""
        backend, amp = self.config.backend, self.config.amp
        with (
            contextlib.nullcontext() if backend == "auto" else fk.use_backend(backend),
            torch.autocast(self.device.type, DTYPES.get(amp), enabled=amp in DTYPES),
        ):
            yield

    def _forward(self, net: nn.Module, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, 1, H, W], and [B] of the image head where the loss uses it."""
        if self.config.channels_last:
            image = image.to(memory_format=torch.channels_last)
        with self.precision():
            if not self.loss.image_weight:
                logits: Tensor = net(image)
                return logits.float(), None
            logits, score = net(image, score=True)
        return logits.float(), score.float()

    def _sums(self, net: nn.Module, image: Tensor, mask: Tensor, spare: bool) -> Tensor:
        logits, score = self._forward(net, image)
        sums = self.loss.sums(logits, mask, image_logits=score)
        return sums * 0.0 if spare else sums

    def _total(self, parts: list[tuple[Tensor, Tensor]], spare: bool) -> Tensor:
        """The sums of the whole batch, from a forward pass that draws the random numbers of the one to come."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            sums = [self._sums(self.part, *part, spare) for part in parts]
        return processes.total(torch.stack(sums).sum(0))

    def _loss(self, image: Tensor, mask: Tensor, spare: bool, total: Tensor | None) -> Tensor:
        """The loss of the whole batch, with the gradient of this part."""
        sums = self._sums(self.whole, image, mask, spare)
        if total is None and processes.world() > 1:
            total = processes.total(sums)
        if total is not None:
            sums = sums + (total - sums).detach()
        return self.loss.from_sums(sums)["total"]

    def _backward(self, loss: Tensor) -> None:
        # An infinite loss can have a finite gradient: times NaN it has none.
        guard = torch.where(loss.detach().isfinite(), 1.0, math.nan)
        # Times the processes, as DistributedDataParallel takes the mean of their gradients where the sum is due.
        self.scaler.scale(loss * (guard * processes.world())).backward()

    def _joined(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged with the other processes once, after the last part."""
        if last or not isinstance(self.whole, DistributedDataParallel):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self.whole.no_sync()
        return context

    def _clip(self) -> Tensor:
        """Clip the scaled gradients, make them NaN where their norm is not finite; returns the norm without scale."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / self.scaler.scale(torch.ones((), device=self.device))
        bound = torch.where(norm.isfinite(), norm, math.nan)
        nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm or math.inf, bound)
        self.scaler.unscale_(self.optimizer)
        return norm


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights of convolutions and linear layers, with decay, then norms, biases and scales, without."""
    # Without decay timm makes one group, but last.pt has two. 1e-30 changes no weight: 1 - lr * 1e-30 is exactly 1.
    groups: list[dict[str, object]] = param_groups_weight_decay(model, weight_decay or 1e-30)
    return groups[::-1]
