"""Checkpoints on the Hugging Face Hub, by a stand-in on this machine, and in local folders."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from frd_model import FRDNet, create_model, load_model, save_model
from frd_model.cli import main
from frd_model.hub import licence
from frd_model.score import ScoreRule
from frd_model.state_dicts import export_state, huggingface_encoder
from frd_model.weights import load_encoder_weights, read_metadata, save_with_rule

from .hub_server import Repository, StandInHub

TINY = {"stages": (1, 2), "blocks": 1, "pyramid_width": 8, "trace_widths": (8, 8)}
RULE = ScoreRule("max", 2.0, -0.5, 0.7, {"0.01": 0.9, "0.05": 0.8, "0.10": 0.6}, {"photos": 10})


def tiny(seed: int = 0) -> FRDNet:
    torch.manual_seed(seed)
    net = create_model("frdnet_mit_b0", preset="lite", **TINY).eval()
    net.score_rule = RULE
    return net


def same(net: FRDNet, other: FRDNet) -> bool:
    mine, theirs = net.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> Iterator[StandInHub]:
    with StandInHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        hub.repositories["lab/net"] = Repository(folder_files(saved))
        yield hub


def test_a_folder_holds_net_configuration_and_rule(saved: Path, tmp_path: Path) -> None:
    assert sorted(folder_files(saved)) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((saved / "config.json").read_text()) == tiny().config.to_dict()
    for net in (FRDNet.from_pretrained(saved), FRDNet.from_pretrained(str(saved)), load_model(saved)):
        assert same(net, tiny()) and net.config == tiny().config
        assert net.score_rule == RULE and not net.training
    taken = create_model("frdnet_mit_b0", "lite", pretrained=saved, **TINY)
    assert same(taken, tiny()) and taken.score_rule == RULE
    assert read_metadata(saved)["config"] == tiny().config
    # Saved again, with neither a rule nor what an older file of that name held.
    net = tiny(1).train().eval()
    net.save_pretrained(tmp_path)
    tiny(2).train().eval().save_pretrained(tmp_path)
    assert FRDNet.from_pretrained(tmp_path).score_rule is None and same(load_model(tmp_path), tiny(2))


def test_config_beside_plain_safetensors(saved: Path, tmp_path: Path) -> None:
    """What another tool has written anew keeps its tensors only."""
    save_file(load_file(saved / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no FRD-Net configuration.*config\.json beside it"):
        FRDNet.from_pretrained(tmp_path)
    shutil.copy(saved / "config.json", tmp_path)
    assert same(FRDNet.from_pretrained(tmp_path), tiny())


def test_copies_of_a_net_keep_its_hub_side(saved: Path, tmp_path: Path) -> None:
    net = copy.deepcopy(FRDNet.from_pretrained(saved))
    net.save_pretrained(tmp_path)
    again = FRDNet.from_pretrained(tmp_path)
    assert same(again, tiny()) and again.score_rule == RULE

    class Derived(FRDNet):
        pass

    with pytest.raises(
        NotImplementedError, match=r"makes an FRDNet, got Derived; build one and use load_weights"
    ):
        Derived.from_pretrained(saved)


def test_a_repository_is_loaded_once(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hf://lab/net", Path("hf://lab/net"), "hf://lab/net@main", "hf://lab/net/model.safetensors"):
        net = load_model(name)
        assert same(net, tiny()) and net.score_rule == RULE
    assert same(FRDNet.from_pretrained("lab/net"), tiny())
    assert same(FRDNet.from_pretrained("lab/net", revision=hub.repositories["lab/net"].commit), tiny())
    assert same(create_model("frdnet_mit_b0", "lite", pretrained="hf://lab/net", **TINY), tiny())
    assert sorted(hub.downloads()) == ["README.md", "config.json", "model.safetensors"]
    assert capsys.readouterr().err.count("licence unknown") == 1
    hub.close()
    assert same(load_model("hf://lab/net"), tiny())
    assert same(FRDNet.from_pretrained("lab/net", local_files_only=True), tiny())


def test_a_new_commit_is_loaded(hub: StandInHub, tmp_path: Path) -> None:
    old = hub.repositories["lab/net"].commit
    assert same(load_model("hf://lab/net"), tiny())
    tiny(1).save_pretrained(tmp_path / "new")
    hub.repositories["lab/net"].files |= folder_files(tmp_path / "new")
    assert same(load_model("hf://lab/net"), tiny(1))
    assert same(load_model(f"hf://lab/net@{old}"), tiny())


def test_what_is_loaded_may_be_plain(hub: StandInHub, saved: Path, tmp_path: Path) -> None:
    """The configuration beside weights without one, in a folder of the repository too."""
    save_file(load_file(saved / "model.safetensors"), tmp_path / "x.safetensors")
    files = {"a/config.json": (saved / "config.json").read_bytes()}
    files["a/x.safetensors"] = (tmp_path / "x.safetensors").read_bytes()
    hub.repositories["lab/plain"] = Repository(files)
    assert same(load_model("hf://lab/plain/a/x.safetensors"), tiny())
    with pytest.raises(
        FileNotFoundError, match=r"hf://lab/plain: has none of model\.safetensors, .*name a file"
    ):
        load_model("hf://lab/plain")


def test_shards_of_a_repository(hub: StandInHub, saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    shutil.copy(saved / "config.json", tmp_path)
    hub.repositories["lab/shards"] = Repository(folder_files(tmp_path))
    assert same(load_model("hf://lab/shards"), tiny())
    hub.close()
    assert same(load_model("hf://lab/shards"), tiny())


@pytest.mark.parametrize(
    "card, found",
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: segformer\n---\n", "other (segformer)"),
        ("---\nlicense: [mit, bsd]\n---\n", "mit, bsd"),
        ("---\ntags: [x]\n---\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("# a page without metadata", "unknown"),
    ],
)
def test_the_licence_of_a_card(tmp_path: Path, card: str, found: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path / "README.md") == found
    assert licence(None) == "unknown"


def test_encoder_weights_name_their_licence(
    hub: StandInHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    small: dict[str, Any] = {"name": "frdnet_mit_b0", "blocks": 1, "stages": (1, 2)}
    encoder = create_model(**small).encoder
    torch.save(export_state(encoder.state_dict(), huggingface_encoder), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n# MiT\n")
    hub.repositories["nvidia/mit-b0"] = Repository(folder_files(tmp_path))
    said = f"hf://nvidia/mit-b0: licence other, see {hub.url}/nvidia/mit-b0\n"
    for again in (False, True):
        other = create_model(**small, encoder_weights="hf://nvidia/mit-b0").encoder
        for key, value in encoder.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
        assert (said in capsys.readouterr().err) != again
    hub.close()
    load_encoder_weights(other, "hf://nvidia/mit-b0")
    load_encoder_weights(other, tmp_path)


def spoiled(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoiled, r"{name}: differs from its checksum \w+, and was removed: try again$"),
        (
            lambda content: content[:-9],
            r"lab/net: the download failed, try again: .*Consistency check failed",
        ),
    ],
)
def test_damaged_downloads_are_refused(hub: StandInHub, name: str, spoil: Any, message: str) -> None:
    repository = hub.repositories["lab/net"]
    repository.sent[name] = spoil(repository.files[name])
    for _ in range(2):
        with pytest.raises((ValueError, ConnectionError), match=message.format(name=name)) as caught:
            load_model("hf://lab/net")
        assert "\n" not in str(caught.value)
    repository.sent.clear()
    assert same(load_model("hf://lab/net"), tiny())


def test_a_cache_that_has_decayed_is_noticed(hub: StandInHub, tmp_path: Path) -> None:
    load_model("hf://lab/net")
    file = next((tmp_path / "cache").glob("*/snapshots/*/model.safetensors")).resolve()
    file.write_bytes(spoiled(file.read_bytes()))
    with pytest.raises(ValueError, match=r"hf://lab/net/model\.safetensors: differs from its checksum"):
        load_model("hf://lab/net")
    assert same(load_model("hf://lab/net"), tiny())


@pytest.mark.parametrize(
    "name, access, error, message",
    [
        (
            "hf://lab/none",
            "open",
            FileNotFoundError,
            r"has no such repository, or it is private: run `hf auth login`",
        ),
        (
            "hf://lab/net",
            "private",
            FileNotFoundError,
            r"or it is private: run `hf auth login` or set HF_TOKEN",
        ),
        (
            "hf://lab/net",
            "gated",
            PermissionError,
            r"ask for access at http://127.*/lab/net, then run `hf auth",
        ),
        ("hf://lab/net@v9", "open", FileNotFoundError, r"the repository has no revision 'v9'"),
        (
            "hf://lab/net/x.pth",
            "open",
            FileNotFoundError,
            r"hf://lab/net/x\.pth: the repository has no such file",
        ),
        ("hf://lab", "open", ValueError, r"must be hf://OWNER/NAME\[@REVISION\]\[/FILE\], got 'hf://lab'"),
        ("hf://lab/n et", "open", ValueError, r"hf://lab/n et: no name of a repository: "),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: StandInHub, name: str, access: str, error: type[Exception], message: str
) -> None:
    hub.repositories["lab/net"].access = access
    with pytest.raises(error, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_token_opens_a_private_repository(hub: StandInHub) -> None:
    hub.repositories["lab/net"].access = "private"
    assert same(FRDNet.from_pretrained("lab/net", token="hf_x"), tiny())


def test_offline_the_way_out_is_named(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    way_out = r"hf://lab/net: not in the cache .*: load it once online, or give a local file or folder$"
    hub.close()
    # huggingface_hub waits between its attempts.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(ConnectionError, match=way_out):
        load_model("hf://lab/net")
    with pytest.raises(
        ConnectionError, match=way_out.replace("cache .*", r"cache .*\(local_files_only is set\)")
    ):
        FRDNet.from_pretrained("lab/net", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=way_out):
        load_model("hf://lab/net")


def test_push_and_back(hub: StandInHub) -> None:
    net = tiny(4)
    net.push_to_hub("lab/pushed")
    files = hub.repositories["lab/pushed"].files
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert b"FRDNet.from_pretrained" in files["README.md"] and b"license" not in files["README.md"]
    again = FRDNet.from_pretrained("lab/pushed")
    assert same(again, net) and again.score_rule == RULE


def test_files_are_written_locally(hub: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"path: must be a local file, got 'hf://lab/x'; FRDNet\.push_to_hub"
    ):
        save_model(tiny(), "hf://lab/x")
    net, path = load_model("hf://lab/net"), tmp_path / "own.safetensors"
    save_with_rule(net, RULE, "hf://lab/net", path)
    assert same(load_model(path), tiny())


def test_a_command_takes_a_repository(
    hub: StandInHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    photo, out = str(tmp_path / "photo.png"), str(tmp_path / "out")
    assert main(["predict", photo, "--out", out, "--checkpoint", "hf://lab/net"]) == 0
    assert json.loads((tmp_path / "out" / "photo.json").read_text())["checkpoint"] == "hf://lab/net"
    capsys.readouterr()
    assert main(["predict", photo, "--out", out, "--overwrite", "--checkpoint", "hf://lab/none"]) == 1
    last = capsys.readouterr().err.splitlines()
    assert len(last) == 1 and last[0].startswith("frd predict: hf://lab/none: http://127.0.0.1:")
