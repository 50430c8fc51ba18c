"""Exemplars: normal training images whose content replaces deviating regions of the corrected image.

A denoiser trained with the squared error predicts the conditional mean, in which a defect fades but fine structure is
blurred. Here the content comes from a normal training image whose surroundings match best (exemplar-based inpainting,
Criminisi et al. 2004). Maps and scores do not use it.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.calibration import prediction_limit

REPLACED_RATE = 0.1  # share of normal images in which a cell is replaced
STRIDE = 4  # pixels between the positions that are compared
REACH = 8  # strides that an exemplar may be shifted by, in each direction
SHIFTS = 2 * REACH + 1


class Exemplars(nn.Module):
    """Normal images of each category that fill the deviating regions of corrected images.

    Args:
        count: Images kept of each category.
        image_size: Their height and width.
        num_categories: ``K``; row ``K`` of each table is of all categories and serves unknown images.
    """

    def __init__(self, count: int, image_size: tuple[int, int], num_categories: int) -> None:
        super().__init__()
        rows, (height, width) = num_categories + 1, image_size
        self.images: torch.Tensor
        self.coarse: torch.Tensor
        self.cell_thresholds: torch.Tensor
        self.register_buffer("images", torch.zeros(rows, count, 3, height, width, dtype=torch.uint8))
        coarse = torch.zeros(rows * count, 4, height // STRIDE, width // STRIDE)
        self.register_buffer("coarse", coarse, persistent=False)
        # Nothing exceeds infinity. With NaN instead, OpenVINO's comparison would be true.
        self.register_buffer("cell_thresholds", torch.full((rows, 1, 1, 1), math.inf))

    @torch.no_grad()
    def fit(self, row: int, images: torch.Tensor) -> None:
        """Keep evenly spaced ones of ``images`` ``(N, 3, H, W)`` in [-1, 1]; some twice if there are too few."""
        count = self.images.shape[1]
        chosen = torch.arange(count) * len(images) // count
        self.images[row] = ((images[chosen] + 1) * 127.5).round().clamp(0, 255).byte()
        self._prepare(row)

    def _prepare(self, row: int) -> None:
        """Set what the search compares: down-scaled exemplars ``e`` as ``(-2 e, |e|^2)``."""
        coarse = F.avg_pool2d(_as_floats(self.images[row]), STRIDE)
        of_row = self.coarse.unflatten(0, self.images.shape[:2])[row]
        of_row.copy_(torch.cat([-2 * coarse, coarse.square().sum(1, keepdim=True)], 1))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for row in range(len(self.images)):
            self._prepare(row)

    @torch.no_grad()
    def calibrate(self, row: int, cells: torch.Tensor) -> None:
        """Set the threshold above which cells deviate from ``cells`` ``(N, 1, h, w)`` of maps of normal images."""
        if len(cells) > 1:
            self.cell_thresholds[row] = prediction_limit(cells.amax((1, 2, 3)), REPLACED_RATE)

    def deviating(self, cells: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Mask ``(B, 1, h, w)`` of deviating cells: those of ``cells`` above the threshold and their neighbours.

        Empty before :meth:`calibrate`.
        """
        high = cells > self.cell_thresholds[category]
        return F.max_pool2d(high.to(cells.dtype), 3, stride=1, padding=1)

    def forward(self, images: torch.Tensor, deviating: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)`` with deviating cells replaced by the exemplar that matches their surroundings best.

        The match minimises the squared difference in the cells around the deviating ones, over the exemplars of the
        category and their shifts. The exemplar's brightness is adjusted by the median difference there,
        which is robust where the exemplar matches badly.

        Args:
            images: ``(B, 3, H, W)``, about [-1, 1].
            deviating: Mask of the cells to replace, ``(B, 1, h, w)``, 0 or 1.
            category: Category index ``(B,)``, whose exemplars are searched.
        """
        coarse = F.avg_pool2d(images, STRIDE)
        around = F.max_pool2d(deviating, 5, stride=1, padding=2) - deviating
        hidden, around = (F.interpolate(cells, size=coarse.shape[-2:]) for cells in (deviating, around))
        exemplars, known = self._best_fit(coarse, hidden, around, category)
        brighter = _median(coarse - F.avg_pool2d(exemplars, STRIDE), around * F.avg_pool2d(known, STRIDE) > 0)
        weight = F.interpolate(deviating, size=images.shape[-2:], mode="bilinear")
        return images + weight * ((exemplars + brighter).clamp(-1, 1) - images)

    def _best_fit(
        self, coarse: torch.Tensor, hidden: torch.Tensor, around: torch.Tensor, category: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Best exemplars ``(B, 3, H, W)`` in [-1, 1] for ``coarse`` images ``(B, 3, H/4, W/4)``, and their extent.

        The extent ``(B, 1, H, W)`` is 0 beyond the shifted exemplar's edge. ``hidden`` and ``around``
        ``(B, 1, H/4, W/4)`` are 1 where content is replaced and where the exemplars are compared.
        """
        # the mean of (x - e)^2 where the surroundings lie on the exemplar, at every shift
        products = F.conv2d(F.pad(torch.cat([around * coarse, around], 1), (REACH,) * 4), self.coarse)
        energy = around * coarse.square().sum(1, keepdim=True)
        shares = F.pad(torch.cat([energy, around, hidden], 1), (REACH,) * 4)
        energy, overlap, covered = F.avg_pool2d(shares, coarse.shape[-2:], stride=1).split(1, 1)
        difference = (products / coarse[0, 0].numel() + energy) / overlap.clamp_min(1e-6)
        missing = hidden.mean((2, 3), keepdim=True) - covered  # a region beyond the exemplar's edge cannot be filled
        difference = difference + 1e3 * (missing > 1e-6)

        rows, count = self.images.shape[:2]
        difference = difference.unflatten(1, (rows, count))
        own = difference.gather(1, category.view(-1, 1, 1, 1, 1).expand_as(difference[:, :1]))
        best = own.flatten(1).argmin(1)
        best, column = best // SHIFTS, best % SHIFTS
        best, line = best // SHIFTS, best % SHIFTS
        chosen, known = self.images[category, best], torch.ones((), dtype=torch.bool, device=best.device)
        for dim, shift in ((2, line), (3, column)):
            length = chosen.shape[dim]
            source = torch.arange(length, device=shift.device) - (shift[:, None] - REACH) * STRIDE
            source = source.unflatten(1, (1, length, 1) if dim == 2 else (1, 1, length))
            within = source.clamp(0, length - 1)
            chosen, known = chosen.gather(dim, within.expand_as(chosen)), known & (source == within)
        return _as_floats(chosen), known.to(coarse.dtype)


def _median(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Lower median ``(B, C, 1, 1)`` of ``values`` ``(B, C, h, w)`` where ``where`` ``(B, 1, h, w)``; 0 if nowhere."""
    count = where.flatten(1).sum(1)
    ordered = torch.where(where, values, 1e6).flatten(2).sort(2).values
    middle = ((count - 1).clamp_min(0) // 2).view(-1, 1, 1).expand(-1, values.shape[1], 1)
    return (ordered.gather(2, middle) * (count > 0).view(-1, 1, 1))[..., None]


def _as_floats(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of bytes."""
    return images.float() / 127.5 - 1
