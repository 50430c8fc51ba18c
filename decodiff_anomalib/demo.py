"""``decodiff demo``: a page in the browser that inspects images with a trained or exported model."""

import hashlib
import html
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data import ImageBatch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.calibration import FEWEST_FURTHER_NORMALS
from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.corruption import draw_defects
from decodiff_anomalib.export.sample_images import drawn_images
from decodiff_anomalib.folder_names import check_folder_name
from decodiff_anomalib.image_io import SUFFIXES, image_files, read_image
from decodiff_anomalib.model_file import ModelFile, open_model
from decodiff_anomalib.scale import COLOURS, HIGHEST, LOWEST, TICKS, colour_bar
from decodiff_anomalib.views import CORRECTION, IMAGE, MAP, label_threshold, views
from decodiff_anomalib.visualizer import PREDICTED, headline, outline

if TYPE_CHECKING:
    import gradio

VIEW = (512, 512)
"""Largest width and height of a view, pixels."""
THUMBNAIL = (160, 160)
MAX_EXAMPLES = 12
KEPT = 3600
"""Seconds for which the server keeps what was uploaded."""
LONGEST_STEM = 100  # of the name of a copy


def demo(
    model: Path,
    examples: Path | None = None,
    false_alarms: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Open a page that inspects images: score, correction, map and mask, with a threshold to move.

    Args:
        model: Checkpoint (.ckpt), or exported file (.onnx, .xml), which shows a correction if it has that output.
        examples: Folder whose first images are offered as examples. By default, normal images that are kept with the
            checkpoint, and defects drawn on them; for exported files, drawn images.
        false_alarms: Folder that images are copied to which are marked as false alarms on the page, for
            `decodiff refine`; made where it is missing. Without it, none can be marked.
        host: Address to serve at. The default is this computer alone; 0.0.0.0 lets everyone in the network use it.
        port: Port to serve at.

    Raises:
        SystemExit: With status 2, if the model or the examples cannot be opened, the folder of false alarms cannot be
            made, Gradio is not installed, or the port is taken.
    """
    with TemporaryDirectory(prefix="decodiff-demo-") as temporary:
        os.environ["GRADIO_TEMP_DIR"] = temporary  # of uploads, which Gradio would leave behind
        try:
            _require_gradio()
            opened = open_model(Path(model))
            files = write_examples(opened, Path(temporary)) if examples is None else _examples_of(Path(examples))
            if false_alarms is not None:
                _prepare_false_alarms(Path(false_alarms), opened.post_processor.categories)
            page = build_page(opened, files, Path(model), None if false_alarms is None else Path(false_alarms))
            serve(page, host, port)
        except (ImportError, OSError, ValueError) as error:
            print(f"decodiff demo: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        page.block_thread()


def _require_gradio() -> None:
    if find_spec("gradio") is None:
        msg = 'The demo needs gradio: pip install "decodiff_anomalib[app]"'
        raise ModuleNotFoundError(msg, name="gradio")


# ---------------------------------------------------------------- examples


def _examples_of(folder: Path) -> list[Path]:
    files = image_files(folder)
    if not files:
        msg = f"--examples {folder} has no images. Give a folder with some, or leave it out."
        raise ValueError(msg)
    return files[:MAX_EXAMPLES]


def write_examples(opened: ModelFile, folder: Path) -> list[Path]:
    """Write images to begin with: exemplars of the model and defects drawn on some, or where it has none, drawn ones.

    Args:
        opened: The model.
        folder: Where they are written to.
    """
    half = MAX_EXAMPLES // 2
    if len(opened.exemplars):
        normal = opened.exemplars[torch.linspace(0, len(opened.exemplars) - 1, half).round().long()]
        defective = draw_defects(normal * 2 - 1, torch.Generator().manual_seed(0)) / 2 + 0.5
        pictures = {f"{number}-normal.png": image for number, image in enumerate(normal, 1)}
        pictures |= {f"{number}-defective.png": image.clamp(0, 1) for number, image in enumerate(defective, 1)}
    else:
        pictures = {f"{number}-drawn.png": image for number, image in enumerate(drawn_images(half, VIEW), 1)}
    for name, image in pictures.items():
        to_pil_image(image).save(folder / name)
    return [folder / name for name in sorted(pictures, reverse=True)]


# ---------------------------------------------------------------- inspecting an image


@dataclass(frozen=True)
class Inspection:
    """The prediction of an image.

    Attributes:
        file: The image.
        batch: Of this image alone, with normalised ``pred_score`` and ``anomaly_map``, ``pred_mask``, ``correction`` in
            [0, 1] if there is one, and ``pred_category``.
        is_unknown: Whether it is of no trained category, which is anomalous whatever the threshold.
        views: Image, correction, map, as :func:`decodiff_anomalib.views.views` names them.
    """

    file: Path
    batch: ImageBatch
    is_unknown: bool
    views: dict[str, Image.Image]

    @property
    def score(self) -> float:
        """Between 0 and 1, 0.5 at the model's threshold; NaN if the image could not be scored."""
        return float(self.batch.pred_score[0])

    def is_anomalous(self, threshold: float) -> bool:
        """Whether the image is anomalous at a threshold; what cannot be scored does not pass."""
        return self.is_unknown or not self.score <= threshold

    def verdict(self, threshold: float) -> tuple[str, str]:
        """The verdict at a threshold in words, and the facts behind it."""
        self.batch.pred_label = torch.tensor([self.is_anomalous(threshold)])
        said, facts = headline(self.batch, 0, threshold, self.file.name)
        return ("Anomalous whatever the threshold" if self.is_unknown else said), facts

    def outlined(self) -> Image.Image:
        """The image with the outline of its mask."""
        found = self.batch.pred_mask
        mask = Image.fromarray(found[0].reshape(found.shape[-2:]).numpy() > 0).convert("L")
        image = self.views[IMAGE]
        return outline(image, mask.resize(image.size, Image.Resampling.NEAREST), PREDICTED)


def inspect(opened: ModelFile, file: Path) -> Inspection:
    """Predict an image.

    Args:
        opened: The model, with thresholds.
        file: The image.

    Raises:
        ValueError: If the image cannot be read; says why.
    """
    outputs = opened.infer(read_image(file, opened.white_level)[None])
    prediction = opened.post_processor(SimpleNamespace(**outputs))
    # without the pixels, which views read from the file: a page keeps what it inspected
    batch = ImageBatch(image=torch.zeros(1, 3, 1, 1), image_path=[str(file)], **prediction._asdict())
    names = (*opened.post_processor.categories, UNKNOWN)
    batch.pred_category = [names[int(outputs["category_index"])]]
    if "correction" in outputs:
        batch.correction = outputs["correction"] / 2 + 0.5
    is_unknown = bool(outputs["ood_score"] > 1)
    return Inspection(file, batch, is_unknown, views(batch, 0, VIEW, opened.white_level))


def inspect_all(opened: ModelFile, files: Sequence[Path]) -> tuple[list[Inspection], list[str]]:
    """Predict images, and why those that cannot be read cannot."""
    found, problems = [], []
    for file in files:
        try:
            found.append(inspect(opened, file))
        except ValueError as error:  # noqa: PERF203 - which names the file by a path that an uploaded one did not have
            problems.append(str(error).replace(str(file), file.name))
    return found, problems


# ---------------------------------------------------------------- false alarms


def _prepare_false_alarms(folder: Path, categories: Sequence[str]) -> None:
    """Make the folder of false alarms, and check that it can have a folder for each category.

    Raises:
        OSError: If it cannot be made.
        ValueError: If a category cannot be the name of a folder.
    """
    for name in categories:
        check_folder_name(name, "category")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--false_alarms {folder} cannot be made: {error}. Give a folder that can be written to."
        raise OSError(msg) from error


def keep_false_alarm(inspection: Inspection, folder: Path, categories: Sequence[str]) -> Path:
    """Copy an image to the folder of false alarms; returns the copy.

    Its name has a hash of its content, so that images of the same name do not replace each other, and none is there
    twice.

    Args:
        inspection: The image.
        folder: Of the false alarms; where there are several categories, the image goes to a folder below it with the
            name of the category that was inferred.
        categories: Of the model.

    Raises:
        OSError: If the image is no longer there, or cannot be written.
    """
    content = inspection.file.read_bytes()
    stem = inspection.file.stem.lstrip(".")[:LONGEST_STEM]  # a hidden file would be no image
    name = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}{inspection.file.suffix}"
    copy = (folder / inspection.batch.pred_category[0] if len(categories) > 1 else folder) / name
    if not copy.exists():
        with atomic_write(copy) as staged:
            staged.write_bytes(content)
    return copy


