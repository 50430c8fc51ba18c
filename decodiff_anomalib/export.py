"""Exports: one graph from image to labels for ONNX, OpenVINO and INT8, each file run against the model it came from.

The graph takes images ``(B, 3, H, W)`` in [0, 1], any number of any size, and holds everything that tests and
predictions do: resizing, codec, category, correction, maps, score, thresholds. It differs from the model in two ways,
both exact up to rounding: images are resized by matrix products, because exporters drop the antialiasing, and what no
image changes is worked out before, see :meth:`decodiff_anomalib.torch_model.DeCoDiffModel.folded`.

A file is handed over only after it gave what the model gives; ``parity.json`` beside it says how closely.
"""

import ast
import copy
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, Batch, ImageBatch, InferenceBatch
from anomalib.deploy.export import CompressionType, ExportType
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Compose, Resize, Transform
from torchvision.transforms.v2.functional import resize

from decodiff_anomalib.conditioning import GIVEN, UNKNOWN
from decodiff_anomalib.data.images import image_paths, inspect_images, restore_depth

if TYPE_CHECKING:
    import openvino
    from torchmetrics import Metric

    from decodiff_anomalib.lightning_model import DeCoDiff

logger = logging.getLogger(__name__)

PREDICTIONS = InferenceBatch._fields
"""What Anomalib's inferencers understand."""

FURTHER = ("correction", "category", "strangeness")
ON_THE_WAY = ("category", "strangeness")  # to the predictions; whoever wants no correction need not wait for one
"""What else the graph can give, see :class:`decodiff_anomalib.torch_model.Inspection`."""

OPSET = 18
ANY_SIZE = 2**40
SINGLE_FILE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB

TOLERANCES = {None: 1e-3, CompressionType.FP16: 5e-2}
"""Largest difference of maps and scores, whose threshold is 0.5; integers are measured, not judged."""

REPORT = "parity.json"
PARITY_IMAGES, PARITY_BATCHES = 22, (1, 2, 8)
FALLBACK_SIZE = (256, 256)
DECIDED_BY = {"pred_label": "pred_score", "pred_mask": "anomaly_map"}
ODD_SIZES = ((96, 160), (333, 257))
CALIBRATION_IMAGES = 300

QUANTISED = ("model.denoiser", "model.novelty.feature.products", "model.novelty.detail.products")
"""What computes in integers: the denoiser, and the searches for the nearest features, whose distance is taken anew.

Features themselves do not. Their rounding is as large as what tells a small defect on a binary image from none.
"""


class ParityError(RuntimeError):
    """An exported file does not give what the model gives."""


# -------------------------------------------------------------------- the graph


class AntialiasedResize(nn.Module):
    """Bilinear resizing with antialiasing, as torch's, by two matrix products that any exporter understands.

    Each row of a matrix is the triangle filter of one target pixel. Distances are counted in integers, so that the
    weights are exact whatever the size; between equal sizes the matrix is the identity.

    Args:
        size: Height and width to resize to.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.height, self.width = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize ``images`` ``(B, 3, H, W)`` to ``(B, 3, height, width)``."""
        rows = _triangle_weights(images.shape[-2], self.height, images.device)
        columns = _triangle_weights(images.shape[-1], self.width, images.device)
        return rows @ images @ columns.T


