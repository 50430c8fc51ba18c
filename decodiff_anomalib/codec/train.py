"""Make a codec like the bundled one: ``python -m decodiff_anomalib.codec.train FOLDER OUTPUT``.

``--model.codec OUTPUT`` uses it.
"""

import logging
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import center_crop

from decodiff_anomalib.codec.linear import PatchCodec
from decodiff_anomalib.image_io import is_image_file, read_image

logger = logging.getLogger(__name__)

SIDE = 256


def read_photographs(files: list[Path]) -> torch.Tensor:
    """Centre crops ``(N, 3, 256, 256)`` in [-1, 1] of ``files``."""
    return 2 * torch.stack([center_crop(read_image(file), [SIDE, SIDE]) for file in files]) - 1


@torch.no_grad()
def reconstruction_psnr(codec: PatchCodec, images: torch.Tensor) -> float:
    """Mean PSNR in dB of ``decode(encode(images))`` for ``images`` ``(N, 3, H, W)`` in [-1, 1]."""
    decoded = codec.decode(codec.encode(images)).clamp(-1, 1)
    squared_error = ((decoded - images) / 2).square().flatten(1).mean(1)
    return (-10 * squared_error.log10()).mean().item()


def train(photographs: Path, output: Path, latent_channels: int = 48) -> None:
    """Fit the codec and write it as safetensors.

    Args:
        photographs: Folder of images of 8 bits and at least 256x256; the last tenth is held out and only measured.
        output: The ``.safetensors`` file to write.
        latent_channels: Principal components kept, of 192.

    Raises:
        FileNotFoundError: If the folder holds fewer than ten photographs.
    """
    files = sorted(filter(is_image_file, photographs.glob("*")))
    if len(files) < 10:
        msg = f"{len(files)} images in {photographs}; at least 10 photographs are needed, hundreds are good."
        raise FileNotFoundError(msg)
    kept = len(files) * 9 // 10
    codec = PatchCodec(latent_channels)
    codec.fit(read_photographs(files[:kept]))
    logger.info("held-out photographs: %.2f dB", reconstruction_psnr(codec, read_photographs(files[kept:])))
    codec.save(output)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    logging.basicConfig(level=logging.INFO)
    auto_cli(train)
