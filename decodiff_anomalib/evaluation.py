"""The published figures, Anomalib's for the same anomaly maps, and a report by category of whichever model is tested.

``MultiCategory`` adds the report, :class:`CategoryReport`, to every test. It follows Anomalib's protocol.

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

The score of an image is the maximum of its map in both; the report takes the score the model gave.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from scipy import ndimage
from scipy.integrate import trapezoid
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Mask

from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.paper import CROP, RESIZE, Size, resize_and_crop

FIGURES = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
COUNTS = ("normal", "defective")
RATES = ("false_alarm_rate", "detection_rate")
LOWER_IS_BETTER = ("false_alarm_rate", "unknown")
HEADINGS = {
    "normal": ("images", "normal"),
    "defective": ("images", "defective"),
    **{figure: tuple(figure.split("_")) for figure in FIGURES},
    "false_alarm_rate": ("alarms", "normal"),
    "detection_rate": ("alarms", "defective"),
    "routed": ("category", "right"),
    "unknown": ("category", "unknown"),
}
"""Column of the table to its two lines of heading where it is printed."""

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
    image = _ranking_figures(*_tally(maps.max((1, 2)), masks.any((1, 2))))
    pixel = _ranking_figures(*_tally(maps.ravel(), masks.ravel())) | {"aupro": _paper_aupro(maps, masks)}
    return _by_level(image, pixel)


def _by_level(image: dict[str, float], pixel: dict[str, float]) -> dict[str, float]:
    return {f"image_{name}": value for name, value in image.items()} | {
        f"pixel_{name}": value for name, value in pixel.items()
    }


def _tally(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of ``(N,)`` scores are negative and positive at each distinct score, from the lowest."""
    distinct, position = np.unique(scores, return_inverse=True)
    negative, positive = (np.bincount(position[kind], minlength=len(distinct)) for kind in (~positive, positive))
    return (np.nan * negative if np.isnan(distinct).any() else negative), positive


def _ranking_figures(negative: np.ndarray, positive: np.ndarray, tied: np.ndarray | bool = True) -> dict[str, float]:
    """Area under the ROC curve, average precision and best F1.

    Args:
        negative: How many of each score ``(S,)``, from the lowest; NaN makes all figures NaN.
        positive: The same.
        tied: Whether they have one score, which is a step of the average precision. Others are close but distinct: they
            count as ranked at random.

    Returns:
        dict[str, float]: ``auroc``, ``ap`` and ``f1max``; NaN where there is only one kind.
    """
    if not (negative.sum() > 0 and positive.sum() > 0):
        return dict.fromkeys(("auroc", "ap", "f1max"), float("nan"))
    negative, positive, tied = (counts[::-1] for counts in np.broadcast_arrays(negative, positive, tied))
    here, found = negative + positive, positive.cumsum()
    ranked = here.cumsum()
    precision, recall = found / ranked, found / found[-1]
    # Ranked at random, the k-th positive of p among h scores comes near the place k/p · h. The mean of the precision
    # over these places is an integral of (a + t p) / (b + t h), where half a score keeps whole counts off its ends.
    found_above, ranked_above = found - positive + 0.5, ranked - here + 0.5
    density, above = positive / here, found_above / ranked_above
    spread = density + (above - density) * np.log1p(here / ranked_above) * ranked_above / here
    return {
        "auroc": float(trapezoid(np.append(0, recall), np.append(0, negative.cumsum() / negative.sum()))),
        "ap": float((positive * np.where(tied, precision, spread)).sum() / found[-1]),
        "f1max": float(np.max(2 * found / (ranked + found[-1]))),
    }