def keep_false_alarms(
    found: Sequence[Inspection], threshold: float, folder: Path, categories: Sequence[str], model: Path
) -> str:
    """Copy the images that are anomalous at a threshold to the folder of false alarms; returns what the page says."""
    alarms = [one for one in found if one.is_anomalous(threshold)]
    if not alarms:
        return "<p>Nothing was marked: no anomalous image is chosen.</p>"
    said = []
    for one in alarms:
        try:
            keep_false_alarm(one, folder, categories)
        except FileNotFoundError:  # noqa: PERF203 - each image has its own
            said.append(f"{one.file.name} is no longer on the server. Drop it again.")
        except OSError as error:
            said.append(f"{one.file.name} cannot be copied: {error}")
    problems = "".join(f"<p>Not marked: {html.escape(problem)}</p>" for problem in said)
    return problems + refine_html(folder, categories, model)


def refine_html(folder: Path, categories: Sequence[str], model: Path) -> str:
    """How many false alarms each folder has, and how the model learns from them."""
    lines = []
    several = len(categories) > 1
    for name in (*categories, UNKNOWN) if several else categories:
        place = folder / name if several else folder
        count = len(image_files(place))
        if not count:
            continue
        words = ["decodiff", "refine", str(model) if model.suffix == ".ckpt" else "CHECKPOINT", "--normal", str(place)]
        if several:
            words += ["--category", "NAME" if name == UNKNOWN else name]
        note = f" It takes {FEWEST_FURTHER_NORMALS} images or more." if count < FEWEST_FURTHER_NORMALS else ""
        if name == UNKNOWN:
            note += " NAME is the category that the images are of; move those of others to its folder."
        if model.suffix != ".ckpt":
            note += f" CHECKPOINT is what {model.name} was exported from."
        lines.append(
            f"<p>{count} in {html.escape(str(place))}; to learn from them: "
            f"<code>{html.escape(shlex.join(words))}</code>{html.escape(note)}</p>"
        )
    return "".join(lines) + "<p>To take one back, delete its file.</p>"


