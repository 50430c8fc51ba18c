"""The parity check: the outputs of an exported file against the model's, recorded in ``parity.json``."""

import copy
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy.export import CompressionType
from torch import nn
from torchvision.transforms.v2.functional import resize

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.export.pipeline import ExportableModel, prediction_pipeline
from decodiff_anomalib.export.sample_images import drawn_images, evenly_spaced, set_up
from decodiff_anomalib.export.thresholds import TABLES

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

TOLERANCES: dict[CompressionType | None, float] = {None: 1e-3, CompressionType.FP16: 0.1}
"""Largest difference of maps and scores, whose threshold is 0.5. Files with integers have none: only measured.

In FP16 rounded features can be nearest to another entry of a memory bank, which changes single places by more than the
rounding itself.
"""

SCORE_OF_LABEL = {"pred_label": "pred_score", "pred_mask": "anomaly_map"}
"""The output that each label is computed from, by comparison with 0.5."""

REPORT = "parity.json"
PARITY_IMAGES, PARITY_BATCHES = 22, (1, 2, 8)
FALLBACK_SIZE = (256, 256)
ODD_SIZES = ((96, 160), (333, 257))


class ParityError(RuntimeError):
    """The outputs of an exported file differ from the model's by more than is allowed."""


class Runtime(NamedTuple):
    """A runtime that has loaded an exported file.

    Attributes:
        name: Product, version and precision.
        infer: Images ``(B, 3, H, W)`` in [0, 1] to outputs by name.
        tolerance: Largest difference of maps and scores; ``None`` measures without a limit.
    """

    name: str
    infer: Callable[[torch.Tensor], Mapping[str, np.ndarray]]
    tolerance: float | None


