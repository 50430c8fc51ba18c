"""The paper's protocol, Anomalib's protocol, and both for the same anomaly maps.

They differ in which pixels and images are anomalous, and in the AUPRO:

==========  =========================================  ====================================
protocol    ``paper``                                  ``anomalib``
==========  =========================================  ====================================
mask        bicubic resize, crop, then ``> 0``:        ``> 0`` at full size, nearest-pixel
            a 0/255 mask grows by its blurred edge     resize, crop
label       whether the cropped mask has an            whether the image shows a defective
            anomalous pixel                            part, even if the crop removes it
AUPRO       200 thresholds, area up to the largest     every threshold, area up to a
            false-positive rate below 0.3              false-positive rate of 0.3
==========  =========================================  ====================================

The score of an image is the maximum of its map in both.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from PIL import Image
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Mask
from tqdm import tqdm

from decodiff_anomalib.evaluation.aupro import paper_aupro
from decodiff_anomalib.evaluation.metrics import METRICS, name_by_scope, ranking_metrics, tally
from decodiff_anomalib.paper import CROP, RESIZE, Size, resize_and_crop


def paper_mask(mask: Image.Image, resize: Size = RESIZE, crop: Size = CROP) -> torch.Tensor:
    """Mask as in the authors' program, bool ``crop``: true wherever the bicubic filter leaves a value above 0."""
    return torch.from_numpy(np.array(resize_and_crop(mask.convert("L"), resize, crop))) > 0


def anomalib_mask(mask: Image.Image, resize: Size = RESIZE, crop: Size = CROP) -> torch.Tensor:
    """Mask as in Anomalib, bool ``crop``: binary at full size, then resized to the nearest pixel and cropped."""
    full = Mask(torch.from_numpy(np.array(mask.convert("L"))) > 0)
    return transforms.center_crop(transforms.resize(full, list(resize)), list(crop)).as_subclass(torch.Tensor)


def paper_metrics(maps: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Metrics of one category, as in the authors' program.

    Args:
        maps: Anomaly maps ``(N, H, W)``.
        masks: Bool ``(N, H, W)``, see :func:`paper_mask`.

    Returns:
        dict[str, float]: The :data:`METRICS`, in [0, 1]; NaN if no images or pixels are normal, or none anomalous.
    """
    scores, anomalous = maps.cpu().numpy(), masks.cpu().numpy()
    image = ranking_metrics(*tally(scores.max((1, 2)), anomalous.max((1, 2))))
    pixel = ranking_metrics(*tally(scores.ravel(), anomalous.ravel())) | {"aupro": paper_aupro(scores, anomalous)}
    return name_by_scope(image, pixel)


def anomalib_metrics(maps: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Metrics of one category by Anomalib's classes.

    Args:
        maps: Anomaly maps ``(N, H, W)``, in [0, 1]. Anomalib applies a sigmoid to others, which may make scores equal.
        masks: Bool ``(N, H, W)``, see :func:`anomalib_mask`.
        labels: Bool ``(N,)``, whether an image shows a defective part.

    Returns:
        dict[str, float]: The :data:`METRICS`, in [0, 1].
    """
    batch = SimpleNamespace(anomaly_map=maps, gt_mask=masks.int(), pred_score=maps.amax((1, 2)), gt_label=labels.int())
    fields = {"image": ("pred_score", "gt_label"), "pixel": ("anomaly_map", "gt_mask")}
    classes: dict[str, Any] = {"auroc": AUROC, "ap": AUPR, "f1max": F1Max, "aupro": AUPRO}
    values = {}
    for name in METRICS:
        scope, kind = name.split("_")
        metric = classes[kind](fields=fields[scope])
        metric.update(batch)
        values[name] = float(metric.compute())
    return values


def compare_protocols(
    maps: torch.Tensor,
    mask_paths: Sequence[str | Path | None],
    categories: Sequence[str],
    resize: Size | None = None,
) -> pd.DataFrame:
    """Compute the metrics of the same anomaly maps by both protocols, for each category.

    Args:
        maps: Anomaly maps ``(N, H, W)``.
        mask_paths: The mask of each image; ``None`` for a normal one.
        categories: The category of each image.
        resize: Size of the images before the centre crop to the maps' ``(H, W)``. Defaults to ``(H, W)``: no crop.

    Returns:
        pd.DataFrame: The :data:`METRICS` as columns, a row for each (category, protocol), and two for the mean over
        categories.

    Raises:
        ValueError: If the numbers of maps, mask paths and categories differ.
    """
    if not len(maps) == len(mask_paths) == len(categories):
        msg = (
            f"{len(maps)} maps, {len(mask_paths)} mask paths and {len(categories)} categories do not match; "
            "give one of each for every image, None as the mask path of a normal one."
        )
        raise ValueError(msg)
    height, width = maps.shape[-2:]
    size = (height, width)
    rows = {}
    for category in tqdm(dict.fromkeys(categories), desc="Metrics", unit=" categories", disable=None, leave=False):
        chosen = [index for index, name in enumerate(categories) if name == category]
        paths = [mask_paths[index] for index in chosen]
        category_maps, labels = maps[chosen].cpu(), torch.tensor([path is not None for path in paths])
        paper_masks, anomalib_masks = torch.zeros(2, *category_maps.shape, dtype=torch.bool)
        for index, path in enumerate(paths):
            if path is not None:
                with Image.open(path) as mask:
                    paper_masks[index] = paper_mask(mask, resize or size, size)
                    anomalib_masks[index] = anomalib_mask(mask, resize or size, size)
        rows[category, "paper"] = paper_metrics(category_maps, paper_masks)
        rows[category, "anomalib"] = anomalib_metrics(category_maps, anomalib_masks, labels)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(METRICS))
    table.index = pd.MultiIndex.from_tuples(table.index, names=["category", "protocol"])
    mean = pd.concat({"mean": table.groupby("protocol", sort=False).mean()}, names=["category"])
    return pd.concat([table, mean])
