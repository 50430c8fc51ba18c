"""What exports cost and keep: size, speed and accuracy of each, against the model in PyTorch. Run with ``-s``.

A model is trained for it, minutes long, unless ``DECODIFF_CHECKPOINT`` names one of the same data.

Times are ratios of medians, taken in turn in one process with as many threads for each; the quartiles of the ratio of
each turn say how far they can be trusted.
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
from anomalib.engine import Engine
from sklearn.metrics import average_precision_score, roc_auc_score

from decodiff_anomalib import DeCoDiff, MultiCategory
from decodiff_anomalib.export import _spread, as_predicting

pytestmark = pytest.mark.benchmarks

TURNS = {1: 30, 8: 8}
ALLOWED_LOSS = 0.005

Outputs = dict[str, np.ndarray]


class Contender(NamedTuple):
    """A way to run the model.

    Attributes:
        infer: Images ``(B, 3, H, W)`` to outputs.
        megabytes: Of its files.
    """

    infer: Callable[[np.ndarray], Outputs]
    megabytes: float


@pytest.fixture(scope="module")
def data(data_dir: Path) -> MultiCategory:
    return MultiCategory(data_dir, num_workers=0)


@pytest.fixture(scope="module")
def model(data: MultiCategory, tmp_path_factory: pytest.TempPathFactory) -> DeCoDiff:
    given = os.environ.get("DECODIFF_CHECKPOINT")
    if given:
        return DeCoDiff.load_from_checkpoint(given, map_location="cpu").eval()
    model = DeCoDiff(preset="fast")
    Engine(default_root_dir=tmp_path_factory.mktemp("run"), accelerator="cpu", logger=False).fit(model, datamodule=data)
    return model.cpu().eval()


@pytest.fixture(scope="module")
def contenders(model: DeCoDiff, data: MultiCategory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contender]:
    folder = tmp_path_factory.mktemp("exports")
    predicting = as_predicting(model)

    def eager(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in predicting.see(torch.from_numpy(images)).items()}

    weights = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    found = {"PyTorch": Contender(eager, weights / 2**20)}

    path = model.to_onnx(folder, datamodule=data)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found["ONNX Runtime"] = Contender(
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
            chosen = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            if precision or chosen != "f32":
                found[f"OpenVINO {name}, {chosen}"] = Contender(
                    lambda images, run=compiled: {output.any_name: value for output, value in run(images).items()},
                    megabytes,
                )
    return found


@pytest.fixture(scope="module")
def tested(data: MultiCategory) -> dict[str, np.ndarray]:
    data.setup("test")
    batches = list(_spread(data.test_data, len(data.test_data)))
    return {
        "images": np.concatenate([batch.image.numpy() for batch in batches]),
        "masks": np.concatenate([batch.gt_mask.numpy() for batch in batches]).astype(bool),
        "labels": np.concatenate([batch.gt_label.numpy() for batch in batches]),
        "categories": np.array([batch.category[0] for batch in batches]),
    }


def predicted(contender: Contender, images: np.ndarray) -> Outputs:
    seen = [contender.infer(images[start : start + 8]) for start in range(0, len(images), 8)]
    return {
        name: np.concatenate([outputs[name] for outputs in seen])
        for name in ("pred_score", "anomaly_map", "pred_label")
    }


def figures(outputs: Outputs, tested: dict[str, np.ndarray]) -> np.ndarray:
    """Pixel AP and image AUROC ``(categories, 2)``."""
    rows = []
    for category in np.unique(tested["categories"]):
        chosen = tested["categories"] == category
        rows.append(
            (
                average_precision_score(tested["masks"][chosen].ravel(), outputs["anomaly_map"][chosen].ravel()),
                roc_auc_score(tested["labels"][chosen], outputs["pred_score"][chosen]),
            )
        )
    return np.array(rows)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def test_accuracy_is_kept(contenders: dict[str, Contender], tested: dict[str, np.ndarray]) -> None:
    ours = predicted(contenders["PyTorch"], tested["images"])
    wanted = figures(ours, tested)
    print(f"\nPixel AP and image AUROC of PyTorch by category:\n{wanted.round(4)}\n")
    lost = {}
    for name, contender in list(contenders.items())[1:]:
        theirs = predicted(contender, tested["images"])
        gained = figures(theirs, tested) - wanted
        lost[name] = -gained.mean(0).min()
        difference = abs(theirs["anomaly_map"] - ours["anomaly_map"])
        print(
            f"{name:28} {contender.megabytes:6.1f} MB  maps differ by {difference.max():.5f}, on average "
            f"{difference.mean():.5f}; {(theirs['pred_label'] != ours['pred_label']).sum()} labels differ; "
            f"AP {gained.mean(0)[0]:+.4f} (worst category {gained[:, 0].min():+.4f}), "
            f"AUROC {gained.mean(0)[1]:+.4f} ({gained[:, 1].min():+.4f})"
        )
    assert not {name: loss for name, loss in lost.items() if loss >= ALLOWED_LOSS}


@pytest.mark.parametrize("batch_size", TURNS)
def test_speed(contenders: dict[str, Contender], tested: dict[str, np.ndarray], batch_size: int) -> None:
    images = tested["images"][:: len(tested["images"]) // batch_size][:batch_size]
    runs = {name: (lambda infer=contender.infer: infer(images)) for name, contender in contenders.items()}
    for run in runs.values():
        run()
    turns = np.array([[seconds(run) for run in runs.values()] for _ in range(TURNS[batch_size])])
    load = os.getloadavg()[0]
    print(f"\nTimes as fast as PyTorch at batch {batch_size}; {torch.get_num_threads()} threads, load {load:.1f}")
    for name, column in zip(runs, turns.T, strict=True):
        low, high = np.quantile(turns[:, 0] / column, (0.25, 0.75))
        ratio = np.median(turns[:, 0]) / np.median(column)
        print(
            f"{name:28} {ratio:5.2f} ({low:.2f} to {high:.2f}), {1000 * np.median(column) / batch_size:.0f} ms an image"
        )
        if name == "OpenVINO FP32, f32":
            assert ratio > 1
