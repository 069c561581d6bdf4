"""Save and load weights: safetensors files with their configuration, other code's checkpoints, encoder weights."""

from __future__ import annotations

import json
import os
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .config import NAME_PREFIX, PRESETS, FRDNetConfig, model_config
from .encoder import MixTransformer
from .frdnet import FRDNet
from .hub import local_file, parse
from .score import ScoreRule
from .state_dicts import (
    WRAPPERS,
    Fit,
    Foreign,
    Naming,
    State,
    check_names,
    export_state,
    fit,
    huggingface_encoder,
    import_state,
    original_encoder,
    released_model,
)
from .state_files import (
    FORMAT,
    config_in_header,
    is_safetensors,
    metadata_in_header,
    read,
    read_safetensors,
)

VERSION = 1
ASSUMED = "released"
# The key of the score rule in the metadata.
SCORE = "score"
# Classification and segmentation heads, which an encoder does not have.
_HEADS = ("head.", "classifier.", "decode_head.")
_FOREIGN_STAGE = re.compile(
    r"(?:patch_embed|block|norm)(\d)\.|encoder\.(?:patch_embeddings|block|layer_norm)\.(\d+)\."
)
_IMAGE_HEAD = "decoder.image_head."
_FIRST_WEIGHT = "stages.0.patch_embed.proj.weight"


def demo_path() -> Path:
    """The demo weights inside the package. FileNotFoundError if they are not installed."""
    path = Path(__file__).parent / "assets" / "demo.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"pretrained='demo': this installation has no {path.name}")
    return path


def save_model(
    model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None, *, half: bool = False
) -> None:
    """Write `model` as safetensors with its configuration inside; :func:`load_model` needs nothing else.

    Args:
        model: an :class:`FRDNet`, or a wrapper of one: DistributedDataParallel, torch.compile, AveragedModel, a
            LightningModule, ... Parameters are stored under the FRDNet's names in their own dtypes. Sharded
            models (FSDP, ``fully_shard``) are gathered: call it in every process; the first one writes.
        path: the file; ``~`` is expanded. Written atomically.
        metadata: any JSON values, for example the training command; :func:`read_metadata` returns them. The net's
            `score_rule` is stored with them as "score"; a rule there that the net does not have is left out. Set it to
            None on a copy whose weights follow a training without `train()`, such as an AveragedModel.
        half: store floating-point parameters as float16, half the size.

    Raises:
        TypeError: `model` holds no FRDNet.
        ValueError: it holds several; parameters that are not those of its configuration (adapters,
            parametrisations, pruning) or have no data (meta device); with `half`, a value that float16 cannot
            hold; metadata that JSON cannot hold.
        OSError: the file cannot be written.
    """
    net = _find_net(model)
    state = {key: _storable(key, tensor, half) for key, tensor in _full_state(model, net).items()}
    header = header_of(net, metadata)
    if not _is_sharded(model) or dist.get_rank() == 0:
        _check_own_names(net.config, state)
        _write_atomically(_target(path), serialize(state, metadata=header))


