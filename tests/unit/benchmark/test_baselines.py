"""Anomalib's models get the right weights and normalisation, and EfficientAd its teacher and photographs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.models import EfficientAd, Padim, Patchcore
from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork
from safetensors.torch import save_file
from torchvision.transforms.v2 import Compose, Normalize, Resize

from decodiff_anomalib.benchmark.baselines import equip_efficient_ad, load_backbone_weights
from decodiff_anomalib.features import VisualFeatures

LITE = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one; those that are distilled are in ``test_teacher``."""
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(SmallPatchDescriptionNetwork(384).state_dict(), file)
    return file


def patchcore(**changes) -> Patchcore:
    return Patchcore(**{**LITE, "pre_trained": False, "visualizer": False, **changes})


# ---------------------------------------------------------------- backbones


def test_packaged_weights_give_the_features_of_visual_features() -> None:
    model = patchcore()
    load_backbone_weights(model, "packaged")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = model.model.feature_extractor(model.pre_processor(images))
    expected = VisualFeatures().backbone(2 * model.pre_processor.transform.transforms[0](images) - 1)
    for name, features in zip(LITE["layers"], expected, strict=True):
        torch.testing.assert_close(found[name], features, atol=2e-4, rtol=1e-4)
    assert expected[0].std() > 0.1


def test_images_are_normalised_as_the_backbone_was_trained(tmp_path: Path) -> None:
    model = patchcore()
    load_backbone_weights(model, "packaged")
    resize, normalise = model.pre_processor.transform.transforms
    assert isinstance(resize, Resize)
    assert list(normalise.mean) == list(normalise.std) == [0.5, 0.5, 0.5]
    torch.testing.assert_close(model.pre_processor(torch.ones(1, 3, 8, 8)).amax(), torch.tensor(1.0))

    other = Padim(pre_trained=False)
    other.pre_processor.transform = Compose([Normalize(mean=[0.0] * 3, std=[1.0] * 3)])
    save_file(other.model.feature_extractor.feature_extractor.state_dict(), tmp_path / "resnet18.safetensors")
    load_backbone_weights(other, tmp_path / "resnet18.safetensors")
    (normalise,) = other.pre_processor.transform.transforms
    assert list(normalise.mean) == [0.485, 0.456, 0.406]


def test_a_file_with_the_names_of_timm_fits_an_extractor_that_timm_renamed(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("convnext_atto")
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    model = patchcore(backbone="convnext_atto", layers=["stages.0", "stages.1"])
    load_backbone_weights(model, tmp_path / "whole.pth")
    part = model.model.feature_extractor.feature_extractor.state_dict()
    torch.testing.assert_close(part["stages_1.blocks.0.mlp.fc1.weight"], whole.stages[1].blocks[0].mlp.fc1.weight.data)


def test_weights_of_another_network_name_the_first_that_does_not_fit(tmp_path: Path) -> None:
    state = patchcore().model.feature_extractor.feature_extractor.state_dict()
    torch.save({**state, "bn1.weight": torch.ones(7)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"bn1\.weight has shape \(7,\), not \(32,\)"):
        load_backbone_weights(patchcore(), tmp_path / "shape.pth")
    state.pop("blocks.1.0.bn2.bias")
    torch.save(state, tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"blocks\.1\.0\.bn2\.bias is missing"):
        load_backbone_weights(patchcore(), tmp_path / "missing.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.safetensors cannot be read as weights"):
        load_backbone_weights(patchcore(), tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth does not hold a state dict"):
        load_backbone_weights(patchcore(), tmp_path / "list.pth")


def test_what_cannot_get_weights_is_refused(photographs: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth' is no file\. Save timm\.create_model"):
        load_backbone_weights(patchcore(), "absent.pth")
    with pytest.raises(ValueError, match="the model has backbone='resnet18'"):
        load_backbone_weights(Padim(pre_trained=False), "packaged")
    with pytest.raises(ValueError, match="EfficientAd has 0 kinds of timm backbones"):
        load_backbone_weights(EfficientAd(visualizer=False), "packaged")
    with pytest.raises(ValueError, match="no pre_processor"):
        load_backbone_weights(patchcore(pre_processor=False), "packaged")


# ---------------------------------------------------------------- EfficientAd


def test_published_weights_in_the_cache_are_used(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (cache / "efficientad_pretrained_weights").mkdir(parents=True)
    published = SmallPatchDescriptionNetwork(384).state_dict()
    torch.save(published, cache / "efficientad_pretrained_weights" / "pretrained_teacher_small.pth")
    for place in ("decodiff_anomalib.benchmark.baselines", "anomalib.models.image.efficient_ad.lightning_model"):
        monkeypatch.setattr(f"{place}.get_pretrained_weights_dir", lambda: cache)
    model = EfficientAd(visualizer=False)
    assert equip_efficient_ad(model, photographs, None, tmp_path) == "published"
    model.prepare_pretrained_model()
    torch.testing.assert_close(model.model.teacher.conv1.weight.data, published["conv1.weight"])


def test_photographs_in_folders_are_read_in_place(
    photographs: Path, teacher: Path, write_images: Callable[..., Path], tmp_path: Path
) -> None:
    model = EfficientAd(visualizer=False)
    equip_efficient_ad(model, photographs, teacher, tmp_path)
    assert model.imagenet_dir == tmp_path / "photographs"
    assert len(list(model.imagenet_dir.glob("0/*.png"))) == 31
    write_images(tmp_path / "classes" / "a", 2)
    equip_efficient_ad(model, tmp_path / "classes", teacher, tmp_path)
    assert model.imagenet_dir == tmp_path / "classes"


def test_a_teacher_that_is_not_there_or_of_another_size_is_refused(
    photographs: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no file\. Give one that `distil_teacher` wrote"):
        equip_efficient_ad(EfficientAd(visualizer=False), photographs, tmp_path / "absent", tmp_path)
    with pytest.raises(ValueError, match=r"for model_size='medium' do not fit: conv1\.weight has shape"):
        equip_efficient_ad(EfficientAd(model_size="medium", visualizer=False), photographs, teacher, tmp_path)
