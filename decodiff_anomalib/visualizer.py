"""Pictures of predictions: Anomalib's panels and the corrected image."""

import hashlib
import os
from pathlib import Path

import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.models.components import AnomalibModule
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.data.run_images import ImageNumbers, absolute, common_folder, datasets_of
from decodiff_anomalib.image_io import SUFFIXES, read_image

LONGEST_NAME = 200
"""Bytes of a picture's file name; file systems allow 255, of which :func:`atomic_write` needs some."""


class DeCoDiffVisualizer(ImageVisualizer):
    """Anomalib's picture of each test or predict image, with the corrected image and its category beside it.

    Pictures go to ``<run>/images`` and keep their path below the common folder of all images, so that equal file names
    do not overwrite each other. Where loaders do not tell all paths, an image outside that folder keeps its whole path,
    and one without a path has its number. :func:`picture_name` gives the file name.
    """

    _common: Path | None = None

    def on_test_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Find the common folder of the images."""
        del pl_module
        self._begin(trainer, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Find the common folder of the images."""
        del pl_module
        self._begin(trainer, trainer.predict_dataloaders)

    def _begin(self, trainer: Trainer, loaders: object) -> None:
        self._common = common_folder(datasets_of(loaders))
        self._numbers = ImageNumbers(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: AnomalibModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save one picture per image."""
        del outputs, batch_idx, dataloader_idx
        output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        corrections = getattr(batch, "correction", None)
        for index, (item, name) in enumerate(zip(batch, self._numbers.names(batch), strict=True)):
            target = output_dir / self._below(name, is_path=bool(item.image_path))
            if item.anomaly_map is not None and item.anomaly_map.max() > 1:
                # raw, where there are no thresholds: above 1 Anomalib's colours would wrap around
                item.anomaly_map = item.anomaly_map / item.anomaly_map.max()
            item.image, item.image_path = _shown(item, getattr(pl_module, "white_level", None)), None
            picture = visualize_image_item(
                item,
                fields=self.fields,
                overlay_fields=self.overlay_fields,
                field_size=self.field_size,
                fields_config=self.fields_config,
                overlay_fields_config=self.overlay_fields_config,
                text_config=self.text_config,
            )
            if picture is None:
                continue
            if corrections is not None:
                named = len(pl_module.categories) > 1 or batch.pred_category[index] == UNKNOWN
                title = f"As {batch.pred_category[index]}" if named else "Correction"
                picture = _beside(picture, self._panel(corrections[index], title))
            with atomic_write(target) as staged:
                picture.save(staged, format="PNG")

    def _below(self, name: str, *, is_path: bool) -> Path:
        """Where the picture of an image lies below the folder of pictures."""
        if not is_path:
            return Path(picture_name(name))
        image = absolute(name)
        above = self._common if self._common and image.is_relative_to(self._common) else image.anchor
        return image.relative_to(above).parent / picture_name(image.name)

    def _panel(self, correction: torch.Tensor, title: str) -> Image.Image:
        """The correction ``(3, H, W)`` in [0, 1] as a panel of the picture."""
        image = to_pil_image(correction.float().clamp(0, 1).cpu()).resize(self.field_size)
        options = {name: value for name, value in self.text_config.items() if name != "enable"}
        return add_text_to_image(image, title, **options) if self.text_config["enable"] else image


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def picture_name(name: str) -> str:
    """File name of the picture of an image file: another one for each image of a folder.

    ``a.png`` keeps its name, any other gets ``.png`` appended; ``a.jpg.png`` too, because ``a.jpg`` may lie beside it.
    A name that is too long is cut and made unique by a digest.
    """
    stem = name.removesuffix(".png")
    is_plain = stem != name and not stem.lower().endswith(tuple(SUFFIXES))
    picture = name if is_plain else f"{name}.png"
    encoded = os.fsencode(picture)
    if len(encoded) <= LONGEST_NAME:
        return picture
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[: LONGEST_NAME - 21].decode(errors='ignore')}-{digest}.png"


def _shown(item: ImageItem, white_level: float | None) -> torch.Tensor:
    """The image ``(3, H, W)`` in [0, 1]: upright and at full size from its file, or what the model was given."""
    try:
        if item.image_path:
            return read_image(item.image_path, white_level)
    except ValueError:
        pass  # an image of a loader's own, whose path is but a name
    return (item.image.float() / 2 + 0.5).clamp(0, 1)
