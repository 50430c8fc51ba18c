"""Codecs: one interface, and pictures that come back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decodiff_anomalib.codec import build_codec
from decodiff_anomalib.codec.linear import WEIGHTS, PatchCodec
from decodiff_anomalib.codec.train import read_photographs, reconstruction_psnr

TINY_KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.5,
}


def test_bundled_codec_returns_photographs(data_dir: Path) -> None:
    codec = build_codec()
    held_out = sorted((data_dir.parent / "photos").glob("09*.jpg"))
    assert reconstruction_psnr(codec, read_photographs(held_out)) > 32
    for category in ("grass_synth", "magnetic_tile", "pcb"):
        normal = read_photographs(sorted((data_dir / category / "train" / "good").glob("*.png"))[:8])
        assert reconstruction_psnr(codec, normal) > 30, category


def test_bundled_codec_interface() -> None:
    codec = build_codec()
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, codec.latent_channels, 8, 12)
    assert codec.decode(latents).shape == images.shape
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert WEIGHTS.stat().st_size < 6e6


def test_no_linear_codec_of_its_size_is_better() -> None:
    """Eckart-Young: the error of the principal components is the sum of the variances left out."""
    images = torch.nn.functional.avg_pool2d(torch.randn(16, 3, 66, 66), 3, stride=1).contiguous()
    codec = PatchCodec(latent_channels=24)
    codec.fit(images)
    patches = torch.nn.functional.pixel_unshuffle(images, 8).movedim(1, -1).flatten(0, -2).double()
    left_out = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0))[:-24].sum() / 192
    error = (codec.decode(codec.encode(images)) - images).square().mean()
    assert error.item() == pytest.approx(left_out.item(), rel=1e-3)
    latents = codec.encode(images)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(24), atol=1e-2, rtol=0)


def test_codec_of_ones_own_photographs(tmp_path: Path) -> None:
    codec = PatchCodec(latent_channels=24)
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    codec.fit(images)
    codec.save(file := tmp_path / "codec.safetensors")
    latents = build_codec(file).encode(images)
    torch.testing.assert_close(latents, codec.encode(images), atol=0, rtol=0)
    restored = build_codec(json.loads(json.dumps(build_codec(str(file)).spec)))  # as a checkpoint has it
    restored.load_state_dict(codec.state_dict())
    torch.testing.assert_close(restored.encode(images), latents, atol=0, rtol=0)
    assert build_codec().spec == "bundled"


def test_autoencoder_kl_scales_and_samples() -> None:
    codec = build_codec(TINY_KL)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = codec.autoencoder.encode(images).latent_dist
    torch.testing.assert_close(codec.encode(images), posterior.mean * 0.5)
    sampled = codec.encode(images, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(sampled, codec.encode(images))
    torch.testing.assert_close(codec.decode(codec.encode(images)), codec.autoencoder.decode(posterior.mean).sample)
    assert (codec.latent_channels, codec.downsample_factor) == (4, 2)
    assert build_codec(json.loads(json.dumps(codec.spec))).spec == codec.spec


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_autoencoders_from_a_folder(kind: str, tmp_path: Path) -> None:
    import diffusers

    config = {name: value for name, value in TINY_KL.items() if not name.startswith("_")}
    original = (
        diffusers.AutoencoderKL(**config)
        if kind == "AutoencoderKL"
        else diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    )
    original.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    for source in (tmp_path, next(tmp_path.glob("*.safetensors"))):
        codec = build_codec(source)
        assert codec.kind == kind
        encoded = original.encode(images)
        expected = encoded.latents if kind == "AutoencoderTiny" else encoded.latent_dist.mean * 0.5
        torch.testing.assert_close(codec.encode(images), expected)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="hf download someone/nothing") as caught:
        build_codec("someone/nothing")
    assert "codec='bundled'" in str(caught.value)


def test_files_that_could_execute_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "autoencoder.ckpt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):
        build_codec(path)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="valid kinds: AutoencoderKL, AutoencoderTiny"):
        build_codec({"_class_name": "UNet2DModel"})
    save_file({"weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(RuntimeError, match="AutoencoderKL"):
        build_codec(tmp_path / "vae.safetensors")
