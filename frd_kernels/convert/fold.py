"""`fold`: copies a model with a plain convolution in place of every difference convolution."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from .._inner import has_hooks
from ..pdc.kinds import parse_kind
from ..pdc.layers import PDC2d
from ..pdc_block.layers import DPM, PDCBlock2d
from .dataflow import Dataflow, may_read_weights
from .report import KEPT, REPLACED, Entry, Report, swap

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


class PlainBlock2d(nn.Module):
    """`PDCBlock2d` out of plain convolutions: convolution -> ReLU -> 1x1 (-> + shortcut).

    Submodules `pdc`, `point` and `shortcut` as in `PDCBlock2d`, `pdc` being an `nn.Conv2d`.
    Input [B, C, H, W], output [B, Co, Ho, Wo].
    """

    def __init__(self, pdc: nn.Conv2d, point: nn.Conv2d, shortcut: nn.Module | None, residual: bool) -> None:
        super().__init__()
        self.pdc, self.point, self.shortcut, self.residual = pdc, point, shortcut, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.point(F.relu(self.pdc(x)))
        if not self.residual:
            return out
        return out + (x if self.shortcut is None else self.shortcut(x))

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


class _Affine(NamedTuple):
    """y = scale * x + shift, both [C] in float64: a batch norm at inference."""

    scale: torch.Tensor
    shift: torch.Tensor


def fold(model: nn.Module, report: list[Entry] | None = None) -> nn.Module:
    """A copy of the model, in eval mode, in which every PDC layer is one `nn.Conv2d`.

    `PDC2d` becomes its `to_conv2d()`, `PDCBlock2d` (also those in `DPM`) a `PlainBlock2d`. Batch norms (BatchNorm2d,
    SyncBatchNorm) next to a PDC layer are folded into it with their running statistics and become `nn.Identity`:

    - after it, if the output of the PDC layer, or of a block without residual, goes into the batch norm only;
    - before it, if the output of the batch norm goes into the PDC layer only, and folding is exact: without padding,
      with a padding mode other than "zeros", or if the shift is 0 (else the zeros would have to be shifted as well).

    Batch norms next to other convolutions are kept.

    The connections are known from `nn.Sequential` and from `torch.fx`, which traces the forward of each module
    separately. If a forward cannot be traced, the batch norms next to its PDC layers are kept. A PDC layer is kept if
    it has hooks, if a forward reads its weight itself, or if a forward names `weight` and cannot be traced.

    Args:
        model: not changed. In eval mode it gives the same result as the copy, up to rounding; at infinite pixels a
            plain convolution gives NaN where the difference does not use them.
        report: entries are appended for each PDC layer, each batch norm next to one, and each forward that cannot be
            traced.

    Returns:
        The copy. Its parameters share no memory with the model's.

    Raises:
        TypeError: model is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    folding = _Folding(copy.deepcopy(model).eval())
    folded = folding.run()
    if report is not None:
        report += folding.report
    return folded


