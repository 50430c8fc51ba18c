"""Pictures of predictions: Anomalib's panels and the corrected image."""

import os
from pathlib import Path

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.data.images import image_paths


class DeCoDiffVisualizer(ImageVisualizer):
    """Anomalib's picture of each test or predict image, with the corrected image and its category beside it.

    Pictures keep their path below the common folder of all images, so that equal file names do not overwrite each
    other. They go to ``<run>/images``.
    """

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
        del outputs, batch_idx
        output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        common = _common_folder(trainer, dataloader_idx)
        corrections = getattr(batch, "correction", None)
        for index, item in enumerate(batch):
            if item.anomaly_map is not None and item.anomaly_map.max() > 1:
                # raw, where there are no thresholds: above 1 Anomalib's colours would wrap around
                item.anomaly_map = item.anomaly_map / item.anomaly_map.max()
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
            path = Path(item.image_path)
            target = output_dir / (path.relative_to(common) if path.is_relative_to(common) else path.name)
            with atomic_write(target.with_suffix(".png")) as staged:
                picture.save(staged)

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


def _common_folder(trainer: Trainer, dataloader_idx: int) -> Path:
    """The deepest folder that holds every image of the running loader."""
    loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    return Path(os.path.commonpath([Path(path).parent for path in image_paths(loaders[dataloader_idx].dataset)]))
