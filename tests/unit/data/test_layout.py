"""Categories are found below a root and their images tabulated; incomplete folders are refused."""

import pytest

from decodiff_anomalib.data import MultiCategory


def test_hidden_files_are_ignored(tmp_path, write_category, set_up):
    write_category(tmp_path, "tile")
    for folder in (tmp_path / "tile").glob("*/*"):
        (folder / "._000.png").write_bytes(b"macOS leaves these in archives")
    counts = set_up(tmp_path, val_split_mode="none").counts.loc["tile"]
    assert counts.to_dict() == {"train normal": 8, "test normal": 2, "test defective": 4, "test masks": 4}


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
    with pytest.raises(ValueError, match=r"Category 'void' has no training images in .*void/train/good"):
        MultiCategory(tmp_path)


def test_category_with_some_masks_missing_is_refused(tmp_path, write_category):
    write_category(tmp_path, "bolt")
    (tmp_path / "bolt" / "ground_truth" / "dent" / "001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"'bolt' has masks, but none for 1 defective images such as .*dent/001\.png"):
        MultiCategory(tmp_path)
