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

from decodiff_anomalib.corruption import (
    MAX_MASK_RATIO,
    MAX_NOISE_RATIO,
    patch_size_probabilities,
    random_patch_mask,
    shuffle_patches,
)
from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser, DenoiserSize, build_denoiser
from decodiff_anomalib.discrepancy import (
    LATENT_CLIP,
    LATENT_SIGMA,
    PIXEL_CLIP,
    fuse,
    gaussian_blur,
    latent_discrepancy,
    pixel_discrepancy,
    resize_mirrored,
    saturate,
)
from decodiff_anomalib.schedule import DeviationSchedule

Comparison = tuple[str, float, float]
FOLDERS = (Path(__file__).parent / "data", Path(__file__).parents[3] / "shared" / "parity")


def difference(found: torch.Tensor, recorded: np.ndarray) -> float:
    """Largest absolute difference."""
    return float((found.double() - torch.as_tensor(recorded).double()).abs().max())


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
    runs = {"train": recorded["train"]} | {name: run for name, run in recorded["inference"].items() if not run["error"]}
    for name, values in runs.items():
        schedule = DeviationSchedule(num_inference_steps=values["num_timesteps"])
        kept = schedule.timesteps.flip(0)
        alphas = schedule.alphas_cumprod[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        tables = {
            "betas": 1 - alphas / before,
            "alphas_cumprod": alphas,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": alphas.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
            "deviation_coefficient": (1 - alphas.sqrt()) / (1 - alphas).sqrt(),
        }
        for table, found in tables.items():
            yield f"schedule.json {name} {table}", difference(found, np.array(values[table])), 1e-12
        exact = {
            "sqrt_one_minus_alphas_cumprod_float32": schedule.scales[kept],
            "deviation_coefficient_float32": schedule.deviation_coefficients[kept],
            "timestep_map": kept,
            "unet_t_in_inference_order": schedule.timesteps,
        }
        for table, found in exact.items():
            yield f"schedule.json {name} {table}", difference(found, np.array(values[table])), 0
    for name, starts in recorded["start_t"].items():
        for start in starts:
            first = len(starts) - start["start_t"]
            steps = DeviationSchedule(num_inference_steps=len(starts))
            zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
            weights = [float(-steps.step(zero, one, index)) for index in range(first, len(starts))]
            stem = f"schedule.json {name} from {start['start_t']}"
            yield f"{stem}, unet_t", difference(steps.timesteps[first:], np.array(start["unet_t"])), 0
            yield f"{stem}, step_weight", difference(torch.tensor(weights), start["step_weight"]), 2e-7


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
    facts = json.loads((parity_dir / "corruption.json").read_text())
    facts["cases"] = {case["p"]: case for case in facts["cases"]}
    for p in (1, 2, 4, 8):
        masks = {}
        for kind in ("mask", "noise_mask"):
            stem = f"p{p}_{kind.replace('noise_mask', 'noise')}"
            ratio, permutations = recorded[f"{stem}_ratio"], recorded[f"{stem}_perm"]
            masks[kind] = random_patch_mask(3, (16, 16), p, ratios=ratio, permutations=permutations)
            yield f"corruption.npz p{p}_{kind}", difference(masks[kind][:, 0], recorded[f"p{p}_{kind}"]), 0
            kept = masks[kind].sum((1, 2, 3)) / p**2
            published = facts["cases"][p][kind.replace("mask", "kept")]
            yield f"corruption.json p={p} {kind}, kept", difference(kept, np.array(published)), 0
        shuffled = shuffle_patches(recorded["x0"], p, permutation=recorded[f"p{p}_patch_perm"])
        yield f"corruption.npz p{p}_shuffled", difference(shuffled, recorded[f"p{p}_shuffled"]), 0
        ramp = shuffle_patches(recorded["ramp"], p, permutation=recorded[f"p{p}_patch_perm"])
        yield f"corruption.npz p{p}_shuffled_ramp", difference(ramp, recorded[f"p{p}_shuffled_ramp"]), 0
        noise = masks["noise_mask"] * recorded[f"p{p}_gaussian"] + (1 - masks["noise_mask"]) * shuffled
        yield f"corruption.npz p{p}_noise", difference(noise, recorded[f"p{p}_noise"]), 0
        arguments = recorded["x0"], noise, masks["mask"], recorded["t"]
        yield f"corruption.npz p{p}_x_t", difference(schedule.corrupt(*arguments), recorded[f"p{p}_x_t"]), 2e-6
        yield f"corruption.npz p{p}_target", difference(schedule.target(*arguments), recorded[f"p{p}_target"]), 0
    for case in facts["rounding"]:
        mask = random_patch_mask(
            1, (case["side"],) * 2, case["p"], ratios=torch.tensor([case["ratio"]], dtype=torch.float64)
        )
        kept = float(mask.sum()) / case["p"] ** 2
        yield f"corruption.json rounding r={case['ratio']} N={case['tokens']}", abs(kept - case["kept"]), 0


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
            worst = difference(latents, recorded[f"{tag}_final{precision}"])
            yield f"sampling.npz {tag}_final{precision}", worst, tolerance
            asked = schedule.timesteps[first:, None].expand(-1, len(latents))
            yield f"sampling.npz {tag}_unet_t", difference(asked, recorded[f"{tag}_unet_t"]), 0


MAP_INPUTS = ("decoded_input", "decoded_output", "latent_input", "latent_output")


def compare_maps(parity_dir: Path, size: int) -> Iterator[Comparison]:
    recorded = load(parity_dir, "anomaly_map.npz")
    decoded_in, decoded_out, latent_in, latent_out = (recorded[f"s{size}_{name}"] for name in MAP_INPUTS)
    pixel = pixel_discrepancy(decoded_out, decoded_in)
    latent = latent_discrepancy(latent_out, latent_in, (size, size))
    maps = {"pixel": pixel, "latent": latent}
    maps |= {mode: fuse(pixel, latent, mode=mode) for mode in ("geometric", "arithmetic")}
    for name, found in maps.items():
        yield f"anomaly_map.npz s{size}_{name}", difference(found[:, 0], recorded[f"s{size}_{name}"]), 1e-6


def compare_large_maps(parity_dir: Path) -> Iterator[Comparison]:
    yield from compare_maps(parity_dir, 256)


def compare_discrepancy(parity_dir: Path) -> Iterator[Comparison]:
    yield from compare_maps(parity_dir, 64)
    recorded = load(parity_dir, "anomaly_map.npz")
    decoded_in, decoded_out, latent_in, latent_out = (recorded[f"s64_{name}"] for name in MAP_INPUTS)
    pixel_raw = (decoded_out - decoded_in).abs().amax(1)
    latent_raw = (latent_out - latent_in).abs().mean(1)
    stages = {
        "pixel_raw": pixel_raw,
        "pixel_clipped": saturate(pixel_raw, PIXEL_CLIP),
        "latent_raw": latent_raw,
        "latent_clipped": saturate(latent_raw, LATENT_CLIP),
        "latent_smoothed": gaussian_blur(saturate(latent_raw, LATENT_CLIP)[:, None], LATENT_SIGMA)[:, 0],
    }
    for name, found in stages.items():
        yield f"anomaly_map.npz s64_{name}", difference(found, recorded[f"s64_{name}"]), 1e-6
    for sigma in (1, 3):
        impulse = torch.zeros(1, 1, 33, 33)
        impulse[..., 16, 16] = 1
        found = gaussian_blur(impulse, sigma)[0, 0]
        yield (
            f"anomaly_map.npz impulse_gauss_sigma{sigma}",
            difference(found, recorded[f"impulse_gauss_sigma{sigma}"]),
            1e-6,
        )
        found = gaussian_blur(recorded["edge_in"][None, None], sigma)[0, 0]
        yield f"anomaly_map.npz edge_gauss_sigma{sigma}", difference(found, recorded[f"edge_gauss_sigma{sigma}"]), 1e-6
    for side in (64, 28):
        found = resize_mirrored(recorded["resize_in"][None, None], (side, side))[0, 0]
        yield f"anomaly_map.npz resize_{side}", difference(found, recorded[f"resize_{side}"]), 1e-6


COMPARISONS = (compare_schedule, compare_forward, compare_corruption, compare_discrepancy)
LARGE_COMPARISONS = (compare_sampling, compare_large_maps)


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda compare: compare.__name__.removeprefix("compare_"))
def test_equals_the_reference(compare, parity_dir: Path, assert_within_tolerance) -> None:
    assert_within_tolerance(compare(parity_dir))


