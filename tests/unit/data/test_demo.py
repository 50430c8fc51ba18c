"""The demo textures: disjoint splits, exact masks, and a cache that is either complete or absent."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from decodiff_anomalib.data import DemoTextures, demo, textures


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("textures")
    DemoTextures(root=root).prepare_data()
    return root


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(textures, "FOREIGN_MATERIAL", {"gravel": "gravel"})
    for name in ("NUM_TRAIN", "NUM_VALIDATION", "NUM_TEST_GOOD", "NUM_TEST_PER_DEFECT"):
        monkeypatch.setattr(textures, name, 1)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("category", ["brick", "grass", "gravel"])
def test_splits_have_the_documented_numbers_of_images(root, category):
    datamodule = DemoTextures(root=root, category=category)
    datamodule.prepare_data()
    datamodule.setup()
    train, val, test = (data.samples for data in (datamodule.train_data, datamodule.val_data, datamodule.test_data))

    assert (len(train), len(val), len(test)) == (80, 24, 64)
    assert (train.label_index == 0).all()
    assert (val.label_index == 0).all()
    assert test.label.value_counts().to_dict() == {
        "good": 24, "crack": 8, "foreign": 8, "smear": 8, "stain": 8, "wire": 8
    }  # fmt: skip
    paths = [set(samples.image_path) for samples in (train, val, test)]
    assert len(set.union(*paths)) == 80 + 24 + 64


def test_batches_have_images_and_masks(root):
    datamodule = DemoTextures(root=root, eval_batch_size=64)
    datamodule.setup()
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.image.shape == (64, 3, 256, 256)
    assert torch.equal(batch.gt_mask.flatten(1).any(1), batch.gt_label.bool())


def test_unknown_category_is_refused():
    with pytest.raises(ValueError, match="'sand'; DemoTextures has brick, grass, gravel"):
        DemoTextures(category="sand")


@pytest.mark.parametrize("name", ["TRAIN_PART", "VALIDATION_PART", "TEST_PART"])
def test_subsets_come_from_different_parts_of_the_photograph(name):
    parts = {other: getattr(textures, other) for other in ("TRAIN_PART", "VALIDATION_PART", "TEST_PART")}
    marked = np.zeros((512, 512))
    marked[parts[name]] = 1
    rng = np.random.default_rng(0)
    for other, part in parts.items():
        crops = [textures._crop(marked, part, rng) for _ in range(200)]
        if other == name:
            assert min(crop.min() for crop in crops) > 0.89  # the darkest exposure of white
        else:
            assert max(crop.max() for crop in crops) == 0


@pytest.mark.parametrize("category", textures.FOREIGN_MATERIAL)
@pytest.mark.parametrize("defect", textures.DEFECTS)
def test_mask_marks_the_changed_pixels(category, defect):
    photograph = textures._load_photograph(category)
    foreign = textures._load_photograph(textures.FOREIGN_MATERIAL[category])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        clean, other = (textures._crop(source, textures.TEST_PART, rng) for source in (photograph, foreign))
        damaged, mask = textures._damage(clean, other, textures.DEFECTS[defect], rng)
        change = np.abs(damaged - clean)
        assert 0.003 < mask.mean() < 0.15
        assert change[~mask].max() == 0
        assert np.mean(change[mask] > 2 / 255) > 0.5
        assert change.max() > 20 / 255


def test_each_defective_image_has_a_mask(root):
    for category in textures.FOREIGN_MATERIAL:
        folder = root / demo.VERSION / "DemoTextures" / category
        images = sorted(path for defect in textures.DEFECTS for path in (folder / "test" / defect).iterdir())
        masks = sorted((folder / "ground_truth").rglob("*.png"))
        assert [(p.parent.name, p.stem + "_mask") for p in images] == [(p.parent.name, p.stem) for p in masks]
        assert all(read(image).shape == (256, 256) for image in images)
        assert all(set(np.unique(read(mask))) == {0, 255} for mask in masks)


@pytest.mark.usefixtures("few_images")
def test_builds_are_bit_identical_for_any_global_seed(tmp_path):
    for seed, name in enumerate(["first", "second"]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the legacy state is what is under test
        torch.manual_seed(seed)
        textures.build_textures(tmp_path / name)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_intact_cache_is_not_rebuilt(root, monkeypatch):
    monkeypatch.setattr(textures, "build_textures", lambda folder: pytest.fail(f"rebuilt {folder}"))
    DemoTextures(root=root).prepare_data()


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "no manifest", "broken manifest"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    datamodule = DemoTextures(root=tmp_path)
    datamodule.prepare_data()
    whole = contents(tmp_path)

    victim = datamodule.root / "gravel" / "train" / "good" / "000.png"
    manifest = datamodule.root / textures.MANIFEST
    match damage:
        case "missing":
            victim.unlink()
        case "truncated":
            victim.write_bytes(victim.read_bytes()[:100])
        case "foreign":
            victim.with_name("999.png").write_bytes(victim.read_bytes())
        case "no manifest":
            manifest.unlink()
        case "broken manifest":
            manifest.write_text(json.dumps({})[:1])

    datamodule.prepare_data()
    assert contents(tmp_path) == whole


@pytest.mark.usefixtures("few_images")
def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(textures.DEFECTS, "wire", interrupt)
        with pytest.raises(KeyboardInterrupt):
            textures.build_textures(tmp_path / "textures")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few_images")
def test_of_two_simultaneous_builds_the_first_is_kept(tmp_path, monkeypatch):
    folder, write_category = tmp_path / "textures", textures._write_category

    def overtaken(*args):
        monkeypatch.setattr(textures, "_write_category", write_category)
        textures.build_textures(folder)
        first.append(folder.stat().st_ino)
        write_category(*args)

    first = []
    monkeypatch.setattr(textures, "_write_category", overtaken)
    textures.build_textures(folder)
    assert [folder.stat().st_ino] == first
    assert [path.name for path in tmp_path.iterdir()] == ["textures"]


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is a convention of Linux")
def test_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DemoTextures().root == tmp_path / "decodiff_anomalib" / demo.VERSION / "DemoTextures"
    assert not list(tmp_path.iterdir())  # written only by prepare_data


def test_unwritable_root_names_the_remedy(tmp_path):
    occupied = tmp_path / "file"
    occupied.touch()
    with pytest.raises(OSError, match=r"Name a writable folder: DemoTextures\(root=...\)"):
        DemoTextures(root=occupied).prepare_data()


def test_missing_scikit_image_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r'pip install "decodiff_anomalib\[demo\]"'):
        DemoTextures(root=tmp_path).prepare_data()


def test_the_datamodule_offers_every_category_with_images() -> None:
    assert set(demo.CATEGORIES) == set(textures.FOREIGN_MATERIAL)
