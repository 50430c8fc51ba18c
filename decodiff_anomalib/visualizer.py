"""Pictures of predictions: image, correction, map and outlines, with their meaning in words around them."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.data.run_images import ImageNumbers, absolute, common_folder, datasets_of
from decodiff_anomalib.image_io import SUFFIXES
from decodiff_anomalib.scale import HIGHEST, LOWEST, TICKS, colour_bar, multiple_of_threshold
from decodiff_anomalib.views import CORRECTION, IMAGE, MAP, MASK, highest_raw, label_threshold, views

LONGEST_NAME = 200
"""Bytes of a picture's file name; file systems allow 255, of which :func:`atomic_write` needs some."""

PREDICTED, LABELLED = "#FFB000", "#00E5FF"
"""Colours of outlines, told apart in every kind of colour vision; their dark borders stand out on any image."""
PAPER, INK, FAINT = "#FFFFFF", "#16191D", "#5B6470"


class DeCoDiffVisualizer(ImageVisualizer):
    """A picture of each test or predict image: the image, its correction, the map, and what was found and labelled.

    Score, threshold and category stand above in words. All maps have one colour scale with the threshold at its middle,
    see :mod:`decodiff_anomalib.scale`; without thresholds, each has its own, whose highest value is stated. Nothing is
    written on the panels.

    Pictures go to ``<run>/images`` and keep their path below the common folder of all images, so that equal file names
    do not overwrite each other. Where loaders do not tell all paths, an image outside that folder keeps its whole path,
    and one without a path has its number. :func:`picture_name` gives the file name.

    Args:
        field_size: Largest width and height of a panel in pixels; text grows with it.
        output_dir: Folder of the pictures, instead of ``<run>/images``.
    """

    _common: Path | None = None

    def __init__(self, field_size: tuple[int, int] = (256, 256), output_dir: str | Path | None = None) -> None:
        super().__init__(field_size=field_size, output_dir=output_dir)

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
        threshold = label_threshold(pl_module)
        for index, name in enumerate(self._numbers.names(batch)):
            shown = views(batch, index, self.field_size, getattr(pl_module, "white_level", None))
            picture = compose(headline(batch, index, threshold, name), _panels(batch, index, shown))
            target = output_dir / self._below(name, is_path=bool(batch.image_path))
            with atomic_write(target) as staged:
                picture.save(staged, format="PNG")

    def _below(self, name: str, *, is_path: bool) -> Path:
        """Where the picture of an image lies below the folder of pictures."""
        if not is_path:
            return Path(picture_name(name))
        image = absolute(name)
        above = self._common if self._common and image.is_relative_to(self._common) else image.anchor
        return image.relative_to(above).parent / picture_name(image.name)


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


# ---------------------------------------------------------------- what is said


def headline(batch: ImageBatch, index: int, threshold: float, name: str) -> tuple[str, str]:
    """The verdict, and the facts behind it."""
    facts = []
    category = batch.pred_category[index] if getattr(batch, "pred_category", None) else None
    if category == UNKNOWN:
        facts.append("of no trained category")
    elif category:
        facts.append(f"category {category}")
    if batch.gt_label is not None:
        facts.append("labelled defective" if batch.gt_label[index] else "labelled normal")
    facts.append(Path(name).name)
    if batch.pred_score is None:
        return "No score", ", ".join(facts)
    score = float(batch.pred_score[index])
    if batch.pred_label is None:
        return f"Score {score:.3g}, no threshold", ", ".join(facts)
    verdict, place = ("Anomalous", "above") if batch.pred_label[index] else ("Normal", "not above")
    if np.isnan(score):
        return "Anomalous: the image could not be scored", ", ".join(facts)
    times = multiple_of_threshold(score, threshold)
    multiple = f" ({times:.2g} × the threshold)" if np.isfinite(times) else ""
    return f"{verdict}: score {score:.2f} {place} {threshold:.2f}{multiple}", ", ".join(facts)


@dataclass(frozen=True)
class Panel:
    """A view with a title above and an explanation below.

    Attributes:
        title: Above the view.
        view: What is shown; all panels of a picture have the same size.
        explanation: Lines below the view, each with the colour of its key, if it has one.
        bar: Colours of the view from left to right, with the text below each share of the width.
    """

    title: str
    view: Image.Image
    explanation: tuple[tuple[str, str | None], ...] = ()
    bar: tuple[Image.Image, dict[float, str]] | None = None


