"""``decodiff reproduce`` on real images in the published layouts, with a small network in the authors' format."""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from decodiff_anomalib.__main__ import main
from decodiff_anomalib.benchmark.reproduce import reproduce
from decodiff_anomalib.codec import build_codec
from decodiff_anomalib.denoiser import DenoiserSize, build_denoiser
from decodiff_anomalib.discrepancy import fuse, latent_discrepancy, pixel_discrepancy
from decodiff_anomalib.evaluation import METRICS, anomalib_mask, anomalib_metrics, paper_mask, paper_metrics
from decodiff_anomalib.paper import CATEGORY_ORDER, prepare_image
from decodiff_anomalib.schedule import DeviationSchedule
from decodiff_anomalib.weights import load_pretrained, to_official_state

# Categories of the data sets, and the real images that stand in for theirs.
STAND_INS = {"tile": "magnetic_tile", "carpet": "grass_synth"}
VISA_STAND_INS = {"pcb3": "pcb", "candle": "grass_synth"}


@pytest.fixture(scope="module")
def root(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real images in MVTec AD's layout."""
    folder = tmp_path_factory.mktemp("mvtec")
    for category, source in STAND_INS.items():
        masks = sorted((data_dir / source / "ground_truth").rglob("*.png"))[::9][:2]
        chosen = {f"ground_truth/{path.parent.name}/{path.name}": path for path in masks}
        for path in masks:
            name = Path("test") / path.parent.name / path.name.replace("_mask", "")
            chosen[str(name)] = data_dir / source / name
        for subset, count in {"train/good": 2, "test/good": 1}.items():
            for path in sorted((data_dir / source / subset).iterdir())[:count]:
                chosen[f"{subset}/{path.name}"] = path
        for name, path in chosen.items():
            (folder / category / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / category / name)
    return folder


def convert(folder: Path, dataset: str) -> Path:
    """A small network without zeros, saved as the authors' script does, then converted on the command line."""
    torch.manual_seed(1)
    size = DenoiserSize(32, 8, 16, layers=1, multipliers=(1, 1, 1))
    denoiser = build_denoiser(size, num_categories=len(CATEGORY_ORDER[dataset]))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    arguments = argparse.Namespace(dataset=dataset, vae_type="ema")
    torch.save({"model": to_official_state(denoiser), "args": arguments}, folder / "last.pt")
    main(["convert", str(folder / "last.pt"), "--to", str(folder / "converted")])
    return folder / "converted"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("weights"), "mvtec")


@torch.no_grad()
def by_hand(picture: Image.Image, category: str, weights: Path, codec: Path) -> torch.Tensor:
    """The published map ``(256, 256)`` of one picture, step by step."""
    denoiser, config = load_pretrained(weights)
    autoencoder, schedule = build_codec(codec), DeviationSchedule(num_inference_steps=5)
    latents = autoencoder.encode(prepare_image(picture)[None])
    row = torch.tensor([config.categories.index(category)])
    corrected = latents
    for index, timestep in enumerate(schedule.timesteps):
        corrected = schedule.step(corrected, denoiser(corrected, timestep[None], row), index)
    pixel = pixel_discrepancy(autoencoder.decode(corrected), autoencoder.decode(latents))
    return fuse(pixel, latent_discrepancy(corrected, latents, (256, 256)))[0, 0]


def expected_rows(
    pictures: dict[str, list[tuple[Path, Path | None]]], weights: Path, codec: Path
) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """Metrics of every category by both protocols, from images and their masks."""
    for category, files in pictures.items():
        maps = torch.stack([by_hand(Image.open(picture), category, weights, codec) for picture, _ in files])
        masks = [Image.new("L", (288, 288)) if mask is None else Image.open(mask) for _, mask in files]
        labels = torch.tensor([mask is not None for _, mask in files])
        yield (category, "paper"), paper_metrics(maps, torch.stack([paper_mask(mask) for mask in masks]))
        full_size_masks = torch.stack([anomalib_mask(mask) for mask in masks])
        yield (category, "anomalib"), anomalib_metrics(maps, full_size_masks, labels)


