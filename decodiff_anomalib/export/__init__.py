"""Export to PyTorch, ONNX and OpenVINO, with optional INT8: one graph from images to labels, compared with the model.

The graph takes images ``(B, 3, H, W)`` in [0, 1], of any number and size, and contains everything that tests and
predictions do: resizing, codec, category, correction, maps, score, thresholds. It differs from the model in two ways,
both exact up to rounding: images are resized by matrix products, because exporters drop the antialiasing, and
everything that does not depend on the images is computed in advance, see
:meth:`decodiff_anomalib.torch_model.DeCoDiffModel.folded`.

Files are written only after their outputs agreed with the model's; ``parity.json`` beside them states the differences.
"""

from decodiff_anomalib.export.mixin import ExportMixin
from decodiff_anomalib.export.parity import TOLERANCES, ParityError, ParityImages, Runtime, check_parity
from decodiff_anomalib.export.pipeline import (
    FURTHER_OUTPUTS,
    INTERMEDIATE_OUTPUTS,
    PREDICTIONS,
    AntialiasedResize,
    ExportableModel,
    Pipeline,
    export_pipeline,
    exportable,
    prediction_pipeline,
)
from decodiff_anomalib.export.quantization import QUANTISED_SCOPES
from decodiff_anomalib.export.writers import write_onnx, write_openvino, write_torch

__all__ = [
    "FURTHER_OUTPUTS",
    "INTERMEDIATE_OUTPUTS",
    "PREDICTIONS",
    "QUANTISED_SCOPES",
    "TOLERANCES",
    "AntialiasedResize",
    "ExportMixin",
    "ExportableModel",
    "ParityError",
    "ParityImages",
    "Pipeline",
    "Runtime",
    "check_parity",
    "export_pipeline",
    "exportable",
    "prediction_pipeline",
    "write_onnx",
    "write_openvino",
    "write_torch",
]