def _region_shares(mask: np.ndarray) -> np.ndarray:
    """What part of its region each anomalous pixel of ``(H, W)`` is; touching corners join a region, as in Anomalib."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    labels = labels[mask]
    return 1 / np.bincount(labels)[labels]


def _paper_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """Area under the per-region overlap, over the false-positive rates below the limit.

    Pixels are binned by the thresholds they exceed, image by image: one pass, and no memory beyond one image's.
    """
    lowest, highest = maps.min(), maps.max()
    thresholds = lowest + np.arange(AUPRO_THRESHOLDS, dtype=maps.dtype) * ((highest - lowest) / AUPRO_THRESHOLDS)
    bins = AUPRO_THRESHOLDS + 1
    normal, covered = np.zeros(bins), np.zeros(bins)
    for scores, mask in zip(maps, masks, strict=True):
        exceeded = np.searchsorted(thresholds, scores, side="left")
        normal += np.bincount(exceeded[~mask], minlength=bins)
        covered += np.bincount(exceeded[mask], weights=_region_shares(mask), minlength=bins)
    # A pixel that exceeds k thresholds is found at the first k of them.
    found_normal, found_covered = (counts[::-1].cumsum()[::-1][1:] for counts in (normal, covered))
    false_positive_rate = found_normal / max(1, normal.sum())
    kept = false_positive_rate < AUPRO_LIMIT
    if not covered.any() or not false_positive_rate[kept].any():
        return float("nan")
    false_positive_rate, overlap = false_positive_rate[kept], found_covered[kept] / covered.sum()
    # Divided by the largest kept rate, which may lie well below the limit; the piece left of the smallest is not added.
    return float(trapezoid(overlap[::-1], false_positive_rate[::-1] / false_positive_rate.max()))


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


# ---------------------------------------------------------------- by category, in bounded memory

MAX_RUNS = 2**17

IMAGE_COLUMNS = ("score", "defective", "alarm", "routed", "unknown")
RUN_COLUMNS = ("lowest", "highest", "normal", "anomalous", "regions")
"""Of a run of scores: its ends, its pixels of either kind, and the anomalous ones as parts of their regions."""


class CategoryFigures(Metric):
    """Figures of one category, over every image and every pixel of its maps, in bounded memory.

    Image scores are kept, at 40 bytes each. Pixels are counted in runs of neighbouring scores. There is a run for each
    distinct score, and the figures are exact, as long as :data:`MAX_RUNS` suffice; then scores that agree in all but
    the last bits share one, and a further bit goes whenever they do not fit. This takes 5 to 11 MB however many images
    there are, and which scores share a run does not depend on the images' order, batches or processes.

    Definitions are Anomalib's: the AUPRO is the area up to a false-positive rate of 0.3, interpolated there and divided
    by it, over 8-connected regions.

    Args:
        category: Which images of a batch to count.
    """

    full_state_update = False

    def __init__(self, category: str) -> None:
        super().__init__()
        self.category = category
        # Flat, because torchmetrics lets a process that had no images send an empty vector.
        self.images: list[torch.Tensor]
        self.runs: list[torch.Tensor]
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("runs", default=[], dist_reduce_fx="cat")
        self.set_dtype(torch.float64)

    def update(self, batch: ImageBatch) -> None:
        """Count the images of this category.

        Args:
            batch: With ``category``, ``pred_score``, ``gt_label`` and, for what they serve, ``pred_label``,
                ``pred_category``, ``anomaly_map`` and ``gt_mask`` ``(B, H, W)``. One without categories or labels is
                left out, one without maps or masks counts in the figures of images only.
        """
        if getattr(batch, "category", None) is None or batch.gt_label is None:
            return
        own = [index for index, name in enumerate(batch.category) if name == self.category]
        named = getattr(batch, "pred_category", None)
        routed = None if named is None else torch.tensor([name == self.category for name in named])
        unknown = None if named is None else torch.tensor([name == UNKNOWN for name in named])
        columns = (batch.pred_score, batch.gt_label, batch.pred_label, routed, unknown)
        absent = torch.full((len(own),), float("nan"))
        chosen = [absent if values is None else values.flatten()[own].cpu() for values in columns]
        self.images.append(torch.stack(chosen, dim=1).double().flatten())
        if batch.anomaly_map is not None and batch.gt_mask is not None:
            for index in own:
                self._count(batch.anomaly_map[index].float().cpu().numpy(), batch.gt_mask[index].cpu().numpy() > 0)

    def _count(self, scores: np.ndarray, mask: np.ndarray) -> None:
        """Add the pixels of an image."""
        normal, count = np.unique(scores[~mask], return_counts=True)
        anomalous, shares = scores[mask], _region_shares(mask)
        runs = np.zeros((len(normal) + len(anomalous), len(RUN_COLUMNS)))
        runs[:, :2] = np.append(normal, anomalous)[:, None]
        runs[: len(normal), 2] = count
        runs[len(normal) :, 3:] = np.stack([np.ones_like(shares), shares], axis=1)
        if np.isnan(scores).any():
            runs[:, 2:] = np.nan
        self.runs.append(torch.from_numpy(runs).flatten())
        if sum(map(len, self.runs)) > 2 * MAX_RUNS * len(RUN_COLUMNS):
            self.runs = [torch.from_numpy(_join_runs(_rows(self.runs, RUN_COLUMNS))).flatten()]

    def compute(self) -> dict[str, float]:
        """Figures of all images so far, of all processes.

        Returns:
            dict[str, float]: Numbers of ``normal`` and ``defective`` images, the :data:`FIGURES`, the share of normal
            and of defective images with ``pred_label`` (:data:`RATES`), and of all images those whose
            ``pred_category`` is theirs (``routed``) or ``unknown``. NaN where there is nothing to tell from, or where a
            score is not a number.
        """
        images = pd.DataFrame(_rows(self.images, IMAGE_COLUMNS), columns=list(IMAGE_COLUMNS))
        lowest, highest, normal, anomalous, regions = _join_runs(_rows(self.runs, RUN_COLUMNS)).T
        image = _ranking_figures(*_tally(images.score.to_numpy(), images.defective.to_numpy() > 0))
        pixel = _ranking_figures(normal, anomalous, lowest == highest) | {"aupro": _aupro(normal, regions)}
        sound, defective = (images[images.defective == label] for label in (0, 1))
        return {
            "normal": len(sound),
            "defective": len(defective),
            **_by_level(image, pixel),
            **dict(zip(RATES, (float(sound.alarm.mean()), float(defective.alarm.mean())), strict=True)),
            "routed": float(images.routed.mean()),
            "unknown": float(images.unknown.mean()),
        }

    def precision_recall(self, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """Precision of the pixels over their recall, of all images so far, of all processes.

        Args:
            points: At most so many points of the curve, evenly spread over the recall.

        Returns:
            tuple[np.ndarray, np.ndarray]: Recall, rising, and precision, both ``(P,)``; empty where there is nothing to
            tell from, or where a score is not a number.
        """
        with self.sync_context():
            _, _, normal, anomalous, _ = _join_runs(_rows(self.runs, RUN_COLUMNS)).T
        if not (normal.sum() > 0 and anomalous.sum() > 0):
            return np.empty(0), np.empty(0)
        found, ranked = (counts[::-1].cumsum() for counts in (anomalous, normal + anomalous))
        recall = found / found[-1]
        kept = np.unique(np.searchsorted(recall, np.linspace(0, 1, points)))
        return recall[kept], (found / ranked)[kept]


def _rows(state: list[torch.Tensor] | torch.Tensor, columns: Sequence[str]) -> np.ndarray:
    """A flat state as ``(N, columns)``."""
    flat = dim_zero_cat(state) if len(state) else torch.zeros(0, dtype=torch.float64)
    return flat.cpu().numpy().reshape(-1, len(columns))


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Whole numbers ``(N,)`` in the order of float32 scores, close together where floats are: at 0, and here at 1 too.

    Anomalib's maps lie between 0 and 1 and crowd at both ends. ``1 - score`` is exact from 0.5 on.
    """

    def rank(floats: np.ndarray) -> np.ndarray:
        bits = floats.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    scores, half = scores.astype(np.float32), np.float32(0.5)
    return np.where(scores < half, rank(scores), 2 * rank(half) - rank(1 - scores))


