"""Which product category an image is of: its name in training, inferred from the image afterwards.

A model knows ``K`` categories by their index ``0 ... K - 1``. The index ``K`` means *unknown*: an image of none of
them, or one of which nothing is to be assumed. Every table with a row for each category has one more for it.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.calibration import prediction_limit
from decodiff_anomalib.paper import CATEGORY_ORDER

UNKNOWN, INFERRED, GIVEN = "unknown", "inferred", "given"
RESERVED = (UNKNOWN, INFERRED, GIVEN)
"""What a model's ``category`` can be besides a name."""

LONE = "product"
"""Name of the category of data that name none."""

CELLS = 8
QUANTILES = (0.3, 0.7)
SPREAD_FLOOR = 0.3
FALSE_FLAG_RATE, MARGIN = 0.01, 1.5


def category_names(datamodule: LightningDataModule | None) -> tuple[str, ...]:
    """Names of the categories that a datamodule holds: ``MultiCategory``'s, or the one of any of Anomalib's.

    Raises:
        ValueError: If a category has a name that means something else.
    """
    names = getattr(datamodule, "categories", None)
    if not names:
        names = [getattr(datamodule, "category", None) or getattr(datamodule, "name", None) or LONE]
    taken = [name for name in names if name in RESERVED]
    if taken:
        msg = f"A category cannot be called {taken[0]!r}; {', '.join(RESERVED)} mean something else. Rename it."
        raise ValueError(msg)
    return tuple(names)


def vocabulary(names: Sequence[str], *, published_table: bool = False) -> tuple[str, ...]:
    """Put names of categories in the order of their indices.

    Those of MVTec AD and of VisA come in the authors' order, others as they are.

    Args:
        names: Of the categories to train on.
        published_table: Whether MVTec AD's and VisA's categories bring all of their data set's, as the authors' models
            know them even where they are trained on a few.
    """
    for published in CATEGORY_ORDER.values():
        if set(names) <= set(published):
            return published if published_table else tuple(name for name in published if name in names)
    return tuple(names)


def category_indices(names: Sequence[str], categories: Sequence[str]) -> torch.Tensor:
    """Index ``(B,)`` of each of ``names`` in ``categories``; their number, which means unknown, where it is none."""
    index = {name: position for position, name in enumerate(categories)}
    return torch.tensor([index.get(name, len(categories)) for name in names])


class CategoryRouter(nn.Module):
    """Infers the category of images from their visual features, and whether it is one of those trained on.

    An image is described by two quantiles of each feature over a coarse grid, which a defect somewhere on it hardly
    moves. Categories are Gaussians with one covariance: what normal images of a category differ by, plus what patches
    of one image differ by. The latter keeps categories whose images are all alike from calling every change strange.

    An image is unknown where it is :data:`MARGIN` times further from the nearest category than the limit which one in a
    hundred normal images of that category exceeds.

    Args:
        num_categories: ``K``.
        channels: Features per position.
    """

    def __init__(self, num_categories: int, channels: int) -> None:
        super().__init__()
        size = len(QUANTILES) * channels
        self.trained: torch.Tensor
        self.prototypes: torch.Tensor
        self.whitening: torch.Tensor
        self.limits: torch.Tensor
        self.register_buffer("trained", torch.zeros(num_categories, dtype=torch.bool))
        self.register_buffer("prototypes", torch.zeros(num_categories, size))
        self.register_buffer("whitening", torch.eye(size))
        self.register_buffer("limits", torch.full((num_categories,), float("inf")))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Infer the categories of images.

        Args:
            features: ``(B, F, h, w)``.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Category index ``(B,)``, ``K`` for unknown, and strangeness ``(B,)``: the
            distance from the nearest category in units of what that category's images are allowed, at least 0.
        """
        distance, nearest = self.distances(self.pool(features)).min(1)
        strangeness = distance / self.limits[nearest]
        return torch.where(strangeness > 1, len(self.trained), nearest), strangeness

    @staticmethod
    def pool(features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, F, h, w)`` on the coarse grid, ``(B, F, CELLS^2)``."""
        return F.adaptive_avg_pool2d(features, CELLS).flatten(2)

    @staticmethod
    def describe(cells: torch.Tensor) -> torch.Tensor:
        """Descriptions ``(B, 2F)`` of images of which :meth:`pool` made ``cells``."""
        quantiles = torch.tensor(QUANTILES, dtype=cells.dtype, device=cells.device)
        return torch.quantile(cells, quantiles, dim=-1).movedim(0, 1).flatten(1)

    def distances(self, cells: torch.Tensor) -> torch.Tensor:
        """Distance ``(B, K)`` of each image from each category."""
        whitened, prototypes = self.describe(cells) @ self.whitening, self.prototypes @ self.whitening
        distances = (whitened[:, None] - prototypes).square().mean(-1).sqrt()
        return torch.where(self.trained, distances, float("inf"))

    @torch.no_grad()
    def fit(self, cells: torch.Tensor, category: torch.Tensor) -> None:
        """Learn the categories of normal images.

        Args:
            cells: Of :meth:`pool`, ``(N, F, CELLS^2)``.
            category: ``(N,)``.
        """
        described = self.describe(cells).double()
        spreads = []
        for index in category.unique():
            of_category = category == index
            self.prototypes[index] = described[of_category].mean(0)
            self.trained[index] = True
            spreads.append(cells[of_category].double().std((0, 2)))
        spread = torch.stack(spreads).mean(0)
        spread = spread.clamp_min(SPREAD_FLOOR * spread.mean()).repeat(len(QUANTILES))
        residual = described - self.prototypes[category]
        covariance = residual.T @ residual / len(residual) + spread.square().diag()
        self.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))
        self.limits.fill_(float("inf"))

    @torch.no_grad()
    def calibrate(self, cells: torch.Tensor, category: torch.Tensor) -> None:
        """Set how far from their category images may be, on normal images that :meth:`fit` has not seen; as there.

        A category with fewer than two such images never calls one unknown.
        """
        distances = self.distances(cells)
        for index in category.unique():
            of_category = distances[category == index, index]
            if len(of_category) > 1:
                self.limits[index] = MARGIN * prediction_limit(of_category, FALSE_FLAG_RATE)
