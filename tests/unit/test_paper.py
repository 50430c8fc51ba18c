"""The published images as an augmentation, and the published learning rate in a training of Lightning's."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_dtype, to_image

from decodiff_anomalib import DeCoDiff, MultiCategory
from decodiff_anomalib.evaluation import anomalib_mask
from decodiff_anomalib.paper import PaperAugmentation, paper_transform, prepare_image


def read(picture: Image.Image) -> torch.Tensor:
    """As Anomalib reads images."""
    return to_dtype(to_image(picture.convert("RGB")), torch.float32, scale=True)


def photograph(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_augmentation_and_pre_processor_give_the_published_image_to_the_bit(mode, shifted, turned) -> None:
    picture = photograph(mode)
    augmentation = PaperAugmentation(shift_probability=float(shifted), half_turn_probability=float(turned))
    ours = paper_transform()(augmentation(read(picture)))
    assert torch.equal(ours.as_subclass(torch.Tensor), prepare_image(picture, shifted=shifted, turned=turned))


def test_real_images_to_the_bit(data_dir: Path) -> None:
    augmentation = PaperAugmentation(shift_probability=0.0)
    for path in sorted(data_dir.glob("*/test/*/000.*")):
        with Image.open(path) as picture:
            ours = paper_transform()(augmentation(read(picture))).as_subclass(torch.Tensor)
            assert torch.equal(ours, prepare_image(picture)), path


def test_masks_follow_as_anomalib_resizes_them() -> None:
    full = np.zeros((512, 640), np.uint8)
    full[100:180, 200:330] = 255
    mask = tv_tensors.Mask(torch.from_numpy(full) > 0)
    image = read(Image.fromarray(full))
    _, cut = paper_transform()(*PaperAugmentation(shift_probability=0.0)(image, mask))
    assert torch.equal(cut.as_subclass(torch.Tensor), anomalib_mask(Image.fromarray(full)))
    image, moved = paper_transform()(*PaperAugmentation(1.0, 1.0)(image, mask))
    assert torch.equal(moved.as_subclass(torch.Tensor).flip(-2, -1)[4:, 4:], cut.as_subclass(torch.Tensor)[:-4, :-4])
    assert float((image[0] > 0)[~moved].float().mean()) < 0.01  # the image went the same way


class Repeated:
    """One picture many times, through an augmentation."""

    def __init__(self, augmentation: PaperAugmentation) -> None:
        self.augmentation, self.image = augmentation, read(photograph())

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(image=self.augmentation(self.image))


@pytest.mark.parametrize("workers", [0, 2])
def test_variants_are_drawn_as_often_as_published_and_repeat_with_the_seed(workers: int) -> None:
    variants = {
        prepare_image(photograph(), (72, 72), (64, 64), shifted=shifted, turned=turned).numpy().tobytes(): name
        for shifted, turned, name in [(0, 0, "plain"), (1, 0, "shifted"), (0, 1, "turned"), (1, 1, "both")]
    }
    finish = paper_transform((72, 72), (64, 64))

    def drawn(seed: int) -> list[str]:
        torch.manual_seed(seed)
        dataset = Repeated(PaperAugmentation(0.5, 0.25, resize=(72, 72), crop=(64, 64)))
        loader = DataLoader(dataset, batch_size=50, num_workers=workers, collate_fn=ImageBatch.collate)
        images = torch.cat([batch.image for batch in loader]).as_subclass(torch.Tensor)
        return [variants[finish(image).numpy().tobytes()] for image in images]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    counts = Counter(first)
    for name, share in {"plain": 0.375, "shifted": 0.375, "turned": 0.125, "both": 0.125}.items():
        deviation = (share * (1 - share) * len(first)) ** 0.5
        assert abs(counts[name] - share * len(first)) < 4 * deviation, counts


@pytest.mark.parametrize("name", ["shift_probability", "half_turn_probability"])
def test_refuses_what_is_no_probability(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=1\.5 must be between 0 and 1"):
        PaperAugmentation(**{name: 1.5})


# ---------------------------------------------------------------- the learning rate


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One category of twelve training images, two of which set the thresholds."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for folder, count in {"train/good": 12, "test/good": 1, "test/bad": 1}.items():
        (root / "part" / folder).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "part" / folder / f"{index}.png")
    return root


class Rates(Callback):
    """Notes the learning rate of every batch, and stops after some epochs."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rates: list[list[float]] = []
        self.stop_after = stop_after

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.rates.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rates[-1].append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = len(self.rates) == self.stop_after


