"""Names of parameters in other code's state dicts, and the part of a file that holds a network.

Each table maps our name of a parameter to its names and its shape in the other code. Reading and writing are both
derived from it, so they cannot drift apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Foreign(NamedTuple):
    """Where another state dict stores one of our parameters.

    names: the tensors that, concatenated along dimension 0, are the parameter.
    dims: their number of dimensions, or None for the parameter's own. A linear layer has 2, a 1x1 convolution 4.
    """

    names: tuple[str, ...]
    dims: int | None = None


Naming = Callable[[str], Foreign]
State = dict[str, Tensor]

# Names that torch's wrappers add between the name of a module and those of its children.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGED = re.compile(r"(?:^|_)(?:ema|swa|avg|averaged?|shadow)(?:_|$)")
_CONTAINERS = WRAPPERS | {"model", "net", "network", "state_dict", "model_state_dict", "params", "weights"}

_STAGE = re.compile(r"stages\.(\d)\.(patch_embed|blocks|norm)\.(.+)")
_HF_PATCH = {"proj": "proj", "norm": "layer_norm"}
_HF_BLOCK = {
    "norm1": "layer_norm_1",
    "norm2": "layer_norm_2",
    "attn.q": "attention.self.query",
    "attn.proj": "attention.output.dense",
    "attn.sr": "attention.self.sr",
    "attn.norm": "attention.self.layer_norm",
    "mlp.fc1": "mlp.dense1",
    "mlp.dwconv": "mlp.dwconv.dwconv",
    "mlp.fc2": "mlp.dense2",
}


def original_encoder(key: str) -> Foreign:
    """The naming of ``mit_b*.pth``: stages spread over patch_embed1..4, block1..4 and norm1..4."""
    stage, part, rest = _stage(key)
    if part == "blocks":
        return Foreign((f"block{stage + 1}.{rest.replace('mlp.dwconv.', 'mlp.dwconv.dwconv.')}",))
    return Foreign((f"{part}{stage + 1}.{rest}",))


def huggingface_encoder(key: str) -> Foreign:
    """The naming of Hugging Face's Segformer encoder: separate queries, keys and values."""
    stage, part, rest = _stage(key)
    if part == "norm":
        return Foreign((f"encoder.layer_norm.{stage}.{rest}",))
    if part == "patch_embed":
        layer, leaf = rest.split(".")
        return Foreign((f"encoder.patch_embeddings.{stage}.{_HF_PATCH[layer]}.{leaf}",))
    number, layer, leaf = _split_block(rest)
    head = f"encoder.block.{stage}.{number}"
    if layer == "attn.kv":
        return Foreign(tuple(f"{head}.attention.self.{which}.{leaf}" for which in ("key", "value")))
    return Foreign((f"{head}.{_HF_BLOCK[layer]}.{leaf}",))


def _stage(key: str) -> tuple[int, str, str]:
    match = _STAGE.fullmatch(key)
    if match is None:
        raise ValueError(f"naming: {key!r} is not a parameter of a MiT encoder")
    return int(match[1]), match[2], match[3]


def _split_block(rest: str) -> tuple[str, str, str]:
    number, rest = rest.split(".", 1)
    layer, leaf = rest.rsplit(".", 1)
    return number, layer, leaf


