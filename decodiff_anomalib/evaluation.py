"""The published figures and Anomalib's, for the same anomaly maps.

The two protocols differ in what they call a defect and in one figure:

==========  =========================================  ====================================
protocol    ``paper``                                  ``anomalib``
==========  =========================================  ====================================
mask        resized bicubically, cut, then ``> 0``:    ``> 0`` at full size, resized to the
            a 0/255 mask grows by its blurred rim      nearest pixel, cut
label       whether the cut mask holds a defect        whether the image is of a defective
                                                       part, cut away or not
AUPRO       200 thresholds, area up to the largest     every threshold, area up to a
            false-positive rate below 0.3              false-positive rate of 0.3
==========  =========================================  ====================================

The score of an image is the maximum of its map in both.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from PIL import Image
from scipy import ndimage
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Mask

from decodiff_anomalib.paper import CROP, RESIZE, Size, resize_and_crop

FIGURES = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")

AUPRO_THRESHOLDS = 200
AUPRO_LIMIT = 0.3


# ---------------------------------------------------------------- what counts as a defect


def paper_mask(mask: Image.Image, resize: Size = RESIZE, crop: Size = CROP) -> torch.Tensor:
    """Published mask, bool ``crop``: true wherever the bicubic filter leaves anything of the defect."""
    return torch.from_numpy(np.array(resize_and_crop(mask.convert("L"), resize, crop))) > 0


def anomalib_mask(mask: Image.Image, resize: Size = RESIZE, crop: Size = CROP) -> torch.Tensor:
    """Anomalib's mask, bool ``crop``: the defect at full size, resized to the nearest pixel and cut."""
    full = Mask(torch.from_numpy(np.array(mask.convert("L"))) > 0)
    return transforms.center_crop(transforms.resize(full, list(resize)), list(crop)).as_subclass(torch.Tensor)


# ---------------------------------------------------------------- the published figures


