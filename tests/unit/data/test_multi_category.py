"""The datamodule of several categories: subsets, augmentations, loaders and what it refuses."""

import copy
import pickle
import shutil
from collections import Counter

import pandas as pd
import pytest
import torch
from anomalib.data import Folder, Folder3D, MVTecAD, get_datamodule
from anomalib.data.utils import ValSplitMode
from torchvision.transforms.v2 import RandomHorizontalFlip, RandomVerticalFlip

from decodiff_anomalib.data import MultiCategory


def all_paths(dataset):
    return set(dataset.samples.image_path)


# --- Subsets ---


def test_every_image_is_in_exactly_one_subset(root, set_up):
    datamodule = set_up(root)
    subsets = [all_paths(data) for data in (datamodule.train_data, datamodule.val_data, datamodule.test_data)]
    on_disk = {str(path) for split in ("train", "test") for path in root.glob(f"[!.]*/{split}/*/*")}
    assert set.union(*subsets) == on_disk
    assert sum(map(len, subsets)) == len(on_disk) == 68 + 20
    assert all("/train/good/" in path for path in subsets[0] | subsets[1])
    assert datamodule.categories == ["bolt", "felt", "tile"]
    assert datamodule.name == "parts"


def test_counts_are_those_on_disk_and_logged_as_one_table(root, caplog, set_up):
    with caplog.at_level("INFO"):
        datamodule = set_up(root)
    expected = pd.DataFrame(
        {
            "train normal": [34, 16, 4, 54],  # 15 % held out of 40, and 4 at least
            "val normal": [6, 4, 4, 14],
            "test normal": [4, 3, 2, 9],
            "test defective": [5, 2, 4, 11],
            "test masks": [5, 0, 4, 9],
        },
        index=["bolt", "felt", "tile", "total"],
    )
    pd.testing.assert_frame_equal(datamodule.counts, expected, check_dtype=False)
    tables = [record.getMessage() for record in caplog.records if "3 categories" in record.getMessage()]
    assert len(tables) == 1
    assert datamodule.counts.to_string() in tables[0]


def test_categories_are_picked_in_the_order_given(root, set_up):
    datamodule = set_up(root, categories=["tile", "bolt"])
    assert datamodule.categories == ["tile", "bolt"]
    assert list(datamodule.counts.index) == ["tile", "bolt", "total"]
    assert set(datamodule.train_data.samples.category) == {"tile", "bolt"}


def test_root_may_be_a_symbolic_link(root, tmp_path, set_up):
    (tmp_path / "link").symlink_to(root)
    datamodule = set_up(tmp_path / "link")
    assert datamodule.name == "parts"
    assert all_paths(datamodule.test_data) == all_paths(set_up(root).test_data)


def test_a_single_category_works(root, set_up):
    datamodule = set_up(root, categories=["felt"])
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.category == ["felt"] * 4
    assert batch.gt_mask is None


def test_validation_split_depends_on_the_seed_alone(root, set_up):
    first, again, other = (all_paths(set_up(root, seed=seed).val_data) for seed in (0, 0, 1))
    assert first == again != other


def test_validation_splits_of_the_datamodules_are_ignored(root, set_up):
    datamodule = set_up(datamodules={name: MVTecAD(root, name) for name in ("bolt", "tile")})
    assert not all_paths(datamodule.val_data) & all_paths(datamodule.test_data)
    assert datamodule.counts["val normal"].to_dict() == {"bolt": 6, "tile": 4, "total": 10}
    assert all_paths(datamodule.val_data) == all_paths(set_up(root, categories=["bolt", "tile"]).val_data)


@pytest.fixture
def own_validation(tmp_path, sizes, write_image, write_category):
    """Two categories; one has validation images and also a defective one, which must be ignored."""
    for name in ("bolt", "tile"):
        write_category(tmp_path, name)
    for name in ("good/000", "good/001", "dent/000"):
        write_image(tmp_path / "bolt" / "validation" / f"{name}.png", sizes["bolt"], 255)
    return tmp_path


def test_a_categorys_own_validation_images_are_used(own_validation, set_up):
    own = {str(path) for path in (own_validation / "bolt" / "validation" / "good").iterdir()}
    datamodule = set_up(own_validation)
    assert datamodule.counts["train normal"].to_dict() == {"bolt": 40, "tile": 4, "total": 44}
    assert datamodule.counts["val normal"].to_dict() == {"bolt": 2, "tile": 4, "total": 6}
    assert own < all_paths(datamodule.val_data)
    assert datamodule.val_data[0].image.min() == 1

    joined = set_up(datamodules=datamodule.datamodules)
    assert own < all_paths(joined.val_data)


def test_val_split_mode_overrides_own_validation_images(own_validation, set_up):
    assert not hasattr(set_up(own_validation, val_split_mode="none"), "val_data")
    on_test = set_up(own_validation, val_split_mode="same_as_test")
    assert all_paths(on_test.val_data) == all_paths(on_test.test_data)


