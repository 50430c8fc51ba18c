"""``decodiff reproduce``: metrics of weights by the published protocol, and by Anomalib's on the same maps."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
import torch
from anomalib.data import Tabular
from anomalib.data.utils import LabelName
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.conditioning import GIVEN
from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.evaluation import compare_protocols
from decodiff_anomalib.lightning_model import DeCoDiff
from decodiff_anomalib.paper import CATEGORY_ORDER, PUBLISHED_MEANS, RESIZE, PaperAugmentation, paper_transform

BATCH_SIZE = 8

VISA_SPLIT = Path("split_csv") / "1cls.csv"

SOURCES = {
    "mvtec": "MVTec AD is at https://www.mvtec.com/company/research/datasets/mvtec-ad; unpack it so that "
    "DIR/bottle/test is there, and give --data DIR.",
    "visa": f"VisA is at https://github.com/amazon-science/spot-diff; unpack it so that DIR/{VISA_SPLIT} is there, and "
    "give --data DIR.",
    "weights": "The authors' checkpoints are at https://github.com/farzad-bz/DeCo-Diff; take the data set's, run "
    "`decodiff convert FILE --to DIR`, and give --weights DIR.",
    "codec": "`hf download stabilityai/sd-vae-ft-ema --local-dir DIR` fetches the autoencoder; give --codec DIR.",
}


def reproduce(
    dataset: Literal["mvtec", "visa"],
    *,
    data: Path,
    weights: str,
    codec: str | None = None,
    categories: list[str] | None = None,
    output: Path | None = None,
) -> pd.DataFrame:
    """Measure weights on MVTec AD or VisA by the published protocol and by Anomalib's, next to the published means.

    Pre-processing, network, correction and maps are the published ones; categories are given, not inferred. All maps
    are kept in memory, a quarter of a megabyte for each test image: 0.5 GB for MVTec AD, 0.6 GB for VisA.

    Args:
        dataset: mvtec or visa.
        data: Folder of the data set as its owners distribute it.
        weights: Folder that `decodiff convert` wrote, or its hub id; or a checkpoint (.ckpt) of this package.
        codec: Folder or hub id of the autoencoder. Defaults to the one the weights were trained with, which a
            checkpoint holds.
        categories: Some of the data set's categories. Defaults to all.
        output: CSV file for the table.

    Returns:
        pd.DataFrame: The table of :func:`decodiff_anomalib.evaluation.compare_protocols`, and the published means.

    Raises:
        SystemExit: With status 2, if data or weights are missing or do not fit.
    """
    chosen = categories or list(CATEGORY_ORDER[dataset])
    try:
        datamodule = _load_data(dataset, Path(data), chosen)
        model = _load_model(weights, codec, chosen)
    except (OSError, ValueError) as error:
        print(f"decodiff reproduce: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    collector = MapCollector()
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, callbacks=[collector])
        engine.test(model, datamodule=datamodule, verbose=False)
    table = compare_protocols(torch.cat(collector.maps), collector.mask_paths, collector.categories, RESIZE)
    published = pd.DataFrame([PUBLISHED_MEANS[dataset]], columns=table.columns, dtype=float)
    published.index = pd.MultiIndex.from_tuples([("published", "paper")], names=table.index.names)
    table = pd.concat([table, published])

    number, total = len(chosen), len(CATEGORY_ORDER[dataset])
    print(f"\nIn per cent. The published means are of {total} categories, the measured means of {number}.")
    print((100 * table).to_string(float_format="{:.2f}".format, na_rep=""))
    if output is not None:
        with atomic_write(Path(output)) as path:
            table.to_csv(path)
    return table


def _load_data(dataset: str, folder: Path, categories: Sequence[str]) -> MultiCategory:
    """The test images with the published pre-processing.

    Raises:
        OSError: If they are not there.
        ValueError: If some of them are not, or a category is none of the data set's.
    """
    unknown = [name for name in categories if name not in CATEGORY_ORDER[dataset]]
    if unknown:
        msg = f"{dataset} has no {', '.join(unknown)}; it has {', '.join(CATEGORY_ORDER[dataset])}."
        raise ValueError(msg)
    needed = [VISA_SPLIT] if dataset == "visa" else [Path(name) / "test" for name in categories]
    missing = [str(path) for path in needed if not (folder / path).exists()]
    if missing:
        msg = f"{folder} has no {', '.join(missing)}. {SOURCES[dataset]}"
        raise FileNotFoundError(msg)
    inner = {"datamodules": _visa(folder)} if dataset == "visa" else {"root": folder}
    return MultiCategory(
        **inner,
        categories=list(categories),
        eval_batch_size=BATCH_SIZE,
        num_workers=min(4, os.cpu_count() or 1),
        test_augmentations=PaperAugmentation(shift_probability=0.0),
        val_split_mode="none",
    )


def _visa(folder: Path) -> dict[str, Tabular]:
    """A datamodule for each category of VisA as distributed, with the split into normal training images and the rest.

    Masks are read as distributed, with their small values. Anomalib's own copies have 255 instead, with which the
    published resizing would enlarge the defects.
    """
    table = pd.read_csv(folder / VISA_SPLIT)
    samples = pd.DataFrame(
        {
            "image_path": table.image,
            "split": table.split,
            "label_index": table.label.map({"normal": LabelName.NORMAL, "anomaly": LabelName.ABNORMAL}),
            "mask_path": table["mask"].fillna("").astype(object),  # a column of text would refuse Anomalib's paths
        }
    )
    return {name: Tabular(name, rows.copy(), root=folder) for name, rows in samples.groupby(table.object)}


def _load_model(weights: str, codec: str | None, categories: Sequence[str]) -> DeCoDiff:
    """The model with given categories and without post-processing, so that its maps are not normalised.

    Raises:
        OSError: If weights or codec are not there.
        ValueError: If they are of another kind, or do not know a category.
    """
    try:
        if Path(weights).suffix == ".ckpt":
            model = DeCoDiff.load_from_checkpoint(weights, map_location="cpu")
        else:
            model = DeCoDiff(preset="paper", weights=weights, codec=codec)
    except OSError as error:
        msg = f"{error} {SOURCES['weights']} {SOURCES['codec']}"
        raise OSError(msg) from error
    model.category = GIVEN
    model.pre_processor = PreProcessor(paper_transform())
    model.post_processor = model.evaluator = model.visualizer = None
    unknown = [name for name in categories if name not in model.categories]
    if unknown:
        msg = (
            f"The weights know {', '.join(model.categories)}, not {', '.join(unknown)}. "
            "Give the weights of this data set, or only --categories they know."
        )
        raise ValueError(msg)
    return model


class MapCollector(Callback):
    """Collects the anomaly map, mask path and category of each test image.

    Attributes:
        maps: Anomaly maps ``(B, H, W)`` of each batch.
        mask_paths: The mask of each image; ``None`` for a normal one.
        categories: The category of each image.
    """

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []
        self.mask_paths: list[str | None] = []
        self.categories: list[str] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch.

        Raises:
            ValueError: If a defective image has no mask.
        """
        del trainer, pl_module, batch, batch_idx, dataloader_idx
        paths = [path or None for path in outputs.mask_path or [""] * len(outputs.category)]
        for image, path, defective in zip(outputs.image_path, paths, outputs.gt_label.tolist(), strict=True):
            if defective and path is None:
                msg = f"{image} is defective and has no mask; pixel metrics need one for each defective image."
                raise ValueError(msg)
        self.maps.append(outputs.anomaly_map.flatten(0, -3).cpu())
        self.mask_paths += paths
        self.categories += outputs.category