def _join_runs(runs: np.ndarray) -> np.ndarray:
    """Sort runs ``(N, 5)`` and join those that agree in the most bits of their scores which leave enough room.

    The result depends on the scores alone, not on what was joined before: how many bits were dropped then shows in the
    widest run, and they stay dropped.
    """
    lowest, highest = _ranks(runs[:, 0]), _ranks(runs[:, 1])
    dropped = int(np.max(lowest ^ highest, initial=0)).bit_length()
    order = np.argsort(lowest, kind="stable")
    runs, lowest = runs[order], lowest[order]

    def first_of_each() -> np.ndarray:
        kept = lowest >> dropped
        return np.flatnonzero(np.diff(kept, prepend=kept[:1] - 1))

    while len(first := first_of_each()) > MAX_RUNS:
        dropped += 1
    highest, counts = np.maximum.reduceat(runs[:, 1], first), np.add.reduceat(runs[:, 2:], first)
    return np.column_stack([runs[first, 0], highest, counts])


def _aupro(normal: np.ndarray, regions: np.ndarray) -> float:
    """Anomalib's area under the per-region overlap.

    Args:
        normal: Normal pixels at each score ``(S,)``, from the lowest.
        regions: Anomalous pixels there, each as the part of its region that it is.
    """
    if not (normal.sum() > 0 and regions.sum() > 0):
        return float("nan")
    rate, overlap = (np.append(0, counts[::-1].cumsum() / counts.sum()) for counts in (normal, regions))
    kept = rate <= AUPRO_LIMIT
    at_limit = np.interp(AUPRO_LIMIT, rate, overlap)
    return float(trapezoid(np.append(overlap[kept], at_limit), np.append(rate[kept], AUPRO_LIMIT)) / AUPRO_LIMIT)


