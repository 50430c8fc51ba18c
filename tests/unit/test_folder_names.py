"""Names that become folders stay in the folder above."""

from pathlib import Path

import pytest

from decodiff_anomalib.folder_names import check_folder_name


@pytest.mark.parametrize("name", ["", ".", "..", "../..", "/etc", "a/b", "a\\b", "a/", "a\nb", "a\0b", "\r", "\t"])
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a category") as caught:
        check_folder_name(name, "category")
    assert repr(name) in str(caught.value)
    assert "Rename it: not empty, not '.' or '..', without '/'" in str(caught.value)


@pytest.mark.parametrize("name", ["bottle", "...", ".hidden", "a..b", "Schraube groß", "paper's corruption", "金属"])
def test_other_names_are_folders(name: str, tmp_path: Path) -> None:
    check_folder_name(name, "category")
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]
