"""Trained and exported models, opened from their files to one interface: raw outputs, thresholds, and saving these."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.transforms.v2.functional import resize

from decodiff_anomalib.atomic_write import atomic_write, naming

if TYPE_CHECKING:
    from decodiff_anomalib import DeCoDiff
    from decodiff_anomalib.post_processor import DeCoDiffPostProcessor

RUNTIMES = {".onnx": ("onnx", "onnxruntime"), ".xml": ("openvino",)}
"""Suffix of an exported file to the packages that run it."""

Outputs = Mapping[str, torch.Tensor]


@dataclass
class ModelFile:
    """A model that was opened from its file.

    Attributes:
        post_processor: Its thresholds, which can be changed in place.
        white_level: See :func:`decodiff_anomalib.data.read_image`.
        infer: An image ``(1, 3, H, W)`` in [0, 1] to its raw ``pred_score`` and ``anomaly_map``, to ``category_index``
            and ``ood_score``, and to ``correction`` (about [-1, 1]) where the file gives it.
        save: Writes the model with its thresholds to a file.
        exemplars: Normal images ``(N, 3, H, W)`` in [0, 1] that are kept with the model; none in exported files.
    """

    post_processor: "DeCoDiffPostProcessor"
    white_level: float | None
    infer: Callable[[torch.Tensor], Outputs]
    save: Callable[[Path], None]
    exemplars: torch.Tensor


def open_model(file: Path) -> ModelFile:
    """Open a checkpoint (.ckpt) or an exported file (.onnx, .xml).

    Raises:
        ModuleNotFoundError: If what runs an exported file is not installed.
        ValueError: If the file does not exist, is none of these, or has no thresholds.
    """
    if not file.is_file():
        msg = f"{file} does not exist. Give a checkpoint (.ckpt) or an exported file (.onnx, .xml)."
        raise ValueError(msg)
    if file.suffix == ".ckpt":
        opened = _open_checkpoint(file)
    elif file.suffix in RUNTIMES:
        opened = _open_exported(file)
    else:
        msg = f"{file.name} is no checkpoint (.ckpt), ONNX (.onnx) or OpenVINO file (.xml). Export it again instead."
        raise ValueError(msg)
    if not opened.post_processor.has_thresholds:
        msg = f"{file}: The model has no thresholds, since it was not validated on normal images. Train it to the end."
        raise ValueError(msg)
    return opened


def load_checkpoint(file: Path) -> "DeCoDiff":
    """The model of a checkpoint, for inference on the CPU.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from decodiff_anomalib import DeCoDiff

    with _loading(file, "train again"):
        return DeCoDiff.load_from_checkpoint(file, map_location="cpu", visualizer=False).eval()


@contextmanager
def _loading(file: Path, remedy: str) -> Iterator[None]:
    """Load from a file; what is wrong with it becomes an error that names it.

    Raises:
        ValueError: Instead of any other error but that it cannot be opened, or a package is missing.
    """
    try:
        yield
    except (ImportError, OSError):
        raise
    except Exception as error:  # a damaged file can raise any exception
        if isinstance(error, ValueError) and file.name in str(error):
            raise
        msg = f"{file} cannot be loaded: {error} It is damaged or of another version; {remedy}."
        raise ValueError(msg) from error


def save_checkpoint(module: "DeCoDiff", source: Path, target: Path) -> None:
    """Write a model that was loaded from the checkpoint ``source``, with what else that holds, to ``target``."""
    from decodiff_anomalib.checkpoint import share_frozen

    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    components = module._checkpointable_components()  # noqa: SLF001 - of our own base class
    checkpoint |= {key: part.checkpoint_config() for key, part in components.items() if part is module.post_processor}
    checkpoint["state_dict"] |= module.state_dict()
    share_frozen(checkpoint)  # so that a training that goes on from it does so with what was changed
    with atomic_write(target) as staged, naming(target, RuntimeError):  # PyTorch turns a full disk into one
        torch.save(checkpoint, staged)