# ---------------------------------------------------------------- what is shown


def verdict_html(inspection: Inspection, threshold: float) -> str:
    """The verdict in words, and the score on a line from 0 to 1 with the threshold."""
    said, facts = (html.escape(words) for words in inspection.verdict(threshold))
    below, above = (mpl.colors.to_hex(mpl.colormaps[COLOURS](share)) for share in (0.1, 0.9))
    colour = above if inspection.is_anomalous(threshold) else below
    share = 100 * min(max(inspection.score, 0.0), 1.0)  # NaN gives 0
    return (
        f'<p class="verdict" style="color: {colour}">{said}</p><p>{facts}</p>'
        f'<div class="score"><div style="width: {share:.1f}%; background: {colour}"></div>'
        f'<i style="left: {100 * threshold:.1f}%"></i></div>'
    )


def legend_html() -> str:
    """The colours of maps, and what they mean."""
    stops = ", ".join(mpl.colors.to_hex(colour / 255) for colour in np.asarray(colour_bar((21, 1)))[0])
    ticks = "".join(
        f'<span style="left: {100 * (value - LOWEST) / (HIGHEST - LOWEST):.0f}%">{html.escape(text)}</span>'
        for value, text in TICKS.items()
    )
    return (
        f'<div class="legend"><div style="background: linear-gradient(to right, {stops})"></div><p>{ticks}</p></div>'
        "<p>The map is in multiples of the threshold of pixels; the mask is where it is above. They do not follow the "
        "slider, which moves the threshold of the score.</p>"
    )


