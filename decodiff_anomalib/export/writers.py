"""Writing PyTorch, ONNX and OpenVINO files through a staging directory that only verified files leave."""

import ast
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy.export import CompressionType, ExportType

from decodiff_anomalib.atomic_write import naming
from decodiff_anomalib.export.parity import (
    ODD_SIZES,
    TOLERANCES,
    ParityImages,
    Runtime,
    check_parity,
    numpy_outputs,
    openvino_runtimes,
    stage_record,
)
from decodiff_anomalib.export.pipeline import (
    FURTHER_OUTPUTS,
    INTERMEDIATE_OUTPUTS,
    PREDICTIONS,
    ExportableModel,
    Pipeline,
    SelectedOutputs,
    export_pipeline,
)
from decodiff_anomalib.export.quantization import compress
from decodiff_anomalib.export.sample_images import drawn_images
from decodiff_anomalib.export.thresholds import RECORD, make_record, name_tables
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor

if TYPE_CHECKING:
    from torchmetrics import Metric

OPSET = 18
ANY_SIZE = 2**40  # bytes up to which constants are folded
SINGLE_FILE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB


def write_torch(model: ExportableModel, root: Path | str, name: str) -> Path:
    """Write ``weights/torch/<name>.pt``, see :meth:`decodiff_anomalib.export.ExportMixin.to_torch`."""
    with staging_directory(root, ExportType.TORCH) as (staging, target):
        file = staging / f"{name}.pt"
        with naming(target / file.name, RuntimeError):  # which PyTorch turns a full disk into
            torch.save({"model": export_pipeline(model)}, file)
        written: Pipeline = torch.load(file, weights_only=False)["model"]  # written just above
        runtime = Runtime(
            f"PyTorch {version('torch')}", lambda images: numpy_outputs(written.outputs(images)), TOLERANCES[None]
        )
        check_parity([runtime], file, model, ParityImages.make(model))
    return target / file.name


def write_onnx(
    model: ExportableModel,
    root: Path | str,
    name: str,
    input_size: tuple[int, int] | None = None,
    datamodule: AnomalibDataModule | None = None,
    output_names: Sequence[str] | None = None,
    **onnx_kwargs,
) -> Path:
    """Write ``weights/onnx/<name>.onnx``, see :meth:`decodiff_anomalib.export.ExportMixin.to_onnx`."""
    _require("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    with staging_directory(root, ExportType.ONNX) as (staging, target):
        file = staging / f"{name}.onnx"
        outputs = output_names or PREDICTIONS
        names = _save_onnx(export_pipeline(model), file, input_size, outputs, **onnx_kwargs)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (graph_input,) = session.get_inputs()
        runtime = Runtime(
            f"ONNX Runtime {version('onnxruntime')}",
            lambda images: dict(zip(names, session.run(names, {graph_input.name: images.numpy()}), strict=True)),
            TOLERANCES[None],
        )
        check_parity([runtime], file, model, ParityImages.make(model, datamodule, input_size))
        _stage_thresholds(model, file)
    return target / file.name


def write_openvino(
    model: ExportableModel,
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
    """Write ``weights/openvino/<name>.xml`` and ``.bin``, see :class:`decodiff_anomalib.export.ExportMixin`."""
    integers = None if compression == CompressionType.FP16 else compression
    _require("onnx", "onnxscript", "openvino", *(["nncf"] if integers else []))
    if compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} and datamodule is None:
        msg = (
            f"compression_type={compression.name} needs images to measure ranges on. Give a datamodule (`--data ...`)."
        )
        raise ValueError(msg)
    onnx_kwargs = dict(onnx_kwargs or {})
    outputs = onnx_kwargs.pop("output_names", PREDICTIONS)
    import openvino

    with staging_directory(root, ExportType.OPENVINO) as (staging, target), TemporaryDirectory() as temporary:
        file, onnx = staging / f"{name}.xml", Path(temporary) / "model.onnx"
        _save_onnx(export_pipeline(model), onnx, input_size, outputs, **onnx_kwargs)
        graph = openvino.convert_model(onnx, **(ov_kwargs or {}))
        if integers:
            graph = compress(graph, integers, datamodule, metric, max_drop, model.white_level)
        with naming(target / file.name, RuntimeError):  # which OpenVINO turns a full disk into
            openvino.save_model(graph, file, compress_to_fp16=compression == CompressionType.FP16)
        runtimes = openvino_runtimes(file, TOLERANCES.get(compression))
        check_parity(runtimes, file, model, ParityImages.make(model, datamodule, input_size), compression)
        _stage_thresholds(model, file)
    return target / file.name


def _stage_thresholds(model: ExportableModel, file: Path) -> None:
    post_processor = model.post_processor
    if isinstance(post_processor, DeCoDiffPostProcessor) and post_processor.has_thresholds:
        stage_record(file, RECORD, make_record(post_processor, model.white_level))


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        msg = f'This export needs {", ".join(missing)}: pip install "decodiff_anomalib[openvino]"'
        raise ModuleNotFoundError(msg, name=missing[0])


@contextmanager
def staging_directory(root: Path | str, export_type: ExportType) -> Iterator[tuple[Path, Path]]:
    """Yield a staging directory and the target directory that its files move to when the block ends without an error.

    Raises:
        OSError: If the target directory cannot be written to, or the disk is full.
    """
    target = Path(root) / "weights" / export_type.value
    try:
        target.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=target, prefix=".staging-")
    except OSError as error:
        msg = f"export_root={str(root)!r} cannot be written to: {error}. Give another folder."
        raise OSError(msg) from error
    with temporary, naming(target):
        staging = Path(temporary.name)
        yield staging, target
        for file in staging.iterdir():
            file.replace(target / file.name)


