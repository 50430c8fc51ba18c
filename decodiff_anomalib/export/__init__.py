"""Export to PyTorch, ONNX and OpenVINO, with optional INT8: one graph from images to labels, compared with the model.

The graph takes images ``(B, 3, H, W)`` in [0, 1], of any number and size, and contains everything that tests and
predictions do: resizing, codec, category, correction, maps, score, thresholds. It differs from the model in two ways,
both exact up to rounding: images are resized by matrix products, because exporters drop the antialiasing, and
everything that does not depend on the images is computed in advance, see
:meth:`decodiff_anomalib.torch_model.DeCoDiffModel.folded`.

Files are written only after their outputs agreed with the model's; ``parity.json`` beside them states the differences.
The names below are imported on first use, because ``import anomalib.models`` imports this package.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "FURTHER_OUTPUTS": "pipeline",
    "INTERMEDIATE_OUTPUTS": "pipeline",
    "PREDICTIONS": "pipeline",
    "QUANTISED_SCOPES": "quantization",
    "TOLERANCES": "parity",
    "AntialiasedResize": "pipeline",
    "ExportMixin": "mixin",
    "ExportableModel": "pipeline",
    "ParityError": "parity",
    "ParityImages": "parity",
    "Pipeline": "pipeline",
    "Runtime": "parity",
    "check_parity": "parity",
    "export_pipeline": "pipeline",
    "exportable": "pipeline",
    "prediction_pipeline": "pipeline",
    "write_onnx": "writers",
    "write_openvino": "writers",
    "write_torch": "writers",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(_HOMES)}."
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
