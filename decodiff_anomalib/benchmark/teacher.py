"""Distillation of EfficientAd's teacher from ImageNet features, on photographs, in minutes on a CPU.

The teacher and its target follow EfficientAD (Batzner et al., WACV 2024, arXiv 2303.14535), section 3.1 and appendix.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.models.image.efficient_ad.torch_model import (
    EfficientAdModelSize,
    MediumPatchDescriptionNetwork,
    SmallPatchDescriptionNetwork,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import (
    center_crop,
    crop,
    resize,
    rgb_to_grayscale,
    to_dtype,
)

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.data.images import inspect_images
from decodiff_anomalib.features import PACKAGED_BACKBONE, VisualFeatures
from decodiff_anomalib.image_io import image_files, read_image
from decodiff_anomalib.precision import computes_bfloat16

logger = logging.getLogger(__name__)

NETWORKS = {
    EfficientAdModelSize.S.value: SmallPatchDescriptionNetwork,
    EfficientAdModelSize.M.value: MediumPatchDescriptionNetwork,
}
TEACHER_CHANNELS = 384

# Chosen for seven minutes on one thread.
PHOTOGRAPH_SIDE, CROP_SIDE, GREY_SHARE = 256, 128, 0.3
STANDARDISING_CROPS, MEASURING_CROPS = 60, 100
REGRESSION_BATCH, PATCHES_PER_CROP, RIDGE = 12, 48, 10_000
DISTILLATION_STEPS, BATCH, LEARNING_RATE = 500, 4, 2e-4


def distil_teacher(
    photographs: Path, output: Path, *, size: str = "small", steps: int = DISTILLATION_STEPS, seed: int = 0
) -> Path:
    """Train EfficientAd's teacher, a patch description network, to give the features of EfficientNet-Lite0.

    As in EfficientAD (arXiv 2303.14535, section 3.1 and appendix), the target is the standardised features, in 384
    channels, of images twice as large. Different from it, and for speed: EfficientNet-Lite0 replaces WideResNet-101,
    ``photographs`` replace ImageNet, and training has fewer steps than 60,000 of 16 images; therefore the last layer is
    set to the least-squares solution before and after training. A tenth of the photographs is held out to measure
    ``explained_variance``, which is in the metadata of the file.

    Args:
        photographs: Folder of photographs, with or without sub-folders; hundreds are good.
        output: The ``.safetensors`` file to write. A file made with the same arguments is kept.
        size: ``small`` or ``medium``, as EfficientAd's ``model_size``.
        steps: Training steps of 4 crops of 128x128 pixels.
        seed: The same seed gives the same teacher.

    Returns:
        Path: ``output``.

    Raises:
        FileNotFoundError: If there are fewer than two photographs.
        ImportError: If the package with the weights is missing.
        ValueError: If a photograph is broken, or the size is unknown.
    """
    if size not in NETWORKS:
        msg = f"size={size!r} is unknown; valid: {', '.join(NETWORKS)}."
        raise ValueError(msg)
    files = find_photographs(photographs)
    metadata = {
        "size": size,
        "steps": str(steps),
        "seed": str(seed),
        "photographs": str(len(files)),
        "backbone": PACKAGED_BACKBONE,
    }
    if output.is_file() and metadata.items() <= _read_metadata(output).items():
        return output
    logger.info("Distilling EfficientAd's teacher from %d photographs, which takes minutes.", len(files))
    held_out, training = files[::10], [file for index, file in enumerate(files) if index % 10]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = PatchTarget(_draw_crops(training, min(STANDARDISING_CROPS, len(training)), generator), generator)
        network = NETWORKS[size](TEACHER_CHANNELS).to(memory_format=torch.channels_last)
        for convolution in _convolutions(network):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
    regression_batches = max(1, steps // 8)
    _solve_head(network, target, training, regression_batches, generator)
    _train(network, target, training, steps, generator)
    _solve_head(network, target, training, regression_batches, generator)
    metadata["explained_variance"] = f"{_explained_variance(network, target, held_out, generator):.4f}"
    logger.info("The teacher explains %s of the variance on held-out photographs.", metadata["explained_variance"])
    with atomic_write(output) as path:
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path, metadata=metadata)
    return output


class PatchTarget:
    """The teacher's target for each patch: ImageNet features, standardised and projected to the teacher's channels.

    Args:
        crops: ``(N, 3, S, S)`` in [0, 1], whose features give mean and standard deviation of each channel.
        generator: Draws the projection.
    """

    def __init__(self, crops: torch.Tensor, generator: torch.Generator) -> None:
        self.backbone = VisualFeatures()
        features = self._extract(crops)
        self.mean, self.std = features.mean((0, 2, 3)), features.std((0, 2, 3))
        # orthonormal columns up to a factor, so that distances between features are kept
        random = torch.randn(TEACHER_CHANNELS, features.shape[1], generator=generator)
        self.projection = torch.linalg.qr(random).Q * (TEACHER_CHANNELS / features.shape[1]) ** 0.5

    @torch.no_grad()
    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        """Target ``(B, 384, S/4 - 8, S/4 - 8)`` for ``crops`` ``(B, 3, S, S)`` in [0, 1]."""
        features = (self._extract(crops).movedim(1, -1) - self.mean) / self.std
        return (features @ self.projection.T).movedim(-1, 1)

    @torch.no_grad()
    def _extract(self, crops: torch.Tensor) -> torch.Tensor:
        """Features at the centres of the teacher's patches: 33 pixels wide, every 4 pixels, without padding."""
        enlarged = F.interpolate(crops, scale_factor=2, mode="bilinear")
        # The backbone pads on two sides only, so that its cells lie 3.2, not 3.6, cells before the patches.
        with _half_precision():
            return self.backbone(2 * enlarged - 1)["image"][:, :, 3:-5, 3:-5].float()