class _Folding:
    """One call of `fold`, on the copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report()
        self.flow = Dataflow(model, _is_layer)
        self.names = {id(module): name for name, module in model.named_modules()}
        parents = [list(module._modules.values()) for module in model.modules()]
        self.places = Counter(id(child) for children in parents for child in children)
        self.replacements: dict[int, nn.Module] = {}
        self.refused: dict[int, str] = {}
        self.before: dict[int, _Affine] = {}
        self.after: dict[int, _Affine] = {}

    def run(self) -> nn.Module:
        blocks = [module for module in self.model.modules() if _is_block(module)]
        in_blocks = {id(block.pdc) for block in blocks}
        layers = [m for m in self.model.modules() if isinstance(m, PDC2d) and id(m) not in in_blocks]
        self._refuse(layers, blocks)
        for module in self.model.modules():
            if isinstance(module, BatchNorm) and type(module).forward in _BATCH_NORM_FORWARDS:
                self._place(module)
        for block in blocks:
            if self._convert(block.pdc, self.refused.get(id(block))):
                self.replacements[id(block)] = self._block(block)
        for layer in layers:
            self._convert(layer, self.refused.get(id(layer)))
        order = list(self.names.values())
        self.report.sort(key=lambda entry: order.index(entry.name))
        return swap(self.model, self.replacements)

    def _refuse(self, layers: list[PDC2d], blocks: list[PDCBlock2d]) -> None:
        """Fills `refused`: id of a layer or block -> why it is kept."""
        for owner, children in self.flow.untraced():
            problem = (
                f"the forward of {type(owner).__name__} cannot be traced ({self.flow.problems[id(owner)]})"
            )
            if may_read_weights(owner):
                self.refused |= {
                    id(m): f"{problem} and uses a weight itself" for m in children if _is_layer(m)
                }
            if any(isinstance(module, BatchNorm) for module in children):
                self._note(owner, KEPT, f"{problem}: the batch norms in it are kept")
        for host in (*layers, *blocks):
            parts = (host, host.pdc, host.point) if isinstance(host, PDCBlock2d) else (host,)
            pdc: Any = host.pdc if isinstance(host, PDCBlock2d) else host
            if any(has_hooks(part) for part in parts):
                self.refused[id(host)] = "has hooks, which would be lost"
            elif type(pdc).forward is not PDC2d.forward or type(pdc)._conv_forward is not PDC2d._conv_forward:
                self.refused[id(host)] = "its class has a forward of its own"
            elif any(id(tensor) in self.flow.fetched for tensor in host.parameters()):
                self.refused[id(host)] = "a forward uses its weight without calling it"

    def _note(self, module: nn.Module, result: str, note: str = "") -> None:
        kind, theta = (module.kind, module.theta) if isinstance(module, PDC2d) else (None, None)
        self.report.append(Entry(self.names[id(module)], type(module).__name__, kind, theta, result, note))

    def _place(self, norm: nn.Module) -> None:
        """Folds the batch norm into the convolution before or after it, if that is possible."""
        source, sink = self.flow.source(norm), self.flow.sink(norm)
        candidates = [
            (source, None if source is None else _last(source), self.after),
            (sink, None if sink is None else _first(sink), self.before),
        ]
        reasons = []
        for host, target, table in candidates:
            if host is None or target is None:
                continue
            reason = self._obstacle(norm, host, target)
            affine = None if reason else _affine(norm)
            if affine is not None and table is self.before and not _commutes(target, affine):
                reason = f"{self.names[id(target)]} pads with zeros, which the shift would have to reach"
            if affine is not None and reason is None:
                table[id(target)] = affine
                self.replacements[id(norm)] = nn.Identity().eval()
                self._note(norm, REPLACED, f"folded into {self.names[id(target)] or '(model)'}")
                return
            reasons.append(reason or "")
        if reasons:
            self._note(norm, KEPT, "; ".join(reasons))

    def _obstacle(self, norm: nn.Module, host: nn.Module, target: nn.Module) -> str | None:
        """Why the batch norm cannot move into the convolution `target` of `host`, whatever its values."""
        refused = [self.refused[id(m)] for m in host.modules() if id(m) in self.refused]
        if refused:
            return f"{self.names[id(host)]} is kept"
        if max(self.places[id(norm)], self.places[id(target)], self.places[id(host)]) > 1:
            return "it or the layer is registered in several places"
        if isinstance(host, DPM) and self.flow.calls(host.central) != 1:
            return f"{self.names[id(host.central)]} is called by others too"
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics"
        if has_hooks(norm) or has_hooks(target) or has_hooks(host):
            return "it or the layer has hooks"
        if any(id(tensor) in self.flow.fetched for tensor in (*norm.parameters(), *norm.buffers())):
            return "a forward uses its tensors without calling it"
        if type(target) is not nn.Conv2d and not isinstance(target, PDC2d):
            return f"{self.names[id(target)]} is a {type(target).__name__}"
        return None

    def _convert(self, layer: PDC2d, refusal: str | None) -> bool:
        """Adds the layer to the report and, unless it is refused, its plain convolution to the replacements."""
        if refusal is None:
            self.replacements[id(layer)] = self._plain(layer)
        self._note(layer, REPLACED if refusal is None else KEPT, refusal or "")
        return refusal is None

    def _block(self, block: PDCBlock2d) -> PlainBlock2d:
        point, after = block.point, self.after.get(id(block.point))
        if after is not None:
            bias = after.shift if point.bias is None else _exact(point.bias) * after.scale + after.shift
            point = _with(point, _exact(point.weight) * after.scale[:, None, None, None], bias, point)
        pdc = self.replacements[id(block.pdc)]
        assert isinstance(pdc, nn.Conv2d)
        return PlainBlock2d(pdc, point, block.shortcut, block.residual).eval()

    def _plain(self, layer: PDC2d) -> nn.Conv2d:
        before, after = self.before.get(id(layer)), self.after.get(id(layer))
        conv = layer.to_conv2d()
        if before is None and after is None:
            return _with(conv, conv.weight, conv.bias, layer)
        weight = _exact(layer.weight)
        bias = weight.new_zeros(layer.out_channels) if layer.bias is None else _exact(layer.bias)
        if before is not None:
            # An output channel sees the input channels of its group only.
            scale, shift = (v.view(layer.groups, 1, -1) for v in before)
            taps = _transform(weight, layer, torch.float64).sum((2, 3)).unflatten(0, (layer.groups, -1))
            bias = bias + (taps * shift).sum(2).flatten()
            weight = (weight.unflatten(0, (layer.groups, -1)) * scale[..., None, None]).flatten(0, 1)
        if after is not None:
            weight = weight * after.scale[:, None, None, None]
            bias = bias * after.scale + after.shift
        return _with(conv, _transform(weight, layer, layer.weight.dtype), bias, layer)


_BATCH_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def _is_block(module: nn.Module) -> TypeGuard[PDCBlock2d]:
    """Whether the module is a PDCBlock2d with its original two layers, not wrapped by an adapter."""
    is_block = isinstance(module, PDCBlock2d) and type(module).forward is PDCBlock2d.forward
    return is_block and isinstance(module.pdc, PDC2d) and isinstance(module.point, nn.Conv2d)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, PDC2d) or _is_block(module)


def _last(module: nn.Module) -> nn.Module | None:
    """The convolution whose output is the module's output, if that is known."""
    if isinstance(module, DPM) and type(module).forward is DPM.forward:
        return _last(module.central)
    if _is_block(module):
        return None if module.residual else module.point
    return module if isinstance(module, PDC2d) else None