def header_of(net: FRDNet, metadata: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a file says about the net in it: format, version, configuration, and metadata with the score rule.

    ValueError for metadata that JSON cannot hold.
    """
    try:
        extra = json.dumps(_with_rule(metadata or {}, net.score_rule))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata: must be what JSON can hold: {error}") from error
    config = json.dumps(net.config.to_dict())
    return {"format": FORMAT, "version": str(VERSION), "config": config, "metadata": extra}


def _with_rule(metadata: Mapping[str, Any], rule: ScoreRule | None) -> dict[str, Any]:
    others = {key: value for key, value in metadata.items() if key != SCORE or not _is_rule(value)}
    return others if rule is None else others | {SCORE: rule.to_dict()}


def _is_rule(value: object) -> bool:
    return isinstance(value, Mapping) and "statistic" in value


def rule_in(file: Path, metadata: Mapping[str, Any]) -> ScoreRule | None:
    """The score rule in the metadata of a file, if it holds one; ValueError if that is not valid."""
    value = metadata.get(SCORE)
    if not _is_rule(value):
        return None
    try:
        return ScoreRule.from_dict(cast(Mapping[str, Any], value))
    except ValueError as error:
        raise ValueError(f"{file}: its score rule is not valid: {error}") from error


def save_with_rule(model: nn.Module, rule: ScoreRule, source: str | Path, path: str | Path) -> None:
    """Give `model`, which was loaded from `source`, a score rule and write it to `path`.

    Tensors and metadata of a file of :func:`save_model` stay as they are in it, half precision included. Written
    atomically.
    """
    _find_net(model).score_rule = rule
    file = _source(source)
    header = read_safetensors(file, tensors=False)[1] if is_safetensors(file) else {}
    if config_in_header(file, header) is None:
        save_model(model, path)
        return
    state, header = read_safetensors(file)
    metadata = json.dumps(_with_rule(metadata_in_header(file, header), rule))
    _write_atomically(_target(path), serialize(state, metadata=header | {"metadata": metadata}))


def _find_net(model: nn.Module) -> FRDNet:
    nets = [m for m in model.modules() if isinstance(m, FRDNet)] if isinstance(model, nn.Module) else []
    if not nets:
        raise TypeError(f"model: an FRDNet or a module around one is needed, got {type(model).__name__}")
    if len(nets) > 1:
        raise ValueError(f"model: this {type(model).__name__} holds {len(nets)} FRD-Nets; give one of them")
    return nets[0]


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP (version 1 or 2) keeps shards of the parameters in other processes."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules())


def _full_state(model: nn.Module, net: FRDNet) -> State:
    """The full parameters of the network, under its own names."""
    if not _is_sharded(model):
        return {_own_name(key): tensor for key, tensor in net.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(State, get_model_state_dict(_outermost(model, net), options=options))


def _outermost(model: nn.Module, net: FRDNet) -> nn.Module:
    """The outermost wrapper around `net` alone, which is the one that FSDP gathers through."""
    for module in model.modules():
        inner: Any = module
        while inner is not net and inner is not None:
            inner = next((c for name, c in inner.named_children() if name in WRAPPERS), None)
        if inner is net:
            return module
    return net


def _own_name(key: str) -> str:
    """`key` without the names that wrappers such as torch.compile add."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _storable(key: str, tensor: Tensor, half: bool) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{key}: has no data (meta device); load weights first")
    # A copy: safetensors refuses tensors that share memory.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if half and tensor.is_floating_point():
        if not torch.isfinite(tensor.half()).all():
            raise ValueError(f"{key}: half storage needs finite values within 65504, got larger ones")
        tensor = tensor.half()
    return tensor


def _plan(config: FRDNetConfig) -> State:
    """Names and shapes of a network, without allocating it."""
    with torch.device("meta"):
        return FRDNet(config).state_dict()


def _check_own_names(config: FRDNetConfig, state: State) -> None:
    """ValueError unless the state has the names of the network that load_model will build."""
    try:
        check_names(set(_plan(config)), set(state))
    except ValueError as error:
        raise ValueError(
            f"model: its parameters are not those of its configuration: {error}; merge adapters and remove "
            "parametrisations and pruning first"
        ) from None


