"""INT8 with NNCF: which modules compute in integers, and the images that determine the integers' ranges."""

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy.export import CompressionType

from decodiff_anomalib.export.parity import named_outputs
from decodiff_anomalib.export.sample_images import evenly_spaced, set_up

if TYPE_CHECKING:
    import openvino
    from torchmetrics import Metric

RANGE_IMAGES = 300
"""Training images, at most, on which the ranges of activations are measured."""

QUANTISED_SCOPES = (
    "model.denoiser",
    *(f"model.memory_banks.{group}.products" for group in ("codec", "image", "enlarged", "fine")),
)
"""Modules that compute in integers: the denoiser, and the search for the nearest entry of a memory bank.

The difference from that entry is computed in floating point, and so are the features: in integers, their rounding error
would be as large as the difference that a small defect makes on a binary image.
"""


def compress(
    graph: "openvino.Model",
    compression: CompressionType,
    datamodule: AnomalibDataModule | None,
    metric: "Metric | None",
    max_drop: float,
    white_level: float | None = None,
) -> "openvino.Model":
    """Compress the weights of :data:`QUANTISED_SCOPES` (``INT8``), or compute in integers there.

    Args:
        graph: The graph to compress.
        compression: ``INT8``, ``INT8_PTQ`` or ``INT8_ACQ``.
        datamodule: Its training images determine the ranges of activations; its test images measure ``metric``. Not
            needed for ``INT8``.
        metric: What ``INT8_ACQ`` limits the loss of, by default the F1 score of the labels.
        max_drop: The largest loss allowed.
        white_level: Of the model, see :func:`decodiff_anomalib.data.read_image`.
    """
    import nncf

    nncf.set_log_level(logging.WARNING)  # below, it reports every node that it leaves alone
    scopes = "|".join(map(re.escape, QUANTISED_SCOPES))
    others = nncf.IgnoredScope(patterns=[rf"^(?!({scopes})[./]).*"], validate=False)
    if compression == CompressionType.INT8:
        return nncf.compress_weights(graph, ignored_scope=others)
    assert datamodule is not None
    set_up(datamodule)
    images = evenly_spaced(datamodule.train_data, RANGE_IMAGES, white_level)
    options = {
        "calibration_dataset": nncf.Dataset(images, lambda batch: batch.image.numpy()),
        "ignored_scope": others,
        "subset_size": len(images),
    }
    if compression == CompressionType.INT8_PTQ:
        return nncf.quantize(graph, **options)
    validation = evenly_spaced(datamodule.test_data, len(datamodule.test_data), white_level)
    return nncf.quantize_with_accuracy_control(
        graph,
        validation_dataset=nncf.Dataset(validation),
        validation_fn=lambda compiled, batches: _measure(compiled, batches, metric),
        max_drop=max_drop,
        **options,
    )


def _measure(compiled: "openvino.CompiledModel", batches: Iterable[Any], metric: "Metric | None") -> float:
    """Value of one of Anomalib's metrics on a graph's predictions; by default of the F1 score of the labels."""
    if metric is None:
        from anomalib.metrics import F1Score

        metric = F1Score(fields=["pred_label", "gt_label"])
    metric.reset()
    for batch in batches:
        outputs = named_outputs(compiled(batch.image.numpy()))
        predictions: dict[str, Any] = {name: torch.from_numpy(value) for name, value in outputs.items()}
        metric.update(ImageBatch(image=batch.image, gt_label=batch.gt_label, gt_mask=batch.gt_mask, **predictions))
    return float(metric.compute())
