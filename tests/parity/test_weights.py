"""The authors' checkpoints and a training step against recorded numbers, at the tolerances stated beside them.

``python tests/parity/test_weights.py`` prints the table: fixture, largest difference, tolerance.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser
from decodiff_anomalib.schedule import DeviationSchedule
from decodiff_anomalib.weights import (
    CATEGORY_TABLE,
    DenoiserConfig,
    convert,
    load_official,
    load_pretrained,
    official_key,
    to_official_state,
)
from decodiff_anomalib.weights.denoiser_config import empty_denoiser
from decodiff_anomalib.weights.official import recognise_size

Comparison = tuple[str, float, float]
FOLDERS = (Path(__file__).parent / "data", Path(__file__).parents[3] / "shared" / "parity")

CHECKPOINT = "official_like_checkpoint"


def difference(actual: torch.Tensor, reference: np.ndarray | torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((actual.detach().double() - torch.as_tensor(reference).double()).abs().max())


def read_official(parity_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of the recorded checkpoint as stored."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(parity_dir / f"{CHECKPOINT}.pt", weights_only=True)["model"]


def load_recorded(parity_dir: Path, name: str) -> Denoiser:
    """A recorded network, loaded through a checkpoint in the authors' layout."""
    if name == CHECKPOINT:
        return load_official(parity_dir / f"{name}.pt")[0]
    state = {key: tensor.float() for key, tensor in load_file(parity_dir / f"{name}.safetensors").items()}
    with TemporaryDirectory() as folder:
        torch.save({"model": state, "args": argparse.Namespace()}, Path(folder) / "last.pt")
        return load_official(Path(folder) / "last.pt")[0]


def shape_only(size: str, num_categories: int) -> Denoiser:
    """A network of a published size, without memory for its weights."""
    return empty_denoiser(DenoiserConfig(DENOISER_SIZES[size], 4, num_categories, None, None, "decodiff"))


@torch.no_grad()
def compare_outputs(parity_dir: Path, names: Sequence[str] = ("unet_xl_like",)) -> Iterator[Comparison]:
    for name in names:
        recorded = np.load(parity_dir / f"{name}_io.npz")
        for precision, dtype, tolerance in (("f32", torch.float32, 2e-5), ("f64", torch.float64, 1e-9)):
            denoiser = load_recorded(parity_dir, name).to(dtype)
            for i in range(2):
                if f"x_{i}" not in recorded:
                    continue
                latents, timesteps = (
                    torch.from_numpy(recorded[f"x_{i}"]).to(dtype),
                    torch.from_numpy(recorded[f"t_{i}"]),
                )
                output = denoiser(latents, timesteps, torch.from_numpy(recorded[f"class_{i}"]))
                yield f"{name}_io.npz y_{i}_{precision}", difference(output, recorded[f"y_{i}_{precision}"]), tolerance
                context = denoiser.category_embedding(torch.from_numpy(recorded[f"class3_{i}"]))
                output = denoiser.unet(latents, timesteps, encoder_hidden_states=context).sample
                yield (
                    f"{name}_io.npz y3_{i}_{precision}",
                    difference(output, recorded[f"y3_{i}_{precision}"]),
                    tolerance,
                )


def compare_round_trip(parity_dir: Path) -> Iterator[Comparison]:
    """Checkpoint -> folder -> denoiser -> the authors' names: every tensor bit-identical."""
    reference = read_official(parity_dir)
    with TemporaryDirectory() as folder:
        convert(parity_dir / f"{CHECKPOINT}.pt", to=Path(folder))
        state = to_official_state(load_pretrained(folder)[0])
    yield f"{CHECKPOINT}.pt names there and back", len(state.keys() ^ reference.keys()), 0
    unequal = [
        key
        for key, tensor in reference.items()
        if not torch.equal(state[key], tensor) or state[key].dtype != tensor.dtype
    ]
    yield f"{CHECKPOINT}.pt tensors there and back", len(unequal), 0


def compare_keys(parity_dir: Path) -> Iterator[Comparison]:
    """Names and shapes of all weights are those recorded."""
    recorded = json.loads((parity_dir / "unet_key_map.json").read_text())
    for size, keys in json.loads((parity_dir / "unet_keys.json").read_text()).items():
        denoiser = shape_only(size.removeprefix("UNet_"), num_categories=15)
        by_official_name = {official_key(key, 2, (True,) * 3): key for key in denoiser.state_dict()}
        key_map = {name: key.removeprefix("unet.") for name, key in by_official_name.items()} | {CATEGORY_TABLE: None}
        yield f"unet_key_map.json {size}", len(key_map.items() ^ recorded.items()), 0
        shapes = {key: list(tensor.shape) for key, tensor in to_official_state(denoiser).items()}
        wrong = [key for key in shapes.keys() | keys.keys() if shapes.get(key) != keys.get(key)]
        yield f"unet_keys.json {size}", len(wrong), 0


