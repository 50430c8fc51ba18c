"""From image to map, with a denoiser whose prediction is known."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.calibration import prediction_limit
from decodiff_anomalib.corruption import ReplayBuffer
from decodiff_anomalib.discrepancy import resize_mirrored
from decodiff_anomalib.exemplars import REPLACED_RATE, Exemplars
from decodiff_anomalib.presets import PRESETS, Settings, resolve
from decodiff_anomalib.torch_model import DeCoDiffModel

PLAIN = resolve(
    "balanced",
    {
        "latents": {"backbone": "none", "references": 0},
        "corruption": {"noise": 0.0},
        "training": {"loss": "absolute"},
        "maps": {"levels": {"pixel": 1.0, "latent": 1.0}},
        "correction": {"num_steps": 3},
    },
)


def change(settings: Settings, group: str, **values: object) -> Settings:
    """Settings with other values in one group."""
    return replace(settings, **{group: replace(getattr(settings, group), **values)})


class KnowsTheDefect(nn.Module):
    """Predicts the deviation of one known image exactly."""

    def __init__(self, deviation: torch.Tensor) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        return self.deviation.expand_as(latents)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) - 0.5


def test_a_known_defect_is_corrected_and_mapped_where_it_is() -> None:
    model = DeCoDiffModel(PLAIN, (64, 96)).eval()
    normal = images()
    defective = normal.clone()
    defective[:, :, 16:24, 40:48] = 1
    lone = torch.zeros(2, dtype=torch.long)
    clean, deviated = model.encode(normal, lone), model.encode(defective, lone)
    model.denoiser = KnowsTheDefect(deviated - clean)
    outputs = model(defective)
    scale = model.schedule.scales[model.schedule.timesteps[0]]
    assert scale == pytest.approx(1, abs=2e-5)
    taken_away = model.decode(deviated, lone) - model.decode(clean, lone)
    torch.testing.assert_close(outputs.correction, defective - taken_away, atol=1e-3, rtol=0)
    assert torch.equal(outputs.reconstruction, defective)
    assert outputs.anomaly_map.shape == (2, 1, 64, 96)
    row, column = divmod(int(outputs.anomaly_map[0, 0].argmax()), 96)
    assert 14 <= row < 26
    assert 38 <= column < 50
    assert torch.equal(outputs.pred_score, model.score(outputs.anomaly_map))
    assert (outputs.anomaly_map[0, 0, 50:, :20] == 1).all()
    assert outputs.pred_score[0] > 1.5


def test_the_score_is_the_maximum_of_the_map_or_the_mean_of_its_highest_cells() -> None:
    maps = torch.zeros(1, 1, 64, 96)  # 8 x 12 cells
    maps[..., 8:16, 16:40], maps[..., 50, 3] = 2.0, 5.0  # three cells, one pixel
    model = DeCoDiffModel(PLAIN, (64, 96))
    for share, score in {0: 5, 0.01: 2, 2 / 96: 2, 4 / 96: (6 + 5 / 64) / 4, 1: (6 + 5 / 64) / 96}.items():
        model.settings = change(PLAIN, "scoring", top_share=share)
        assert model.score(maps).item() == pytest.approx(score, rel=1e-6)
    assert PRESETS["paper"].scoring.top_share == 0
    assert PRESETS["balanced"].scoring.top_share == PRESETS["fast"].scoring.top_share == 0.01
    with pytest.raises(ValueError, match=r"scoring\.top_share=2 must be between 0 and 1"):
        change(PLAIN, "scoring", top_share=2)


def test_an_untrained_model_corrects_nothing() -> None:
    model = DeCoDiffModel(PLAIN, (64, 96)).eval()
    outputs = model(images())
    assert torch.equal(outputs.correction, images())  # not even by what the codec loses
    assert (outputs.anomaly_map == 1).all()  # nothing exceeds the normal range


@pytest.mark.parametrize("corruption", ["patches", "defects"])
def test_loss_of_an_untrained_model_is_the_energy_of_the_deviation(corruption: str) -> None:
    """Its prediction is 0, so the loss must be the mean square of what it should have predicted; it also repeats."""
    model = DeCoDiffModel(change(PLAIN, "corruption", kind=corruption), (64, 96))
    category = torch.zeros(2, dtype=torch.long)
    losses = [
        model.training_loss(images(), category, ReplayBuffer(), torch.Generator().manual_seed(seed)).item()
        for seed in (0, 0, 1)
    ]
    assert losses[0] > 0
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize(("learnt", "expected"), [("used", {2, 6, 9}), ("all", set(range(10)))])
def test_timesteps_of_training(learnt: str, expected: set[int]) -> None:
    """Trailing thirds of ten timesteps are 9, 6 and 2."""
    model = DeCoDiffModel(change(PLAIN, "corruption", timesteps=learnt), (64, 96))
    drawn = model._draw_timesteps(torch.zeros(500, 1, 1, 1), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == expected


def test_latents_have_unit_variance_on_the_images_they_were_fitted_to() -> None:
    model = DeCoDiffModel(PRESETS["balanced"], (64, 96))
    coarse = torch.randn(8, 3, 4, 6, generator=torch.Generator().manual_seed(0)) / 3
    smooth = torch.nn.functional.interpolate(coarse, size=(64, 96), mode="bicubic")
    lone = torch.zeros(8, dtype=torch.long)
    model.fit(smooth, lone, torch.Generator().manual_seed(0))
    latents = model.encode(smooth, lone)
    assert latents.shape[1:] == (48 + 152 + 112 + 4 * 40, 8, 12)
    assert latents.std((0, 2, 3)).max() < 1.2  # the four cells of the finer grid vary together, not alike
    assert latents[:, 0].std() == pytest.approx(1, abs=0.05)
    through_the_codec = model.codec.decode(model.codec.encode(smooth))
    torch.testing.assert_close(model.decode(latents, lone), through_the_codec, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(250, 256), (0, 32)])
def test_sizes_that_do_not_fit(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be multiples of 32 pixels, such as"):
        DeCoDiffModel(PLAIN, size)


@pytest.fixture(scope="module")
def conditioned() -> tuple[DeCoDiffModel, torch.Tensor, torch.Tensor]:
    """A fitted model of three categories, dark noise, bright noise and stripes, with a few further images of each."""
    model = DeCoDiffModel(change(PRESETS["balanced"], "correction", num_steps=2), (64, 64), num_categories=3).eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(24, 3, 64, 64, generator=generator) / 10
    stripes = torch.linspace(0, 40, 64).sin() / 2 + noise[16:]
    images = torch.cat([noise[:8] - 0.6, noise[8:16] + 0.4, stripes])
    category = torch.arange(24) // 8
    for parameter in model.denoiser.parameters():  # an untrained one predicts nothing
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    held_out = category.new_tensor([0, 1, 8, 9, 16, 17])
    training = torch.tensor([index for index in range(24) if index not in held_out])
    model.fit(images[training], category[training], torch.Generator().manual_seed(0))
    model.calibrate(images[held_out], category[held_out])
    return model, images, category


def test_an_image_is_treated_as_the_category_that_is_inferred_from_it(conditioned) -> None:
    model, images, category = conditioned
    inferred, given = model(images), model(images, category)
    assert torch.equal(inferred.category_index, category)
    assert torch.equal(inferred.anomaly_map, given.anomaly_map)
    assert (given.ood_score == 0).all()
    wrong = model(images, (category + 1) % 3)
    assert (wrong.pred_score != given.pred_score).all()


def feature_distance(model: DeCoDiffModel, images: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
    """Distance of features from the nearest in the banks, by torch.cdist; the finer grid counts twice."""
    features, total = model.features(images), 0
    for name, weight in {"image": 1, "enlarged": 1, "fine": 2}.items():
        latents = model.feature_latents[name](features[name], category)
        nearest = [
            torch.cdist(part.flatten(1).mT, model.memory_banks[name].bank[index]).amin(1).view(1, 1, *part.shape[1:])
            for part, index in zip(latents, category, strict=True)
        ]
        total = total + weight * resize_mirrored(torch.cat(nearest), images.shape[-2:])
    return total / 4


def test_levels_are_fused_by_their_weights(conditioned) -> None:
    """A level alone is its excess over what is normal, and the default is the mean of two of these."""
    model, images, category = conditioned
    default, maps = model.settings, {}
    try:
        for level in ("pixel", "latent", "feature"):
            model.settings = change(default, "maps", levels={level: 3.0})
            maps[level] = model(images, category).anomaly_map
    finally:
        model.settings = default
    assert default.maps.levels == {"latent": 1.0, "feature": 1.0}
    found = model(images, category).anomaly_map
    torch.testing.assert_close(found, (maps["latent"] + maps["feature"]) / 2, rtol=1e-4, atol=1e-5)
    distance = feature_distance(model, images, category)
    torch.testing.assert_close(maps["feature"], model.normal_range(distance, "feature", category), rtol=1e-4, atol=1e-5)
    assert (maps["pixel"] - maps["latent"]).abs().max() > 0.1


def test_the_range_of_maps_and_the_threshold_of_cells_are_those_of_held_out_normal_images(conditioned) -> None:
    model, images, category = conditioned
    held_out = [0, 1, 8, 9, 16, 17]
    images, category = images[held_out], category[held_out]
    distance = feature_distance(model, images, category)
    cells = F.avg_pool2d(model(images, category).anomaly_map, 8)
    row = torch.arange(images.shape[-1])
    row = torch.minimum(row, row.flip(0))
    ring = (torch.minimum(row, row[:, None]) // 8).clamp_max(3)[::4, ::4]
    for index in range(3):
        for border in range(4):
            own = distance[category == index][:, 0, ::4, ::4][:, ring == border]
            torch.testing.assert_close(model.normal_range.median[index, 2, border], own.median())
            high = model.normal_range.high[index, 2, border].item()
            assert high == pytest.approx(max(own.quantile(0.99).item(), 1.01 * own.median().item()), rel=0.02)
        limit = prediction_limit(cells[category == index].amax((1, 2, 3)), REPLACED_RATE)
        assert model.exemplars.cell_thresholds[index].item() == pytest.approx(limit.item(), rel=1e-4)


def test_the_corrected_image_takes_what_deviates_from_normal_images(conditioned) -> None:
    model, images, category = conditioned
    defective = images[:1].clone()
    defective[:, :, 24:40, 40:56] = torch.tensor([0.9, -0.9, 0.9]).view(3, 1, 1)
    outputs = model(defective, category[:1])
    cells = F.avg_pool2d(outputs.anomaly_map, 8)
    assert model.exemplars.deviating(cells, category[:1])[0, 0, 3:5, 5:7].min() == 1
    assert (outputs.correction - images[:1])[:, :, 26:38, 42:54].abs().mean() < 0.2
    assert (outputs.reconstruction - images[:1])[:, :, 26:38, 42:54].abs().mean() > 0.8
    assert Exemplars(1, (64, 96), num_categories=3).deviating(cells, category[:1]).sum() == 0  # not calibrated


@pytest.mark.parametrize("levels", [{}, {"image": 1.0}, {"latent": 0.0}, {"feature": 1.0}])
def test_levels_that_cannot_be(levels: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be one or more of pixel, latent, each with a weight above 0"):
        change(PLAIN, "maps", levels=levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": {"magnification": 0.5}}, "magnification=0.5 must be at least 1"),
        ({"correction": {"exemplars": -1}}, "exemplars=-1 must be at least 0"),
        ({"latents": {"scale": False}}, r"scale=False needs normal_range=False, exemplars=0 and references=0"),
        (
            {"latents": {"scale": False}, "maps": {"normal_range": False}},
            r"exemplars=12 and settings\.latents\.references=1000 are fitted together",
        ),
        (
            {"latents": {"references": 0}},
            r"feature needs settings\.latents\.backbone, .* and settings\.latents\.references above 0, which is 0",
        ),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("balanced", settings)


def test_without_features_the_other_levels_remain() -> None:
    assert DeCoDiff(features="none").settings.maps.levels == {"latent": 1.0}


def test_the_deviation_is_a_share_of_the_difference_from_the_nearest_normal_latents(conditioned) -> None:
    """Shares of 1 correct every position to its reference, shares of 0 nothing."""
    model, images, category = conditioned

    class Shares(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, latents: torch.Tensor, timesteps: int, category: torch.Tensor) -> torch.Tensor:
            assert latents.shape[1] == 2 * 472
            return torch.full_like(latents[:, :7], self.share)

    observed, denoiser = model.observe(images, category), model.denoiser
    try:
        for share, expected in {0.0: observed.latents, 1.0: observed.references}.items():
            model.denoiser = Shares(share)
            deviation = model.predict_deviation(observed.latents, observed.references, 9, category)
            torch.testing.assert_close(observed.latents - deviation, expected, atol=1e-5, rtol=1e-5)
    finally:
        model.denoiser = denoiser
    distance = (observed.latents - observed.references).norm(dim=1)
    assert distance.mean() < (observed.latents - observed.latents.roll(3, 0)).norm(dim=1).mean()


def test_the_relative_loss_divides_by_the_deviation_of_each_sample() -> None:
    """With a zero prediction and energy e of a sample's deviation it is the mean of e / (e + 0.02)."""
    settings = change(change(PLAIN, "training", loss="relative"), "corruption", variants=4, samples_per_step=8)
    model, replay = DeCoDiffModel(settings, (64, 96)), ReplayBuffer()
    value = model.training_loss(images(), torch.zeros(2, dtype=torch.long), replay, torch.Generator().manual_seed(0))
    energy = torch.stack([deviation.float().square().mean() for (_, deviation), _ in replay._samples])
    assert len(energy) == 8
    assert value.item() == pytest.approx((energy / (energy + 0.02)).mean().item(), rel=1e-3)