def _first(module: nn.Module) -> PDC2d | None:
    """The PDC layer that is the only user of the module's input, if that is known."""
    if _is_block(module):
        return None if module.residual else module.pdc
    return module if isinstance(module, PDC2d) else None


def _commutes(layer: nn.Module, affine: _Affine) -> bool:
    """Whether it makes no difference if the input is padded before or after the affine map."""
    assert isinstance(layer, PDC2d)
    pads_zeros = layer.padding_mode == "zeros" and layer.geometry().plain_padding != (0, 0)
    return not pads_zeros or not affine.shift.any()


def _affine(norm: nn.Module) -> _Affine:
    """The batch norm at inference, from its running statistics."""
    assert isinstance(norm, BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -_exact(norm.running_mean) * scale
    return _Affine(scale, shift if norm.bias is None else shift + _exact(norm.bias))


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64 on the CPU, since not every device has float64 and every installation has the CPU kernels."""
    tensor = tensor.detach()
    return tensor.double() if tensor.is_meta else tensor.cpu().double()


def _transform(weight: torch.Tensor, layer: PDC2d, dtype: torch.dtype) -> torch.Tensor:
    """The plain kernel of a float64 weight, rounded once to `dtype` (zero-sum in 16 bit)."""
    return torch.ops.frd.pdc_weight(weight, int(parse_kind(layer.kind)), layer.theta, dtype)


def _with(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None, source: nn.Conv2d) -> nn.Conv2d:
    """The convolution in eval mode with new parameters, of the device, dtype and `requires_grad` of `source`'s."""
    like = source.weight
    conv.weight = nn.Parameter(weight.detach().to(like), like.requires_grad)
    if bias is not None:
        learns = like.requires_grad if source.bias is None else source.bias.requires_grad
        conv.bias = nn.Parameter(bias.detach().to(like), learns)
    return conv.eval()
