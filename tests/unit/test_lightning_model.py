"""What DeCoDiff is before it meets an engine: how often networks are built, seeds, arguments, checkpoints."""

from pathlib import Path

import pytest
import timm
import torch
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.checkpoint import builds_model
from decodiff_anomalib.torch_model import DeCoDiffModel


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many backbones and torch models were built, not counting backbones without weights."""
    counts = {"backbone": 0, "model": 0}
    create, init = timm.create_model, DeCoDiffModel.__init__

    def create_model(*args, **kwargs):
        counts["backbone"] += torch.empty(0).device.type != "meta"
        return create(*args, **kwargs)

    def counted(self, *args, **kwargs) -> None:
        counts["model"] += 1
        init(self, *args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(DeCoDiffModel, "__init__", counted)
    return counts


def save(model: DeCoDiff, path: Path) -> Path:
    """A checkpoint as Lightning writes it, without a trainer."""
    checkpoint = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.6.0",
    }
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def weights(model: DeCoDiff) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.model.denoiser.parameters()])


def test_a_model_builds_its_backbone_once(built: dict[str, int]) -> None:
    DeCoDiff(image_size=64)
    assert built == {"backbone": 1, "model": 1}


def test_new_categories_share_the_backbone(built: dict[str, int]) -> None:
    model = DeCoDiff(image_size=64)
    model._adopt_categories(("bolt", "felt"))
    assert built == {"backbone": 1, "model": 2}
    assert model.model.num_categories == 2


def test_known_categories_keep_their_regions_to_ignore() -> None:
    model = DeCoDiff(image_size=64)
    model._adopt_categories(("felt",))
    model.model.ignore(0, torch.ones(64, 64, dtype=torch.bool))
    model._adopt_categories(("bolt", "felt"))
    assert model.model.ignored.flatten(1).float().mean(1).tolist() == [0, 1, 0]  # those of unknown images stay none


def test_a_checkpoint_is_loaded_into_one_model(built: dict[str, int], tmp_path: Path) -> None:
    model = DeCoDiff(image_size=64, settings={"maps": {"levels": {"latent": 1.0}}})
    model._adopt_categories(("bolt", "felt"))
    path = save(model, tmp_path / "model.ckpt")
    built.update(backbone=0, model=0)
    loaded = DeCoDiff.load_from_checkpoint(path)
    assert built == {"backbone": 1, "model": 1}
    assert loaded.categories == ("bolt", "felt")
    assert loaded.settings == model.settings
    assert torch.equal(weights(loaded), weights(model))


def test_a_checkpoint_of_a_codec_from_elsewhere_needs_it_no_more(small_codec: Path, tmp_path: Path) -> None:
    arguments = {"settings": {"latents": {"codec": str(small_codec)}}, "image_size": 64, "denoiser": "XS"}
    path = save(DeCoDiff(preset="paper", **arguments), tmp_path / "model.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["codec"] is None
    assert saved["decodiff"]["codec"]["_class_name"] == "AutoencoderKL"
    small_codec.rename(small_codec.with_name("moved"))
    try:
        loaded = DeCoDiff.load_from_checkpoint(path)
    finally:
        small_codec.with_name("moved").rename(small_codec)
    assert loaded.model.codec.spec == saved["decodiff"]["codec"]


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    before = torch.random.get_rng_state()
    first = weights(DeCoDiff(image_size=64, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(weights(DeCoDiff(image_size=64, seed=3)), first)
    assert not torch.equal(weights(DeCoDiff(image_size=64, seed=4)), first)


def test_an_argument_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(DeCoDiff(image_size=64), tmp_path / "model.ckpt")
    for arguments, message in (
        ({"denoiser": "tiny"}, r"trained with denoiser='nano', the model is to have 'tiny'"),
        ({"image_size": 96}, r"trained with image_size=\[64, 64\], the model is to have \[96, 96\]"),
        ({"num_steps": 5}, r"trained for num_steps=1 and no other"),
        (
            {"settings": {"maps": {"latent_sigma": 1.0}}},
            r"trained with settings\.maps\.latent_sigma=0\.0, .* have 1\.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DeCoDiff.load_from_checkpoint(path, **arguments)
    assert DeCoDiff.load_from_checkpoint(path, codec="bundled").model.codec.spec == "bundled"


def test_the_white_level_is_the_checkpoints_unless_one_is_stated(tmp_path: Path) -> None:
    model = DeCoDiff(image_size=64)
    assert model.white_level is None
    model.white_level = 4095.0
    path = save(model, tmp_path / "model.ckpt")
    assert DeCoDiff.load_from_checkpoint(path).white_level == 4095
    assert DeCoDiff.load_from_checkpoint(path, white_level=65535).white_level == 65535
    older = torch.load(path, weights_only=True)
    del older["decodiff"]["white_level"], older["hyper_parameters"]["white_level"]
    torch.save(older, path)
    assert DeCoDiff.load_from_checkpoint(path).white_level is None
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"white_level={wrong} must be above 0"):
            DeCoDiff(image_size=64, white_level=wrong)


def test_loading_leaves_the_constructor_as_it_was(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt"
    )
    with pytest.raises(ValueError, match="The checkpoint is not DeCoDiff's"):
        DeCoDiff.load_from_checkpoint(tmp_path / "other.ckpt")
    assert builds_model()
    assert isinstance(DeCoDiff(image_size=64).model, DeCoDiffModel)


def test_training_goes_on_as_the_arguments_say(tmp_path: Path) -> None:
    path = save(DeCoDiff(image_size=64, preset="fast"), tmp_path / "model.ckpt")
    same = DeCoDiff.load_from_checkpoint(path)
    assert (same.settings.training.steps, same._duration.steps) == (200, 200)
    longer = DeCoDiff.load_from_checkpoint(path, train_steps=900, learning_rate=1e-5)
    assert (longer.settings.training.steps, longer._duration.steps) == (900, 900)
    assert longer.settings.training.learning_rate == 1e-5


def resize_to(*sides: int) -> PreProcessor:
    return PreProcessor(Compose([Resize(sides), Normalize([0.5] * 3, [0.5] * 3)]))


def test_the_working_size_is_that_of_the_pre_processor() -> None:
    model = DeCoDiff(pre_processor=resize_to(64, 96))
    assert model.model.exemplars.images.shape[-2:] == (64, 96)
    assert DeCoDiff.configure_pre_processor((64, 96)).transform.transforms[0].size == [64, 96]  # no model needed
    assert DeCoDiff(image_size=64).pre_processor.transform.transforms[0].size == [64, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pre_processor": PreProcessor(Resize(128))}, r"keeps the aspect ratio .* Give both sides: \(128, 128\)"),
        ({"pre_processor": resize_to(64, 96), "image_size": 64}, r"image_size=64, but the pre-processor .*\(64, 96\)"),
        ({"image_size": "256"}, "image_size='256' must be one whole number, or two"),
        ({"image_size": (64, 64, 3)}, r"image_size=\(64, 64, 3\) must be one whole number, or two"),
        ({"image_size": 64.0}, "image_size=64.0 must be one whole number, or two"),
        ({"image_size": 100}, r"image_size=\(100, 100\) must be multiples of 32 pixels, such as \(96, 96\)"),
    ],
)
def test_sizes_that_are_none(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeCoDiff(**arguments)


def test_a_seed_set_later_draws_weights_anew_but_none_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, is_drawn in ((None, True), ("folder", False)):
        monkeypatch.setenv("PL_GLOBAL_SEED", "1")
        model = DeCoDiff(image_size=64)
        model.hparams["init_from"] = given
        before = weights(model)
        monkeypatch.setenv("PL_GLOBAL_SEED", "2")
        model._follow_seed()
        assert model.seed == 2
        assert torch.equal(weights(model), before) is not is_drawn