def test_the_search_for_references_is_exact_where_training_computes_in_half_precision(conditioned) -> None:
    model, images, category = conditioned
    latents = model.encode(images, category)
    with torch.autocast("cpu", torch.bfloat16):
        found = model._refer_exactly(latents, category)
    assert torch.equal(found, model.refer(latents, category))


def test_noise_is_no_part_of_the_deviation() -> None:
    """The loss of a zero prediction stays the energy of the deviation."""
    category, losses = torch.zeros(2, dtype=torch.long), []
    for noise in (0.0, 4.0):
        model = DeCoDiffModel(change(PLAIN, "corruption", noise=noise, samples_per_step=2), (64, 96))
        losses.append(model.training_loss(images(), category, ReplayBuffer(), torch.Generator().manual_seed(0)).item())
    assert losses[0] == losses[1]


def test_a_fixed_category_is_taken_for_all_images(conditioned) -> None:
    model, images, _ = conditioned
    model.fixed_category = 1
    try:
        assert torch.equal(model(images).pred_score, model(images, torch.ones(24, dtype=torch.long)).pred_score)
    finally:
        model.fixed_category = None


def test_one_image_scores_the_same_in_any_company(conditioned) -> None:
    model, images, _ = conditioned
    together, alone = model(images), model(images[17:18])
    torch.testing.assert_close(alone.anomaly_map, together.anomaly_map[17:18])


