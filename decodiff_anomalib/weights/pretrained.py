"""Pretrained denoisers: a folder with ``model.safetensors`` and ``config.json``, local or on the hub.

These files cannot execute code, and can be published on a model hub without changes. ``decodiff convert`` creates them
from a checkpoint of the authors.
"""

import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from decodiff_anomalib.atomic_write import atomic_write, naming
from decodiff_anomalib.denoiser import Denoiser
from decodiff_anomalib.weights.denoiser_config import DenoiserConfig, empty_denoiser, fill, refuse_other_weights
from decodiff_anomalib.weights.official import load_official

logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def convert(path: Path, *, to: Path, num_heads: int | None = None) -> None:
    """Convert the authors' weights, or latent-diffusion's, to files that are safe to open and to publish.

    Args:
        path: Checkpoint of the authors' training script (.pt), or a class-conditional one of latent-diffusion (.ckpt).
        to: Folder for model.safetensors and config.json; made where it is missing.
        num_heads: Attention heads at the finest resolution. Only needed for sizes that were not published.
    """
    denoiser, config = load_official(path, num_heads)
    save_pretrained(denoiser, config, to)
    print(f"{to}: denoiser {config.denoiser}, {config.num_categories} categories, {config.latent_channels} channels.")


def save_pretrained(denoiser: Denoiser, config: DenoiserConfig, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` to ``folder``.

    Raises:
        OSError: If they cannot be written.
    """
    tensors = {key: tensor.contiguous() for key, tensor in denoiser.state_dict().items()}
    with atomic_write(Path(folder, WEIGHTS_FILE)) as staged, naming(Path(folder, WEIGHTS_FILE), SafetensorError):
        save_file(tensors, staged, metadata={"format": "pt"})
    with atomic_write(Path(folder, CONFIG_FILE)) as staged:
        staged.write_text(config.to_json(), encoding="utf-8")


def load_pretrained(source: str | Path) -> tuple[Denoiser, DenoiserConfig]:
    """Load the files that :func:`convert` or :func:`save_pretrained` wrote.

    Args:
        source: The folder, or the hub id of its published copy; the hub is used only if there is no such folder.

    Returns:
        tuple[Denoiser, DenoiserConfig]: The denoiser, in evaluation mode, and its description.

    Raises:
        OSError: If the source is neither local nor reachable.
        ValueError: If it contains something else.
    """
    folder = Path(source)
    if folder.is_file():
        msg = f"weights={str(source)!r} is a file. Run `decodiff convert {source} --to DIR` and give weights=DIR."
        raise ValueError(msg)
    if not folder.is_dir():
        folder = _download(str(source))
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (folder / name).is_file()]
    if missing:
        msg = (
            f"weights={str(source)!r} has no {' and no '.join(missing)}. "
            "Give a folder or hub id of what `decodiff convert` writes."
        )
        raise ValueError(msg)
    try:
        config = DenoiserConfig.from_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        denoiser, state = empty_denoiser(config), load_file(folder / WEIGHTS_FILE)
        refuse_other_weights(source, state, denoiser.state_dict())
        return fill(denoiser, state), config
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise any exception
        msg = f"weights={str(source)!r} cannot be loaded: {error} Run `decodiff convert` again."
        raise ValueError(msg) from error


def _download(hub_id: str) -> Path:
    """Folder of the local copy of a repository on the hub, downloaded if necessary.

    Raises:
        OSError: If it can be neither found nor downloaded.
    """
    from huggingface_hub import snapshot_download

    logger.info("Looking for the weights %s on the hub.", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except (OSError, ValueError) as error:  # no network or no such repository; not a valid id
        msg = (
            f"weights={hub_id!r} is neither a local folder nor in the local cache, and could not be fetched. "
            f"Where there is a network, run `hf download {hub_id} --local-dir DIR` and give weights=DIR."
        )
        raise OSError(msg) from error
