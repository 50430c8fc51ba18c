"""The method against numbers recorded from the authors' implementation, at the tolerances stated beside them.

``python tests/parity/test_method.py`` prints the table: fixture, largest difference, tolerance.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decodiff_anomalib.corruption import patch_size_probabilities, random_patch_mask, shuffle_patches
from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser, DenoiserSize, build_denoiser
from decodiff_anomalib.discrepancy import fuse, gaussian_blur, latent_discrepancy, pixel_discrepancy, resize_mirrored
from decodiff_anomalib.schedule import DeviationSchedule

Comparison = tuple[str, float, float]


def difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """Largest absolute difference."""
    return float((ours.double() - torch.as_tensor(theirs).double()).abs().max())


def load(parity_dir: Path, name: str) -> dict[str, torch.Tensor]:
    """Arrays of an ``.npz``, float16 widened to float32."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(parity_dir / name).items()}
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in arrays.items()}


def load_denoiser(parity_dir: Path, name: str, dtype: torch.dtype = torch.float32) -> Denoiser:
    """A recorded network in our module, through the recorded key pairs."""
    config = json.loads((parity_dir / "unet_small_config.json").read_text())[name]
    layout = config["diffusers_config"]
    key_map = json.loads((parity_dir / "unet_key_map.json").read_text())
    state = {key: value.to(dtype) for key, value in load_file(parity_dir / f"{name}.safetensors").items()}

    width = layout["block_out_channels"][0]
    size = DenoiserSize(
        width,
        config["head_layout"][0]["dim_head"],
        layout["cross_attention_dim"],
        multipliers=tuple(channels // width for channels in layout["block_out_channels"]),
    )
    denoiser = build_denoiser(size, num_categories=config["config"]["ncls"], sample_size=16)
    denoiser.category_embedding.weight.data = state.pop("cond_stage_model.embedding.weight")
    denoiser.unet.load_state_dict({key_map[key]: value for key, value in state.items()})
    return denoiser.to(dtype).eval()


def compare_schedule(parity_dir: Path) -> Iterator[Comparison]:
    recorded = json.loads((parity_dir / "schedule.json").read_text())
    schedule = DeviationSchedule()
    for name, values in recorded["train"].items():
        ours = {
            "alphas_cumprod": schedule.alphas_cumprod,
            "sqrt_alphas_cumprod": schedule.alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - schedule.alphas_cumprod).sqrt(),
        }.get(name)
        if ours is not None:
            yield f"schedule.json {name}", difference(ours, np.array(values)), 1e-12
    for name, respaced in recorded["inference"].items():
        if respaced["error"]:
            continue
        steps = DeviationSchedule(num_inference_steps=len(respaced["timestep_map"]))
        yield f"schedule.json {name} timesteps", difference(steps.timesteps.flip(0), respaced["timestep_map"]), 0
    for name, starts in recorded["start_t"].items():
        start = starts[-1]
        steps = DeviationSchedule(num_inference_steps=len(start["unet_t"]))
        zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        weights = [float(-steps.step(zero, one, index)) for index in range(steps.num_inference_steps)]
        yield f"schedule.json {name} step weights", difference(torch.tensor(weights), start["step_weight"]), 2e-7


def compare_forward(parity_dir: Path) -> Iterator[Comparison]:
    recorded, schedule = load(parity_dir, "forward.npz"), DeviationSchedule()
    for p in (1, 2, 4, 8, 16):
        arguments = recorded["x0"], recorded["noise"], recorded[f"mask_p{p}"], recorded["t"]
        yield f"forward.npz x_t_p{p}", difference(schedule.corrupt(*arguments), recorded[f"x_t_p{p}"]), 2e-6
        target = schedule.target(*arguments)
        yield f"forward.npz deviation_p{p}", difference(target, recorded[f"deviation_p{p}"]), 0
        loss = (target - recorded["pred"]).square().flatten(1).mean(1)
        yield f"forward.npz loss_p{p}", difference(loss, recorded[f"loss_p{p}"]), 2e-6