def _write_atomically(path: Path, data: bytes) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a directory; the name of a file is needed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory")
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    # Mode 0o666 as open() uses, so that umask and folder decide who may read the file.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`save_model` stored with the tensors: ``{"config": FRDNetConfig, "metadata": dict}``.

    Raises:
        ValueError: not a safetensors file, or one without an FRD-Net configuration.
    """
    file = _source(path)
    if not is_safetensors(file):
        raise ValueError(f"{file}: no valid safetensors file")
    _, header = read_safetensors(file, tensors=False)
    config = config_in_header(file, header)
    if config is None:
        raise ValueError(f"{file}: holds no FRD-Net configuration (a file of save_model is needed)")
    return {"config": config, "metadata": metadata_in_header(file, header)}


def stored_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`save_model` was given as metadata; empty for other checkpoints."""
    file = _source(path)
    header = read_safetensors(file, tensors=False)[1] if is_safetensors(file) else {}
    return {} if config_in_header(file, header) is None else metadata_in_header(file, header)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    model: str | None = None,
    preset: str | None = None,
) -> FRDNet:
    """Load a model from a file, in eval mode and in float32, whatever the dtype of the file, with its `score_rule`.

    Args:
        path: ``"demo"``, a file of :func:`save_model`, or ``last.pt`` of a training run (its averaged weights,
            if it has them); or a checkpoint without a configuration: a state dict (.pth, .safetensors, or the
            index of several) as any wrapper or trainer saves it, in our names or those of the authors' code. Its
            configuration may be in a ``config.json`` next to it, with fields of :class:`FRDNetConfig`. Also a folder
            with ``model.safetensors``, and ``hf://owner/name[@revision][/file]`` on the Hugging Face Hub.
        device: of the model.
        model, preset: name and preset of :func:`frd_model.create_model`, for files without a configuration.
            Without either, a .pth is read as the preset ``released``.

    Raises:
        FileNotFoundError: no such file, or no such repository, revision or file on the Hub.
        PermissionError, ConnectionError: the Hub asks for access or was not reached.
        ValueError: a corrupt file, or one that does not hold this model.
    """
    file = _source(path)
    stored = read(file)
    config, assumed = _choose_config(file, stored.config, model, preset)
    net = FRDNet(config)
    try:
        _fill(net, net, stored.state, file)
    except ValueError as error:
        if stored.config is not None:
            raise
        tried = f"assumed was preset {assumed!r}" if assumed else f"given was preset {preset!r}"
        raise ValueError(
            f"{error}; the file tells no configuration, {tried} with {NAME_PREFIX}{config.encoder}: "
            "give model and preset (--model, --preset) that it was made with"
        ) from None
    net.score_rule = rule_in(file, stored.metadata)
    return net.to(device).eval()


def _choose_config(
    file: Path, stored: FRDNetConfig | None, model: str | None, preset: str | None
) -> tuple[FRDNetConfig, str | None]:
    """The configuration to build, and the preset's name if it is a guess."""
    if model is None and preset is None:
        if stored is None and file.suffix in (".safetensors", ".json"):
            raise ValueError(
                f"{file}: holds no FRD-Net configuration: give model and preset (--model, --preset), or put its "
                "config.json beside it"
            )
        return stored or PRESETS[ASSUMED], None if stored else ASSUMED
    given = model_config(model, preset or ASSUMED)
    if stored is None:
        return given, None if preset else ASSUMED
    if model is None:
        given = given.replace(encoder=stored.encoder)
    if preset is None:
        given = stored.replace(encoder=given.encoder)
    differences = given.differences(stored)
    if differences:
        raise ValueError(
            f"{file}: holds its own configuration, leave out model and preset (--model, --preset); given against "
            f"file: {'; '.join(differences[:3])}"
        )
    return stored, None


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load any file that :func:`load_model` reads into `model`, an FRDNet or a wrapper of one.

    Values are converted to the dtype of the model's parameters. The net's `score_rule` becomes that of the file. A
    model without an image head takes the weights of one that has it, without the head's and a rule that needs it; one
    with a head takes those of one without, keeps its own head, and warns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a corrupt file, one of another configuration, names or shapes that do not match.
    """
    file, net = _source(path), _find_net(model)
    stored = read(file)
    config, state = stored.config, stored.state
    if config is not None and config.image_head != net.config.image_head:
        state = {key: value for key, value in state.items() if not key.startswith(_IMAGE_HEAD)}
        if net.config.image_head:
            warnings.warn(f"{file}: has no image head; the model's own keeps its weights", stacklevel=2)
            state |= {key: v for key, v in net.state_dict().items() if key.startswith(_IMAGE_HEAD)}
        config = config.replace(image_head=net.config.image_head)
    differences = net.config.differences(config) if config else []
    if differences:
        raise ValueError(
            f"{file}: holds another configuration; model against file: {'; '.join(differences[:3])}"
        )
    rule = rule_in(file, stored.metadata)
    _fill(model, net, state, file)
    needs_head = rule is not None and rule.statistic == "head"
    net.score_rule = None if needs_head and not net.config.image_head else rule


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Load pretrained weights into a MiT encoder: Hugging Face's (``hf://nvidia/mit-b*``) or original ``mit_b*.pth``.

    Classification and segmentation heads in the file are ignored, as are stages after the encoder's last one;
    everything else must match. In an encoder with more than three input planes the file's weights are used for RGB
    and zeros for the others, so that its output is initially that of the pretrained encoder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a corrupt file, names or shapes that do not match.
    """
    file = _source(path)
    if not isinstance(encoder, MixTransformer):
        raise ValueError(f"{file}: encoder weights fit a MiT only, got {type(encoder).__name__}")
    own = encoder.state_dict()
    naming, found = _best_fit(file, read(file).state, own, (huggingface_encoder, original_encoder))
    state = {k: v for k, v in found.state.items() if not k.startswith(_HEADS)}
    state = {k: v for k, v in state.items() if _stage_of(k) < len(encoder.stages)}
    _widen(encoder, state, naming(_FIRST_WEIGHT).names[0])
    encoder.load_state_dict(_import(file, "encoder", own, state, naming))