@pytest.mark.parametrize("mode", ["same_as_test", ValSplitMode.SAME_AS_TEST])
def test_same_as_test_validates_on_the_test_set(root, mode, set_up):
    datamodule = set_up(root, val_split_mode=mode)
    assert all_paths(datamodule.val_data) == all_paths(datamodule.test_data)
    assert len(datamodule.train_data) == 68


def test_none_leaves_out_validation(root, set_up):
    datamodule = set_up(root, val_split_mode="none")
    assert not hasattr(datamodule, "val_data")
    assert len(datamodule.train_data) == 68


def test_synthetic_validation_keeps_the_categories(root, sizes, set_up):
    datamodule = set_up(root, val_split_mode="synthetic", val_split_ratio=0.25)
    assert set(datamodule.val_data.samples.label_index) == {0, 1}
    for item in datamodule.val_data:
        assert item.image.shape[:0:-1] == sizes[item.category]
        assert item.gt_mask is not None


def test_without_normal_test_images_training_images_are_used(tmp_path, write_category, set_up):
    write_category(tmp_path, "bolt")
    shutil.rmtree(tmp_path / "bolt" / "test" / "good")
    counts = set_up(tmp_path, val_split_mode="none").counts.loc["bolt"]
    assert counts.to_dict() == {"train normal": 32, "test normal": 8, "test defective": 5, "test masks": 5}


def test_training_images_alone_are_enough(tmp_path, write_category, set_up):
    write_category(tmp_path, "bolt", masks=False)
    shutil.rmtree(tmp_path / "bolt" / "test")
    counts = set_up(tmp_path, val_split_mode="none").counts.loc["bolt"]
    assert counts.to_dict() == {"train normal": 32, "test normal": 8, "test masks": 0}


# --- Images ---


def test_augmentations_of_the_datamodules_are_kept(root, set_up):
    flip = RandomHorizontalFlip(p=1)
    inner = {"bolt": MVTecAD(root, "bolt", train_augmentations=flip), "tile": MVTecAD(root, "tile")}
    datamodule = set_up(datamodules=inner)
    by_category = {part.category: part.augmentations for part in datamodule.train_data.parts}
    assert by_category == {"bolt": flip, "tile": None}
    assert {part.augmentations for part in datamodule.test_data.parts} == {None}


def test_augmentations_apply_to_every_category_that_has_none(root, sizes, set_up):
    flip, turn = RandomHorizontalFlip(p=1), RandomVerticalFlip(p=1)
    datamodule = set_up(root, train_augmentations=flip, test_augmentations=turn)
    assert [part.augmentations for part in datamodule.train_data.parts] == [flip] * 3
    assert [part.augmentations for part in datamodule.val_data.parts] == [None] * 3
    assert [part.augmentations for part in datamodule.test_data.parts] == [turn] * 3
    masked = next(item for item in datamodule.test_data if item.category == "bolt" and item.gt_label == 1)
    assert masked.gt_mask[:, : sizes["bolt"][0] // 2].all()

    inner = {"bolt": MVTecAD(root, "bolt", train_augmentations=flip), "tile": MVTecAD(root, "tile")}
    datamodule = set_up(datamodules=inner, train_augmentations=turn)
    assert {part.category: part.augmentations for part in datamodule.train_data.parts} == {"bolt": flip, "tile": turn}


def test_datamodules_of_different_kinds_are_joined(root, tmp_path, set_up):
    folder = {"name": "x", "normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/hole"}
    inner = {
        "screws": MVTecAD(root, "bolt"),
        "cloth": Folder(root=root / "felt", **folder),
    }
    datamodule = set_up(datamodules=inner)
    assert datamodule.categories == ["screws", "cloth"]
    assert datamodule.name == "parts"
    assert datamodule.counts.loc["total"].to_dict() == {
        "train normal": 50, "val normal": 10, "test normal": 7, "test defective": 7, "test masks": 5
    }  # fmt: skip
    assert {item.category for item in datamodule.test_data} == {"screws", "cloth"}


def test_datamodules_can_be_given_as_configurations(root):
    inner = {name: {"class_path": "MVTecAD", "init_args": {"root": str(root), "category": name}} for name in ["tile"]}
    datamodule = get_datamodule({"class_path": "MultiCategory", "init_args": {"datamodules": inner}})
    datamodule.setup()
    assert datamodule.counts.loc["tile", "test defective"] == 4


# --- Loaders ---


def drawn(datamodule):
    return [name for batch in datamodule.train_dataloader() for name in batch.category]


def test_training_order_depends_on_the_seed_alone(root, set_up):
    def order(seed):
        loader = set_up(root, seed=seed, train_batch_size=64).train_dataloader()
        return [path for batch in loader for path in batch.image_path]

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert order(0) == first
    assert sorted(first) != first
    assert order(1) != first


def test_epochs_differ(root, set_up):
    loader = set_up(root, train_batch_size=64).train_dataloader()
    first, second = ([path for batch in loader for path in batch.image_path] for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_balance_draws_categories_equally_often(root, grey_values, set_up):
    datamodule = set_up(root, balance=True)
    sampler = datamodule.train_dataloader().sampler
    category = datamodule.train_data.samples.category
    counts = Counter(category[index] for _ in range(200) for index in sampler)
    assert len(sampler) == 54
    total = sum(counts.values())
    assert total == 200 * 54
    for name in grey_values:
        assert counts[name] / total == pytest.approx(1 / 3, abs=0.02)  # five standard deviations

    assert Counter(drawn(set_up(root))) == {"bolt": 34, "felt": 16, "tile": 4}


def test_datamodule_can_be_pickled_and_copied(root, set_up):
    datamodule = set_up(root)
    for twin in (pickle.loads(pickle.dumps(datamodule)), copy.deepcopy(datamodule)):  # noqa: S301 - our own bytes
        pd.testing.assert_frame_equal(twin.train_data.samples, datamodule.train_data.samples)
        assert twin.test_data[0].category == "bolt"


# --- Refused arguments and data ---


@pytest.mark.parametrize("given", [{}, {"root": "x", "datamodules": {}}])
def test_root_or_datamodules_but_not_both(given):
    with pytest.raises(ValueError, match=r"from root or from datamodules; (neither|both) were given"):
        MultiCategory(**given)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (["bolt", "bold"], "Unknown categories 'bold'; valid: bolt, felt, tile"),
        (["tile", "bolt", "tile"], "names 'tile' more than once"),
        ([], "at least one category"),
    ],
)
def test_bad_choices_of_categories_are_refused(root, categories, message):
    with pytest.raises(ValueError, match=message):
        MultiCategory(root, categories=categories)