def _triangle_weights(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Weights ``(target, source)``; a ``source`` that is symbolic gives symbolic weights."""
    length = torch.full((), source, device=device)
    centers = (2 * torch.arange(target, device=device) + 1)[:, None] * length  # in units of 1 / (2 target) pixels
    distances = ((2 * torch.arange(source, device=device) + 1) * target - centers).abs()
    weights = (1 - distances / (2 * length.clamp_min(target))).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def exportable(transform: Transform | None) -> nn.Module | None:
    """A transform that exporters understand and that keeps the antialiasing, which Anomalib's own version drops."""
    if isinstance(transform, Compose):
        return Compose([exportable(part) for part in transform.transforms])
    if (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation in {"bilinear", InterpolationMode.BILINEAR}
        and len(transform.size) == 2
    ):
        return AntialiasedResize(transform.size)
    return get_exportable_transform(transform)


class Pipeline(nn.Module):
    """From images to predictions, as one module.

    Args:
        pre_processor: Images in [0, 1] to what the model takes; ``None`` for nothing.
        model: The torch model.
        post_processor: Normalises and labels; ``None`` leaves scores and maps raw and labels nothing.
    """

    def __init__(self, pre_processor: nn.Module | None, model: nn.Module, post_processor: nn.Module | None) -> None:
        super().__init__()
        self.pre_processor = pre_processor
        self.model = model
        self.post_processor = post_processor

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Predictions on ``images`` ``(B, 3, H, W)`` in [0, 1]; maps are of the working size."""
        seen = self.see(images)
        return InferenceBatch(**{name: seen.get(name) for name in PREDICTIONS})

    def see(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All of :data:`PREDICTIONS` and :data:`FURTHER` that there is, by name."""
        seen = self.model(self.pre_processor(images) if self.pre_processor else images)
        done = self.post_processor(seen) if self.post_processor else seen
        predictions = {name: getattr(done, name, None) for name in PREDICTIONS}
        further = {name: getattr(seen, name) for name in FURTHER}
        return {name: value for name, value in {**predictions, **further}.items() if value is not None}


class _Chosen(Pipeline):
    """A pipeline that gives some outputs, in order."""

    def __init__(self, pipeline: Pipeline, names: Sequence[str]) -> None:
        super().__init__(pipeline.pre_processor, pipeline.model, pipeline.post_processor)
        self.names = names

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = self.see(images)
        return tuple(seen[name] for name in self.names)


def as_predicting(model: "DeCoDiff") -> Pipeline:
    """The model as tests and predictions use it, antialiasing included; shares its modules."""
    calibrated = getattr(model.post_processor, "calibrated", True)
    return Pipeline(
        getattr(model.pre_processor, "transform", None) or model.pre_processor,
        model.model,
        model.post_processor if calibrated else None,
    )


def as_exported(model: "DeCoDiff") -> Pipeline:
    """The graph: a copy of the model for inference alone, on the CPU."""
    source = as_predicting(model)
    if model.post_processor is not None and source.post_processor is None:
        logger.warning(
            "The model has no thresholds, since it was not validated on normal images: the export gives raw scores and "
            "maps and no labels. `engine.validate(model, datamodule)` before `engine.export(model, ...)` sets them."
        )
    if model.category == GIVEN:
        logger.warning("An exported graph is given images alone: it infers their category, whatever category='given'.")
    pre_processor = source.pre_processor
    pre_processor = exportable(pre_processor) if isinstance(pre_processor, Transform) else copy.deepcopy(pre_processor)
    exported = Pipeline(pre_processor, model.model.folded(), copy.deepcopy(source.post_processor))
    return exported.cpu().eval().requires_grad_(requires_grad=False)


# -------------------------------------------------------------------- files


def write_torch(model: "DeCoDiff", root: Path | str, name: str) -> Path:
    """Write ``weights/torch/<name>.pt``, see :meth:`decodiff_anomalib.DeCoDiff.to_torch`."""
    with _delivery(root, ExportType.TORCH) as (folder, target):
        file = folder / f"{name}.pt"
        torch.save({"model": as_exported(model)}, file)
        written: Pipeline = torch.load(file, weights_only=False)["model"]  # written just above
        run = Run(f"PyTorch {version('torch')}", lambda images: _numpy(written.see(images)), TOLERANCES[None])
        _prove([run], file, model, ParityImages.make(model))
    return target / file.name


def write_onnx(
    model: "DeCoDiff",
    root: Path | str,
    name: str,
    input_size: tuple[int, int] | None = None,
    datamodule: AnomalibDataModule | None = None,
    output_names: Sequence[str] | None = None,
    **onnx_kwargs,
) -> Path:
    """Write ``weights/onnx/<name>.onnx``, see :meth:`decodiff_anomalib.DeCoDiff.to_onnx`."""
    _require("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    with _delivery(root, ExportType.ONNX) as (folder, target):
        file = folder / f"{name}.onnx"
        names = _save_onnx(as_exported(model), file, input_size, output_names or PREDICTIONS, **onnx_kwargs)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        run = Run(
            f"ONNX Runtime {version('onnxruntime')}",
            lambda images: dict(zip(names, session.run(names, {given.name: images.numpy()}), strict=True)),
            TOLERANCES[None],
        )
        _prove([run], file, model, ParityImages.make(model, datamodule, input_size))
    return target / file.name


def write_openvino(
    model: "DeCoDiff",
    root: Path | str,
    name: str,
    input_size: tuple[int, int] | None = None,
    compression: CompressionType | None = None,
    datamodule: AnomalibDataModule | None = None,
    metric: "Metric | None" = None,
    max_drop: float = 0.01,
    ov_kwargs: dict[str, Any] | None = None,
    onnx_kwargs: dict[str, Any] | None = None,
) -> Path:
    """Write ``weights/openvino/<name>.xml`` and ``.bin``, see :meth:`decodiff_anomalib.DeCoDiff.to_openvino`."""
    integers = compression not in {None, CompressionType.FP16}
    _require("onnx", "onnxscript", "openvino", *(["nncf"] if integers else []))
    if compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} and datamodule is None:
        msg = f"compression_type={compression.name} needs images to calibrate on. Give a datamodule (`--data ...`)."
        raise ValueError(msg)
    onnx_kwargs = dict(onnx_kwargs or {})
    shown = onnx_kwargs.pop("output_names", PREDICTIONS)
    import openvino

    with _delivery(root, ExportType.OPENVINO) as (folder, target), TemporaryDirectory() as scratch:
        file, onnx = folder / f"{name}.xml", Path(scratch) / "model.onnx"
        wanted = list(dict.fromkeys((*shown, *ON_THE_WAY)))
        names = _save_onnx(as_exported(model), onnx, input_size, wanted, **onnx_kwargs)
        graph = openvino.convert_model(onnx, **(ov_kwargs or {}))
        for result, output in zip(graph.get_results(), names, strict=True):
            if output not in shown:
                graph.remove_result(result)
        if integers:
            graph = _compress(graph, compression, datamodule, metric, max_drop)
        openvino.save_model(graph, file, compress_to_fp16=compression == CompressionType.FP16)
        runs = _openvino_runs(file, TOLERANCES.get(compression))
        _prove(runs, file, model, ParityImages.make(model, datamodule, input_size), compression)
    return target / file.name


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        msg = f'This export needs {", ".join(missing)}: pip install "decodiff_anomalib[openvino]"'
        raise ModuleNotFoundError(msg, name=missing[0])


@contextmanager
def _delivery(root: Path | str, export_type: ExportType) -> Iterator[tuple[Path, Path]]:
    """A folder to write to and the one its files go to, if all goes well; where they go, nothing unproven ever lies."""
    target = Path(root) / "weights" / export_type.value
    try:
        target.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(dir=target, prefix=".unproven-")
    except OSError as error:
        msg = f"export_root={str(root)!r} cannot be written to: {error}. Give another folder."
        raise OSError(msg) from error
    with scratch:
        yield Path(scratch.name), target
        for file in Path(scratch.name).iterdir():
            file.replace(target / file.name)


def _save_onnx(
    pipeline: Pipeline,
    file: Path,
    input_size: tuple[int, int] | None,
    output_names: Sequence[str],
    **onnx_kwargs,
) -> list[str]:
    """Write the graph and return the names of its outputs.

    Nothing in it is computed from constants alone, and its nodes are named after the module that they are of, so that
    parts of it can be addressed.
    """
    import onnxscript

    example = torch.stack(_drawn(2, input_size or ODD_SIZES[0]))  # a batch of one would become a constant
    with torch.no_grad():
        available = pipeline.see(example)
    unknown = set(output_names) - {*PREDICTIONS, *FURTHER}
    if unknown:
        msg = f"output_names={list(output_names)} must be of {', '.join((*PREDICTIONS, *FURTHER))}."
        raise ValueError(msg)
    names = [name for name in output_names if name in available]
    size = {} if input_size else {2: "height", 3: "width"}
    options = {"dynamic_shapes": ({0: "batch_size", **size},), "opset_version": OPSET, "input_names": ["input"]}
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # each constant that it folds is news to it
    with torch.no_grad():
        program = torch.onnx.export(
            _Chosen(pipeline, names).eval(), (example,), output_names=names, verbose=False, **options | onnx_kwargs
        )
    onnxscript.optimizer.optimize(program.model, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE)
    for node in program.model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.name = f"{scopes[-2] if len(scopes) > 1 else ''}/{node.name}"
        node.metadata_props.clear()  # where the code lay on this machine
    size_of = {tensor.data_ptr(): tensor.nbytes for tensor in pipeline.state_dict().values()}  # steps share weights
    program.save(file, external_data=sum(size_of.values()) > SINGLE_FILE_BYTES)
    return names


# -------------------------------------------------------------------- integers


def _compress(
    graph: "openvino.Model",
    compression: CompressionType,
    datamodule: AnomalibDataModule | None,
    metric: "Metric | None",
    max_drop: float,
) -> "openvino.Model":
    import nncf

    homes = "|".join(map(re.escape, QUANTISED))
    others = nncf.IgnoredScope(patterns=[rf"^(?!({homes})[./]).*"], validate=False)
    if compression == CompressionType.INT8:
        return nncf.compress_weights(graph, ignored_scope=others)
    _set_up(datamodule)
    images = _spread(datamodule.train_data, CALIBRATION_IMAGES)
    options = {
        "calibration_dataset": nncf.Dataset(images, lambda batch: batch.image.numpy()),
        "ignored_scope": others,
        "subset_size": len(images),
    }
    if compression == CompressionType.INT8_PTQ:
        return nncf.quantize(graph, **options)
    validation = _spread(datamodule.test_data, len(datamodule.test_data))
    return nncf.quantize_with_accuracy_control(
        graph,
        validation_dataset=nncf.Dataset(validation),
        validation_fn=lambda compiled, batches: _measure(compiled, batches, metric),
        max_drop=max_drop,
        **options,
    )


def _measure(compiled: "openvino.CompiledModel", batches: Iterator[Batch], metric: "Metric | None") -> float:
    """What a metric of Anomalib's makes of a graph; without one, the F1 score of its labels."""
    if metric is None:
        from anomalib.metrics import F1Score

        metric = F1Score(fields=["pred_label", "gt_label"])
    metric.reset()
    for batch in batches:
        found = {name: torch.from_numpy(value) for name, value in _named(compiled(batch.image.numpy())).items()}
        metric.update(ImageBatch(image=batch.image, gt_label=batch.gt_label, gt_mask=batch.gt_mask, **found))
    return float(metric.compute())


def _set_up(datamodule: AnomalibDataModule) -> None:
    datamodule.prepare_data()
    datamodule.setup("fit")


def _spread(dataset: Dataset, count: int) -> DataLoader:
    """Up to ``count`` images, one by one, from all over a data set that is sorted by category."""
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    paths = image_paths(dataset)
    wide = inspect_images(paths[index] for index in chosen)

    def collate(items: list[Any]) -> Batch:
        batch = dataset.collate_fn(items)
        restore_depth(batch, wide)
        return batch

    return DataLoader(Subset(dataset, chosen.tolist()), batch_size=1, collate_fn=collate)


# -------------------------------------------------------------------- parity


class Run(NamedTuple):
    """A way to run an exported file.

    Attributes:
        name: Of the runtime.
        infer: Images ``(B, 3, H, W)`` to outputs by name.
        tolerance: Largest difference of maps and scores; ``None`` measures without judging.
    """

    name: str
    infer: Callable[[torch.Tensor], Mapping[str, np.ndarray]]
    tolerance: float | None


class ParityImages(NamedTuple):
    """Images to compare on.

    Attributes:
        batches: ``(B, 3, H, W)`` in [0, 1], of several sizes where the graph takes them.
        origin: Where they are from.
    """

    batches: list[torch.Tensor]
    origin: str

    @classmethod
    def make(
        cls,
        model: "DeCoDiff",
        datamodule: AnomalibDataModule | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> "ParityImages":
        """Images of all categories from a datamodule's test images, else drawn ones; some of odd sizes."""
        if datamodule is None:
            images, origin = _drawn(PARITY_IMAGES, input_size or model.input_size or FALLBACK_SIZE), "drawn"
        else:
            _set_up(datamodule)
            images = [batch.image[0] for batch in _spread(datamodule.test_data, PARITY_IMAGES)]
            origin = f"test images of {datamodule.name}"
        if input_size:
            images = [resize(image, list(input_size), antialias=True) for image in images]
        elif model.input_size:  # else the graph does not resize
            images += [image for size in ODD_SIZES for image in _drawn(1, size)]
        of_size = defaultdict(list)
        for image in images:
            of_size[image.shape].append(image)
        batches = []
        for group in map(iter, of_size.values()):
            for count in cycle(PARITY_BATCHES):
                batch = list(islice(group, count))
                if not batch:
                    break
                batches.append(torch.stack(batch))
        return cls(batches, origin)


def _drawn(count: int, size: Sequence[int]) -> list[torch.Tensor]:
    """Images ``(3, height, width)`` in [0, 1] from flat to busy, dark to bright, grey to coloured."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for index in range(count):
        cells = 2 ** (index % 6 + 1)
        coarse = torch.rand(1, 3 if index % 3 else 1, cells, cells, generator=generator)
        image = F.interpolate(coarse, size=tuple(size), mode="bicubic")[0].expand(3, -1, -1)
        fine = torch.rand(3, *size, generator=generator) - 0.5
        contrast, brightness, roughness = torch.rand(3, generator=generator).tolist()
        images.append((brightness + contrast * (image - 0.5) + 0.3 * roughness * fine).clamp(0, 1))
    return images


def _prove(
    runs: Sequence[Run],
    file: Path,
    model: "DeCoDiff",
    images: ParityImages,
    compression: CompressionType | None = None,
) -> None:
    """Run a file against the model, log what differs and keep it in ``parity.json`` beside the file.

    Raises:
        ParityError: If more differs than a run tolerates.
    """
    predicting = as_predicting(model)
    if model.device.type != "cpu":
        predicting = copy.deepcopy(predicting).cpu()
    predicting.eval()
    with torch.inference_mode():
        expected = [_numpy(predicting.see(batch)) for batch in images.batches]
    categories = (*model.categories, UNKNOWN)
    seen = Counter(categories[index] for outputs in expected for index in outputs["category"])
    report = {
        "compression": compression.value if compression else None,
        "images": sum(map(len, images.batches)),
        "origin": images.origin,
        "batches": ["x".join(map(str, batch.shape)) for batch in images.batches],
        "categories": dict(seen),
        "calibrated": predicting.post_processor is not None,
        "runs": {},
    }
    logger.info("Comparing %s with the model on %d images (%s).", file.name, report["images"], images.origin)
    untried = set(model.categories) - set(seen)
    if untried:
        logger.warning(
            "No image of the comparison was taken for %s: unproven there. Give a datamodule (`--data ...`).",
            ", ".join(sorted(untried)),
        )
    for run in runs:
        with torch.inference_mode():
            found = [run.infer(batch) for batch in images.batches]
        report["runs"][run.name] = _judge(run, expected, found, file.name)
    _keep(report, file)


def _keep(report: dict[str, Any], file: Path) -> None:
    """Write ``parity.json`` beside a file, with what it says already of others where the file will go."""
    before = file.parent.parent / REPORT
    reports = json.loads(before.read_text()) if before.is_file() else {}
    (file.parent / REPORT).write_text(json.dumps({**reports, file.name: report}, indent=2) + "\n")


def _judge(
    run: Run,
    expected: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]],
    file: str,
) -> dict[str, Any]:
    """Differences of a run; a label may differ where its score is as near the threshold as scores may differ."""
    near = run.tolerance or 0.0
    result: dict[str, Any] = {"tolerance": run.tolerance, "largest_difference": {}, "different": {}, "undecided": {}}
    beyond = []
    for name in found[0]:
        pairs = [(ours[name], theirs[name]) for ours, theirs in zip(expected, found, strict=True)]
        if name in DECIDED_BY:
            scores = [ours[DECIDED_BY[name]] for ours in expected]
            differ = [
                (ours != theirs, abs(score - 0.5) <= near) for (ours, theirs), score in zip(pairs, scores, strict=True)
            ]
            result["different"][name] = sum(int(wrong.sum()) for wrong, _ in differ)
            result["undecided"][name] = sum(int((wrong & close).sum()) for wrong, close in differ)
            if run.tolerance is not None and result["different"][name] > result["undecided"][name]:
                beyond.append(f"{name} differs {result['different'][name] - result['undecided'][name]} times")
        elif pairs[0][0].dtype.kind == "f":
            largest = max(float(_distance(ours, theirs).max()) for ours, theirs in pairs)
            result["largest_difference"][name] = largest
            if run.tolerance is not None and not largest <= run.tolerance:
                beyond.append(f"{name} differs by {largest:.3g}")
        else:
            result["different"][name] = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
    logger.info(
        "%s, %s: %s", file, run.name, json.dumps({key: result[key] for key in ("largest_difference", "different")})
    )
    if beyond:
        msg = (
            f"{file} does not give what the model gives ({run.name}): {', '.join(beyond)}; {run.tolerance:g} is "
            "allowed. Nothing was written. Try the versions that the package was tested with, or another opset_version."
        )
        raise ParityError(msg)
    return result


def _distance(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Absolute difference, of equal infinities and of undefined values 0 too."""
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0, np.abs(ours - theirs))


def _numpy(outputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in outputs.items()}


def _openvino_runs(file: Path, tolerance: float | None) -> list[Run]:
    """The file in single precision, and as OpenVINO runs it by itself where that is another precision."""
    import openvino

    product = f"OpenVINO {version('openvino')}"
    exact = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    runs = [Run(f"{product}, float32", lambda images: _named(exact(images.numpy())), tolerance)]
    usual = openvino.compile_model(file, "CPU")
    precision = usual.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision != "f32":
        name = f"{product}, {precision} (this machine's default)"
        runs.append(Run(name, lambda images: _named(usual(images.numpy())), None))
    return runs


def _named(outputs: "openvino.utils.data_helpers.OVDict") -> dict[str, np.ndarray]:
    return {output.any_name: value for output, value in outputs.items()}