def _panels(batch: ImageBatch, index: int, shown: dict[str, Image.Image]) -> list[Panel]:
    panels = [Panel("Image", shown[IMAGE])]
    if CORRECTION in shown:
        category = batch.pred_category[index] if getattr(batch, "pred_category", None) else None
        title = "Correction" if category in {None, UNKNOWN} else f"Correction, as {category}"
        panels.append(Panel(title, shown[CORRECTION]))
    if MAP in shown:
        highest = highest_raw(batch, index)
        if highest is None:
            ticks = {(value - LOWEST) / (HIGHEST - LOWEST): text for value, text in TICKS.items()}
        else:
            ticks = {0.0: "0", 1.0: f"{highest:.3g}"}
        size = shown[MAP].width, max(4, shown[MAP].width // 24)
        panels.append(Panel("Anomaly map", shown[MAP], bar=(colour_bar(size, highest), ticks)))
    outlined, keys = shown[IMAGE], []
    if batch.pred_mask is not None:
        height, width = batch.pred_mask.shape[-2:]
        found = Image.fromarray(batch.pred_mask[index].reshape(height, width).cpu().numpy() > 0).convert("L")
        outlined = outline(outlined, found.resize(outlined.size, Image.Resampling.NEAREST), PREDICTED)
        keys.append(("found", PREDICTED))
    if MASK in shown:
        outlined = outline(outlined, shown[MASK].convert("L"), LABELLED)
        keys.append(("labelled", LABELLED))
    if keys:
        panels.append(Panel("Defects", outlined, tuple(keys)))
    return panels


# ---------------------------------------------------------------- how it is drawn


def outline(image: Image.Image, mask: Image.Image, colour: str) -> Image.Image:
    """The image with the outlines of a mask (white on black, same size), which lie outside of what they enclose."""
    enclosed, width = np.asarray(mask) > 0, max(1.0, image.width / 160)
    drawn = image.copy()
    if enclosed.any():
        distance = distance_transform_edt(~enclosed)
        for thickness, ink in ((3 * width, INK), (2 * width, colour)):
            drawn.paste(ink, mask=Image.fromarray((distance > 0) & (distance <= thickness)).convert("L"))
    return drawn


@lru_cache(maxsize=8)
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which is always there and has the letters of many languages."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut at the end where it is too wide."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept and font.getlength(f"{text[:kept].rstrip()}…") > width:
        kept -= 1
    return f"{text[:kept].rstrip()}…"


def compose(headline: tuple[str, str], panels: list[Panel]) -> Image.Image:
    """A picture of panels in a row, with text above and below them, never on them.

    Args:
        headline: A line in large letters, and one in small ones.
        panels: At least one.
    """
    width, height = panels[0].view.size
    unit = max(12, round(width / 20))  # height of letters
    gap, line = unit, round(1.5 * unit)
    top = gap + 2 * line + gap // 2 + line
    total = gap + len(panels) * (width + gap)
    picture = Image.new("RGB", (total, top + height + gap // 2 + 2 * line), PAPER)
    draw = ImageDraw.Draw(picture)
    small, large = _font(unit), _font(round(1.2 * unit), bold=True)
    draw.text((gap, gap), _fitted(headline[0], large, total - 2 * gap), INK, large)
    draw.text((gap, gap + round(1.1 * line)), _fitted(headline[1], small, total - 2 * gap), FAINT, small)
    for place, panel in enumerate(panels):
        left, below = gap + place * (width + gap), top + height + gap // 2
        draw.text((left, top - round(0.4 * unit)), _fitted(panel.title, small, width), INK, small, anchor="ls")
        picture.paste(panel.view, (left, top))
        if panel.bar:
            bar, ticks = panel.bar
            picture.paste(bar, (left, below))
            for share, text in ticks.items():
                anchor = "la" if share == 0 else "ra" if share == 1 else "ma"
                draw.text((left + share * width, below + bar.height + unit // 4), text, INK, small, anchor=anchor)
        for text, colour in panel.explanation:
            draw.rectangle((left, below, left + unit, below + unit), colour, INK, max(1, unit // 12))
            draw.text((left + round(1.4 * unit), below + unit), text, INK, small, anchor="ls")
            left += round(1.4 * unit + small.getlength(text) + unit)
    return picture