def _half_precision() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu"))


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


# ---------------------------------------------------------------- photographs


def find_photographs(folder: Path) -> list[Path]:
    """All images below ``folder``; each can be read.

    Raises:
        FileNotFoundError: If there are fewer than two.
        ValueError: If some are broken, or have more than 8 bits.
    """
    files = image_files(folder)
    if len(files) < 2:
        msg = f"{len(files)} images below {folder}; give a folder of photographs of anything, hundreds are good."
        raise FileNotFoundError(msg)
    deep = [path for path, depth in inspect_images(files).items() if depth]
    if deep:
        msg = f"{len(deep)} photographs have more than 8 bits, such as {deep[0]}. Save them with 8."
        raise ValueError(msg)
    return files


def _draw_crops(files: Sequence[Path], count: int, generator: torch.Generator) -> torch.Tensor:
    """Crops ``(count, 3, 128, 128)`` in [0, 1] of random photographs at 256 pixels, three in ten of them grey."""
    crops = []
    for index in torch.randint(len(files), (count,), generator=generator).tolist():
        side = PHOTOGRAPH_SIDE
        picture = to_dtype(read_image(files[index]), torch.uint8, scale=True)
        picture = center_crop(resize(picture, [side], antialias=True), [side, side])
        top, left = torch.randint(side - CROP_SIDE + 1, (2,), generator=generator).tolist()
        picture = crop(picture, top, left, CROP_SIDE, CROP_SIDE)
        grey = torch.rand((), generator=generator) < GREY_SHARE
        crops.append(rgb_to_grayscale(picture, num_output_channels=3) if grey else picture)
    return torch.stack(crops).float() / 255


def _read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


# ---------------------------------------------------------------- training


@torch.no_grad()
def _solve_head(
    network: nn.Module, target: PatchTarget, files: Sequence[Path], batches: int, generator: torch.Generator
) -> None:
    """Set the last convolution to the ridge regression of the target on that layer's inputs."""
    head = _convolutions(network)[-1]
    assert head.bias is not None
    inputs: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].float()))
    channels = head.weight[0].numel() + 1  # a constant 1 for the bias
    products, moments = torch.zeros(channels, channels), torch.zeros(channels, TEACHER_CHANNELS)
    for _ in range(batches):
        crops = _draw_crops(files, REGRESSION_BATCH, generator)
        expected = target(crops).flatten(2).mT
        with _half_precision():
            network(crops)
        patches = F.unfold(inputs.pop().contiguous(), head.kernel_size).mT
        # Neighbouring patches are alike: a few patches of many crops tell more than all patches of a few.
        drawn = torch.randperm(patches.shape[1], generator=generator)[:PATCHES_PER_CROP]
        rows = F.pad(patches[:, drawn].flatten(0, 1), (0, 1), value=1.0)
        products = products + rows.T @ rows
        moments = moments + rows.T @ expected[:, drawn].flatten(0, 1)
    handle.remove()
    count = products[-1, -1]
    variance = (products.diagonal() / count - (products[-1] / count).square())[:-1].mean()
    products.diagonal()[:-1] += RIDGE * variance  # the ridge weighs as much as RIDGE patches of white noise
    solution = torch.linalg.solve(products, moments)
    head.weight.copy_(solution[:-1].T.reshape(head.weight.shape))
    head.bias.copy_(solution[-1])


def _train(
    network: nn.Module, target: PatchTarget, files: Sequence[Path], steps: int, generator: torch.Generator
) -> None:
    """Minimise the squared distance from the target with Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.05 * steps), (1 - step / steps) / 0.6)
    )
    for _ in range(steps):
        crops = _draw_crops(files, BATCH, generator)
        with _half_precision():
            outputs = network(crops)
        loss = F.mse_loss(outputs.float(), target(crops))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _explained_variance(
    network: nn.Module, target: PatchTarget, files: Sequence[Path], generator: torch.Generator
) -> float:
    """Share of the target's variance on ``files`` that the network explains.

    The variance is about the mean that the target is standardised by.
    """
    crops = _draw_crops(files, min(MEASURING_CROPS, len(files)), generator)
    expected = target(crops)
    outputs = torch.cat([network(crop[None]) for crop in crops])
    return 1 - (F.mse_loss(outputs, expected) / expected.square().mean()).item()
