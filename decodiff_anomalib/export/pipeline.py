"""The one graph from images to predictions, and the antialiased resize that exporters understand."""

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from anomalib.data import InferenceBatch
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Compose, Resize, Transform

from decodiff_anomalib.conditioning import GIVEN

if TYPE_CHECKING:
    from decodiff_anomalib.torch_model import DeCoDiffModel

logger = logging.getLogger(__name__)

PREDICTIONS = InferenceBatch._fields
"""The outputs that Anomalib's inferencers read."""

FURTHER_OUTPUTS = ("correction", "category_index", "ood_score")
"""The other outputs of the graph, see :class:`decodiff_anomalib.torch_model.ModelOutput`."""

INTERMEDIATE_OUTPUTS = ("category_index", "ood_score")
"""Those of :data:`FURTHER_OUTPUTS` that the predictions depend on; ``correction`` is computed only on request."""


class ExportableModel(Protocol):
    """What exports need of a Lightning model."""

    category: str
    categories: tuple[str, ...]
    white_level: float | None

    @property
    def pre_processor(self) -> nn.Module | None:
        """Images ``(B, 3, H, W)`` in [0, 1] to the input of ``model``."""

    @property
    def model(self) -> "DeCoDiffModel":
        """The torch model."""

    @property
    def post_processor(self) -> nn.Module | None:
        """Raw to normalised and labelled predictions."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Working height and width; ``None`` where the pre-processor does not resize."""

    def check_category(self) -> None:
        """Raise ``ValueError`` where the model cannot determine the category of images."""


class AntialiasedResize(nn.Module):
    """Bilinear resizing with antialiasing, equal to torch's, as two matrix products that any exporter understands.

    Each row of a matrix is the triangle filter of one target pixel. Distances are computed in integers, so that the
    weights are exact for any size; between equal sizes the matrix is the identity.

    Args:
        size: Height and width to resize to.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.height, self.width = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize ``images`` ``(B, 3, H, W)`` to ``(B, 3, height, width)``."""
        rows = _triangle_weights(images.shape[-2], self.height, images.device)
        columns = _triangle_weights(images.shape[-1], self.width, images.device)
        return rows @ images @ columns.T


def _triangle_weights(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Weights ``(target, source)``; they are symbolic where ``source`` is."""
    length = torch.full((), source, device=device)
    centers = (2 * torch.arange(target, device=device) + 1)[:, None] * length  # in units of 1 / (2 target) pixels
    distances = ((2 * torch.arange(source, device=device) + 1) * target - centers).abs()
    weights = (1 - distances / (2 * length.clamp_min(target))).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def exportable(transform: Transform | None) -> nn.Module | None:
    """A version of ``transform`` that exporters understand and that keeps the antialiasing; Anomalib's drops it."""
    if isinstance(transform, Compose):
        return Compose([exportable(part) for part in transform.transforms])
    if (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation in {"bilinear", InterpolationMode.BILINEAR}
        and len(transform.size) == 2
    ):
        return AntialiasedResize(transform.size)
    return get_exportable_transform(transform)


class Pipeline(nn.Module):
    """From images to predictions, as one module.

    Args:
        pre_processor: Images in [0, 1] to the input of ``model``; ``None`` passes them on.
        model: The torch model.
        post_processor: Normalises and labels; with ``None``, scores and maps stay raw and there are no labels.
    """

    def __init__(self, pre_processor: nn.Module | None, model: nn.Module, post_processor: nn.Module | None) -> None:
        super().__init__()
        self.pre_processor = pre_processor
        self.model = model
        self.post_processor = post_processor

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Predictions on ``images`` ``(B, 3, H, W)`` in [0, 1]; maps are of the working size."""
        outputs = self.outputs(images)
        return InferenceBatch(**{name: outputs.get(name) for name in PREDICTIONS})

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All available :data:`PREDICTIONS` and :data:`FURTHER_OUTPUTS` by name."""
        output = self.model(self.pre_processor(images) if self.pre_processor else images)
        processed = self.post_processor(output) if self.post_processor else output
        predictions = {name: getattr(processed, name, None) for name in PREDICTIONS}
        further = {name: getattr(output, name) for name in FURTHER_OUTPUTS}
        return {name: value for name, value in {**predictions, **further}.items() if value is not None}


class SelectedOutputs(Pipeline):
    """A pipeline that returns a tuple of chosen outputs.

    Args:
        pipeline: The pipeline whose modules to share.
        names: The outputs, in this order.
    """

    def __init__(self, pipeline: Pipeline, names: Sequence[str]) -> None:
        super().__init__(pipeline.pre_processor, pipeline.model, pipeline.post_processor)
        self.names = names

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The chosen outputs on ``images`` ``(B, 3, H, W)`` in [0, 1]."""
        outputs = self.outputs(images)
        return tuple(outputs[name] for name in self.names)


def prediction_pipeline(model: ExportableModel) -> Pipeline:
    """The model as tests and predictions use it, with antialiasing; shares the model's modules."""
    has_thresholds = getattr(model.post_processor, "has_thresholds", True)
    return Pipeline(
        getattr(model.pre_processor, "transform", None) or model.pre_processor,
        model.model,
        model.post_processor if has_thresholds else None,
    )


def export_pipeline(model: ExportableModel) -> Pipeline:
    """The graph to export: a copy of the model for inference only, on the CPU."""
    source = prediction_pipeline(model)
    if model.post_processor is not None and source.post_processor is None:
        logger.warning(
            "The model has no thresholds, since it was not validated on normal images: the export gives raw scores and "
            "maps and no labels. `engine.validate(model, datamodule)` before `engine.export(model, ...)` sets them."
        )
    if model.category == GIVEN:
        logger.warning(
            "An exported graph takes images only: it infers their category, although the model has category='given'."
        )
    pre_processor = source.pre_processor
    pre_processor = exportable(pre_processor) if isinstance(pre_processor, Transform) else copy.deepcopy(pre_processor)
    exported = Pipeline(pre_processor, model.model.folded(), copy.deepcopy(source.post_processor))
    return exported.cpu().eval().requires_grad_(requires_grad=False)