def _stage_of(key: str) -> int:
    match = _FOREIGN_STAGE.match(key)
    if match is None:
        return -1
    return int(match[1]) - 1 if match[1] else int(match[2])


def _widen(encoder: MixTransformer, state: dict[str, Tensor], first: str) -> None:
    own = encoder.state_dict()[_FIRST_WEIGHT]
    got = state.get(first)
    if got is not None and got.dim() == 4 and got.shape[1] == 3 and own.shape[1] > 3:
        state[first] = torch.cat((got, got.new_zeros(got.shape[0], own.shape[1] - 3, *got.shape[2:])), dim=1)


def export_released(model: FRDNet) -> dict[str, Tensor]:
    """The state dict of a `released` model in the names and shapes of the authors' code."""
    return export_state(model.state_dict(), released_model)


def _import(file: Path, kind: str, own: State, state: State, naming: Naming) -> State:
    try:
        return import_state(own, state, naming)
    except ValueError as error:
        raise ValueError(f"{file}: does not fit this {kind}: {error}") from error


def _own(key: str) -> Foreign:
    return Foreign((key,))


def _best_fit(file: Path, state: State, own: State, namings: Sequence[Naming]) -> tuple[Naming, Fit]:
    """The naming under which the file has the most parameters of `own`, and that part of the file."""
    found: list[tuple[Naming, Fit]] = []
    for naming in namings:
        try:
            names = {name for key in own for name in naming(key).names}
        # The module has parts that this naming does not know.
        except ValueError:
            continue
        found.append((naming, fit(file, state, names)))
    return max(found, key=lambda pair: pair[1].matched)


def _fill(model: nn.Module, net: FRDNet, stored: State, file: Path) -> None:
    sharded = _is_sharded(model)
    own = _plan(net.config) if sharded else {_own_name(k): v for k, v in net.state_dict().items()}
    naming, found = _best_fit(file, stored, own, (_own, released_model))
    state = _import(file, "FRDNet", own, found.state, naming)
    for key, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{file}: {key}: has no data (meta device)")
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(_outermost(model, net), dict[str, Any](state), options=options)
        return
    # A network on the meta device has no memory to copy to: it takes the tensors themselves.
    meta = any(tensor.is_meta for tensor in own.values())
    if meta:
        state = {key: tensor.to(own[key].dtype, copy=True) for key, tensor in state.items()}
    net.load_state_dict({key: state[_own_name(key)] for key in net.state_dict()}, assign=meta)


def _source(name: str | Path) -> Path:
    """The file of a checkpoint to read."""
    return demo_path() if str(name) == "demo" else local_file(name)


def _target(path: str | Path) -> Path:
    """The file to write."""
    if parse(path) is not None:
        raise ValueError(
            f"path: must be a local file, got {str(path)!r}; FRDNet.push_to_hub writes to the Hub"
        )
    return Path(os.path.expanduser(path))
