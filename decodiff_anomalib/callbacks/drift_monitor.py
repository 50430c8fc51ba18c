"""A watch over predictions for images that have become unlike those the model knows."""

import logging
import math
import statistics
from collections import deque

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from decodiff_anomalib.calibration import FEWEST_NORMALS, SMALLEST
from decodiff_anomalib.conditioning import INFERRED

logger = logging.getLogger(__name__)

WINDOW = 50  # images
WINDOW_SIGMAS, CENTRE_SIGMAS = 5.0, 3.0  # hardly a false warning in streams of thousands of images
MEDIAN_EFFICIENCY = math.sqrt(math.pi / 2)  # standard error of a median, relative to that of a mean
WHAT = {
    "raw_score": "Scores are higher than those of normal images: more parts are defective, or all images have changed.",
    "ood_score": "Images differ from the training images as a whole: look at the lamp, the focus and the camera.",
}


class DriftMonitor(Callback):
    """Warns once when images have become unlike the normal images of the training set.

    Two logarithms are watched in the order of the predictions: of the raw score and of the out-of-distribution score,
    each in standard deviations from its mean on the held-out normal images of the image's category. The median over the
    last 50 images, which single defective images do not move, is compared with what the median of normal images exceeds
    with 5 sigma (of the window) and 3 sigma (of the mean of the held-out images, of which there are few).

    Args:
        window: Images of the median.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a stream."""
        del trainer
        if stage != TrainerFn.PREDICTING:
            return
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=self.window) for name in WHAT}
        self._warned: set[str] = set()
        self._count = 0
        self._usual = {"raw_score": usual_scores(pl_module), "ood_score": usual_ood_scores(pl_module)}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        *_: object,
        **__: object,
    ) -> None:
        """Take up the images of a batch, and warn if the last ones are unlike."""
        del trainer, pl_module
        index = outputs.category_index.tolist()
        self._count += len(index)
        for name, usual in self._usual.items():
            found = getattr(outputs, name, None)
            if found is None or not usual:
                continue
            for category, value in zip(index, found.flatten().tolist(), strict=True):
                # An image of no category, or without a score, is as unlike as can be. A category without held-out
                # images tells nothing.
                if math.isnan(value) or (category not in usual and name == "ood_score" and value > 1):
                    self._recent[name].append(math.inf)
                elif category in usual:
                    mean, spread = usual[category][:2]
                    self._recent[name].append((math.log(max(value, SMALLEST)) - mean) / spread)
            self._warn_of(name)

    def _warn_of(self, name: str) -> None:
        recent = self._recent[name]
        if name in self._warned or len(recent) < self.window:
            return
        fewest = min(count for _, _, count in self._usual[name].values())
        limit = warning_limit(self.window, fewest)
        median = statistics.median(recent)
        if median > limit:
            self._warned.add(name)
            logger.warning(
                "The last %d images, up to number %d, are unlike the normal images that thresholds were set on: their "
                "median %s lies %.1f standard deviations above, %.1f are usual at most. %s `decodiff threshold MODEL "
                "--images FOLDER` sets thresholds on normal images as they are now.",
                self.window,
                self._count,
                name,
                median,
                limit,
                WHAT[name],
            )


def warning_limit(window: int, normals: int) -> float:
    """What the median of ``window`` images is compared with, in standard deviations of ``normals`` held-out images."""
    return WINDOW_SIGMAS * MEDIAN_EFFICIENCY / math.sqrt(window) + CENTRE_SIGMAS / math.sqrt(normals)


def usual_scores(pl_module: LightningModule) -> dict[int, tuple[float, float, int]]:
    """Category index to mean, standard deviation and number of the logarithms of normal scores."""
    kept = getattr(getattr(pl_module, "post_processor", None), "normal_scores", [])
    logs = {index: torch.tensor(scores).clamp_min(SMALLEST).log() for index, scores in enumerate(kept)}
    return {
        index: (float(values.mean()), max(float(values.std()), SMALLEST), len(values))
        for index, values in logs.items()
        if len(values) >= FEWEST_NORMALS
    }


def usual_ood_scores(pl_module: LightningModule) -> dict[int, tuple[float, float, int]]:
    """The same of out-of-distribution scores; empty where categories are not inferred, whose scores are 0."""
    router = pl_module.model.router
    if router is None or pl_module.category != INFERRED:
        return {}
    return {
        index: (mean, max(spread, SMALLEST), int(count))
        for index, (mean, spread, count) in enumerate(router.usual.tolist())
        if count >= FEWEST_NORMALS
    }
