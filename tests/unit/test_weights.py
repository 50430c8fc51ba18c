"""What is refused, and starting one network from another."""

import argparse
import json
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from jsonargparse import auto_cli

from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser, DenoiserSize, build_denoiser
from decodiff_anomalib.weights import (
    CATEGORY_TABLE,
    LATENT_DIFFUSION_PREFIX,
    DenoiserConfig,
    convert,
    load_official,
    load_pretrained,
    official_key,
    save_pretrained,
    to_official_state,
    transfer,
)

SIZE = DenoiserSize(32, 8, 16, layers=1, multipliers=(1, 1, 1))


def make_denoiser(num_categories: int = 3, latent_channels: int = 4, size: DenoiserSize = SIZE) -> Denoiser:
    """A small network with no zero in it."""
    denoiser = build_denoiser(size, latent_channels, num_categories)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.1)
    return denoiser.eval()


def make_config(denoiser: Denoiser, size: DenoiserSize = SIZE, categories: tuple[str, ...] | None = None):
    table = denoiser.category_embedding
    return DenoiserConfig(size, denoiser.unet.config.in_channels, table.num_embeddings, categories, None, "decodiff")


def save_official(path: Path, denoiser: Denoiser, **arguments) -> Path:
    """A checkpoint as the authors' script writes it."""
    torch.save({"model": to_official_state(denoiser), "args": argparse.Namespace(**arguments)}, path)
    return path


def assert_same(ours: Denoiser, theirs: Denoiser) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


# ---------------------------------------------------------------- checkpoints of the authors


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("place", ["args", "model", "optimizer"])
def test_executes_nothing(write, place: str, tmp_path: Path) -> None:
    checkpoint = {"model": {}, "args": argparse.Namespace()} | {place: Attack(tmp_path / "harm")}
    write(checkpoint, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="was not opened"):
        load_official(tmp_path / "last.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor a zip", pickle.dumps({"a": 1})[:-3]])
def test_refuses_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt was not opened.*Accepted are checkpoints of the authors"):
        load_official(path)


def test_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.pt"):
        load_official(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        ({"epoch": 3, "weights": {}}, "holds a dictionary with 'epoch', 'weights'"),
        ([1, 2], "holds a list"),
        ({"model": {"a": 1}, "args": argparse.Namespace()}, "holds a dictionary with 'model', 'args'"),
        ({"model": {}, "args": {}}, "holds a dictionary with 'model', 'args'"),
        ({"model": {}, "args": argparse.Namespace()}, "'input_blocks.0.0.weight' is missing"),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "'input_blocks.0.0.weight' is missing"),
    ],
)
def test_refuses_other_contents(checkpoint, found: str, tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=found):
        load_official(tmp_path / "last.pt")


def test_refuses_other_networks(tmp_path: Path) -> None:
    state = to_official_state(make_denoiser())
    del state["out.2.bias"]
    state["unet.extra"] = torch.zeros(1)
    state["out.2.weight"] = torch.zeros(8, 32, 3, 3)
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "last.pt")
    wrong = r"1 missing, such as 'out\.2\.bias'; 1 unknown, such as 'unet\.extra'; 1 of another shape, such as 'out"
    with pytest.raises(ValueError, match=wrong):
        load_official(tmp_path / "last.pt")


def test_refuses_networks_of_other_depth(tmp_path: Path) -> None:
    state = to_official_state(make_denoiser())
    state["input_blocks.9.0.op.weight"] = state["input_blocks.2.0.op.weight"]
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="has 4 resolutions; the authors' has 3"):
        load_official(tmp_path / "last.pt")


def test_heads_that_are_not_in_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    denoiser = make_denoiser(size=DenoiserSize(32, 16, 16, layers=1, multipliers=(1, 1, 1)))
    path = save_official(tmp_path / "last.pt", denoiser)
    with caplog.at_level(logging.WARNING):
        assert load_official(path)[1].size.head_channels == 8
    assert "no published size is 32 wide: took 4" in caplog.text
    assert load_official(path, num_heads=2)[1].size.head_channels == 16
    with pytest.raises(ValueError, match=r"num_heads=5 does not give the widths inside the transformers, \{32: 32\}"):
        load_official(path, num_heads=5)
    with pytest.raises(ValueError, match="num_heads=64 does not give"):
        load_official(path, num_heads=64)
    assert load_official(save_official(path, denoiser, num_heads=2))[1].size.head_channels == 16


def test_fewer_blocks_and_less_attention_are_recognised_too(tmp_path: Path) -> None:
    """Resolutions without attention and one residual block each: the rule for names covers them."""
    denoiser = make_denoiser(size=replace(DENOISER_SIZES["nano"], modulated=False))
    attention = DENOISER_SIZES["nano"].attention
    assert len({official_key(key, 1, attention) for key in denoiser.state_dict()}) == len(denoiser.state_dict())
    loaded, info = load_official(save_official(tmp_path / "last.pt", denoiser))
    assert info.size.attention == attention
    assert info.size.head_channels == DENOISER_SIZES["nano"].head_channels
    assert_same(loaded, denoiser)


def test_a_modulated_network_has_no_name_among_the_authors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modulated by the category, which the authors' is not"):
        to_official_state(make_denoiser(size=DENOISER_SIZES["nano"]))