def command_html(model: Path, threshold: float, default: float) -> str:
    """How to keep a threshold that was chosen on the page; nothing at the model's own."""
    if threshold == default:
        return ""
    command = f"decodiff threshold {shlex.quote(str(model))} --score {threshold:g}"
    return f"<p>To keep this threshold: <code>{html.escape(command)}</code></p>"


STYLE = """
label[data-testid="block-label"] { position: static; width: fit-content; } /* not on the pictures */
.verdict { font-size: 1.4rem; font-weight: 600; margin: 0; }
.dark .verdict { filter: brightness(1.6); }
.score { position: relative; height: 14px; background: var(--background-fill-secondary); margin: 10px 0; }
.score div { height: 100%; }
.score i { position: absolute; top: -5px; bottom: -5px; border-left: 3px solid var(--body-text-color); }
#results .caption-label { max-width: 100%; left: 0; right: 0; font-size: 0.75rem; text-align: center; opacity: 1; }
.legend { padding: 0 3em; }
.legend div { height: 12px; }
.legend p { position: relative; height: 1.6em; }
.legend span { position: absolute; transform: translateX(-50%); }
"""


def build_page(
    opened: ModelFile, examples: Sequence[Path], model: Path, false_alarms: Path | None = None
) -> "gradio.Blocks":
    """The page, which needs no network.

    Args:
        opened: The model, with thresholds.
        examples: Images to begin with.
        model: Its file, to be named on the page.
        false_alarms: Folder that marked images are copied to; ``None`` for a page without the buttons that mark them.
    """
    import gradio as gr

    default = label_threshold(opened)

    def thumbnail(picture: Image.Image) -> Image.Image:
        small = picture.copy()
        small.thumbnail(THUMBNAIL)
        return small

    def words(found: list[Inspection], chosen: int, threshold: float) -> list[object]:
        """The verdicts at a threshold."""
        captions = [
            (thumbnail(one.views[IMAGE]), f"{'Anomalous' if one.is_anomalous(threshold) else 'Normal'} {one.score:.2f}")
            for one in found
        ]
        verdict = verdict_html(found[chosen], threshold) if found else ""
        return [gr.Gallery(captions, visible=len(found) > 1), verdict, command_html(model, threshold, default)]

    def pictures(found: list[Inspection], chosen: int) -> list[object]:
        if not found:
            return [gr.Image(None), gr.Image(None), gr.Image(None), gr.Image(None)]
        one = found[chosen]
        correction = one.views.get(CORRECTION)
        return [
            gr.Image(one.views[IMAGE]),
            gr.Image(correction, visible=correction is not None),
            gr.Image(one.views[MAP]),
            gr.Image(one.outlined()),
        ]

    def look(files: Sequence[Path], threshold: float, progress: gr.Progress) -> list[object]:
        found, problems = inspect_all(opened, progress.tqdm(files, unit="images"))
        not_read = "".join(f"<p>Not read: {html.escape(problem)}</p>" for problem in problems)
        return [found, 0, not_read, *words(found, 0, threshold), *pictures(found, 0)]

    def look_at_uploads(files: list[str] | None, threshold: float, progress=gr.Progress()) -> list[object]:  # noqa: ANN001, B008
        return look([Path(file) for file in files or ()], threshold, progress)

    def look_at_example(threshold: float, event: gr.SelectData, progress=gr.Progress()) -> list[object]:  # noqa: ANN001, B008
        return look([examples[event.index]], threshold, progress)

    def choose(found: list[Inspection], threshold: float, event: gr.SelectData) -> list[object]:
        return [event.index, verdict_html(found[event.index], threshold), *pictures(found, event.index)]

    small = [thumbnail(to_pil_image(read_image(file, opened.white_level))) for file in examples]
    with gr.Blocks(title=f"DeCoDiff: {model.name}", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        inspections, selected = gr.State([]), gr.State(0)
        gr.Markdown(f"## {model.name}\nFinds defects in images of {', '.join(opened.post_processor.categories)}.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                uploads = gr.File(
                    label="Images", file_count="multiple", file_types=sorted(SUFFIXES), elem_id="uploads", height=150
                )
                offered = gr.Gallery(
                    small, label="Examples", columns=2, height=320, allow_preview=False, interactive=False, buttons=[],
                    elem_id="examples",
                )  # fmt: skip
                threshold = gr.Slider(
                    0.01, 0.99, default, step=0.01, label="Threshold of the score", elem_id="threshold",
                    info=f"{default:g} is the model's own.",
                )  # fmt: skip
                command = gr.HTML(elem_id="command")
                if false_alarms is not None:
                    keep = partial(
                        keep_false_alarms, folder=false_alarms, categories=opened.post_processor.categories, model=model
                    )
                    _add_marking(keep, inspections, selected, threshold)
            with gr.Column(scale=3, min_width=600):
                verdict = gr.HTML("<p>Drop images, or choose an example.</p>", elem_id="verdict")
                problems = gr.HTML(elem_id="problems")
                results = gr.Gallery(
                    label="Inspected images", columns=6, height=170, allow_preview=False, interactive=False,
                    buttons=[], visible=False, elem_id="results",
                )  # fmt: skip
                with gr.Row(elem_id="views"):
                    shown = [
                        gr.Image(label=label, type="pil", interactive=False, buttons=["fullscreen"], min_width=200)
                        for label in ("Image", "Correction", "Anomaly map", "Mask")
                    ]
                gr.HTML(legend_html())
        said = [results, verdict, command]
        everything = [inspections, selected, problems, *said, *shown]
        one_at_a_time = {"concurrency_id": "model", "api_visibility": "private"}
        uploads.change(look_at_uploads, [uploads, threshold], everything, **one_at_a_time)
        offered.select(look_at_example, threshold, everything, **one_at_a_time)
        quickly = {"show_progress": "hidden", "api_visibility": "private"}
        results.select(choose, [inspections, threshold], [selected, verdict, *shown], **quickly)
        threshold.change(words, [inspections, selected, threshold], said, trigger_mode="always_last", **quickly)
    return page


def _add_marking(
    keep: Callable[[list[Inspection], float], str],
    inspections: "gradio.State",
    selected: "gradio.State",
    threshold: "gradio.Slider",
) -> None:
    """Buttons that mark images as false alarms, and what was said about them.

    Args:
        keep: Keeps the images of inspections that are anomalous at a threshold; returns what the page says.
        inspections: Of all images shown.
        selected: Place of the one that is looked at.
        threshold: Of the score.
    """
    import gradio as gr

    def keep_one(found: list[Inspection], chosen: int, threshold: float) -> str:
        return keep(found[chosen : chosen + 1], threshold)

    one = gr.Button("This image is a false alarm", elem_id="mark")
    every = gr.Button("All anomalous images shown are false alarms", elem_id="mark-all")
    marked = gr.HTML(elem_id="marked")
    quickly = {"show_progress": "hidden", "api_visibility": "private"}
    one.click(keep_one, [inspections, selected, threshold], marked, **quickly)
    every.click(keep, [inspections, threshold], marked, **quickly)


def serve(page: "gradio.Blocks", host: str, port: int) -> str:
    """Serve a page in the background; returns its address.

    Raises:
        OSError: If the port is taken.
    """
    import gradio as gr

    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the system: the default ones are fetched
    theme = gr.themes.Default(primary_hue="teal", font=fonts[0], font_mono=fonts[1])
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=STYLE,
        )
    except OSError as error:
        msg = f"--port {port} of {host} is taken or not allowed. Another demo may be running; give another --port."
        raise OSError(msg) from error
    print(f"{address} shows the demo. Ctrl-C ends it.")
    return address