def train(parts: Path, tmp_path: Path, rates: Rates, model: dict | None = None, resume: Path | None = None, **engine):
    """The paper preset with a small network on three batches an epoch; the trainer that did it."""
    denoiser = {"width": 32, "head_channels": 8, "context_width": 16, "layers": 1, "multipliers": [1, 1, 1]}
    small = DeCoDiff(preset="paper", image_size=32, codec="bundled", denoiser=denoiser, visualizer=False, **model or {})
    arguments = {"default_root_dir": tmp_path, "accelerator": "cpu", "logger": False, "check_val_every_n_epoch": 1000}
    trained = Engine(**arguments | engine, callbacks=[rates])
    datamodule = MultiCategory(parts, train_batch_size=4, num_workers=0, val_split_ratio=0.17)
    trained.fit(small, datamodule=datamodule, ckpt_path=resume)
    return trained.trainer


@pytest.mark.parametrize(("run", "stop_after"), [(0, 13), (1, None), (2, None)])
def test_learning_rate_of_every_epoch_is_the_published_one(
    run: int, stop_after: int | None, parts: Path, parity_dir: Path, tmp_path: Path
) -> None:
    recorded = json.loads((parity_dir / "lr_schedule.json").read_text())[run]
    model = {"learning_rate": recorded["lr"], "settings": {"warmup_steps": 3 * recorded["warmup_epochs"]}}
    train(parts, tmp_path, noted := Rates(stop_after), model, max_epochs=recorded["epochs"])
    assert [len(set(epoch)) for epoch in noted.rates] == [1] * (stop_after or recorded["epochs"])
    found = [epoch[0] for epoch in noted.rates]
    np.testing.assert_allclose(found, recorded["lr_used_in_epoch"][:stop_after], rtol=0, atol=1e-15)


def test_a_resumed_training_goes_on_where_it_stopped(parts: Path, parity_dir: Path, tmp_path: Path) -> None:
    recorded = json.loads((parity_dir / "lr_schedule.json").read_text())[1]
    model = {"learning_rate": recorded["lr"], "settings": {"warmup_steps": 3 * recorded["warmup_epochs"]}}
    duration = {"max_epochs": recorded["epochs"], "check_val_every_n_epoch": 1}
    stopped = train(parts, tmp_path, first := Rates(2), model, **duration)
    checkpoint = Path(stopped.checkpoint_callback.best_model_path)
    train(parts, tmp_path, second := Rates(3), model, checkpoint, **duration)
    found = [epoch[0] for epoch in first.rates + second.rates]
    np.testing.assert_allclose(found, recorded["lr_used_in_epoch"][:5], rtol=0, atol=1e-15)


def test_published_numbers_of_steps_are_the_presets(parts: Path, tmp_path: Path) -> None:
    """MVTec AD: 26 micro-batches make 13 steps an epoch. Here the same 800 and 10 epochs at 2 steps an epoch."""
    model = {"settings": {"warmup_steps": 130 * 2 // 13, "train_steps": 10_400 * 2 // 13}}
    train(parts, tmp_path, noted := Rates(2), model, accumulate_grad_batches=2)
    assert [epoch[0] for epoch in noted.rates] == pytest.approx([0, 1e-5], abs=1e-15)


@pytest.mark.parametrize("duration", [{"max_epochs": 3}, {"max_steps": 9}])
def test_schedule_lasts_as_long_as_the_training(duration: dict, parts: Path, tmp_path: Path) -> None:
    train(parts, tmp_path, noted := Rates(), {"settings": {"warmup_steps": 0}}, **duration)
    expected = [1e-4 * (1 + np.cos(np.pi * epoch / 4.5)) / 2 for epoch in range(3)]
    assert [epoch[0] for epoch in noted.rates] == pytest.approx(expected, abs=1e-15)


def test_a_left_over_micro_batch_is_a_step_of_its_own(parts: Path, tmp_path: Path) -> None:
    """Three micro-batches an epoch, two a step: the authors' program makes 3 steps in two epochs, Lightning 4."""
    assert train(parts, tmp_path, Rates(), max_epochs=2, accumulate_grad_batches=2).global_step == 4


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="learning_rate_schedule='days' is unknown; valid: steps, epochs"):
        DeCoDiff(preset="paper", settings={"learning_rate_schedule": "days"})
