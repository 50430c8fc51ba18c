"""The distilled teacher of EfficientAd."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork
from safetensors.torch import load_file
from torch import nn

from decodiff_anomalib.benchmark import teacher as module
from decodiff_anomalib.benchmark.teacher import distil_teacher


def test_a_teacher_explains_features_of_images_it_was_not_trained_on(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CROP_SIDE", 64)  # for speed
    teacher = distil_teacher(photographs, tmp_path / "teacher.safetensors", steps=8)
    about = module._read_metadata(teacher)
    assert about.items() >= {"size": "small", "steps": "8", "seed": "0", "photographs": "31"}.items()
    assert 0.1 < float(about["explained_variance"]) < 1  # the mean alone explains 0
    network = SmallPatchDescriptionNetwork(384)
    network.load_state_dict(load_file(teacher))
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 384, 8, 8)


def narrow_network(channels: int) -> nn.Module:
    """As many outputs as the teacher has, but a last layer with few inputs, which is solved fast."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 4, 6), nn.ReLU(), nn.Conv2d(4, channels, 4))


def test_a_seed_makes_the_same_teacher_again_and_a_file_made_alike_is_kept(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CROP_SIDE", 64)
    monkeypatch.setitem(module.NETWORKS, "small", narrow_network)
    state = torch.random.get_rng_state()
    teacher = distil_teacher(photographs, tmp_path / "made" / "teacher.safetensors", steps=8)
    again = load_file(distil_teacher(photographs, tmp_path / "again.safetensors", steps=8))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in load_file(teacher).items():
        assert torch.equal(tensor, again[name]), name
    other = load_file(distil_teacher(photographs, tmp_path / "other.safetensors", steps=8, seed=1))
    assert not torch.equal(other["3.weight"], again["3.weight"])
    written = teacher.stat().st_mtime_ns
    assert distil_teacher(photographs, teacher, steps=8) == teacher
    assert teacher.stat().st_mtime_ns == written


def test_the_target_keeps_distances_and_is_of_unit_variance() -> None:
    crops = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    target = module.PatchTarget(crops, torch.Generator().manual_seed(0))
    wanted = target(crops)
    assert wanted.shape == (4, 384, 8, 8)
    assert wanted.var((0, 2, 3)).mean() == pytest.approx(1, abs=0.01)


def test_photographs_that_cannot_be_used_are_named(write_images: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"0 images below .*; give a folder of photographs"):
        distil_teacher(tmp_path / "absent", tmp_path / "teacher.safetensors")
    folder = write_images(tmp_path / "photographs", 2)
    (folder / "broken.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        distil_teacher(folder, tmp_path / "teacher.safetensors")
    with pytest.raises(ValueError, match="size='large' is unknown; valid: small, medium"):
        distil_teacher(folder, tmp_path / "teacher.safetensors", size="large")