def compare_corruption(parity_dir: Path) -> Iterator[Comparison]:
    recorded, schedule = load(parity_dir, "corruption.npz"), DeviationSchedule()
    for p in (1, 2, 4, 8):
        masks = {}
        for kind in ("mask", "noise_mask"):
            stem = f"p{p}_{kind.replace('noise_mask', 'noise')}"
            ratio, permutations = recorded[f"{stem}_ratio"], recorded[f"{stem}_perm"]
            masks[kind] = random_patch_mask(3, (16, 16), p, ratios=ratio, permutations=permutations)
            yield f"corruption.npz p{p}_{kind}", difference(masks[kind][:, 0], recorded[f"p{p}_{kind}"]), 0
        shuffled = shuffle_patches(recorded["x0"], p, permutation=recorded[f"p{p}_patch_perm"])
        yield f"corruption.npz p{p}_shuffled", difference(shuffled, recorded[f"p{p}_shuffled"]), 0
        ramp = shuffle_patches(recorded["ramp"], p, permutation=recorded[f"p{p}_patch_perm"])
        yield f"corruption.npz p{p}_shuffled_ramp", difference(ramp, recorded[f"p{p}_shuffled_ramp"]), 0
        noise = masks["noise_mask"] * recorded[f"p{p}_gaussian"] + (1 - masks["noise_mask"]) * shuffled
        yield f"corruption.npz p{p}_noise", difference(noise, recorded[f"p{p}_noise"]), 0
        arguments = recorded["x0"], noise, masks["mask"], recorded["t"]
        yield f"corruption.npz p{p}_x_t", difference(schedule.corrupt(*arguments), recorded[f"p{p}_x_t"]), 2e-6
        yield f"corruption.npz p{p}_target", difference(schedule.target(*arguments), recorded[f"p{p}_target"]), 0
    for case in json.loads((parity_dir / "corruption.json").read_text())["rounding"]:
        mask = random_patch_mask(
            1, (case["side"],) * 2, case["p"], ratios=torch.tensor([case["ratio"]], dtype=torch.float64)
        )
        kept = float(mask.sum()) / case["p"] ** 2
        yield f"corruption.json rounding r={case['ratio']} N={case['tokens']}", abs(kept - case["kept"]), 0


@torch.no_grad()
def compare_denoiser(parity_dir: Path) -> Iterator[Comparison]:
    for name in ("unet_small", "unet_xl_like"):
        recorded = load(parity_dir, f"{name}_io.npz")
        for precision, dtype, tolerance in (("f32", torch.float32, 2e-5), ("f64", torch.float64, 1e-9)):
            denoiser = load_denoiser(parity_dir, name, dtype)
            for i in range(2):
                if f"x_{i}" in recorded:
                    latents, category = recorded[f"x_{i}"].to(dtype), recorded[f"class_{i}"]
                    ours = denoiser(latents, recorded[f"t_{i}"], category)
                    yield (
                        f"{name}_io.npz y_{i}_{precision}",
                        difference(ours, recorded[f"y_{i}_{precision}"]),
                        tolerance,
                    )
                    context = denoiser.category_embedding(recorded[f"class3_{i}"])
                    ours = denoiser.unet(latents, recorded[f"t_{i}"], encoder_hidden_states=context).sample
                    yield (
                        f"{name}_io.npz y3_{i}_{precision}",
                        difference(ours, recorded[f"y3_{i}_{precision}"]),
                        tolerance,
                    )


@torch.no_grad()
def compare_sampling(parity_dir: Path) -> Iterator[Comparison]:
    recorded = load(parity_dir, "sampling.npz")
    for precision, dtype, tolerance in (("", torch.float32, 2e-5), ("_f64", torch.float64, 1e-9)):
        denoiser = load_denoiser(parity_dir, "unet_small", dtype)
        for tag, count, first in [
            *((f"ddim{n}", n, 0) for n in (2, 3, 4, 5, 10)),
            ("one", 1, 0),
            ("ddim10_start4", 10, 6),
            ("ddim5_start3", 5, 2),
        ]:
            schedule = DeviationSchedule(num_inference_steps=count)
            latents = recorded["encoded"].to(dtype)
            states = []
            for index in range(first, count):
                timesteps = schedule.timesteps[index].expand(len(latents))
                latents = schedule.step(latents, denoiser(latents, timesteps, recorded["class_index"]), index)
                states.append(latents)
            worst = difference(torch.stack(states), recorded[f"{tag}_steps{precision}"])
            yield f"sampling.npz {tag}_steps{precision}", worst, tolerance