@pytest.mark.parametrize("name", ["../..", "..", "", "a/b", "a\nb"])
def test_names_that_lead_out_of_a_folder_are_refused(root, name):
    with pytest.raises(ValueError, match="cannot be the name of a category, because folders are named after it"):
        MultiCategory(datamodules={"bolt": MVTecAD(root, "bolt"), name: MVTecAD(root, "tile")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_split_mode": "from_trian"}, "'from_trian' is unknown; valid: none, same_as_test, from_train"),
        ({"val_split_ratio": 0}, "val_split_ratio=0 must be between 0 and 1"),
        ({"val_split_ratio": 1.0}, r"val_split_ratio=1\.0 must be between 0 and 1"),
    ],
)
def test_bad_splits_are_refused(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCategory(root, **arguments)


def test_category_too_small_for_validation_is_refused(tmp_path, write_image, set_up):
    for name in ("train/good/0.png", "test/good/0.png", "test/dent/0.png"):
        write_image(tmp_path / "tile" / name, (32, 32), 100)
    with pytest.raises(RuntimeError, match=r"Category 'tile' .*val_split_ratio=0\.1 give no validation images \(1"):
        set_up(tmp_path, val_split_ratio=0.1)


def test_datamodule_without_training_images_is_refused(tmp_path, root, write_category, set_up):
    write_category(tmp_path, "tile")
    shutil.rmtree(tmp_path / "tile" / "train")
    inner = {"a": MVTecAD(root, "bolt"), "b": MVTecAD(tmp_path, "tile")}
    with pytest.raises(RuntimeError, match=r"Category 'b' \(MVTecAD\) failed: it has no training images"):
        set_up(datamodules=inner)


def test_datamodule_of_other_data_than_images_is_refused(root, set_up):
    folders = {
        "normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/dent",
        "normal_depth_dir": "train/good", "normal_test_depth_dir": "test/good", "abnormal_depth_dir": "test/dent",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Category 'a' \(Folder3D\) failed: Folder3DDataset gives no plain images"):
        set_up(datamodules={"a": Folder3D("x", root=root / "bolt", **folders)})


@pytest.mark.parametrize("same_object", [True, False])
def test_same_images_under_two_names_are_refused(root, same_object, set_up):
    first = MVTecAD(root, "bolt")
    second = first if same_object else MVTecAD(root, "bolt")
    with pytest.raises(ValueError, match=r"Categories 'a' and 'b' both contain '.*bolt/"):
        set_up(datamodules={"a": first, "b": second})


@pytest.mark.parametrize("step", ["prepare_data", "_setup"])
def test_failing_datamodule_is_named_and_no_subset_is_set(root, monkeypatch, step):
    inner = {"a": MVTecAD(root, "bolt"), "b": MVTecAD(root, "tile")}
    datamodule = MultiCategory(datamodules=inner, num_workers=0)
    cause = OSError("disk full")

    def fail(*_):
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(inner["b"], step, fail)
        with pytest.raises(RuntimeError, match=r"Category 'b' \(MVTecAD\) failed: disk full") as caught:
            getattr(datamodule, step.removeprefix("_"))()
    assert caught.value.__cause__ is cause
    assert not hasattr(datamodule, "train_data")
    datamodule.setup()
    assert datamodule.counts.loc["total", "train normal"] == 34 + 4


def test_warns_of_pictures_that_would_overwrite_each_other(root, set_up):
    inner = {
        name: Folder(name, root / name / "train/good", normal_test_dir=root / name / "test/good")
        for name in ("bolt", "tile")
    }
    with pytest.warns(UserWarning, match="overwrite 2 of 6 test pictures"):
        datamodule = set_up(datamodules=inner)
    assert datamodule.name == "MultiCategory"