def test_normal_deviation_is_the_mean_correction_of_each_category_and_of_all(conditioned) -> None:
    model, images, _ = conditioned
    held_out = torch.tensor([0, 1, 8, 9, 16, 17])
    category = torch.arange(6) // 2
    latents = model.encode(images[held_out], category)
    with torch.no_grad():
        correction = model.correct(latents, model.refer(latents, category), category) - latents
    expected = correction.abs().mean((2, 3)).unflatten(0, (3, 2)).mean(1)
    torch.testing.assert_close(model.normal_deviation[:3, :, 0, 0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.normal_deviation[3, :, 0, 0], expected.mean(0), rtol=1e-4, atol=1e-6)


def test_each_category_has_latents_in_its_own_units(conditioned) -> None:
    model, images, category = conditioned
    latents = model.encode(images, category)
    for index in range(3):
        mean, std = latents[category == index].mean((0, 2, 3)), latents[category == index].std((0, 2, 3))
        assert mean.abs().mean() < 0.1
        assert std.mean() < 1.1
    pooled = model.encode(images, torch.full_like(category, 3))
    assert pooled[category == 0].mean((0, 2, 3)).abs().max() > 0.9  # among dark, bright and striped ones, dark is dark


def test_some_categories_are_dropped_in_training() -> None:
    """With all of them dropped, the rows of the table share one gradient; with none, unused rows have none."""

    def row_gradients(share: float) -> torch.Tensor:
        model = DeCoDiffModel(change(PLAIN, "training", category_dropout=share), (64, 96), num_categories=3)
        for parameter in model.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
        model.training_loss(images(), torch.tensor([1, 1]), ReplayBuffer(), torch.Generator().manual_seed(0)).backward()
        return model.denoiser.category_embedding.weight.grad

    dropped, kept = row_gradients(1.0), row_gradients(0.0)
    assert dropped.abs().max() > 0
    torch.testing.assert_close(dropped[0], dropped[1])
    assert kept[1].abs().max() > 0
    assert kept[0].abs().max() == kept[2].abs().max() == 0


def test_folded_model_gives_the_same_outputs_and_leaves_the_model_unchanged() -> None:
    model = DeCoDiffModel(change(PRESETS["balanced"], "correction", num_steps=3), (64, 64), num_categories=2).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    model.fit(images, torch.tensor([0, 0, 1, 1]), generator)
    for parameter in model.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    with torch.no_grad():
        before = model(images)
        folded = model.folded().requires_grad_(requires_grad=False)
        for folded_output, output in zip(folded(images), before, strict=True):
            torch.testing.assert_close(folded_output, output, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(images).anomaly_map, before.anomaly_map)
    assert all(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_regions_are_ignored_in_the_images_of_their_category_alone(conditioned) -> None:
    model, images, category = conditioned
    regions = torch.zeros(64, 64, dtype=torch.bool)
    regions[:, :32] = True
    before = model(images, category)
    model.ignore(1, regions)
    try:
        after = model(images, category)
    finally:
        model.ignore(1, torch.zeros_like(regions))
    own = category == 1
    assert (before.anomaly_map[own][..., :32] > 0).all()
    assert (after.anomaly_map[own][..., :32] == 0).all()
    assert torch.equal(after.correction[own][..., :32], images[own][..., :32])
    assert torch.equal(after.anomaly_map[own][..., 32:], before.anomaly_map[own][..., 32:])
    for found, expected in zip(after, before, strict=True):
        assert torch.equal(found[~own], expected[~own])


def test_weights_that_know_no_regions_ignore_none() -> None:
    model = DeCoDiffModel(PLAIN, (64, 96))
    model.ignore(0, torch.ones(64, 96, dtype=torch.bool))
    assert model.ignored.all()  # of the only category, and of unknown images
    state = model.state_dict()
    del state["ignored"]
    assert model.load_state_dict(state).missing_keys == []
    assert not model.ignored.any()