def paper_figures(maps: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Figures of one category, as published.

    Args:
        maps: Anomaly maps ``(N, H, W)``.
        masks: Bool ``(N, H, W)``, see :func:`paper_mask`.

    Returns:
        dict[str, float]: The :data:`FIGURES`, in [0, 1]; NaN where all images or pixels are of one kind.
    """
    maps, masks = maps.cpu().numpy(), masks.cpu().numpy()
    image = _ranking_figures(maps.max((1, 2)), masks.any((1, 2)))
    pixel = _ranking_figures(maps.ravel(), masks.ravel()) | {"aupro": _paper_aupro(maps, masks)}
    return {f"image_{name}": value for name, value in image.items()} | {
        f"pixel_{name}": value for name, value in pixel.items()
    }


def _ranking_figures(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve, step-wise average precision and best F1 of ``(N,)`` scores."""
    if positive.all() or not positive.any():
        return dict.fromkeys(("auroc", "ap", "f1max"), float("nan"))
    precision, recall, _ = precision_recall_curve(positive, scores)
    return {
        "auroc": float(roc_auc_score(positive, scores)),
        "ap": float(-np.sum(np.diff(recall) * precision[:-1])),
        "f1max": float(np.max(2 * precision * recall / (precision + recall + 1e-10))),
    }


def _paper_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """Area under the per-region overlap, over the false-positive rates below the limit.

    Pixels are binned by the thresholds they exceed, image by image: one pass, and no memory beyond one image's.
    """
    lowest, highest = maps.min(), maps.max()
    thresholds = lowest + np.arange(AUPRO_THRESHOLDS, dtype=maps.dtype) * ((highest - lowest) / AUPRO_THRESHOLDS)
    bins = AUPRO_THRESHOLDS + 1
    normal, covered, regions = np.zeros(bins), np.zeros(bins), 0
    for scores, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        exceeded = np.searchsorted(thresholds, scores, side="left")
        pixels = np.bincount((labels * bins + exceeded).ravel(), minlength=(count + 1) * bins).reshape(-1, bins)
        normal += pixels[0]
        covered += (pixels[1:] / pixels[1:].sum(1, keepdims=True)).sum(0)
        regions += count
    # A pixel that exceeds k thresholds is found at the first k of them.
    found_normal, found_covered = (counts[::-1].cumsum()[::-1][1:] for counts in (normal, covered))
    false_positive_rate = found_normal / max(1, normal.sum())
    kept = false_positive_rate < AUPRO_LIMIT
    if not regions or not false_positive_rate[kept].any():
        return float("nan")
    false_positive_rate, overlap = false_positive_rate[kept], found_covered[kept] / regions
    # Divided by the largest kept rate, which may lie well below the limit; the piece left of the smallest is not added.
    return float(auc(false_positive_rate / false_positive_rate.max(), overlap))


# ---------------------------------------------------------------- Anomalib's figures


def anomalib_figures(maps: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Figures of one category by Anomalib's metric classes.

    Args:
        maps: Anomaly maps ``(N, H, W)``, in [0, 1] (others are squashed by Anomalib, which may tie them).
        masks: Bool ``(N, H, W)``, see :func:`anomalib_mask`.
        labels: Bool ``(N,)``, whether an image is of a defective part.

    Returns:
        dict[str, float]: The :data:`FIGURES`, in [0, 1].
    """
    batch = SimpleNamespace(anomaly_map=maps, gt_mask=masks.int(), pred_score=maps.amax((1, 2)), gt_label=labels.int())
    image, pixel = ("pred_score", "gt_label"), ("anomaly_map", "gt_mask")
    kinds = {"auroc": AUROC, "ap": AUPR, "f1max": F1Max, "aupro": AUPRO}
    figures = {}
    for figure in FIGURES:
        level, name = figure.split("_")
        metric = kinds[name](fields=image if level == "image" else pixel)
        metric.update(batch)
        figures[figure] = float(metric.compute())
    return figures


# ---------------------------------------------------------------- side by side


def compare_protocols(
    maps: torch.Tensor,
    mask_paths: Sequence[str | Path | None],
    categories: Sequence[str],
    resize: Size | None = None,
) -> pd.DataFrame:
    """Measure the same anomaly maps by both protocols, category by category.

    Args:
        maps: Anomaly maps ``(N, H, W)``.
        mask_paths: The mask of each image; ``None`` for a normal one.
        categories: The category of each image.
        resize: What each image was resized to before the maps' ``(H, W)`` was cut out of its centre. Defaults to
            ``(H, W)``: nothing was cut.

    Returns:
        pd.DataFrame: The :data:`FIGURES` as columns, a row for each (category, protocol), and two for the mean over
        categories.

    Raises:
        ValueError: If there is not one mask path and one category for each map.
    """
    if not len(maps) == len(mask_paths) == len(categories):
        msg = (
            f"{len(maps)} maps, {len(mask_paths)} mask paths and {len(categories)} categories do not match; "
            "give one of each for every image, None as the mask path of a normal one."
        )
        raise ValueError(msg)
    size = tuple(maps.shape[-2:])
    rows = {}
    for category in dict.fromkeys(categories):
        chosen = [index for index, name in enumerate(categories) if name == category]
        paths = [mask_paths[index] for index in chosen]
        of_category, labels = maps[chosen].cpu(), torch.tensor([path is not None for path in paths])
        published, ours = torch.zeros(2, *of_category.shape, dtype=torch.bool)
        for index, path in enumerate(paths):
            if path is not None:
                with Image.open(path) as mask:
                    published[index] = paper_mask(mask, resize or size, size)
                    ours[index] = anomalib_mask(mask, resize or size, size)
        rows[category, "paper"] = paper_figures(of_category, published)
        rows[category, "anomalib"] = anomalib_figures(of_category, ours, labels)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(FIGURES))
    table.index = pd.MultiIndex.from_tuples(table.index, names=["category", "protocol"])
    mean = pd.concat({"mean": table.groupby("protocol", sort=False).mean()}, names=["category"])
    return pd.concat([table, mean])
