"""Broken files and missing folders are named, and images are read again that Anomalib reads wrong."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD, PredictDataset
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.data import read_image as public_read_image
from decodiff_anomalib.data.images import (
    check_folders,
    image_owners,
    image_paths,
    inspect_images,
    read_image,
    reread,
    settle_white_level,
)
from decodiff_anomalib.image_io import Depth


def save(path: Path, array: np.ndarray, orientation: int = 1) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, exif=exif)
    return str(path)


def gradient(height: int, width: int) -> np.ndarray:
    return np.linspace(0, 65535, height * width).reshape(height, width).astype(np.uint16)


# ---------------------------------------------------------------- files


def test_broken_files_are_all_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", np.zeros((32, 32, 3), np.uint8))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(Path(save(tmp_path / "whole.png", noise)).read_bytes()[:3000])
    text = tmp_path / "text.png"
    text.write_text("not an image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(ValueError, match="3 of 4 image files cannot be read") as caught:
        inspect_images([good, truncated, text, empty])
    assert all(str(path) in str(caught.value) for path in (truncated, text, empty))
    assert str(good) not in str(caught.value)
    assert "Replace or remove them" in str(caught.value)


def test_images_that_anomalib_reads_wrong_are_found(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.png", np.zeros((8, 8, 3), np.uint8))
    turned = save(tmp_path / "turned.jpg", np.zeros((8, 8, 3), np.uint8), orientation=6)
    deep = save(tmp_path / "deep.png", gradient(8, 8))
    assert inspect_images([plain, turned, deep]) == {turned: None, deep: Depth(65535.0, is_float=False)}


def test_the_white_level_is_settled_once_and_kept() -> None:
    found = {"a": None, "b": Depth(1000.0, is_float=False), "c": Depth(4000.0, is_float=False)}
    assert settle_white_level(found, None) == 4095
    assert settle_white_level(found, 65535) == 65535
    assert settle_white_level({"a": None}, None) is None
    assert settle_white_level({"a": None}, 255) == 255
    with pytest.raises(ValueError, match=r"1 of 2 image files cannot be read:\n  c: its highest value 4000 is above"):
        settle_white_level(found, 1023)


# ---------------------------------------------------------------- datasets


def test_deep_images_go_through_the_transform_of_their_dataset(tmp_path: Path) -> None:
    values = gradient(40, 60)
    (tmp_path / "deep").mkdir()
    deep = save(tmp_path / "deep" / "a.png", values)
    save(tmp_path / "plain" / "a.png", (values / 257).round().astype(np.uint8))
    transform = Compose([CenterCrop((20, 30)), Resize((16, 16), antialias=True)])
    of_8_bits, of_16_bits = (PredictDataset(tmp_path / name, transform) for name in ("plain", "deep"))
    batch = of_16_bits.collate_fn([of_16_bits[0]])
    assert batch.image.mean() > 0.9  # clipped
    reread(batch, image_owners(of_16_bits), 65535)
    torch.testing.assert_close(batch.image[0], of_8_bits[0].image, atol=1 / 255, rtol=0, check_dtype=True)
    assert batch.image_path == [deep]


def test_augmentations_are_those_of_the_images_category(tmp_path: Path, write_category: Callable[..., None]) -> None:
    for name in ("bolt", "tile"):
        write_category(tmp_path, name, mode="L")
    path = tmp_path / "tile" / "test" / "good" / "000.png"
    save(path, gradient(32, 32))
    datamodule = MultiCategory(tmp_path, num_workers=0, val_split_mode="none")
    datamodule.setup()
    datamodule.test_data.parts[1].augmentations = CenterCrop(10)
    dataset = datamodule.test_data.subsample(
        [index for index, name in enumerate(datamodule.test_data.samples.image_path) if name == str(path)]
    )
    batch = dataset.collate_fn([dataset[0]])
    reread(batch, image_owners(dataset), 65535)
    assert torch.equal(batch.image[0], read_image(path, 65535)[:, 11:21, 11:21])


def test_parts_and_chains_of_datasets_tell_of_their_images(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    names = [Path("one/a.png"), Path("one/b.png"), Path("two/c.png")]
    a, b, c = (save(tmp_path / name, gradient(8, 12)) for name in names)
    one, two = (PredictDataset(tmp_path / folder) for folder in ("one", "two"))
    assert image_paths(Subset(one, [1])) == [b]
    assert image_owners(Subset(one, [1])) == {b: one}
    assert image_owners(ConcatDataset([one, Subset(two, [0])])) == {a: one, b: one, c: two}
    assert image_paths(Subset(TensorDataset(torch.zeros(2)), [1])) == []


def test_other_images_stay_as_they_are(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, gradient(8, 12)) for name in ("a.png", "b.png")]
    batch = ImageBatch(image=torch.full((2, 3, 8, 12), 0.5), image_path=paths)
    reread(batch, {paths[1]: SimpleNamespace()}, 65535)
    assert (batch.image[0] == 0.5).all()
    assert torch.equal(batch.image[1], read_image(paths[1], 65535))


def test_a_photograph_is_upright_in_its_batch(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    turned = save(tmp_path / "turned" / "a.png", noise, orientation=6)
    upright = save(tmp_path / "upright.png", np.rot90(noise, -1))
    alone = PredictDataset(tmp_path / "turned")
    batch = alone.collate_fn([alone[0]])
    reread(batch, dict.fromkeys(inspect_images([turned]), alone), None)
    assert torch.equal(batch.image[0], read_image(upright))
    both = ImageBatch(image=torch.ones(2, 3, 8, 12), image_path=[turned, "other.png"])
    reread(both, {turned: alone}, None)
    torch.testing.assert_close(both.image[0], Resize((8, 12))(read_image(upright)))


def test_reading_is_public() -> None:
    assert public_read_image is read_image


# ---------------------------------------------------------------- folders


@pytest.fixture
def mvtecad(tmp_path: Path, write_image: Callable[..., None]) -> MVTecAD:
    for name in ("train/good", "test/good", "test/dent", "ground_truth/dent"):
        write_image(tmp_path / "part" / name / "0.PNG", (8, 8), 100)
    return MVTecAD(tmp_path, category="part")


def test_mvtecad_reads_both_spellings_of_its_suffix(mvtecad: MVTecAD) -> None:
    check_folders(mvtecad)
    mvtecad.setup()
    assert len(mvtecad.train_data) == 1


def test_missing_folders_of_mvtecad_are_named(mvtecad: MVTecAD) -> None:
    folder = Path(mvtecad.root) / "part"
    (folder / "ground_truth" / "dent" / "0.PNG").unlink()
    with pytest.raises(FileNotFoundError, match=r"no masks for dent, .* only the folder 'good' holds normal images"):
        check_folders(mvtecad)
    (folder / "train" / "good" / "0.PNG").rename(folder / "train" / "good" / "0.jpg")
    with pytest.raises(FileNotFoundError, match=r"no \.png images in .*good\. .*MultiCategory` reads .* other formats"):
        check_folders(mvtecad)
    (folder / "train" / "good").rename(folder / "train" / "normal")
    with pytest.raises(FileNotFoundError, match=r"in a folder named 'good'; .*train has normal: rename it"):
        check_folders(mvtecad)
