"""`PDC2d`, the pixel difference convolution as a layer: a drop-in for `torch.nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Proxy

from .. import _autograd, backend
from .._autocast import autocast_dtype
from .._numbers import is_integer, parse_count
from .._torch_internals import version_of
from . import api
from .arguments import Geometry, IntOrPair, checked_geometry, parse_geometry, parse_theta
from .kinds import parse_kind


class _Plain(NamedTuple):
    """The plain kernel of a frozen layer.

    key: identifies the weight and the options that it was computed from.
    weight: an alias of that weight. It keeps the memory alive, so that no other weight gets the address in the key.
    """

    kernel: torch.Tensor
    key: Any
    weight: torch.Tensor


class PDC2d(nn.Conv2d):
    """Pixel difference convolution with the arguments, parameters and defaults of `nn.Conv2d`.

    `weight` is [out_channels, in_channels / groups, 3, 3] for every kind, so checkpoints of PiDiNet's layers
    load.

    Args:
        kernel_size: 3.
        padding: as for a 3x3 kernel: int, pair, "same" or "valid". Radial's outer taps reach one dilation
            step further, over what `padding_mode` pads with.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        theta: 0 is the plain convolution, 1 the pure difference.
        Others: as in `nn.Conv2d`.

    Input [B, C, H, W] or [C, H, W]; output of the same shape as from `nn.Conv2d` with a 3x3 kernel.

    A dense layer computes its plain kernel at every call (on one CPU core 1 % of its time at 56x56 pixels, 14 % at
    14x14); `freeze()` caches it.

    Raises:
        ValueError: an argument is invalid; the message names it, the rule and the value.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kind: str = "angular",
        theta: float = 1.0,
    ) -> None:
        sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        if len(sizes) != 2 or not all(is_integer(size) and size == 3 for size in sizes):
            raise ValueError(f"kernel_size must be 3, got {kernel_size!r}")
        geometry = parse_geometry(kind, theta, stride, padding, dilation, groups)
        super().__init__(
            parse_count(in_channels, "in_channels"),
            parse_count(out_channels, "out_channels"),
            3,
            geometry.stride,
            padding if isinstance(padding, str) else geometry.padding,
            geometry.dilation,
            geometry.groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self.kind = parse_kind(kind).name.lower()
        self.theta = parse_theta(theta)

    _frozen = False
    _plain: _Plain | None = None

    def geometry(self) -> Geometry:
        """The current attributes, parsed. They may be edited, as some code does with the stride of a loaded net."""
        return parse_geometry(self.kind, self.theta, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        options = (self.kind, self.theta, self.stride, self.padding, self.dilation, self.groups)
        if isinstance(input, Proxy):
            return api.pdc2d_padded(input, weight, bias, self.padding_mode, *options)
        geometry = checked_geometry(input, weight, bias, *options)
        if self.padding_mode != "zeros":
            input, geometry = api.pad(input, geometry, self.padding_mode)
        return api.run(input, weight, bias, geometry, self._kept_plain(weight, geometry))

    def freeze(self) -> PDC2d:
        """Caches the plain kernel of a dense layer for inference, in eval mode, until `unfreeze()` or `train()`.

        The kernel is computed at the next call that needs no gradient of the weight. It is computed again after a
        call that needs one, and when the version counter of the weight has changed: after an optimizer step,
        `load_state_dict`, `to` or an in-place operation. Writes that PyTorch does not count are not detected:
        `weight.data.copy_`, a step of an optimizer with `fused=True` after a call without gradients, a NumPy array
        that shares the memory, another process. Call `freeze()` again after one. Copies and pickles stay frozen and
        compute the kernel again. A depthwise layer has no plain kernel; for it nothing changes.

        To deploy a net, use `frd_kernels.convert.fold` instead: it has none of these limits, and folds batch norms.

        Returns:
            The layer.
        """
        self.eval()
        self._frozen, self._plain = True, None
        return self

    def unfreeze(self) -> PDC2d:
        """Undoes `freeze()`. Returns the layer."""
        self._frozen, self._plain = False, None
        return self

    def _kept_plain(self, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor | None:
        """The plain kernel of a frozen layer; None if `api.run` has to compute it."""
        if not self._frozen or torch.compiler.is_compiling() or _autograd.has_observers():
            return None
        if type(weight) not in (torch.Tensor, nn.Parameter) or weight.is_inference():
            return None
        if torch.is_grad_enabled() and weight.requires_grad:
            # A step of a fused optimizer may follow, which the version counter does not show.
            self._plain = None
            return None
        native = backend.select("pdc2d", weight)
        if native is None or api.is_depthwise(weight, geometry.groups):
            return None
        source = (weight.data_ptr(), weight.stride(), version_of(weight), weight.dtype, weight.device)
        key = (*source, autocast_dtype(weight.device.type), geometry.kind, geometry.theta, native.name)
        plain = self._plain
        if plain is None or plain.key != key:
            # Inference tensors cannot be saved for a backward, which a later call may need for its input.
            with torch.inference_mode(False), torch.no_grad():
                plain = _Plain(api.plain_weight(native, weight, geometry), key, weight.detach())
            self._plain = plain
        return plain.kernel

    def train(self, mode: bool = True) -> PDC2d:
        if mode:
            self.unfreeze()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the cached kernel out: its key holds an address."""
        return {name: value for name, value in self.__dict__.items() if name != "_plain"}

    def to_conv2d(self) -> nn.Conv2d:
        """The plain convolution that gives the same output; radial becomes 5x5 with padding + dilation.

        In 16 bit its kernel is rounded (zero-sum), whereas a depthwise PDC2d rounds only the output.
        """
        geometry = self.geometry()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            geometry.plain_size,
            geometry.stride,
            geometry.plain_padding,
            geometry.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(api.pdc_weight(self.weight, kind=self.kind, theta=self.theta))
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}, theta={self.theta:g}"