def test_both_protocols_side_by_side(
    root: Path, weights: Path, small_codec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tables" / "mvtec.csv"
    given = ["--data", root, "--weights", weights, "--codec", small_codec, "--categories", "[tile,carpet]"]
    main(["reproduce", "mvtec", *map(str, given), "--output", str(output)])

    pictures: dict[str, list[tuple[Path, Path | None]]] = {category: [] for category in STAND_INS}
    for category, files in pictures.items():
        for path in sorted((root / category / "test").glob("*/*")):
            mask = root / category / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
            files.append((path, mask if mask.exists() else None))
    expected = dict(expected_rows(pictures, weights, small_codec))
    table = pd.read_csv(output, index_col=[0, 1])
    assert list(table.columns) == list(METRICS)
    for row, metrics in expected.items():
        assert table.loc[row].to_dict() == pytest.approx(metrics, abs=1e-4), row
    assert len(table) == 7  # two rows for each category and the mean, and the published means
    published = table.loc[("published", "paper")].dropna().to_dict()
    assert published == {"image_auroc": 0.992, "pixel_ap": 0.768, "pixel_aupro": 0.951}

    printed = capsys.readouterr().out
    assert "The published means are of 15 categories, the measured means of 2." in printed
    assert f"{100 * table.loc[('tile', 'paper'), 'pixel_auroc']:.2f}" in printed
    assert "99.20" in printed


def test_visa_as_distributed(data_dir: Path, small_codec: Path, tmp_path: Path) -> None:
    """Images and masks by VisA's own table; masks keep their small values, which the published filter does not grow."""
    lines, pictures = ["object,split,label,image,mask"], {category: [] for category in VISA_STAND_INS}
    for category, source in VISA_STAND_INS.items():
        images, masks = (tmp_path / category / "Data" / name for name in ("Images", "Masks"))
        images.mkdir(parents=True)
        masks.mkdir()
        files = [(min((data_dir / source / name / "good").iterdir()), name, "normal") for name in ("train", "test")]
        defective = sorted(path for path in (data_dir / source / "test").glob("*/*") if path.parent.name != "good")
        files += [(path, "test", "anomaly") for path in defective[:1]]
        for index, (path, split, label) in enumerate(files):
            image, mask = images / f"{index}.png", masks / f"{index}.png" if label == "anomaly" else None
            shutil.copy(path, image)
            if mask:
                stored = data_dir / source / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
                Image.fromarray((np.array(Image.open(stored).convert("L")) > 0).astype(np.uint8)).save(mask)
            named = [str(name.relative_to(tmp_path)) if name else "" for name in (image, mask)]
            lines.append(",".join([category, split, label, *named]))
            if split == "test":
                pictures[category].append((image, mask))
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(lines))

    weights = convert(tmp_path, "visa")
    table = reproduce(
        "visa", data=tmp_path, weights=str(weights), codec=str(small_codec), categories=list(VISA_STAND_INS)
    )
    for row, metrics in expected_rows(pictures, weights, small_codec):
        assert table.loc[row].to_dict() == pytest.approx(metrics, abs=1e-4), row
    assert table.loc[("published", "paper"), "pixel_ap"] == 0.575


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"--data": "nowhere"}, "nowhere has no tile/test. MVTec AD is at https://www.mvtec.com"),
        ({"--categories": "[tile,wood]"}, "has no wood/test. MVTec AD is at"),
        ({"--weights": "./nowhere"}, "run `decodiff convert FILE --to DIR`, and give --weights DIR"),
        ({"--codec": "./nowhere"}, "`hf download stabilityai/sd-vae-ft-ema --local-dir DIR`"),
        ({"--weights": __file__}, "is a file. Run `decodiff convert"),
        ({"--categories": "[pcb1]"}, "mvtec has no pcb1; it has capsule, bottle"),
    ],
)
def test_what_is_missing_is_said_without_a_traceback(
    given: dict, said: str, root: Path, weights: Path, small_codec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--data": root, "--weights": weights, "--codec": small_codec, "--categories": "[tile]"} | given
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", "mvtec", *(str(part) for pair in given.items() for part in pair)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_weights_of_the_other_data_set(root: Path, small_codec: Path, tmp_path: Path, capsys) -> None:
    given = {"--data": root, "--weights": convert(tmp_path, "visa"), "--codec": small_codec, "--categories": "[tile]"}
    with pytest.raises(SystemExit):
        main(["reproduce", "mvtec", *(str(part) for pair in given.items() for part in pair)])
    assert "The weights know candle, cashew" in capsys.readouterr().err