def compare_train_step(parity_dir: Path) -> Iterator[Comparison]:
    """One step with the published optimiser, from ``unet_small``, without dropout."""
    recorded = {key: torch.from_numpy(value) for key, value in np.load(parity_dir / "train_step.npz").items()}
    facts = json.loads((parity_dir / "train_step.json").read_text())
    denoiser, schedule = load_recorded(parity_dir, "unet_small"), DeviationSchedule()
    arguments = recorded["x0"], recorded["noise"], recorded["mask"], recorded["t"]
    deviation = schedule.target(*arguments)
    predicted = denoiser(schedule.corrupt(*arguments), recorded["t"], recorded["class_index"])
    losses = (deviation - predicted).square().mean(dim=(1, 2, 3))
    yield "train_step.npz loss_per_sample", difference(losses, recorded["loss_per_sample"]), 2e-6
    loss = losses.mean() / facts["accumulation_divisor"]
    yield "train_step.npz loss_backward", difference(loss, recorded["loss_backward"]), 2e-6

    published = facts["adamw"]
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=published["lr"],
        betas=tuple(published["betas"]),
        eps=published["eps"],
        weight_decay=published["weight_decay"],
    )
    loss.backward()
    gradients = {
        official_key(name, 2, (True,) * 3): parameter.grad.clone() for name, parameter in denoiser.named_parameters()
    }
    optimizer.step()
    weights = to_official_state(denoiser)

    zero = set(facts["zero_gradient_keys"])
    yield "train_step.json zero_gradient_keys", max(float(gradients[key].norm()) for key in zero), 1e-7
    norms = [abs(float(gradients[key].norm()) - facts["gradient_norms"][key]) for key in gradients if key not in zero]
    yield f"train_step.json gradient_norms of {len(norms)} tensors", max(norms), 1e-6
    yield "train_step.json gradient_norms, names", len(gradients.keys() ^ facts["gradient_norms"].keys()), 0
    for name, value in recorded.items():
        kind, _, key = name.partition("/")
        if kind == "grad":
            yield f"train_step.npz {name}", difference(gradients[key], value), 1e-6
        elif kind == "after_adamw":
            # Adam's first step has the size of the learning rate and the sign of the gradient, even of a tiny one.
            found = (weights[key].double() - value.double()).abs()
            certain = recorded[f"grad/{key}"].abs() >= 1e-6
            for label, chosen, tolerance in (("", certain, 1e-6), (" where the gradient is < 1e-6", ~certain, 2e-4)):
                if chosen.any():
                    yield f"train_step.npz {name}{label}", float(found[chosen].max()), tolerance


def compare_large_outputs(parity_dir: Path) -> Iterator[Comparison]:
    yield from compare_outputs(parity_dir, (CHECKPOINT, "unet_small"))


COMPARISONS = (compare_outputs, compare_keys)
LARGE_COMPARISONS = (compare_large_outputs, compare_round_trip, compare_train_step)


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda compare: compare.__name__.removeprefix("compare_"))
def test_equals_the_reference(compare, parity_dir: Path, assert_within_tolerance) -> None:
    assert_within_tolerance(compare(parity_dir))


@pytest.mark.parametrize("compare", LARGE_COMPARISONS, ids=lambda compare: compare.__name__.removeprefix("compare_"))
def test_equals_the_large_reference(compare, large_parity_dir: Path, assert_within_tolerance) -> None:
    assert_within_tolerance(compare(large_parity_dir))


def test_recognises_the_shape(parity_dir: Path) -> None:
    assert_shape(parity_dir, "unet_xl_like")


@pytest.mark.parametrize("name", [CHECKPOINT, "unet_small"])
def test_recognises_the_shape_of_large_networks(name: str, large_parity_dir: Path) -> None:
    assert_shape(large_parity_dir, name)


def assert_shape(parity_dir: Path, name: str) -> None:
    recorded = json.loads((parity_dir / "unet_small_config.json").read_text())[name]
    layout, denoiser = recorded["diffusers_config"], load_recorded(parity_dir, name)
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim"):
        found = denoiser.unet.config[key]
        assert (list(found) if isinstance(found, tuple) else found) == layout[key], key
    assert denoiser.category_embedding.num_embeddings == recorded["config"]["ncls"]
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == recorded["parameters"]


@pytest.mark.parametrize("size", ["XS", "S", "M", "L", "XL"])
def test_recognises_published_sizes(size: str) -> None:
    state = to_official_state(shape_only(size, num_categories=12))
    assert recognise_size(state, num_heads=None) == DENOISER_SIZES[size]


def test_reads_the_description_of_the_checkpoint(large_parity_dir: Path, parity_dir: Path) -> None:
    _, info = load_official(large_parity_dir / f"{CHECKPOINT}.pt")
    recorded = json.loads((parity_dir / "class_index.json").read_text())["mvtec"]
    assert info.num_categories == 15
    assert {name: row for row, name in enumerate(info.categories)} == recorded
    assert (info.codec, info.source, info.latent_channels) == ("stabilityai/sd-vae-ft-ema", "decodiff", 4)


if __name__ == "__main__":
    for folder, comparisons in zip(FOLDERS, (COMPARISONS, LARGE_COMPARISONS), strict=True):
        for compare in comparisons if folder.is_dir() else ():
            for name, found, tolerance in compare(folder):
                print(f"{name:60s} {found:9.2e}  {tolerance:9.2e}  {'ok' if found <= tolerance else 'FAIL'}")