def _save_onnx(
    pipeline: Pipeline,
    file: Path,
    input_size: tuple[int, int] | None,
    output_names: Sequence[str],
    **onnx_kwargs,
) -> list[str]:
    """Write the graph as ONNX and return the names of its outputs.

    :data:`~decodiff_anomalib.export.INTERMEDIATE_OUTPUTS` that are not asked for stay in the graph as named tensors.
    Constants are folded, and nodes are named after the module that they belong to, so that modules can be addressed in
    the graph.

    Raises:
        ValueError: If an output name is unknown.
    """
    import onnxscript

    example = torch.stack(drawn_images(2, input_size or ODD_SIZES[0]))  # a batch of one would become a constant
    with torch.no_grad():
        available = pipeline.outputs(example)
    unknown = set(output_names) - {*PREDICTIONS, *FURTHER_OUTPUTS}
    if unknown:
        msg = f"output_names={list(output_names)} must be of {', '.join((*PREDICTIONS, *FURTHER_OUTPUTS))}."
        raise ValueError(msg)
    names = [name for name in output_names if name in available]
    computed = list(dict.fromkeys((*names, *INTERMEDIATE_OUTPUTS)))  # which keep their names in the graph
    size = {} if input_size else {2: "height", 3: "width"}
    options: dict[str, Any] = {
        "dynamic_shapes": ({0: "batch_size", **size},),
        "opset_version": OPSET,
        "input_names": ["input"],
    }
    options |= onnx_kwargs
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # below, it reports every folded constant
    with torch.no_grad():
        program = torch.onnx.export(
            SelectedOutputs(pipeline, computed).eval(), (example,), output_names=computed, verbose=False, **options
        )
    assert program is not None  # it is only where torch writes the file itself
    onnxscript.optimizer.optimize(program.model, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE)
    del program.model.graph.outputs[len(names) :]
    if isinstance(pipeline.post_processor, DeCoDiffPostProcessor):
        name_tables(program.model.graph, pipeline.post_processor)
    for node in program.model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.name = f"{scopes[-2] if len(scopes) > 1 else ''}/{node.name}"
        node.metadata_props.clear()  # it has source paths of this machine
    size_of = {tensor.data_ptr(): tensor.nbytes for tensor in pipeline.state_dict().values()}  # steps share weights
    program.save(file, external_data=sum(size_of.values()) > SINGLE_FILE_BYTES)
    return names