@pytest.mark.parametrize("compare", LARGE_COMPARISONS, ids=lambda compare: compare.__name__.removeprefix("compare_"))
def test_equals_the_large_reference(compare, large_parity_dir: Path, assert_within_tolerance) -> None:
    assert_within_tolerance(compare(large_parity_dir))


@pytest.mark.parametrize("size", ["XS", "S", "M", "L", "XL"])
def test_published_sizes(size: str, parity_dir: Path) -> None:
    recorded = json.loads((parity_dir / "unet_sizes.json").read_text())[f"UNet_{size}"]
    twin = next(iter(json.loads((parity_dir / "unet_parity.json").read_text()).values()))["cases"]
    with torch.device("meta"):
        for categories in (15, 12):
            denoiser = build_denoiser(size, num_categories=categories)
            count = sum(parameter.numel() for parameter in denoiser.parameters())
            assert count == recorded[f"parameters_ncls{categories}"]
    assert len(denoiser.state_dict()) == recorded["state_dict_keys"]
    dropouts = [module for module in denoiser.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert {module.p for module in dropouts} == {0.4}
    assert [len(dropouts)] * 2 == twin["UNet_XS_full_size (2, 4, 32, 32) ctx1"]["dropout_modules_reference_diffusers"]
    widths = [layout["channels"] for layout in recorded["head_layout"]]
    assert [DENOISER_SIZES[size].width * multiplier for multiplier in (1, 2, 4)] == widths
    attention = [block.attentions[0].transformer_blocks[0].attn1 for block in denoiser.unet.down_blocks]
    assert [(layer.heads, layer.inner_dim) for layer in attention] == [
        (layout["heads"], layout["inner_dim"]) for layout in recorded["head_layout"]
    ]


def test_training_distribution(parity_dir: Path) -> None:
    recorded = json.loads((parity_dir / "corruption.json").read_text())["training_distribution"]
    stops = {(case["image_size"], case["p"]) for case in recorded["incompatible_patch_sizes"]}
    for size, patches in recorded["mask_patch_sizes"].items():
        table = dict(zip(patches, recorded["mask_patch_probabilities"][size], strict=True))
        possible = {p: share for p, share in table.items() if (int(size), p) not in stops}
        share = sum(possible.values())  # patches that do not divide the latents stop the authors' program
        found = patch_size_probabilities(int(size) // 8, int(size) // 8)
        assert found == pytest.approx({p: chance / share for p, chance in possible.items()})
    assert recorded["mask_ratio"]["high"] == MAX_MASK_RATIO
    assert recorded["patch_shuffle_ratio"]["high"] == MAX_NOISE_RATIO
    assert DeviationSchedule().num_train_timesteps == recorded["t"]["high_exclusive"]


if __name__ == "__main__":
    for folder, comparisons in zip(FOLDERS, (COMPARISONS, LARGE_COMPARISONS), strict=True):
        for compare in comparisons if folder.is_dir() else ():
            for name, found, tolerance in compare(folder):
                print(f"{name:60s} {found:9.2e}  {tolerance:9.2e}  {'ok' if found <= tolerance else 'FAIL'}")