# The authors' angular block, which runs first, is convDC2; rounds 1, 2, 3 are cluster16, cluster4, cluster2.
_ROUNDS = ("cluster16", "cluster4", "cluster2")
_PROJECTIONS = {"key": "f", "value": "v"}
_RELEASED_BLOCK = {
    "scale1": "layer_scale_1",
    "scale2": "layer_scale_2",
    "mixer.enter": "token_mixer.projcd",
    "mixer.macro": "token_mixer.proj",
    "mixer.leave": "token_mixer.projlast",
    "mixer.dpm.angular.pdc": "token_mixer.convDC2.conv1",
    "mixer.dpm.angular.point": "token_mixer.convDC2.conv2",
    "mixer.dpm.central.pdc": "token_mixer.convDC1.conv1",
    "mixer.dpm.central.point": "token_mixer.convDC1.conv2",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def released_model(key: str) -> Foreign:
    """The naming of the authors' FRDNet_Main, for the preset ``released``."""
    part, rest = key.split(".", 1)
    if part == "encoder":
        return original_encoder(rest)
    if part == "decoder":
        return Foreign((rest.replace("layers.", "deconv_model.", 1),))
    if part != "blocks":
        raise ValueError(f"naming: {key!r} has no place in the released checkpoints")
    number, rest = rest.split(".", 1)
    if rest.startswith("norm_out."):
        return Foreign((f"norm_fec{int(number) + 1}.{rest.removeprefix('norm_out.')}",))
    head = f"fecblock{int(number) + 1}.0"
    if rest in _RELEASED_BLOCK:
        return Foreign((f"{head}.{_RELEASED_BLOCK[rest]}",))
    if rest.startswith("mixer.icm."):
        return _released_icm(f"{head}.token_mixer", rest.removeprefix("mixer.icm."))
    layer, leaf = rest.rsplit(".", 1)
    if layer not in _RELEASED_BLOCK:
        raise ValueError(f"naming: {key!r} has no place in the released checkpoints")
    dims = 2 if layer.startswith("mlp.") and leaf == "weight" else None
    return Foreign((f"{head}.{_RELEASED_BLOCK[layer]}.{leaf}",), dims)


def _released_icm(head: str, rest: str) -> Foreign:
    if rest in ("alpha", "beta"):
        return Foreign(tuple(f"{head}.{cluster}.sim_{rest}" for cluster in _ROUNDS))
    _, number, which, leaf = rest.split(".")
    # Rounds 1 and 2 are 1x1 convolutions there, round 3 is a linear layer as all are here.
    dims = None if leaf == "bias" else (4, 4, 2)[int(number)]
    return Foreign((f"{head}.{_ROUNDS[int(number)]}.{_PROJECTIONS[which]}.{leaf}",), dims)


def import_state(
    own: Mapping[str, Tensor], foreign: Mapping[str, Tensor], naming: Naming
) -> dict[str, Tensor]:
    """`foreign` under our names.

    Args:
        own: the model's state dict, for its names and shapes.
        foreign: a state dict in the other naming.

    Raises:
        ValueError: missing or unexpected names in `foreign`, or shapes that do not match.
    """
    places = {key: naming(key) for key in own}
    wanted = {name for place in places.values() for name in place.names}
    check_names(wanted, set(foreign))
    state = {}
    for key, place in places.items():
        parts = [foreign[name] for name in place.names]
        shape = list(own[key].shape)
        want = _foreign_shape(shape, place)
        for name, part in zip(place.names, parts, strict=True):
            # A scalar may have been stored with and without its one dimension.
            if list(part.shape) != want and {(*want,), (*part.shape,)} != {(), (1,)}:
                raise ValueError(f"{name}: shape {want} is needed, got {list(part.shape)}")
        state[key] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)
    return state


def export_state(own: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """The inverse of :func:`import_state`: our state dict under the other names and shapes."""
    state = {}
    for key, tensor in own.items():
        place = naming(key)
        want = _foreign_shape(list(tensor.shape), place)
        for name, part in zip(place.names, tensor.detach().chunk(len(place.names)), strict=True):
            state[name] = part.reshape(want).clone()
    return state


def _foreign_shape(shape: list[int], place: Foreign) -> list[int]:
    if not shape:
        return []
    rows = shape[0] // len(place.names)
    dims = len(shape) if place.dims is None else place.dims
    return [rows, *shape[1:], 1, 1][:dims]


def check_names(wanted: set[str], got: set[str]) -> None:
    """ValueError unless both sets are the same."""
    missing, extra = sorted(wanted - got), sorted(got - wanted)
    if missing or extra:
        raise ValueError(f"{_listed('missing', missing)}, {_listed('unexpected', extra)}")


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what} parameters" + (f" ({shown})" if names else "")


class Fit(NamedTuple):
    """The tensors under one prefix of a file, of which `matched` have the wanted names."""

    prefix: str
    state: State
    matched: int


def fit(file: Path, state: Mapping[str, Tensor], names: Collection[str]) -> Fit:
    """The part of `state` whose names, after a common prefix and without those of wrappers, are `names`.

    If several parts are complete, averaged weights (``ema``, ``swa``, ...) come first, then weights under usual names
    (``model``, ``state_dict``, ...). If none is complete, the part with the most names is returned.

    Raises:
        ValueError: two different networks, neither of which comes first.
    """
    fits = list(_fits(state, set(names)))
    complete = [f for f in fits if f.matched == len(names)]
    if not complete:
        return max(fits, key=lambda f: (f.matched, -_rank(f.prefix)), default=Fit("", dict(state), 0))
    rank = min(_rank(f.prefix) for f in complete)
    first, *others = [f for f in complete if _rank(f.prefix) == rank]
    for other in others:
        if any(not torch.equal(first.state[name], other.state[name]) for name in names):
            raise ValueError(
                f"{file}: holds several nets, {first.prefix!r} and {other.prefix!r}: save the state dict of one"
            )
    return first


def _fits(state: Mapping[str, Tensor], names: set[str]) -> Iterator[Fit]:
    wrappers = WRAPPERS - {part for name in names for part in name.split(".")}
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(p for p in parts[i:] if p not in wrappers) in names:
                counts[".".join([*parts[:i], ""])] += 1
    # "model." and "model.module." may be the same network: the longer prefix has fewer other tensors under it.
    seen: list[tuple[str, int]] = []
    for prefix, count in sorted(counts.items(), key=lambda item: -len(item[0])):
        if any(longer.startswith(prefix) and count == other for longer, other in seen):
            continue
        seen.append((prefix, count))
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        own = {".".join(p for p in k.split(".") if p not in wrappers): v for k, v in inside.items()}
        yield Fit(prefix, own, sum(name in own for name in names))


def _rank(prefix: str) -> int:
    parts = [part for part in prefix.split(".") if part]
    if any(_AVERAGED.search(part.lower()) for part in parts):
        return 0
    return 1 if all(part in _CONTAINERS for part in parts) else 2
