"""The published images as an augmentation, and the published learning rate in a training of Lightning's."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_dtype, to_image

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.evaluation import anomalib_mask
from decodiff_anomalib.paper import PaperAugmentation, paper_transform, prepare_image


def read(picture: Image.Image) -> torch.Tensor:
    """As Anomalib reads images."""
    return to_dtype(to_image(picture.convert("RGB")), torch.float32, scale=True)


def photograph(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_augmentation_and_pre_processor_give_the_published_image_to_the_bit(mode, shifted, turned) -> None:
    picture = photograph(mode)
    augmentation = PaperAugmentation(shift_probability=float(shifted), half_turn_probability=float(turned))
    result = paper_transform()(augmentation(read(picture)))
    assert torch.equal(result.as_subclass(torch.Tensor), prepare_image(picture, shifted=shifted, turned=turned))


def test_real_images_to_the_bit(data_dir: Path) -> None:
    augmentation = PaperAugmentation(shift_probability=0.0)
    for path in sorted(data_dir.glob("*/test/*/000.*")):
        with Image.open(path) as picture:
            result = paper_transform()(augmentation(read(picture))).as_subclass(torch.Tensor)
            assert torch.equal(result, prepare_image(picture)), path


def test_masks_follow_as_anomalib_resizes_them() -> None:
    full = np.zeros((512, 640), np.uint8)
    full[100:180, 200:330] = 255
    mask = tv_tensors.Mask(torch.from_numpy(full) > 0)
    image = read(Image.fromarray(full))
    _, cut = paper_transform()(*PaperAugmentation(shift_probability=0.0)(image, mask))
    assert torch.equal(cut.as_subclass(torch.Tensor), anomalib_mask(Image.fromarray(full)))
    image, moved = paper_transform()(*PaperAugmentation(1.0, 1.0)(image, mask))
    assert torch.equal(moved.as_subclass(torch.Tensor).flip(-2, -1)[4:, 4:], cut.as_subclass(torch.Tensor)[:-4, :-4])
    assert float((image[0] > 0)[~moved].float().mean()) < 0.01  # the image went the same way


class Repeated:
    """One picture many times, through an augmentation."""

    def __init__(self, augmentation: PaperAugmentation) -> None:
        self.augmentation, self.image = augmentation, read(photograph())

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(image=self.augmentation(self.image))


@pytest.mark.parametrize("workers", [0, 2])
def test_variants_are_drawn_as_often_as_published_and_repeat_with_the_seed(workers: int) -> None:
    variants = {
        prepare_image(photograph(), (72, 72), (64, 64), shifted=shifted, turned=turned).numpy().tobytes(): name
        for shifted, turned, name in [(0, 0, "plain"), (1, 0, "shifted"), (0, 1, "turned"), (1, 1, "both")]
    }
    finish = paper_transform((72, 72), (64, 64))

    def drawn(seed: int) -> list[str]:
        torch.manual_seed(seed)
        dataset = Repeated(PaperAugmentation(0.5, 0.25, resize=(72, 72), crop=(64, 64)))
        loader = DataLoader(dataset, batch_size=50, num_workers=workers, collate_fn=ImageBatch.collate)
        images = torch.cat([batch.image for batch in loader]).as_subclass(torch.Tensor)
        return [variants[finish(image).numpy().tobytes()] for image in images]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    counts = Counter(first)
    for name, share in {"plain": 0.375, "shifted": 0.375, "turned": 0.125, "both": 0.125}.items():
        deviation = (share * (1 - share) * len(first)) ** 0.5
        assert abs(counts[name] - share * len(first)) < 4 * deviation, counts


@pytest.mark.parametrize("name", ["shift_probability", "half_turn_probability"])
def test_refuses_what_is_no_probability(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=1\.5 must be between 0 and 1"):
        PaperAugmentation(**{name: 1.5})


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="learning_rate_schedule='days' is unknown; valid: steps, epochs"):
        DeCoDiff(preset="paper", settings={"training": {"learning_rate_schedule": "days"}})
