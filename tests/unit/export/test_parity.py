"""Comparison of an export's outputs with the model's, and its report."""

import json
from pathlib import Path

import numpy as np
import pytest

from decodiff_anomalib.export import ParityError, Runtime, parity


def compare(exported: dict[str, list], expected: dict[str, list], tolerance: float | None = 1e-3) -> dict:
    def arrays(outputs: dict[str, list]) -> list[dict[str, np.ndarray]]:
        return [{name: np.asarray(value) for name, value in outputs.items()}]

    runtime = Runtime("runtime", lambda _: {}, tolerance)
    return parity._compare(runtime, arrays(expected), arrays(exported), "model.onnx")


def test_differences_are_measured_by_name() -> None:
    expected = {"pred_score": [0.2, 0.9], "pred_label": [False, True], "category_index": [0, 1]}
    exported = {"pred_score": [0.2005, 0.9], "pred_label": [False, True], "category_index": [0, 1]}
    result = compare(exported, expected)
    assert result["largest_difference"] == {"pred_score": pytest.approx(0.0005)}
    assert result["different"] == {"pred_label": 0, "category_index": 0}


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ({"pred_score": [0.2, 0.8], "pred_label": [False, True]}, "pred_score differs by 0.1; 0.001 is allowed"),
        ({"pred_score": [0.2, 0.9], "pred_label": [True, True]}, "pred_label differs 1 times"),
        ({"pred_score": [0.2, float("nan")], "pred_label": [False, True]}, "pred_score differs by nan"),
    ],
)
def test_differences_beyond_the_tolerance_raise_an_error_with_the_numbers(exported: dict, message: str) -> None:
    expected = {"pred_score": [0.2, 0.9], "pred_label": [False, True]}
    with pytest.raises(ParityError, match=r"outputs of model\.onnx differ from the model's \(runtime\)") as caught:
        compare(exported, expected)
    assert message in str(caught.value)
    compare(exported, expected, tolerance=None)  # measured only


def test_a_label_may_differ_only_at_the_threshold() -> None:
    expected = {"pred_score": [0.4999, 0.9], "pred_label": [False, True]}
    result = compare({"pred_score": [0.5001, 0.9], "pred_label": [True, True]}, expected)
    assert result["different"] == result["undecided"] == {"pred_label": 1}


def test_the_report_keeps_the_entries_of_other_files(tmp_path: Path) -> None:
    reports = tmp_path / "parity.json"
    for name in ("model.onnx", "other.onnx", "model.onnx"):
        staging = tmp_path / ".staging"
        staging.mkdir(exist_ok=True)
        parity.stage_record(staging / name, "parity.json", {"images": 1})
        (staging / "parity.json").replace(reports)
    assert set(json.loads(reports.read_text())) == {"model.onnx", "other.onnx"}
