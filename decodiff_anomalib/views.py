"""The views of one prediction: image, correction, map and mask, as pictures of any size."""

from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from decodiff_anomalib.image_io import read_image
from decodiff_anomalib.scale import AT_THRESHOLD, paint

IMAGE, CORRECTION, MAP, MASK = "image", "correction", "map", "mask"


def views(batch: ImageBatch, index: int, size: tuple[int, int], white_level: float | None) -> dict[str, Image.Image]:
    """The views that there are of an image of a batch, in the order in which they are shown.

    Args:
        batch: After post-processing.
        index: Of the image.
        size: Largest width and height. Views have the aspect ratio of the image file.
        white_level: Of the model, see :func:`decodiff_anomalib.image_io.read_image`.
    """
    image = _image(batch, index, white_level)
    scale = min(size[0] / image.width, size[1] / image.height)
    shown = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    found = {IMAGE: image}
    correction = _values(batch, "correction", index)
    if correction is not None:
        found[CORRECTION] = to_pil_image(torch.from_numpy(correction).clamp(0, 1))
    values = _values(batch, "anomaly_map", index)
    if values is not None:
        found[MAP] = paint(_plane(values), highest_raw(batch, index))
    mask = _values(batch, "gt_mask", index)
    if mask is not None:
        found[MASK] = Image.fromarray(_plane(mask) > 0).convert("L")
    return {
        name: view.resize(shown, Image.Resampling.NEAREST if name == MASK else Image.Resampling.LANCZOS).convert("RGB")
        for name, view in found.items()
    }


def label_threshold(model: object) -> float:
    """The normalised score above which a model's images are anomalous."""
    return 1 - getattr(getattr(model, "post_processor", None), "image_sensitivity", 1 - AT_THRESHOLD)


def highest_raw(batch: ImageBatch, index: int) -> float | None:
    """The highest value of a map that is raw because there are no thresholds; ``None`` if it is normalised."""
    if batch.pred_label is not None or batch.anomaly_map is None:
        return None
    values = batch.anomaly_map[index].float()
    return float(values.nan_to_num(0).max())


def _values(batch: ImageBatch, name: str, index: int) -> np.ndarray[Any, Any] | None:
    values = getattr(batch, name, None)
    return None if values is None else values[index].float().cpu().numpy()


def _plane(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A map ``(H, W)`` of ``(1, H, W)`` or ``(H, W)``; both sides may be 1."""
    return values.reshape(values.shape[-2:])


def _image(batch: ImageBatch, index: int, white_level: float | None) -> Image.Image:
    """The image upright and at full size from its file, or what the model was given."""
    try:
        if batch.image_path:
            return to_pil_image(read_image(batch.image_path[index], white_level))
    except ValueError:
        pass  # an image of a loader's own, whose path is but a name
    return to_pil_image((batch.image[index].float() / 2 + 0.5).clamp(0, 1).cpu())
