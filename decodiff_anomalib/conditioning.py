"""Conditioning on the product category: given by name in training, inferred from the image afterwards.

A model has ``K`` categories with index ``0 ... K - 1``. Index ``K`` means *unknown*: an image of none of them. Tables
with a row for each category have one more row for it.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.calibration import prediction_limit
from decodiff_anomalib.paper import CATEGORY_ORDER

UNKNOWN, INFERRED, GIVEN = "unknown", "inferred", "given"
RESERVED = (UNKNOWN, INFERRED, GIVEN)
"""Values of a model's ``category`` that are not the name of one."""

DEFAULT_CATEGORY = "product"
"""Name of the category of data that name none."""

CELLS = 8
QUANTILES = (0.3, 0.7)
SPREAD_FLOOR = 0.3
SMALLEST_SPREAD = 1e-3  # of pooled features, and of distances: constant images have none
UNKNOWN_RATE, MARGIN = 0.01, 1.5


def category_names(datamodule: object | None) -> tuple[str, ...]:
    """Names of the categories that a datamodule holds: ``MultiCategory``'s, or the one of any of Anomalib's.

    Raises:
        ValueError: If a category has a reserved name.
    """
    names = getattr(datamodule, "categories", None)
    if not names:
        names = [getattr(datamodule, "category", None) or getattr(datamodule, "name", None) or DEFAULT_CATEGORY]
    taken = [name for name in names if name in RESERVED]
    if taken:
        msg = f"A category cannot be called {taken[0]!r}; {', '.join(RESERVED)} are reserved. Rename it."
        raise ValueError(msg)
    return tuple(names)


def vocabulary(names: Sequence[str], *, published_table: bool = False) -> tuple[str, ...]:
    """Names of categories in the order of their indices.

    Categories of MVTec AD and of VisA are in the order of the authors' tables, others in the given order.

    Args:
        names: Of the categories to train on.
        published_table: Whether categories of MVTec AD or VisA get the table of the whole data set, as in the authors'
            models, even if only some of them are trained on.
    """
    for published in CATEGORY_ORDER.values():
        if set(names) <= set(published):
            return published if published_table else tuple(name for name in published if name in names)
    return tuple(names)


def category_indices(names: Sequence[str], categories: Sequence[str]) -> torch.Tensor:
    """Index ``(B,)`` of each of ``names`` in ``categories``; their number, meaning unknown, for others."""
    index = {name: position for position, name in enumerate(categories)}
    return torch.tensor([index.get(name, len(categories)) for name in names])


def fixed_category_index(category: str, categories: Sequence[str]) -> int | None:
    """Index that a model's ``category`` fixes for all images; ``None`` where it is inferred or given.

    Raises:
        ValueError: If ``category`` is no reserved word and none of ``categories``.
    """
    if category in {INFERRED, GIVEN}:
        return None
    known = (*categories, UNKNOWN)
    if category not in known:
        msg = (
            f"category={category!r} is none that the model was trained on; "
            f"valid: {', '.join((*categories, *RESERVED))}."
        )
        raise ValueError(msg)
    return known.index(category)


class CategoryRouter(nn.Module):
    """Infers the category of images from their visual features, with an out-of-distribution score.

    The descriptor of an image holds two quantiles of each feature over a coarse grid, which a local defect hardly
    changes. Categories are Gaussians with a shared covariance: the variation between normal images of a category plus
    the variation between the patches of one image. The second term keeps the covariance from collapsing where all
    images of a category are alike. The distance is Mahalanobis', divided by the square root of the dimension.

    The out-of-distribution score is the distance from the nearest category relative to :data:`MARGIN` times the limit
    that one in a hundred normal images of that category exceeds. An image is unknown where it is above 1.

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
        self.usual: torch.Tensor
        self.register_buffer("trained", torch.zeros(num_categories, dtype=torch.bool))
        self.register_buffer("prototypes", torch.zeros(num_categories, size))
        self.register_buffer("whitening", torch.eye(size))
        self.register_buffer("limits", torch.full((num_categories,), float("inf")))
        # Of held-out normal images: mean and standard deviation of the logarithm of their scores, and their number.
        self.register_buffer("usual", torch.zeros(num_categories, 3))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Infer the categories of images.

        Args:
            features: ``(B, F, h, w)``.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Category index ``(B,)``, ``K`` for unknown, and out-of-distribution score
            ``(B,)``, at least 0.
        """
        distance, nearest = self.distances(self.pool(features)).min(1)
        ood_score = distance / self.limits[nearest]
        return torch.where(ood_score > 1, len(self.trained), nearest), ood_score

    @staticmethod
    def pool(features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, F, h, w)`` on the coarse grid, ``(B, F, CELLS^2)``."""
        return F.adaptive_avg_pool2d(features, CELLS).flatten(2)

    @staticmethod
    def describe(cells: torch.Tensor) -> torch.Tensor:
        """Descriptors ``(B, 2F)`` of images from their pooled ``cells`` ``(B, F, CELLS^2)``."""
        quantiles = torch.tensor(QUANTILES, dtype=cells.dtype, device=cells.device)
        return torch.quantile(cells, quantiles, dim=-1).movedim(0, 1).flatten(1)

    def distances(self, cells: torch.Tensor) -> torch.Tensor:
        """Mahalanobis distance ``(B, K)`` of each image from each category; infinite where it was not fitted."""
        whitened, prototypes = self.describe(cells) @ self.whitening, self.prototypes @ self.whitening
        distances = (whitened[:, None] - prototypes).square().mean(-1).sqrt()
        return torch.where(self.trained, distances, float("inf"))

    @torch.no_grad()
    def fit(self, cells: torch.Tensor, category: torch.Tensor) -> None:
        """Fit the Gaussians to normal images.

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
        spread = spread.maximum((SPREAD_FLOOR * spread.mean()).clamp_min(SMALLEST_SPREAD)).repeat(len(QUANTILES))
        residual = described - self.prototypes[category]
        covariance = residual.T @ residual / len(residual) + spread.square().diag()
        self.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))
        self.limits.fill_(float("inf"))

    @torch.no_grad()
    def calibrate(self, cells: torch.Tensor, category: torch.Tensor) -> None:
        """Set the limits on held-out normal images; arguments as :meth:`fit`.

        A category with fewer than two of them has no limit: its images are never unknown.
        """
        distances = self.distances(cells)
        for index in category.unique():
            of_category = distances[category == index, index]
            if len(of_category) > 1:
                limit = prediction_limit(of_category, UNKNOWN_RATE).clamp_min(SMALLEST_SPREAD)
                self.limits[index] = MARGIN * limit
                logs = (of_category / self.limits[index]).clamp_min(SMALLEST_SPREAD).log()
                self.usual[index] = torch.stack([logs.mean(), logs.std(), torch.tensor(float(len(logs))).to(logs)])