# ---------------------------------------------------------------- the report


def category_table(figures: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Set the figures of several categories side by side.

    Args:
        figures: Category to what :meth:`CategoryFigures.compute` gives.

    Returns:
        pd.DataFrame: A row for each category that had images, then ``mean`` and ``worst`` of them, which leave out NaN.
        ``routed`` and ``unknown`` are columns if the model said which category it took an image for.
    """
    table = pd.DataFrame.from_dict(figures, orient="index")
    table = table[table.normal + table.defective > 0]
    table = table.drop(columns=[name for name in ("routed", "unknown") if table[name].isna().all()])
    rates = table.drop(columns=list(COUNTS))
    worst = rates.min().where(~rates.columns.isin(LOWER_IS_BETTER), rates.max())
    # As objects, counts stay whole above the summaries, which have none.
    table = pd.concat(
        [table.astype(dict.fromkeys(COUNTS, object)), pd.DataFrame({"mean": rates.mean(), "worst": worst}).T]
    )
    return table.rename_axis("category")


class CategoryReport(Callback):
    """Ends a test with the figures of each category, their mean and the worst, for any of Anomalib's models.

    The table is the last thing printed and goes to ``categories.csv`` and ``categories.json`` in the folder of the run.
    The trainer's loggers get ``CATEGORY/FIGURE``; ``mean/FIGURE`` and ``worst/FIGURE`` are logged like any metric, so
    that ``Engine.test`` returns them and ``anomalib benchmark`` has columns of them.

    Batches without categories or labels say nothing; without any others, there is no report. Where processes share a
    test, Lightning repeats a few images so that all have as many, and those count as often.

    Args:
        categories: Names of those that may come, the same in every process.

    Attributes:
        table: What :func:`category_table` makes of the last test; ``None`` before.
        curves: Category to what :meth:`CategoryFigures.precision_recall` gives, of the last test.
    """

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)
        self.table: pd.DataFrame | None = None
        self.curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._figures: dict[str, CategoryFigures] = {}

    @classmethod
    def attach(cls, trainer: Trainer, categories: Sequence[str]) -> None:
        """Give a trainer a report of its own, in the place of any that it has.

        It comes last: models bring their post-processing as a callback too, and the report is of what that leaves.
        """
        others = [callback for callback in trainer.callbacks if not isinstance(callback, cls)]
        trainer.callbacks = [*others, cls(categories)]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from nothing."""
        del trainer, pl_module
        self.table, self.curves = None, {}
        self._figures = {category: CategoryFigures(category) for category in self.categories}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch after its post-processing."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        for figures in self._figures.values():
            figures.update(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the table and log it."""
        if trainer.world_size > 1:  # processes exchange what lies on their device
            for figures in self._figures.values():
                figures.to(pl_module.device)
        table = category_table({category: figures.compute() for category, figures in self._figures.items()})
        self.curves = {category: figures.precision_recall() for category, figures in self._figures.items()}
        self._figures = {}
        categories, summaries = table[:-2], table[-2:]
        if categories.empty:
            return
        self.table = table
        # The same names whatever the model: the benchmark joins models by their columns. Not `self.log`, which
        # Lightning gave only to the callbacks it found before ours was attached.
        for summary, row in summaries.iterrows():
            for name in (*FIGURES, *RATES):
                pl_module.log(f"{summary}/{name}", float(row[name]), sync_dist=True)
        named = {
            f"{row}/{name}": value for row, values in categories.iterrows() for name, value in values.dropna().items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the table and print it: only now has Lightning printed its own."""
        del pl_module
        if stage != "test" or self.table is None or not trainer.is_global_zero:
            return
        path, saved = Path(trainer.default_root_dir) / "categories.csv", ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.table.to_csv(path)
            self.table.reset_index().to_json(path.with_suffix(".json"), orient="records", indent=2, double_precision=15)
            saved = f", saved to {path} and {path.with_suffix('.json').name}"
        except OSError as error:
            rank_zero_warn(
                f"The figures of the categories could not be saved to '{path}' and are only printed: {error}. Make the "
                "folder writable, or choose another with default_root_dir."
            )
        if trainer.test_loop.verbose:
            shown = self.table.set_axis(pd.MultiIndex.from_tuples(HEADINGS[name] for name in self.table), axis=1)
            text = shown.rename_axis(index=None).to_string(float_format="{:.3f}".format, na_rep="-")
            print(f"\nBy category{saved}:\n{text}\n")
