"""Size, speed and accuracy of each kind of export, compared with the model in PyTorch. Run with ``-s``.

A model is trained first, which takes minutes, unless ``DECODIFF_CHECKPOINT`` names one of the same data.

Speeds are ratios of medians, measured in turns in one process with the same number of threads; the quartiles of the
ratio over the turns show their uncertainty.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.deploy import CompressionType
from sklearn.metrics import average_precision_score, roc_auc_score

from decodiff_anomalib import DeCoDiff, MultiCategory
from decodiff_anomalib.export import prediction_pipeline
from decodiff_anomalib.export.sample_images import evenly_spaced

pytestmark = pytest.mark.benchmarks

TURNS = {1: 30, 8: 8}  # by batch size
ALLOWED_LOSS = 0.005

Outputs = dict[str, np.ndarray]


class Export(NamedTuple):
    """An exported file in a runtime, or the model itself.

    Attributes:
        infer: Images ``(B, 3, H, W)`` in [0, 1] to outputs by name.
        megabytes: Size of its files.
    """

    infer: Callable[[np.ndarray], Outputs]
    megabytes: float


@pytest.fixture(scope="module")
def data(data_dir: Path) -> MultiCategory:
    return MultiCategory(data_dir, num_workers=0)


@pytest.fixture(scope="module")
def exports(model: DeCoDiff, data: MultiCategory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    folder = tmp_path_factory.mktemp("exports")
    pipeline = prediction_pipeline(model)

    def pytorch(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in pipeline.outputs(torch.from_numpy(images)).items()}

    weights = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    exports = {"PyTorch": Export(pytorch, weights / 2**20)}

    path = model.to_onnx(folder, datamodule=data)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    exports["ONNX Runtime"] = Export(
        lambda images: dict(zip(names, session.run(names, {"input": images}), strict=True)), path.stat().st_size / 2**20
    )
    for compression in (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ):
        name = compression.name if compression else "FP32"
        path = model.to_openvino(folder, name, compression_type=compression, datamodule=data)
        megabytes = sum(file.stat().st_size for file in (path, path.with_suffix(".bin"))) / 2**20
        for precision in ("f32", None):
            config = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
            compiled = openvino.compile_model(
                path, "CPU", config | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
            )
            actual = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            if precision or actual != "f32":
                exports[f"OpenVINO {name}, {actual}"] = Export(
                    lambda images, graph=compiled: {output.any_name: value for output, value in graph(images).items()},
                    megabytes,
                )
    return exports


@pytest.fixture(scope="module")
def test_set(data: MultiCategory) -> dict[str, np.ndarray]:
    data.setup("test")
    batches = list(evenly_spaced(data.test_data, len(data.test_data)))
    return {
        "images": np.concatenate([batch.image.numpy() for batch in batches]),
        "masks": np.concatenate([batch.gt_mask.numpy() for batch in batches]).astype(bool),
        "labels": np.concatenate([batch.gt_label.numpy() for batch in batches]),
        "categories": np.array([batch.category[0] for batch in batches]),
    }


def predict(export: Export, images: np.ndarray) -> Outputs:
    batches = [export.infer(images[start : start + 8]) for start in range(0, len(images), 8)]
    return {
        name: np.concatenate([outputs[name] for outputs in batches])
        for name in ("pred_score", "anomaly_map", "pred_label")
    }


def metrics(outputs: Outputs, test_set: dict[str, np.ndarray]) -> np.ndarray:
    """Pixel AP and image AUROC ``(categories, 2)``."""
    rows = []
    for category in np.unique(test_set["categories"]):
        chosen = test_set["categories"] == category
        rows.append(
            (
                average_precision_score(test_set["masks"][chosen].ravel(), outputs["anomaly_map"][chosen].ravel()),
                roc_auc_score(test_set["labels"][chosen], outputs["pred_score"][chosen]),
            )
        )
    return np.array(rows)


def seconds(infer: Callable[[], object]) -> float:
    started = time.perf_counter()
    infer()
    return time.perf_counter() - started


def test_exports_keep_the_accuracy(exports: dict[str, Export], test_set: dict[str, np.ndarray]) -> None:
    reference = predict(exports["PyTorch"], test_set["images"])
    reference_metrics = metrics(reference, test_set)
    print(f"\nPixel AP and image AUROC of PyTorch by category:\n{reference_metrics.round(4)}\n")
    losses = {}
    for name, export in list(exports.items())[1:]:
        predictions = predict(export, test_set["images"])
        gain = metrics(predictions, test_set) - reference_metrics
        losses[name] = -gain.mean(0).min()
        difference = abs(predictions["anomaly_map"] - reference["anomaly_map"])
        print(
            f"{name:28} {export.megabytes:6.1f} MB  maps differ by {difference.max():.5f}, on average "
            f"{difference.mean():.5f}; {(predictions['pred_label'] != reference['pred_label']).sum()} labels differ; "
            f"AP {gain.mean(0)[0]:+.4f} (worst category {gain[:, 0].min():+.4f}), "
            f"AUROC {gain.mean(0)[1]:+.4f} ({gain[:, 1].min():+.4f})"
        )
    assert not {name: loss for name, loss in losses.items() if loss >= ALLOWED_LOSS}


@pytest.mark.parametrize("batch_size", TURNS)
def test_speed(exports: dict[str, Export], test_set: dict[str, np.ndarray], batch_size: int) -> None:
    images = test_set["images"][:: len(test_set["images"]) // batch_size][:batch_size]
    calls = {name: (lambda infer=export.infer: infer(images)) for name, export in exports.items()}
    for call in calls.values():
        call()
    turns = np.array([[seconds(call) for call in calls.values()] for _ in range(TURNS[batch_size])])
    load = os.getloadavg()[0]
    print(f"\nTimes as fast as PyTorch at batch {batch_size}; {torch.get_num_threads()} threads, load {load:.1f}")
    for name, column in zip(calls, turns.T, strict=True):
        low, high = np.quantile(turns[:, 0] / column, (0.25, 0.75))
        ratio = np.median(turns[:, 0]) / np.median(column)
        print(
            f"{name:28} {ratio:5.2f} ({low:.2f} to {high:.2f}), {1000 * np.median(column) / batch_size:.0f} ms an image"
        )
        if name == "OpenVINO FP32, f32":
            assert ratio > 1
