"""Categories are found below a root and their images tabulated; incomplete folders are refused."""

import pytest

from decodiff_anomalib.data import MultiCategory


def test_hidden_files_are_ignored(tmp_path, write_category, set_up, recwarn):
    write_category(tmp_path, "tile")
    for folder in (tmp_path / "tile").glob("*/*"):
        (folder / "._000.png").write_bytes(b"macOS leaves these in archives")
        (folder / "Thumbs.db").touch()
    (tmp_path / "tile" / "license.txt").touch()
    counts = set_up(tmp_path, val_split_mode="none").counts.loc["tile"]
    assert counts.to_dict() == {"train normal": 8, "test normal": 2, "test defective": 4, "test masks": 4}
    assert not [warning for warning in recwarn if "not used" in str(warning.message)]


def test_files_that_are_not_used_are_counted_with_the_reason(tmp_path, write_category, write_image):
    write_category(tmp_path, "bolt")
    write_category(tmp_path, "tile")
    tile = tmp_path / "tile"
    for name in (
        "a.png",
        "test/a.PNG",
        "test/b.jpg",
        "test/good/more/a.png",
        "train/broken/a.png",
        "val/good/a.png",
        "ground_truth/crack/900_mask.png",
    ):
        write_image(tile / name, (8, 8), 100)
    (tile / "train" / "good" / "a.heic").touch()
    with pytest.warns(UserWarning, match="not used") as caught:
        datamodule = MultiCategory(tmp_path)
    (message,) = {str(warning.message) for warning in caught}
    assert message == (
        "8 files of category 'tile' are not used: "
        "1 in the folder itself (images belong into train/good or test/<good or defect>), "
        "1 in ground_truth/crack/ (masks of no image), "
        "2 in test/ itself (images belong into test/<good or defect>), "
        "1 in test/good/more/ (images belong into test/<good or defect>), "
        "1 in train/broken/ (images belong into train/good), "
        "1 .heic (no image format that is read), "
        "1 in val/good/ (images belong into train/good or test/<good or defect>)."
    )
    datamodule.setup()
    assert datamodule.counts.loc["tile", "test defective"] == 4


def test_missing_root_is_refused_and_nothing_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib.data.datamodules.image.mvtecad.download_and_extract", pytest.fail)
    with pytest.raises(FileNotFoundError, match=r"absent' is not a folder\. .*downloads nothing"):
        MultiCategory(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_root_without_categories_is_refused(root):
    with pytest.raises(FileNotFoundError, match=r"holds no category\. .*<root>/<category>/train/good"):
        MultiCategory(root / "bolt")


@pytest.mark.parametrize("left", ["test", "train"])
def test_category_without_training_images_is_refused(tmp_path, left, write_category):
    write_category(tmp_path, "bolt")
    (tmp_path / "void" / left / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'void' has no training images in .*void/train/good.*named 'good'"):
        MultiCategory(tmp_path)


def test_category_with_some_masks_missing_is_refused(tmp_path, write_category):
    write_category(tmp_path, "bolt")
    (tmp_path / "bolt" / "ground_truth" / "dent" / "001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"'bolt' has masks, but none for 1 defective images such as .*dent/001\.png"):
        MultiCategory(tmp_path)
