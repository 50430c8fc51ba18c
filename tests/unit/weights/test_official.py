"""Checkpoints of the authors: what is recognised in them, and what is refused."""

import argparse
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch

from decodiff_anomalib.denoiser import DENOISER_SIZES, DenoiserSize
from decodiff_anomalib.weights import CATEGORY_TABLE, load_official, official_key, to_official_state, transfer
from decodiff_anomalib.weights.official import LATENT_DIFFUSION_PREFIX


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("place", ["args", "model", "optimizer"])
def test_checkpoint_cannot_execute_code(write, place: str, tmp_path: Path) -> None:
    checkpoint = {"model": {}, "args": argparse.Namespace()} | {place: Attack(tmp_path / "harm")}
    write(checkpoint, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="was not opened"):
        load_official(tmp_path / "last.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor a zip", pickle.dumps({"a": 1})[:-3]])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt was not opened.*Accepted are checkpoints of the authors"):
        load_official(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
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
def test_other_contents_are_refused(checkpoint, found: str, tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=found):
        load_official(tmp_path / "last.pt")


def test_networks_with_other_weights_are_refused(tmp_path: Path, make_denoiser) -> None:
    state = to_official_state(make_denoiser())
    del state["out.2.bias"]
    state["unet.extra"] = torch.zeros(1)
    state["out.2.weight"] = torch.zeros(8, 32, 3, 3)
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "last.pt")
    wrong = r"1 missing, such as 'out\.2\.bias'; 1 unknown, such as 'unet\.extra'; 1 of another shape, such as 'out"
    with pytest.raises(ValueError, match=wrong):
        load_official(tmp_path / "last.pt")


def test_networks_with_other_resolutions_are_refused(tmp_path: Path, make_denoiser) -> None:
    state = to_official_state(make_denoiser())
    state["input_blocks.9.0.op.weight"] = state["input_blocks.2.0.op.weight"]
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="has 4 resolutions; the authors' has 3"):
        load_official(tmp_path / "last.pt")


def test_number_of_heads_that_the_weights_do_not_show(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_denoiser, save_official
) -> None:
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


def test_fewer_blocks_and_less_attention_are_recognised(
    tmp_path: Path, make_denoiser, save_official, assert_same_weights
) -> None:
    """Resolutions without attention and one residual block each: the rule for names covers them."""
    attention = (False, False, True)
    size = DenoiserSize(32, 8, 64, attention=attention, dropout=0.0, layers=1, norm_groups=8)
    denoiser = make_denoiser(size=size)
    assert len({official_key(key, 1, attention) for key in denoiser.state_dict()}) == len(denoiser.state_dict())
    loaded, info = load_official(save_official(tmp_path / "last.pt", denoiser))
    assert info.size.attention == attention
    assert info.size.head_channels == size.head_channels
    assert_same_weights(loaded, denoiser)


def test_modulated_network_has_no_official_names(tmp_path: Path, make_denoiser) -> None:
    with pytest.raises(ValueError, match="modulated by the category, which the authors' is not"):
        to_official_state(make_denoiser(size=DENOISER_SIZES["nano"]))


def test_category_names_are_known_if_the_table_has_one_row_for_each(
    tmp_path: Path, make_denoiser, save_official
) -> None:
    path = tmp_path / "last.pt"
    _, info = load_official(save_official(path, make_denoiser(12), dataset="visa", vae_type="mse"))
    assert info.categories[2] == "fryum"
    assert info.codec == "stabilityai/sd-vae-ft-mse"
    assert load_official(save_official(path, make_denoiser(3), dataset="visa"))[1].categories is None


def test_latent_diffusion_checkpoint_is_recognised(tmp_path: Path, make_denoiser, assert_same_weights) -> None:
    denoiser = make_denoiser(1001)
    state = to_official_state(denoiser)
    table = state.pop(CATEGORY_TABLE)
    weights = {LATENT_DIFFUSION_PREFIX + key: tensor for key, tensor in state.items()} | {CATEGORY_TABLE: table}
    weights |= {"model_ema.decay": torch.ones(1), "first_stage_model.encoder.conv_in.weight": torch.ones(1)}
    torch.save({"global_step": 7, "state_dict": weights}, tmp_path / "model.ckpt")
    loaded, info = load_official(tmp_path / "model.ckpt")
    assert (info.source, info.num_categories, info.categories) == ("latent-diffusion", 1001, None)
    assert_same_weights(loaded, denoiser)

    target = make_denoiser(15)
    transfer(loaded, target)
    assert torch.equal(target.category_embedding.weight, table[:15])
