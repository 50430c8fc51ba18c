"""Several categories as one: nothing lost, nothing leaked, nothing mixed up."""

import copy
import pickle
import shutil
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder, Folder3D, MVTecAD, get_datamodule
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.split import random_split
from anomalib.metrics import AUROC
from PIL import Image
from torch.utils.data import DataLoader, SequentialSampler
from torchvision.transforms.v2 import RandomHorizontalFlip, RandomVerticalFlip

from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.data.multi_category import CategoryBatch, RunBatchSampler

# Every image of a category has one grey value, so that its pixels tell its category.
GREY = {"bolt": 40, "felt": 120, "tile": 200}
SIZES = {"bolt": (48, 64), "felt": (80, 40), "tile": (32, 32)}
TRAIN = {"bolt": 40, "felt": 20, "tile": 8}
TEST = {
    "bolt": {"good": 4, "dent": 2, "scratch": 3},
    "felt": {"good": 3, "hole": 2},
    "tile": {"good": 2, "crack": 4},
}


def write(path, size, value, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


def write_category(folder, name, suffix=".png", mode="RGB", masks=True):
    """Each mask marks the left half of its image."""
    width, height = SIZES[name]
    for index in range(TRAIN[name]):
        write(folder / name / "train" / "good" / f"{index:03d}{suffix}", (width, height), GREY[name], mode)
    for label, count in TEST[name].items():
        for index in range(count):
            write(folder / name / "test" / label / f"{index:03d}{suffix}", (width, height), GREY[name], mode)
            if masks and label != "good":
                mask = np.zeros((height, width), np.uint8)
                mask[:, : width // 2] = 255
                path = folder / name / "ground_truth" / label / f"{index:03d}_mask.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Colour with masks, grey JPEG without masks, grey with masks; and two folders that are no category."""
    root = tmp_path_factory.mktemp("data") / "parts"
    write_category(root, "bolt")
    write_category(root, "felt", suffix=".jpg", mode="L", masks=False)
    write_category(root, "tile", mode="L")
    (root / "notes").mkdir()
    (root / ".building" / "train").mkdir(parents=True)
    return root


def set_up(root=None, **arguments):
    arguments = {"num_workers": 0, "eval_batch_size": 4} | arguments
    datamodule = MultiCategory(root, **arguments)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def all_paths(dataset):
    return set(dataset.samples.image_path)


# --- Which images ---


def test_every_image_is_in_exactly_one_subset(root):
    datamodule = set_up(root)
    subsets = [all_paths(data) for data in (datamodule.train_data, datamodule.val_data, datamodule.test_data)]
    on_disk = {str(path) for split in ("train", "test") for path in root.glob(f"[!.]*/{split}/*/*")}
    assert set.union(*subsets) == on_disk
    assert sum(map(len, subsets)) == len(on_disk) == 68 + 20
    assert all("/train/good/" in path for path in subsets[0] | subsets[1])
    assert datamodule.categories == ["bolt", "felt", "tile"]
    assert datamodule.name == "parts"


def test_counts_are_those_on_disk_and_logged_as_one_table(root, caplog):
    with caplog.at_level("INFO"):
        datamodule = set_up(root)
    expected = pd.DataFrame(
        {
            "train normal": [34, 17, 7, 58],  # 15 % held out: 6 of 40, 3 of 20, 1 of 8
            "val normal": [6, 3, 1, 10],
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


def test_categories_are_picked_in_the_order_given(root):
    datamodule = set_up(root, categories=["tile", "bolt"])
    assert datamodule.categories == ["tile", "bolt"]
    assert list(datamodule.counts.index) == ["tile", "bolt", "total"]
    assert set(datamodule.train_data.samples.category) == {"tile", "bolt"}


def test_root_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    datamodule = set_up(tmp_path / "link")
    assert datamodule.name == "parts"
    assert all_paths(datamodule.test_data) == all_paths(set_up(root).test_data)


def test_hidden_files_are_no_images(tmp_path):
    write_category(tmp_path, "tile")
    for folder in (tmp_path / "tile").glob("*/*"):
        (folder / "._000.png").write_bytes(b"macOS leaves these in archives")
    counts = set_up(tmp_path, val_split_mode="none").counts.loc["tile"]
    assert counts.to_dict() == {"train normal": 8, "test normal": 2, "test defective": 4, "test masks": 4}


def test_one_category_alone_is_fine(root):
    datamodule = set_up(root, categories=["felt"])
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.category == ["felt"] * 4
    assert batch.gt_mask is None


def test_validation_repeats_and_follows_the_seed(root):
    first, again, other = (all_paths(set_up(root, seed=seed).val_data) for seed in (0, 0, 1))
    assert first == again != other


def test_validation_ignores_what_the_inner_datamodules_would_do(root):
    datamodule = set_up(datamodules={name: MVTecAD(root, name) for name in ("bolt", "tile")})
    assert not all_paths(datamodule.val_data) & all_paths(datamodule.test_data)
    assert datamodule.counts["val normal"].to_dict() == {"bolt": 6, "tile": 1, "total": 7}
    assert all_paths(datamodule.val_data) == all_paths(set_up(root, categories=["bolt", "tile"]).val_data)


@pytest.fixture
def own_validation(tmp_path):
    """Two categories, of which one brings validation images, a defective one among them that is nobody's business."""
    for name in ("bolt", "tile"):
        write_category(tmp_path, name)
    for name in ("good/000", "good/001", "dent/000"):
        write(tmp_path / "bolt" / "validation" / f"{name}.png", SIZES["bolt"], 255)
    return tmp_path


def test_a_categorys_own_validation_images_are_used(own_validation):
    own = {str(path) for path in (own_validation / "bolt" / "validation" / "good").iterdir()}
    datamodule = set_up(own_validation)
    assert datamodule.counts["train normal"].to_dict() == {"bolt": 40, "tile": 7, "total": 47}
    assert datamodule.counts["val normal"].to_dict() == {"bolt": 2, "tile": 1, "total": 3}
    assert own < all_paths(datamodule.val_data)
    assert datamodule.val_data[0].image.min() == 1

    joined = set_up(datamodules=datamodule.datamodules)
    assert own < all_paths(joined.val_data)


def test_other_validation_goes_first_where_it_is_asked_for(own_validation):
    assert not hasattr(set_up(own_validation, val_split_mode="none"), "val_data")
    on_test = set_up(own_validation, val_split_mode="same_as_test")
    assert all_paths(on_test.val_data) == all_paths(on_test.test_data)


@pytest.mark.parametrize("mode", ["same_as_test", ValSplitMode.SAME_AS_TEST])
def test_validation_on_the_test_set_only_when_asked_for(root, mode):
    datamodule = set_up(root, val_split_mode=mode)
    assert all_paths(datamodule.val_data) == all_paths(datamodule.test_data)
    assert len(datamodule.train_data) == 68


def test_no_validation_when_asked_for(root):
    datamodule = set_up(root, val_split_mode="none")
    assert not hasattr(datamodule, "val_data")
    assert len(datamodule.train_data) == 68


def test_synthetic_validation_keeps_the_categories(root):
    datamodule = set_up(root, val_split_mode="synthetic", val_split_ratio=0.25)
    assert set(datamodule.val_data.samples.label_index) == {0, 1}
    for item in datamodule.val_data:
        assert item.image.shape[:0:-1] == SIZES[item.category]
        assert item.gt_mask is not None


def test_without_normal_test_images_training_images_take_their_place(tmp_path):
    write_category(tmp_path, "bolt")
    shutil.rmtree(tmp_path / "bolt" / "test" / "good")
    counts = set_up(tmp_path, val_split_mode="none").counts.loc["bolt"]
    assert counts.to_dict() == {"train normal": 32, "test normal": 8, "test defective": 5, "test masks": 5}


def test_training_images_alone_are_enough(tmp_path):
    write_category(tmp_path, "bolt", masks=False)
    shutil.rmtree(tmp_path / "bolt" / "test")
    counts = set_up(tmp_path, val_split_mode="none").counts.loc["bolt"]
    assert counts.to_dict() == {"train normal": 32, "test normal": 8, "test masks": 0}


# --- What the images are ---


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_batches_from_worker_processes_know_category_and_masks(root, start):
    datamodule = set_up(root, num_workers=1)
    loader = datamodule.test_dataloader()
    loader.multiprocessing_context = start
    batches = list(loader)

    assert sum(len(batch) for batch in batches) == 20
    for batch in batches:
        assert isinstance(batch, CategoryBatch)
        for item in batch:
            grey = round(item.image[0, 0, 0].item() * 255)
            assert abs(grey - GREY[item.category]) < 3
            defective = "/good/" not in item.image_path
            assert bool(item.gt_label) == defective
            if item.gt_mask is None:
                assert defective
                assert item.category == "felt"
            else:
                width = item.gt_mask.shape[1]
                expected = torch.zeros_like(item.gt_mask)
                expected[:, : width // 2] = defective
                assert (item.gt_mask == expected).float().mean() > 0.97  # resized to the batch's largest image
    assert {item.category for batch in batches for item in batch if item.gt_mask is None} == {"felt"}


def test_pixel_metrics_see_exactly_the_images_whose_pixels_are_known(root):
    seen = {}
    for batch in set_up(root).test_dataloader():
        assert batch.gt_mask is None or len(batch.gt_mask) == len(batch)
        seen.update(dict.fromkeys(batch.image_path, batch.gt_mask is not None))
    unknown = [path for path, known in seen.items() if not known]
    assert len(unknown) == 2
    assert all("/felt/test/hole/" in path for path in unknown)

    metric = AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False)
    for batch in set_up(root).test_dataloader():
        metric.update(batch.update(anomaly_map=torch.zeros(len(batch), 1, *batch.image.shape[-2:])))
    assert metric.compute() == 0.5


def test_a_batch_of_any_images_can_be_made(root):
    data = set_up(root).test_data
    batch = next(iter(DataLoader(data, batch_size=len(data), collate_fn=data.collate_fn)))
    assert len(batch) == 20
    assert batch.gt_mask is None
    assert sum(path != "" for path in batch.mask_path) == 9


def test_numpy_twins_keep_the_category(root):
    batch = next(iter(set_up(root).val_dataloader()))
    assert (
        [item.category for item in batch.to_numpy()] == [item.to_numpy().category for item in batch] == batch.category
    )


def test_model_resizing_and_own_augmentations_reach_each_category(root):
    flip = RandomHorizontalFlip(p=1)
    inner = {"bolt": MVTecAD(root, "bolt", train_augmentations=flip), "tile": MVTecAD(root, "tile")}
    datamodule = set_up(datamodules=inner)
    by_category = {part.category: part.augmentations for part in datamodule.train_data.parts}
    assert by_category == {"bolt": flip, "tile": None}
    assert {part.augmentations for part in datamodule.test_data.parts} == {None}


def test_augmentations_are_of_every_category_that_brings_none(root):
    flip, turn = RandomHorizontalFlip(p=1), RandomVerticalFlip(p=1)
    datamodule = set_up(root, train_augmentations=flip, test_augmentations=turn)
    assert [part.augmentations for part in datamodule.train_data.parts] == [flip] * 3
    assert [part.augmentations for part in datamodule.val_data.parts] == [None] * 3
    assert [part.augmentations for part in datamodule.test_data.parts] == [turn] * 3
    masked = next(item for item in datamodule.test_data if item.category == "bolt" and item.gt_label == 1)
    assert masked.gt_mask[:, : SIZES["bolt"][0] // 2].all()

    inner = {"bolt": MVTecAD(root, "bolt", train_augmentations=flip), "tile": MVTecAD(root, "tile")}
    datamodule = set_up(datamodules=inner, train_augmentations=turn)
    assert {part.category: part.augmentations for part in datamodule.train_data.parts} == {"bolt": flip, "tile": turn}


def test_subsets_of_subsets_still_read_the_right_images(root):
    datamodule = set_up(root)
    kept, held_out = random_split(datamodule.train_data, 0.5, label_aware=True, seed=0)
    joined = held_out + datamodule.test_data + kept
    assert len(joined) == len(datamodule.train_data) + len(datamodule.test_data)
    assert joined.task == "segmentation"
    for index, item in enumerate(joined):
        sample = joined.samples.iloc[index]
        assert (item.image_path, item.category) == (sample.image_path, sample.category)


def test_datamodules_of_different_kinds_are_joined(root, tmp_path):
    folder = {"name": "x", "normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/hole"}
    inner = {
        "screws": MVTecAD(root, "bolt"),
        "cloth": Folder(root=root / "felt", **folder),
    }
    datamodule = set_up(datamodules=inner)
    assert datamodule.categories == ["screws", "cloth"]
    assert datamodule.name == "parts"
    assert datamodule.counts.loc["total"].to_dict() == {
        "train normal": 51, "val normal": 9, "test normal": 7, "test defective": 7, "test masks": 5
    }  # fmt: skip
    assert {item.category for item in datamodule.test_data} == {"screws", "cloth"}


def test_configurations_stand_for_datamodules_as_in_the_benchmark(root):
    inner = {name: {"class_path": "MVTecAD", "init_args": {"root": str(root), "category": name}} for name in ["tile"]}
    datamodule = get_datamodule({"class_path": "MultiCategory", "init_args": {"datamodules": inner}})
    datamodule.setup()
    assert datamodule.counts.loc["tile", "test defective"] == 4


# --- The loaders ---


def drawn(datamodule):
    return [name for batch in datamodule.train_dataloader() for name in batch.category]


def test_training_order_follows_the_seed_alone(root):
    def order(seed):
        loader = set_up(root, seed=seed, train_batch_size=64).train_dataloader()
        return [path for batch in loader for path in batch.image_path]

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert order(0) == first
    assert sorted(first) != first
    assert order(1) != first


def test_epochs_differ(root):
    loader = set_up(root, train_batch_size=64).train_dataloader()
    first, second = ([path for batch in loader for path in batch.image_path] for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_balance_draws_categories_equally_often(root):
    datamodule = set_up(root, balance=True)
    sampler = datamodule.train_dataloader().sampler
    category = datamodule.train_data.samples.category
    counts = Counter(category[index] for _ in range(200) for index in sampler)
    assert len(sampler) == 58
    total = sum(counts.values())
    assert total == 200 * 58
    for name in GREY:
        assert counts[name] / total == pytest.approx(1 / 3, abs=0.02)  # five standard deviations

    assert Counter(drawn(set_up(root))) == {"bolt": 34, "felt": 17, "tile": 7}


@pytest.mark.parametrize("size", [1, 3, 10])
def test_run_batches_keep_order_and_never_mix(size):
    keys = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1]
    sampler = RunBatchSampler(SequentialSampler(keys), size, drop_last=False, keys=keys)
    batches = list(sampler)
    assert list(chain.from_iterable(batches)) == list(range(11))
    assert len(sampler) == len(batches)
    assert all(len({keys[index] for index in batch}) == 1 for batch in batches)
    for batch, following in pairwise(batches):
        assert len(batch) == size or keys[batch[-1]] != keys[following[0]]


def test_run_batches_can_drop_what_is_not_full():
    sampler = RunBatchSampler(SequentialSampler(range(5)), 2, drop_last=True, keys=[0, 0, 0, 1, 1])
    assert list(sampler) == [[0, 1], [3, 4]]


def test_datamodule_can_be_pickled_and_copied(root):
    datamodule = set_up(root)
    for twin in (pickle.loads(pickle.dumps(datamodule)), copy.deepcopy(datamodule)):  # noqa: S301 - our own bytes
        pd.testing.assert_frame_equal(twin.train_data.samples, datamodule.train_data.samples)
        assert twin.test_data[0].category == "bolt"


# --- What is refused ---


@pytest.mark.parametrize("given", [{}, {"root": "x", "datamodules": {}}])
def test_root_or_datamodules_but_not_both(given):
    with pytest.raises(ValueError, match=r"from root or from datamodules; (neither|both) were given"):
        MultiCategory(**given)


def test_missing_root_is_refused_and_nothing_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib.data.datamodules.image.mvtecad.download_and_extract", pytest.fail)
    with pytest.raises(FileNotFoundError, match=r"absent' is not a folder\. .*downloads nothing"):
        MultiCategory(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_root_without_categories_is_refused(root):
    with pytest.raises(FileNotFoundError, match=r"holds no category\. .*<root>/<category>/train/good"):
        MultiCategory(root / "bolt")


@pytest.mark.parametrize("left", ["test", "train"])
def test_category_without_training_images_is_refused(tmp_path, left):
    write_category(tmp_path, "bolt")
    (tmp_path / "void" / left / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Category 'void' has no training images in .*void/train/good"):
        MultiCategory(tmp_path)


def test_category_with_some_masks_missing_is_refused(tmp_path):
    write_category(tmp_path, "bolt")
    (tmp_path / "bolt" / "ground_truth" / "dent" / "001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"'bolt' has masks, but none for 1 defective images such as .*dent/001\.png"):
        MultiCategory(tmp_path)


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


def test_category_too_small_to_validate_is_refused(root):
    with pytest.raises(RuntimeError, match=r"Category 'tile' .*val_split_ratio=0\.1 give no validation images \(8"):
        set_up(root, val_split_ratio=0.1)


def test_datamodule_without_training_images_is_refused(tmp_path, root):
    write_category(tmp_path, "tile")
    shutil.rmtree(tmp_path / "tile" / "train")
    inner = {"a": MVTecAD(root, "bolt"), "b": MVTecAD(tmp_path, "tile")}
    with pytest.raises(RuntimeError, match=r"Category 'b' \(MVTecAD\) failed: it has no training images"):
        set_up(datamodules=inner)


def test_datamodule_of_anything_but_images_is_refused(root):
    folders = {
        "normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/dent",
        "normal_depth_dir": "train/good", "normal_test_depth_dir": "test/good", "abnormal_depth_dir": "test/dent",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Category 'a' \(Folder3D\) failed: Folder3DDataset gives no plain images"):
        set_up(datamodules={"a": Folder3D("x", root=root / "bolt", **folders)})


@pytest.mark.parametrize("same_object", [True, False])
def test_one_product_under_two_names_is_refused(root, same_object):
    first = MVTecAD(root, "bolt")
    second = first if same_object else MVTecAD(root, "bolt")
    with pytest.raises(ValueError, match=r"Categories 'a' and 'b' both contain '.*bolt/"):
        set_up(datamodules={"a": first, "b": second})


@pytest.mark.parametrize("step", ["prepare_data", "_setup"])
def test_failing_datamodule_is_named_and_leaves_nothing_half_done(root, monkeypatch, step):
    inner = {"a": MVTecAD(root, "bolt"), "b": MVTecAD(root, "tile")}
    datamodule = MultiCategory(datamodules=inner, num_workers=0)
    cause = OSError("disk on fire")

    def fail(*_):
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(inner["b"], step, fail)
        with pytest.raises(RuntimeError, match=r"Category 'b' \(MVTecAD\) failed: disk on fire") as caught:
            getattr(datamodule, step.removeprefix("_"))()
    assert caught.value.__cause__ is cause
    assert not hasattr(datamodule, "train_data")
    datamodule.setup()
    assert datamodule.counts.loc["total", "train normal"] == 34 + 7


def test_pictures_that_would_overwrite_each_other_are_announced(root):
    inner = {
        name: Folder(name, root / name / "train/good", normal_test_dir=root / name / "test/good")
        for name in ("bolt", "tile")
    }
    with pytest.warns(UserWarning, match="overwrite 2 of 6 test pictures"):
        datamodule = set_up(datamodules=inner)
    assert datamodule.name == "MultiCategory"