def test_category_names_are_known_where_the_table_has_the_data_sets_size(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    _, info = load_official(save_official(path, make_denoiser(12), dataset="visa", vae_type="mse"))
    assert info.categories[2] == "fryum"
    assert info.codec == "stabilityai/sd-vae-ft-mse"
    assert load_official(save_official(path, make_denoiser(3), dataset="visa"))[1].categories is None


def test_latent_diffusion_is_recognised(tmp_path: Path) -> None:
    denoiser = make_denoiser(1001)
    state = to_official_state(denoiser)
    table = state.pop(CATEGORY_TABLE)
    theirs = {LATENT_DIFFUSION_PREFIX + key: tensor for key, tensor in state.items()} | {CATEGORY_TABLE: table}
    theirs |= {"model_ema.decay": torch.ones(1), "first_stage_model.encoder.conv_in.weight": torch.ones(1)}
    torch.save({"global_step": 7, "state_dict": theirs}, tmp_path / "model.ckpt")
    loaded, info = load_official(tmp_path / "model.ckpt")
    assert (info.source, info.num_categories, info.categories) == ("latent-diffusion", 1001, None)
    assert_same(loaded, denoiser)

    target = make_denoiser(15)
    transfer(loaded, target)
    assert torch.equal(target.category_embedding.weight, table[:15])


# ---------------------------------------------------------------- files of our own


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = make_denoiser()
    path = save_official(tmp_path / "last.pt", denoiser)
    auto_cli(convert, args=[str(path), "--to", str(tmp_path / "converted")], prog="decodiff convert")
    assert "3 categories, 4 channels" in capsys.readouterr().out
    assert_same(load_pretrained(tmp_path / "converted")[0], denoiser)
    with pytest.raises(SystemExit):
        auto_cli(convert, args=["--help"], prog="decodiff convert")
    help_text = capsys.readouterr().out
    assert "--to TO" in help_text
    assert "Checkpoint of the authors' training script" in help_text


def test_saved_and_loaded(tmp_path: Path) -> None:
    denoiser = make_denoiser(2, latent_channels=48)
    config = make_config(denoiser, categories=("brick", "grass"))
    save_pretrained(denoiser, config, tmp_path)
    loaded, loaded_config = load_pretrained(tmp_path)
    assert loaded_config == config
    assert_same(loaded, denoiser)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    latents, timesteps, category = torch.rand(2, 48, 8, 8), torch.tensor([0, 9]), torch.tensor([0, 1])
    assert torch.equal(loaded(latents, timesteps, category), denoiser(latents, timesteps, category))


def test_refuses_a_checkpoint_that_was_not_converted(tmp_path: Path) -> None:
    path = save_official(tmp_path / "last.pt", make_denoiser())
    with pytest.raises(ValueError, match=r"is a file. Run `decodiff convert .*last\.pt --to DIR`"):
        load_pretrained(path)


def test_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no config\.json"):
        load_pretrained(tmp_path)
    denoiser = make_denoiser()
    save_pretrained(denoiser, make_config(denoiser), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="describes 'AutoencoderKL', not a 'Denoiser'"):
        load_pretrained(tmp_path)
    save_pretrained(denoiser, make_config(make_denoiser(5)), tmp_path)
    with pytest.raises(ValueError, match=r"1 of another shape, such as 'category_embedding\.weight'"):
        load_pretrained(tmp_path)


def test_hub_is_asked_only_where_there_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, asked = make_denoiser(), []
    save_pretrained(denoiser, make_config(denoiser), tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    load_pretrained(tmp_path)
    assert not asked
    assert_same(load_pretrained("someone/decodiff")[0], denoiser)
    assert asked == ["someone/decodiff"]


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError("no network"), ConnectionError("no network")])
def test_without_a_network_says_the_offline_way(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="run `hf download someone/decodiff --local-dir DIR` and give weights=DIR"):
        load_pretrained("someone/decodiff")


def test_mistyped_folder_is_no_hub_id() -> None:
    with pytest.raises(OSError, match="is neither a local folder nor in the local cache"):
        load_pretrained("./no/such/folder")


# ---------------------------------------------------------------- starting from other weights


@pytest.mark.parametrize("num_categories", [2, 3, 5])
def test_rows_keep_their_place_without_names(num_categories: int) -> None:
    source, target = make_denoiser(3), make_denoiser(num_categories)
    before, shared = target.category_embedding.weight.detach().clone(), min(3, num_categories)
    transfer(source, target)
    assert torch.equal(target.category_embedding.weight[:shared], source.category_embedding.weight[:shared])
    assert torch.equal(target.category_embedding.weight[shared:], before[shared:])
    for key, tensor in source.unet.state_dict().items():
        assert torch.equal(target.unet.state_dict()[key], tensor)


def test_categories_take_the_row_of_their_name() -> None:
    source, target = make_denoiser(3), make_denoiser(3)
    old, before = source.category_embedding.weight, target.category_embedding.weight.detach().clone()
    transfer(source, target, ("a", "b", "c"), ("c", "new", "a"))
    assert torch.equal(target.category_embedding.weight, torch.stack([old[2], before[1], old[0]]))


def test_started_network_trains_apart_from_its_source() -> None:
    source, target = make_denoiser(), make_denoiser()
    transfer(source, target)
    assert all(parameter.requires_grad for parameter in target.parameters())
    ours, theirs = target.state_dict(), source.state_dict()
    assert all(ours[key].data_ptr() != theirs[key].data_ptr() for key in theirs)


def test_refuses_latents_of_other_channels() -> None:
    with pytest.raises(ValueError, match="latents of 4 channels, the model's have 48"):
        transfer(make_denoiser(), make_denoiser(latent_channels=48))


def test_refuses_another_size() -> None:
    wide = DenoiserSize(64, 8, 16, layers=1, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=r"block_out_channels=\(32, 32, 32\) of the weights is \(64, 64, 64\)"):
        transfer(make_denoiser(), make_denoiser(size=wide))


def test_refuses_other_heads_though_every_tensor_fits() -> None:
    other = DenoiserSize(32, 16, 16, layers=1, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=r"attention_head_dim=\(4, 4, 4\) of the weights is \(2, 2, 2\)"):
        transfer(make_denoiser(), make_denoiser(size=other))
