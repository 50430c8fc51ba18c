"""Conversion of checkpoints, and folders of weights: saved, loaded, downloaded and refused."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from jsonargparse import auto_cli

from decodiff_anomalib.weights import convert, load_pretrained, save_pretrained


def test_convert_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_denoiser, save_official, assert_same_weights
) -> None:
    denoiser = make_denoiser()
    path = save_official(tmp_path / "last.pt", denoiser)
    auto_cli(convert, args=[str(path), "--to", str(tmp_path / "converted")], prog="decodiff convert")
    assert "3 categories, 4 channels" in capsys.readouterr().out
    assert_same_weights(load_pretrained(tmp_path / "converted")[0], denoiser)
    with pytest.raises(SystemExit):
        auto_cli(convert, args=["--help"], prog="decodiff convert")
    help_text = capsys.readouterr().out
    assert "--to TO" in help_text
    assert "Checkpoint of the authors' training script" in help_text


def test_saved_weights_load_unchanged(tmp_path: Path, make_denoiser, make_config, assert_same_weights) -> None:
    denoiser = make_denoiser(2, latent_channels=48)
    config = make_config(denoiser, categories=("brick", "grass"))
    save_pretrained(denoiser, config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    loaded, loaded_config = load_pretrained(tmp_path)
    assert loaded_config == config
    assert_same_weights(loaded, denoiser)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    latents, timesteps, category = torch.rand(2, 48, 8, 8), torch.tensor([0, 9]), torch.tensor([0, 1])
    assert torch.equal(loaded(latents, timesteps, category), denoiser(latents, timesteps, category))


def test_checkpoint_that_was_not_converted_is_refused(tmp_path: Path, make_denoiser, save_official) -> None:
    path = save_official(tmp_path / "last.pt", make_denoiser())
    with pytest.raises(ValueError, match=r"is a file. Run `decodiff convert .*last\.pt --to DIR`"):
        load_pretrained(path)


def test_other_folders_are_refused(tmp_path: Path, make_denoiser, make_config) -> None:
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


def test_hub_is_used_only_if_there_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_denoiser, make_config, assert_same_weights
) -> None:
    denoiser, asked = make_denoiser(), []
    save_pretrained(denoiser, make_config(denoiser), tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    load_pretrained(tmp_path)
    assert not asked
    assert_same_weights(load_pretrained("someone/decodiff")[0], denoiser)
    assert asked == ["someone/decodiff"]


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError("no network"), ConnectionError("no network")])
def test_error_without_a_network_names_the_offline_command(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="run `hf download someone/decodiff --local-dir DIR` and give weights=DIR"):
        load_pretrained("someone/decodiff")


def test_mistyped_folder_is_refused() -> None:
    with pytest.raises(OSError, match="is neither a local folder nor in the local cache"):
        load_pretrained("./no/such/folder")