def compare_discrepancy(parity_dir: Path) -> Iterator[Comparison]:
    recorded = load(parity_dir, "anomaly_map.npz")
    for size in (64, 256):
        names = ("decoded_input", "decoded_output", "latent_input", "latent_output")
        decoded_in, decoded_out, latent_in, latent_out = (recorded[f"s{size}_{name}"] for name in names)
        pixel = pixel_discrepancy(decoded_out, decoded_in)
        latent = latent_discrepancy(latent_out, latent_in, (size, size))
        maps = {"pixel": pixel, "latent": latent}
        maps |= {mode: fuse(pixel, latent, mode=mode) for mode in ("geometric", "arithmetic")}
        for name, ours in maps.items():
            yield f"anomaly_map.npz s{size}_{name}", difference(ours[:, 0], recorded[f"s{size}_{name}"]), 1e-6
    for sigma in (1, 3):
        impulse = torch.zeros(1, 1, 33, 33)
        impulse[..., 16, 16] = 1
        ours = gaussian_blur(impulse, sigma)[0, 0]
        yield (
            f"anomaly_map.npz impulse_gauss_sigma{sigma}",
            difference(ours, recorded[f"impulse_gauss_sigma{sigma}"]),
            1e-6,
        )
        ours = gaussian_blur(recorded["edge_in"][None, None], sigma)[0, 0]
        yield f"anomaly_map.npz edge_gauss_sigma{sigma}", difference(ours, recorded[f"edge_gauss_sigma{sigma}"]), 1e-6
    for side in (64, 28):
        ours = resize_mirrored(recorded["resize_in"][None, None], (side, side))[0, 0]
        yield f"anomaly_map.npz resize_{side}", difference(ours, recorded[f"resize_{side}"]), 1e-6


COMPARISONS = (
    compare_schedule,
    compare_forward,
    compare_corruption,
    compare_denoiser,
    compare_sampling,
    compare_discrepancy,
)


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda compare: compare.__name__.removeprefix("compare_"))
def test_equals_the_reference(compare, parity_dir: Path, assert_within_tolerance) -> None:
    assert_within_tolerance(compare(parity_dir))


@pytest.mark.parametrize("size", ["XS", "S", "M", "L", "XL"])
def test_published_sizes(size: str, parity_dir: Path) -> None:
    recorded = json.loads((parity_dir / "unet_sizes.json").read_text())[f"UNet_{size}"]
    with torch.device("meta"):
        for categories in (15, 12):
            denoiser = build_denoiser(size, num_categories=categories)
            count = sum(parameter.numel() for parameter in denoiser.parameters())
            assert count == recorded[f"parameters_ncls{categories}"]
    widths = [layout["channels"] for layout in recorded["head_layout"]]
    assert [DENOISER_SIZES[size].width * multiplier for multiplier in (1, 2, 4)] == widths
    heads = [block.attentions[0].transformer_blocks[0].attn1.heads for block in denoiser.unet.down_blocks]
    assert heads == [layout["heads"] for layout in recorded["head_layout"]]


def test_patch_size_distribution(parity_dir: Path) -> None:
    assert patch_size_probabilities(32, 32) == {1: 0.30, 2: 0.25, 4: 0.20, 8: 0.15, 16: 0.10}
    assert list(patch_size_probabilities(28, 28)) == [1, 2, 4, 14]  # 8 does not divide 28: the original stops here
    assert patch_size_probabilities(64, 64)[32] == pytest.approx(0.10)


if __name__ == "__main__":
    for compare in COMPARISONS:
        for name, found, tolerance in compare(Path(__file__).parents[3] / "shared" / "parity"):
            print(f"{name:60s} {found:9.2e}  {tolerance:9.2e}  {'ok' if found <= tolerance else 'FAIL'}")
