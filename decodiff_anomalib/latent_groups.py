"""Groups of latent channels, each on its own grid, in one tensor."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812


class LatentGroup(NamedTuple):
    """Latents of one source.

    Attributes:
        channels: Channels on the group's own grid.
        cells: Cells of the group's grid along the side of a latent pixel: 1, or 2 for a grid twice as fine.
    """

    channels: int
    cells: int = 1


class LatentGroups:
    """How the groups of latents lie in one tensor ``(B, C, h, w)``.

    Each 2x2 cells of a finer grid are four times the channels of one latent pixel (``pixel_unshuffle``), so that the
    schedule, the denoiser and the correction see one tensor.

    Args:
        groups: By name, in the order of their channels.

    Attributes:
        channels: Of the whole tensor, ``C``.
        gates: Cells of all groups in one latent pixel: channels of what has one value for each cell.
    """

    def __init__(self, groups: Mapping[str, LatentGroup]) -> None:
        self.groups = dict(groups)
        self._channels = [group.channels * group.cells**2 for group in groups.values()]
        self._gates = [group.cells**2 for group in groups.values()]
        self.channels, self.gates = sum(self._channels), sum(self._gates)

    def join(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One tensor ``(B, C, h, w)`` of the groups on their own grids, ``(B, channels, cells h, cells w)``."""
        return torch.cat([_unshuffle(parts[name], group.cells) for name, group in self.groups.items()], dim=1)

    def split(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """The groups on their own grids; undoes :meth:`join`."""
        parts = zip(self.groups.items(), latents.split(self._channels, dim=1), strict=True)
        return {name: _shuffle(part, group.cells) for (name, group), part in parts}

    def spread(self, gates: torch.Tensor) -> torch.Tensor:
        """One value for each cell of each group, ``(B, gates, h, w)``, repeated over the group's channels."""
        parts = zip(self.groups.values(), gates.split(self._gates, dim=1), strict=True)
        return torch.cat([part.repeat(1, group.channels, 1, 1) for group, part in parts], dim=1)


def _unshuffle(part: torch.Tensor, cells: int) -> torch.Tensor:
    return part if cells == 1 else F.pixel_unshuffle(part, cells)


def _shuffle(part: torch.Tensor, cells: int) -> torch.Tensor:
    return part if cells == 1 else F.pixel_shuffle(part, cells)
