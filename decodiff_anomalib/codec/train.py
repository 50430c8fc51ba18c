"""Train the bundled codec on a folder of photographs: ``python -m decodiff_anomalib.codec.train --help``.

The photographs are cut into random squares (random scale, flips, quarter turns, a third of them grey, some with
stretched contrast as printed or machined surfaces have), and the codec learns to return them: mean absolute plus mean
squared error, from the principal-component start of :meth:`PatchCodec.fit_linear_path`. The run is resumable: the
state beside ``output`` is picked up when the command is repeated.
"""

import json
import logging
import math
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor

from decodiff_anomalib.codec.patch import PatchCodec

logger = logging.getLogger(__name__)


def load_photographs(files: list[Path], size: int) -> torch.Tensor:
    """Read ``files`` as centre crops: uint8 ``(N, 3, size, size)``."""
    return torch.stack([center_crop(pil_to_tensor(Image.open(file).convert("RGB")), [size, size]) for file in files])


def random_crops(photographs: torch.Tensor, batch_size: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw augmented squares ``(batch_size, 3, size, size)`` in [-1, 1] from uint8 ``photographs``."""

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    crops = []
    side = photographs.shape[-1]
    for index in torch.randint(len(photographs), (batch_size,), generator=generator).tolist():
        source = int(uniform(size * 0.75, min(size * 1.75, side)))
        top, left = int(uniform(0, side - source)), int(uniform(0, side - source))
        crop = photographs[index, :, top : top + source, left : left + source].float() / 127.5 - 1
        crop = F.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)[0]
        crop = torch.rot90(crop, int(uniform(0, 4)), dims=(1, 2))
        if uniform() < 0.5:
            crop = crop.flip(2)
        if uniform() < 0.33:
            crop = crop.mean(0, keepdim=True).expand(3, -1, -1)
        if uniform() < 0.2:
            crop = ((crop - crop.mean()) * uniform(1, 6)).clamp(-1, 1)
        crops.append(crop)
    return torch.stack(crops)


@torch.no_grad()
def reconstruction_psnr(codec: PatchCodec, images: torch.Tensor) -> float:
    """Mean PSNR in dB of ``decode(encode(images))`` for ``images`` ``(N, 3, H, W)`` in [-1, 1]."""
    decoded = torch.cat([codec.decode(codec.encode(chunk)) for chunk in images.split(10)]).clamp(-1, 1)
    squared_error = ((decoded - images) / 2).square().flatten(1).mean(1)
    return (-10 * squared_error.log10()).mean().item()


def train(
    photographs: Path,
    output: Path,
    steps: int = 4000,
    batch_size: int = 16,
    crop_size: int = 128,
    learning_rate: float = 1e-3,
    latent_channels: int = 32,
    width: int = 128,
    seed: int = 0,
) -> None:
    """Train the bundled codec and write it as float16 safetensors.

    Args:
        photographs: Folder of images; files whose name starts with ``09`` are held out and only measured.
        output: The ``.safetensors`` file to write; ``<output>.state`` holds the resumable run.
        steps: Optimiser steps.
        batch_size: Squares per step.
        crop_size: Side of a square in pixels, a multiple of 8.
        learning_rate: Peak of a one-cycle cosine.
        latent_channels: Channels of the latents.
        width: Channels of the residual branches.
        seed: Seed of weights and squares.
    """
    files = sorted(photographs.glob("*.jpg"))
    if not files:
        msg = f"No .jpg file in {photographs}. Give a folder of photographs of at least 256x256 pixels."
        raise FileNotFoundError(msg)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    training = load_photographs([file for file in files if not file.name.startswith("09")], 288)
    held_out = load_photographs([file for file in files if file.name.startswith("09")], 256).float() / 127.5 - 1

    codec = PatchCodec(latent_channels=latent_channels, width=width).to(memory_format=torch.channels_last)
    codec.fit_linear_path(training[::3].float() / 127.5 - 1)
    logger.info("linear path: %.2f dB on the held-out photographs", reconstruction_psnr(codec, held_out))
    # the linear path is optimal among linear ones and badly scaled for Adam: only the branches learn
    branches = [*codec.analysis_branch.parameters(), *codec.synthesis_branch.parameters()]
    optimizer = torch.optim.AdamW(branches, lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))
    )
    average = torch.optim.swa_utils.AveragedModel(codec, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))

    state_file = Path(f"{output}.state")
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in {"codec": codec, "average": average, "optimizer": optimizer, "schedule": schedule}.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        start = state["step"]

    began = time.monotonic()
    for step in range(start, steps):
        images = random_crops(training, batch_size, crop_size, generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = codec.encode(images)
            # a little latent noise: the decoder must not amplify the small errors of a correction
            noise_level = 0.1 * torch.rand(len(latents), 1, 1, 1, generator=generator)
            decoded = codec.decode(latents + noise_level * torch.randn(latents.shape, generator=generator))
        error = decoded.float() - images
        # the latents must stay near the whitened start: unit variance, zero mean, one scale per channel
        scale = latents.float().var((0, 2, 3)).clamp_min(1e-4).log().square().mean()
        loss = error.abs().mean() + 4 * error.square().mean() + 1e-3 * scale
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(branches, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(codec)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            psnr = reconstruction_psnr(average.module.eval(), held_out)
            pace = (time.monotonic() - began) / (step + 1 - start)
            logger.info("step %d  loss %.4f  held-out %.2f dB  %.2f s/step", step + 1, loss.item(), psnr, pace)
            state = {"codec": codec, "average": average, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in state.items()}
            torch.save(state | {"generator": generator.get_state(), "step": step + 1}, state_file)
            write(average.module, output)
    halved = PatchCodec(latent_channels=latent_channels, width=width)
    halved.load_state_dict(load_file(output))
    logger.info("as stored (float16): %.2f dB on the held-out photographs", reconstruction_psnr(halved, held_out))


def write(codec: PatchCodec, output: Path) -> None:
    """Store ``codec`` at ``output`` as float16 safetensors, its shape in the header."""
    shape = {"latent_channels": codec.latent_channels, "width": codec.analysis_branch[0].out_channels}
    tensors = {name: tensor.half().contiguous() for name, tensor in codec.state_dict().items()}
    save_file(tensors, output, metadata={"config": json.dumps(shape)})


if __name__ == "__main__":
    from jsonargparse import auto_cli

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    auto_cli(train)
