"""The staging directory and the packages that exports need. Exported files are tested in integration."""

from pathlib import Path

import pytest
from anomalib.deploy.export import ExportType

from decodiff_anomalib.export import ParityError, writers


def test_a_failed_export_leaves_existing_files_unchanged(tmp_path: Path) -> None:
    def write(content: str, *, fail: bool) -> None:
        with writers.staging_directory(tmp_path, ExportType.ONNX) as (staging, target):
            (staging / "model.onnx").write_text(content)
            assert not (target / "model.onnx").exists() or (target / "model.onnx").read_text() == "first"
            if fail:
                raise ParityError

    write("first", fail=False)
    with pytest.raises(ParityError):
        write("second", fail=True)
    assert [path.name for path in (tmp_path / "weights" / "onnx").iterdir()] == ["model.onnx"]
    assert (tmp_path / "weights" / "onnx" / "model.onnx").read_text() == "first"


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    with (
        pytest.raises(OSError, match=r"export_root='.*' cannot be written to: .* Give another folder"),
        writers.staging_directory(tmp_path, ExportType.ONNX),
    ):
        pass


def test_missing_packages_are_reported_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "find_spec", lambda name: None if name == "nncf" else object())
    writers._require("onnx", "openvino")
    with pytest.raises(ModuleNotFoundError, match=r'needs nncf: pip install "decodiff_anomalib\[openvino\]"'):
        writers._require("onnx", "nncf")
