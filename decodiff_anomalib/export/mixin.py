"""Anomalib's export methods, for a Lightning model to inherit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from anomalib import TaskType
    from anomalib.data import AnomalibDataModule, InferenceBatch
    from anomalib.deploy.export import CompressionType
    from torchmetrics import Metric

    from decodiff_anomalib.export.pipeline import ExportableModel


class ExportMixin:
    """Inference and exports with one graph; replaces Anomalib's methods in an :class:`ExportableModel`."""

    def forward(self: ExportableModel, batch: torch.Tensor, *args, **kwargs) -> InferenceBatch:
        """Predictions on images ``(B, 3, H, W)`` in [0, 1], as in tests; Anomalib's method drops the antialiasing.

        Maps are of the working size. Without thresholds, scores and maps are raw and there are no labels.
        """
        del args, kwargs
        from decodiff_anomalib.export.pipeline import prediction_pipeline

        return prediction_pipeline(self)(batch)

    def to_torch(self: ExportableModel, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Write ``weights/torch/<name>.pt`` for Anomalib's ``TorchInferencer``.

        The file is a pickle, the only kind that ``TorchInferencer`` reads. Loading it needs this package and can run
        any code, which is why ``TRUST_REMOTE_CODE=1`` must be set: load only files that you wrote yourself. ONNX and
        OpenVINO files, and checkpoints (``DeCoDiff.load_from_checkpoint``), are read without running code.

        Args:
            export_root: Folder for ``weights/torch``.
            model_file_name: The file's name.

        Raises:
            OSError: If the folder cannot be written to.
            ParityError: If the file's outputs differ from the model's; it is not written then.
        """
        from decodiff_anomalib.export.writers import write_torch

        self.check_category()
        return write_torch(self, export_root, model_file_name)

    def to_onnx(
        self: ExportableModel,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *,
        datamodule: AnomalibDataModule | None = None,
        output_names: Sequence[str] | None = None,
        **kwargs,
    ) -> Path:
        """Write ``weights/onnx/<name>.onnx``, verified with ONNX Runtime, and ``parity.json`` with the differences.

        Through ``engine.export`` or the command line, arguments after ``input_size`` go into ``onnx_kwargs``.

        Args:
            export_root: Folder for ``weights/onnx``.
            model_file_name: The file's name.
            input_size: Fixes height and width; by default, the graph takes images of any size.
            datamodule: The file is verified on its test images, without one on drawn images.
            output_names: Of ``pred_score``, ``pred_label``, ``anomaly_map``, ``pred_mask`` (these by default),
                ``correction`` ``(B, 3, H, W)`` about [-1, 1], ``category_index`` and ``ood_score``. Anomalib's
                inferencers cannot read a file with one of the latter three.
            kwargs: For ``torch.onnx.export``.

        Raises:
            ModuleNotFoundError: If the extra ``openvino`` is not installed.
            OSError: If the folder cannot be written to.
            ParityError: If the file's outputs differ from the model's; it is not written then.
            ValueError: If an output is unknown.
        """
        from decodiff_anomalib.export.writers import write_onnx

        self.check_category()
        return write_onnx(self, export_root, model_file_name, input_size, datamodule, output_names, **kwargs)

    def to_openvino(
        self: ExportableModel,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write ``weights/openvino/<name>.xml`` and ``.bin``, and ``parity.json`` with the differences.

        ``category_index`` and ``ood_score`` are in the graph as named tensors: after ``read_model``, ``add_outputs``
        makes them outputs. ``correction`` is computed only where ``output_names`` in ``onnx_kwargs`` has it, and
        Anomalib's inferencer cannot read such a file.

        Args:
            export_root: Folder for ``weights/openvino``.
            model_file_name: The files' name.
            input_size: Fixes height and width; by default, the graph takes images of any size.
            compression_type: ``FP16`` and ``INT8`` store smaller weights and compute as before; ``INT8_PTQ`` computes
                the denoiser and the search in the memory banks in integers, ``INT8_ACQ`` as much of them as lowers
                ``metric`` by no more than ``max_drop``.
            datamodule: The files are verified, and ``metric`` is measured, on its test images; the ranges of integers
                are measured on its training images, which are normal and of all categories.
            metric: One of Anomalib's, by default the F1 score of the labels.
            task: Not used; as in Anomalib.
            max_drop: Largest loss of ``metric``.
            ov_kwargs: For ``openvino.convert_model``.
            onnx_kwargs: As the further arguments of :meth:`to_onnx`.

        Raises:
            ModuleNotFoundError: If the extra ``openvino`` is not installed.
            OSError: If the folder cannot be written to.
            ParityError: If the files' maps or scores differ from the model's by more than 1e-3, or 0.1 with ``FP16``;
                they are not written then. With integers, the difference is measured only.
            ValueError: If ``INT8_PTQ`` or ``INT8_ACQ`` has no datamodule, or an output is unknown.
        """
        del task
        from decodiff_anomalib.export.writers import write_openvino

        self.check_category()
        return write_openvino(
            self,
            export_root,
            model_file_name,
            input_size,
            compression_type,
            datamodule,
            metric,
            max_drop,
            ov_kwargs,
            onnx_kwargs,
        )