class ParityImages(NamedTuple):
    """Images to compare on.

    Attributes:
        batches: ``(B, 3, H, W)`` in [0, 1], of several sizes where the graph takes them.
        origin: Where they are from.
    """

    batches: list[torch.Tensor]
    origin: str

    @classmethod
    def make(
        cls,
        model: ExportableModel,
        datamodule: AnomalibDataModule | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> "ParityImages":
        """A datamodule's test images of all categories, else drawn ones, and drawn ones of other sizes."""
        if datamodule is None:
            images, origin = drawn_images(PARITY_IMAGES, input_size or model.input_size or FALLBACK_SIZE), "drawn"
        else:
            set_up(datamodule)
            chosen = evenly_spaced(datamodule.test_data, PARITY_IMAGES, model.white_level)
            images = [batch.image[0] for batch in chosen]
            origin = f"test images of {datamodule.name}"
        if input_size:
            images = [resize(image, list(input_size), antialias=True) for image in images]
        elif model.input_size:  # else the graph does not resize
            images += [image for size in ODD_SIZES for image in drawn_images(1, size)]
        of_size: defaultdict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for image in images:
            of_size[image.shape].append(image)
        batches = []
        for group in map(iter, of_size.values()):
            for count in cycle(PARITY_BATCHES):
                batch = list(islice(group, count))
                if not batch:
                    break
                batches.append(torch.stack(batch))
        return cls(batches, origin)


def check_parity(
    runtimes: Sequence[Runtime],
    file: Path,
    model: ExportableModel,
    images: ParityImages,
    compression: CompressionType | None = None,
) -> None:
    """Compare a file's outputs with the model's, log the differences and write them to ``parity.json`` beside it.

    Args:
        runtimes: Each runs the file.
        file: The exported file, in a staging directory.
        model: The model it was exported from.
        images: What both are run on.
        compression: Of the file, for the report.

    Raises:
        ParityError: If the outputs of a runtime differ by more than its tolerance.
    """
    reference = prediction_pipeline(model)
    if model.device.type != "cpu":
        reference = copy.deepcopy(reference).cpu()
    reference.eval()
    with torch.inference_mode():
        expected = [numpy_outputs(reference.outputs(batch)) for batch in images.batches]
    categories = (*model.categories, UNKNOWN)
    predicted = Counter(categories[index] for outputs in expected for index in outputs["category_index"])
    report: dict[str, Any] = {
        "compression": compression.value if compression else None,
        "images": sum(map(len, images.batches)),
        "origin": images.origin,
        "batches": ["x".join(map(str, batch.shape)) for batch in images.batches],
        "categories": dict(predicted),
        "thresholds": _thresholds_of(reference.post_processor),
        "runtimes": {},
    }
    logger.info("Comparing %s with the model on %d images (%s).", file.name, report["images"], images.origin)
    unverified = set(model.categories) - set(predicted)
    if unverified:
        logger.warning(
            "The export is not verified for %s: no image of the comparison was assigned to them. Give a datamodule "
            "(`--data ...`).",
            ", ".join(sorted(unverified)),
        )
    for runtime in runtimes:
        with torch.inference_mode():
            exported = [runtime.infer(batch) for batch in images.batches]
        report["runtimes"][runtime.name] = _compare(runtime, expected, exported, file.name)
    stage_record(file, REPORT, report)


def _thresholds_of(post_processor: nn.Module | None) -> dict[str, list[float]] | None:
    """The thresholds that differences were measured with; ``decodiff threshold`` can move them afterwards."""
    tables = {name: getattr(post_processor, name, None) for name in TABLES}
    return {name: table.tolist() for name, table in tables.items() if table is not None} if post_processor else None


def stage_record(file: Path, name: str, record: dict[str, Any]) -> None:
    """Write the record of a staged file, with those of the other files in the target directory."""
    existing = file.parent.parent / name
    if existing.is_file():
        shutil.copy(existing, file.parent / name)
    write_record(file.parent / name, file.name, record)


def write_record(path: Path, file: str, record: dict[str, Any]) -> None:
    """Set the record of ``file`` in the JSON file ``path``, which has one of each exported file in its folder."""
    records = json.loads(path.read_text()) if path.is_file() else {}
    with atomic_write(path) as staged:
        staged.write_text(json.dumps({**records, file: record}, indent=2) + "\n")


def _compare(
    runtime: Runtime,
    expected: Sequence[Mapping[str, np.ndarray]],
    exported: Sequence[Mapping[str, np.ndarray]],
    file: str,
) -> dict[str, Any]:
    """Differences of the exported outputs from the model's.

    A label may differ where its score is no further from the threshold than scores may differ.
    """
    tolerance = runtime.tolerance
    result: dict[str, Any] = {"tolerance": tolerance, "largest_difference": {}, "different": {}, "undecided": {}}
    beyond = []
    for name in exported[0]:
        pairs = [(model[name], export[name]) for model, export in zip(expected, exported, strict=True)]
        if name in SCORE_OF_LABEL:
            scores = [model[SCORE_OF_LABEL[name]] for model in expected]
            differ = [
                (model != export, abs(score - 0.5) <= (tolerance or 0.0))
                for (model, export), score in zip(pairs, scores, strict=True)
            ]
            result["different"][name] = sum(int(wrong.sum()) for wrong, _ in differ)
            result["undecided"][name] = sum(int((wrong & close).sum()) for wrong, close in differ)
            if tolerance is not None and result["different"][name] > result["undecided"][name]:
                beyond.append(f"{name} differs {result['different'][name] - result['undecided'][name]} times")
        elif pairs[0][0].dtype.kind == "f":
            largest = max(float(_difference(model, export).max()) for model, export in pairs)
            result["largest_difference"][name] = largest
            if tolerance is not None and not largest <= tolerance:  # NaN is beyond, too
                beyond.append(f"{name} differs by {largest:.3g}")
        else:
            result["different"][name] = sum(int((model != export).sum()) for model, export in pairs)
    logger.info(
        "%s, %s: %s", file, runtime.name, json.dumps({key: result[key] for key in ("largest_difference", "different")})
    )
    if beyond:
        msg = (
            f"The outputs of {file} differ from the model's ({runtime.name}): {', '.join(beyond)}; {tolerance:g} is "
            "allowed. Nothing was written. Try the versions that the package was tested with, or another opset_version."
        )
        raise ParityError(msg)
    return result


def _difference(model: np.ndarray, export: np.ndarray) -> np.ndarray:
    """Absolute difference; 0 between equal infinities and between NaNs."""
    same = (model == export) | (np.isnan(model) & np.isnan(export))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0, np.abs(model - export))


def openvino_runtimes(file: Path, tolerance: float | None) -> list[Runtime]:
    """OpenVINO in single precision, and in its default precision where that is another, which is only measured."""
    import openvino

    product = f"OpenVINO {version('openvino')}"
    exact = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    runtimes = [Runtime(f"{product}, float32", lambda images: named_outputs(exact(images.numpy())), tolerance)]
    default = openvino.compile_model(file, "CPU")
    precision = default.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision != "f32":
        name = f"{product}, {precision} (this machine's default)"
        runtimes.append(Runtime(name, lambda images: named_outputs(default(images.numpy())), None))
    return runtimes


def numpy_outputs(outputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Outputs of a pipeline as arrays."""
    return {name: value.numpy() for name, value in outputs.items()}


def named_outputs(outputs: "openvino.utils.data_helpers.OVDict") -> dict[str, np.ndarray]:
    """Outputs of a compiled OpenVINO model by name."""
    return {output.any_name: value for output, value in outputs.items()}