def _open_checkpoint(file: Path) -> ModelFile:
    from decodiff_anomalib.export import Pipeline, prediction_pipeline

    module = load_checkpoint(file)
    with _loading(file, "train again"):
        input_size = module.input_size  # which its transform tells, if it works
        raw = Pipeline(prediction_pipeline(module).pre_processor, module.model, None)

    def infer(image: torch.Tensor) -> Outputs:
        with torch.inference_mode():
            return raw.outputs(image)

    def save(target: Path) -> None:
        save_checkpoint(module, file, target)

    exemplars = torch.zeros(0, 3, *input_size)
    if module.model.exemplars is not None:
        exemplars = module.model.exemplars.images[:-1].flatten(0, 1) / 255
    return ModelFile(module.post_processor, module.white_level, infer, save, exemplars)


def _open_exported(file: Path) -> ModelFile:
    from decodiff_anomalib.export.parity import write_record
    from decodiff_anomalib.export.thresholds import (
        RECORD,
        TABLES,
        make_record,
        read_record,
        restore_post_processor,
        write_onnx_tables,
        write_openvino_tables,
    )

    missing = [package for package in RUNTIMES[file.suffix] if find_spec(package) is None]
    if missing:
        msg = f'{file.name} needs {", ".join(missing)}: pip install "decodiff_anomalib[openvino]"'
        raise ModuleNotFoundError(msg, name=missing[0])
    with _loading(file, "export it again"):
        record = read_record(file)
        white_level = record["white_level"]
        post_processor = restore_post_processor(record)
        before = restore_post_processor(record)
        run = _run_onnx(file) if file.suffix == ".onnx" else _run_openvino(file)

    def infer(image: torch.Tensor) -> Outputs:
        outputs = run(image)
        index = outputs["category_index"]
        return outputs | {
            "pred_score": _raw(outputs["pred_score"].flatten(), before.image_thresholds[index]),
            "anomaly_map": _raw(outputs["anomaly_map"], before.pixel_thresholds[index]),
        }

    def save(target: Path) -> None:
        if target.suffix != file.suffix:
            msg = f"--output {target} must end in {file.suffix}, as the model does."
            raise ValueError(msg)
        tables = {name: getattr(post_processor, name).numpy() for name in TABLES}
        with atomic_write(target) as staged:
            if file.suffix == ".onnx":
                write_onnx_tables(file, staged, tables)
            else:
                try:
                    with naming(target, RuntimeError):  # OpenVINO turns a full disk into one
                        write_openvino_tables(file, staged, tables)
                    staged.with_suffix(".bin").replace(target.with_suffix(".bin"))
                finally:
                    staged.with_suffix(".bin").unlink(missing_ok=True)
        write_record(target.parent / RECORD, target.name, make_record(post_processor, white_level))

    return ModelFile(post_processor, white_level, infer, save, torch.zeros(0, 3, 1, 1))


def _raw(values: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Raw values of ``values / (values + limit)``."""
    return limit.view(-1, *[1] * (values.ndim - 1)) * values / (1 - values)


# ---------------------------------------------------------------- runtimes

Run = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def _wanted(declared: set[str]) -> list[str]:
    """Outputs to ask a graph for that declares some: what predictions depend on is in it in any case."""
    from decodiff_anomalib.export import INTERMEDIATE_OUTPUTS

    return ["pred_score", "anomaly_map", *INTERMEDIATE_OUTPUTS, *({"correction"} & declared)]


def _run_onnx(file: Path) -> Run:
    import onnx
    import onnxruntime

    model = onnx.load(file)
    declared = {output.name for output in model.graph.output}
    names = _wanted(declared)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()

    def run(image: torch.Tensor) -> dict[str, torch.Tensor]:
        found = session.run(names, {graph_input.name: _sized(image, graph_input.shape).numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


def _run_openvino(file: Path) -> Run:
    import openvino

    graph = openvino.Core().read_model(file)
    declared = {output.any_name for output in graph.outputs}
    names = _wanted(declared)
    graph.add_outputs([name for name in names if name not in declared])
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shape = [side.get_length() if side.is_static else None for side in graph.inputs[0].partial_shape]

    def run(image: torch.Tensor) -> dict[str, torch.Tensor]:
        found = compiled(_sized(image, shape).numpy())
        return {name: torch.from_numpy(np.array(found[name])) for name in names}

    return run


def _sized(image: torch.Tensor, shape: list[Any]) -> torch.Tensor:
    """An image of the size that a graph asks for, if it asks for one."""
    size = shape[-2:]
    return resize(image, size, antialias=True) if all(isinstance(side, int) for side in size) else image
