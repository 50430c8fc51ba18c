"""Exports through Anomalib's engine and command line, compared with the model's own predictions."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from anomalib.data import NumpyImageBatch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.deploy.export import ExportType
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image, ImageOps
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from decodiff_anomalib import DeCoDiff, MultiCategory, export
from decodiff_anomalib.__main__ import main as decodiff
from decodiff_anomalib.calibration import prediction_limit
from decodiff_anomalib.data import DemoTextures, read_image
from decodiff_anomalib.export import (
    FURTHER_OUTPUTS,
    INTERMEDIATE_OUTPUTS,
    PREDICTIONS,
    TOLERANCES,
    ParityError,
    prediction_pipeline,
)
from decodiff_anomalib.export.parity import SCORE_OF_LABEL
from decodiff_anomalib.export.quantization import QUANTISED_SCOPES
from decodiff_anomalib.export.sample_images import drawn_images

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of gravel and their negatives, two categories in MVTec AD's layout."""
    root = tmp_path_factory.mktemp("data")
    demo = DemoTextures(root=root)
    demo.prepare_data()
    gravel = Path(demo.root) / demo.category
    parts = root / "parts"
    for file in sorted(gravel.rglob("*.png")):
        if int("".join(filter(str.isdigit, file.stem))) < 40:
            image = Image.open(file)
            inverted = image if "ground_truth" in file.parts else ImageOps.invert(image.convert("RGB"))
            for category, picture in {"gravel": image, "negative": inverted}.items():
                target = parts / category / file.relative_to(gravel)
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target)
    return parts


def data_of(root: Path) -> MultiCategory:
    return MultiCategory(root, num_workers=0, train_batch_size=16, val_split_ratio=0.3)


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False)


@pytest.fixture(scope="module")
def checkpoint(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    engine(results).fit(DeCoDiff(image_size=64, train_steps=20), datamodule=data_of(root))
    return next(results.rglob("model.ckpt"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> DeCoDiff:
    return DeCoDiff.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False).eval()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def onnx_file(checkpoint: Path, exports: Path) -> Path:
    """Through the command line in a process of its own, with all outputs."""
    arguments = ["export", "--model", "DeCoDiff", "--ckpt_path", checkpoint, "--export_type", "onnx"]
    names = {"output_names": [*PREDICTIONS, *FURTHER_OUTPUTS]}
    program = [sys.executable, "-c", "from anomalib.cli.cli import main; main()"]
    result = subprocess.run(
        [*program, *map(str, arguments), "--export_root", str(exports), "--onnx_kwargs", json.dumps(names)],
        cwd=exports,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return exports / "weights" / "onnx" / "model.onnx"


@pytest.fixture(scope="module")
def openvino_file(checkpoint: Path, root: Path, exports: Path) -> Path:
    """Through the engine, verified on test images."""
    return engine(exports).export(
        DeCoDiff(), ExportType.OPENVINO, export_root=exports, datamodule=data_of(root), ckpt_path=checkpoint
    )


def photographs(root: Path, count: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Test images of both categories ``(count, 3, H, W)`` in [0, 1]."""
    files = sorted(root.glob("*/test/*/*.png"))
    chosen = [files[index] for index in np.linspace(0, len(files) - 1, count).astype(int)]
    images = [Image.open(file).convert("RGB") for file in chosen]
    images = [image.resize(size[::-1]) if size else image for image in images]
    return np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) / 255 for image in images])


def expected(model: DeCoDiff, images: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        return {
            name: value.numpy() for name, value in prediction_pipeline(model).outputs(torch.from_numpy(images)).items()
        }


def assert_same(found: dict[str, np.ndarray], model: DeCoDiff, images: np.ndarray, tolerance: float = 1e-3) -> None:
    wanted = expected(model, images)
    for name, value in found.items():
        near = abs(wanted[SCORE_OF_LABEL[name]] - 0.5) < tolerance if name in SCORE_OF_LABEL else False
        difference = abs(value.astype(float) - wanted[name])
        same = (difference <= tolerance) | near
        if name == "anomaly_map":  # where two entries of a memory bank are equally near, runtimes may choose either
            assert same.mean() >= 0.999, name
            assert difference.max() <= max(tolerance, 0.01), name
        else:
            assert same.all(), name


# -------------------------------------------------------------------- the model itself


def test_forward_equals_predictions(model: DeCoDiff, root: Path, tmp_path: Path) -> None:
    """Anomalib's own method resizes without antialiasing."""
    batches = engine(tmp_path).predict(model, datamodule=data_of(root))
    files = [path for batch in batches for path in batch.image_path]
    scores = torch.cat([batch.pred_score for batch in batches])
    for index in (0, len(files) // 2, len(files) - 1):
        image = torch.from_numpy(np.asarray(Image.open(files[index]).convert("RGB"), np.float32) / 255)
        with torch.inference_mode():
            torch.testing.assert_close(model(image.movedim(-1, 0)[None]).pred_score[0], scores[index])


# -------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def session(onnx_file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])


def infer(session: onnxruntime.InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": images}), strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("size", [None, (64, 64), (100, 333), (512, 300)])
def test_onnx_outputs_equal_the_models(
    session: onnxruntime.InferenceSession, model: DeCoDiff, root: Path, batch_size: int, size: tuple[int, int] | None
) -> None:
    images = photographs(root, batch_size, size)
    found = infer(session, images)
    assert set(found) == {*PREDICTIONS, *FURTHER_OUTPUTS}
    assert_same(found, model, images)


def test_onnx_declares_dynamic_batch_and_image_size(onnx_file: Path) -> None:
    graph = onnx.load(onnx_file).graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [
        "batch_size",
        3,
        "height",
        "width",
    ]
    assert all(output.type.tensor_type.shape.dim[0].dim_param == "batch_size" for output in graph.output)


def test_the_graph_has_folded_constants_named_modules_and_no_local_paths(onnx_file: Path) -> None:
    graph = onnx.load(onnx_file).graph
    known = {tensor.name for tensor in graph.initializer}
    assert not [node.name for node in graph.node if set(node.input) <= known]
    modules = {node.name.split("/")[0] for node in graph.node}
    assert not [name for name in modules if "time_proj" in name or "embedding." in name or "attn2.to_" in name]
    assert set(QUANTISED_SCOPES) - {"model.denoiser"} <= modules
    assert b"site-packages" not in onnx_file.read_bytes()
    assert str(Path(export.__file__).parents[2]).encode() not in onnx_file.read_bytes()


def test_the_report_states_images_and_differences(onnx_file: Path) -> None:
    report = json.loads((onnx_file.parent / "parity.json").read_text())["model.onnx"]
    (measured,) = report["runtimes"].values()
    assert report["origin"] == "drawn"
    assert {text.split("x", 1)[0] for text in report["batches"]} >= {"1", "2", "8"}
    assert {text.split("x", 1)[1] for text in report["batches"]} == {"3x64x64", "3x96x160", "3x333x257"}
    assert measured["tolerance"] == 1e-3
    assert measured["largest_difference"]["anomaly_map"] < 1e-4
    assert measured["different"]["pred_label"] == 0
    assert [path.name for path in sorted(onnx_file.parent.iterdir())] == [
        "model.onnx",
        "parity.json",
        "thresholds.json",
    ]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 64, 64), np.uint8), r"expected: \(tensor\(float\)\)"),
        (np.zeros((1, 1, 64, 64), np.float32), "Expected: 3"),
        (np.zeros((3, 64, 64), np.float32), "Invalid rank"),
    ],
)
def test_onnx_runtime_refuses_wrong_types_and_shapes(
    session: onnxruntime.InferenceSession, images: np.ndarray, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        session.run(None, {"input": images})


# -------------------------------------------------------------------- OpenVINO


def test_anomalibs_inferencer_agrees_on_a_folder(
    openvino_file: Path, model: DeCoDiff, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it writes a cache into the working directory
    inferencer = OpenVINOInferencer(openvino_file, device="CPU", config=EXACT)
    batches = engine(tmp_path).predict(model, data_path=root / "negative" / "test")
    predicted = {path: batch for batch in batches for path in batch.image_path}
    for file in list(predicted)[::5]:
        found = inferencer.predict(file)
        assert isinstance(found, NumpyImageBatch)
        assert found.pred_score[0] == pytest.approx(float(predicted[file].pred_score[0]), abs=1e-3)
        assert bool(found.pred_label[0]) == bool(predicted[file].pred_label[0])
        assert found.anomaly_map.shape[-2:] == (64, 64)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_openvino_outputs_equal_the_models_and_intermediate_outputs_can_be_added(
    openvino_file: Path, model: DeCoDiff, root: Path, batch_size: int
) -> None:
    graph = openvino.Core().read_model(openvino_file)
    assert [output.any_name for output in graph.outputs] == list(PREDICTIONS)
    graph.add_outputs(list(INTERMEDIATE_OUTPUTS))
    compiled = openvino.compile_model(graph, "CPU", EXACT)
    for size in (None, (90, 200)):
        images = photographs(root, batch_size, size)
        found = {output.any_name: value for output, value in compiled(images).items()}
        assert set(found) == {*PREDICTIONS, *INTERMEDIATE_OUTPUTS}
        assert_same(found, model, images)


def test_openvino_gives_the_correction_on_request(root: Path, tmp_path: Path) -> None:
    """Of a model without features, whose graph is smaller, with a denoiser that changes images."""
    model = DeCoDiff(image_size=64, features="none").eval()
    torch.nn.init.normal_(model.model.denoiser.unet.conv_out.weight, std=0.05)
    file = model.to_openvino(tmp_path, onnx_kwargs={"output_names": ["pred_score", "correction"]})
    compiled = openvino.compile_model(file, "CPU", EXACT)
    images = photographs(root, 2, None)
    found = {output.any_name: value for output, value in compiled(images).items()}
    assert set(found) == {"pred_score", "correction"}
    assert_same(found, model, images)


def test_the_report_names_test_images_and_includes_the_default_precision(openvino_file: Path) -> None:
    report = json.loads((openvino_file.parent / "parity.json").read_text())["model.xml"]
    assert report["origin"].startswith("test images of")
    assert set(report["categories"]) >= {"gravel", "negative"}
    exact, *default = report["runtimes"].values()
    assert exact["tolerance"] == 1e-3
    assert exact["largest_difference"]["anomaly_map"] < 1e-4
    assert all(runtime["tolerance"] is None for runtime in default)


def test_wrong_arguments_are_refused_before_anything_is_written(model: DeCoDiff, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compression_type=INT8_PTQ needs images .* Give a datamodule"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)
    with pytest.raises(ValueError, match=r"output_names=\['score'\] must be of pred_score, "):
        model.to_onnx(tmp_path, output_names=["score"])
    assert not list(tmp_path.rglob("*.*"))


# -------------------------------------------------------------------- PyTorch


def test_torch_inferencer_agrees(
    checkpoint: Path, model: DeCoDiff, root: Path, exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engine(exports).export(DeCoDiff(), ExportType.TORCH, export_root=exports, ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE"):
        TorchInferencer(path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(path, device="cpu")
    images = photographs(root, 4, (80, 120))
    with torch.inference_mode():
        batch = inferencer.predict(torch.from_numpy(images))
    found = {name: getattr(batch, name).numpy().reshape(4, *shape) for name, shape in SHAPES.items()}
    assert_same(found, model, images)


SHAPES = {"pred_score": (), "pred_label": (), "anomaly_map": (1, 64, 64), "pred_mask": (1, 64, 64)}


def test_a_file_whose_outputs_differ_is_not_written(
    model: DeCoDiff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tolerance of 0, rounding is an error."""
    monkeypatch.setitem(TOLERANCES, None, 0.0)
    with pytest.raises(ParityError, match=r"outputs of model\.pt differ from the model\'s .* anomaly_map differs by"):
        model.to_torch(tmp_path)
    assert not list((tmp_path / "weights" / "torch").iterdir())


def test_without_thresholds_scores_are_raw_and_there_are_no_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        path = DeCoDiff(image_size=64).to_torch(tmp_path)
    assert "The model has no thresholds" in caplog.text
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    batch = TorchInferencer(path, device="cpu").predict(torch.rand(2, 3, 70, 64))
    assert batch.pred_label is None
    assert batch.pred_mask is None
    assert batch.pred_score.shape == (2,)
    report = json.loads((path.parent / "parity.json").read_text())["model.pt"]
    assert report["thresholds"] is None


# -------------------------------------------------------------------- slow tests


@pytest.mark.slow
@pytest.mark.parametrize("compression", list(CompressionType))
def test_compressed_files_are_small_and_rank_images_as_the_model_does(
    model: DeCoDiff, root: Path, exports: Path, compression: CompressionType
) -> None:
    """Smaller than the full file, nearly the same scores, and readable by Anomalib's inferencer."""
    name = compression.value
    path = engine(exports).export(
        model, ExportType.OPENVINO, exports, name, compression_type=compression, datamodule=data_of(root)
    )
    report = json.loads((path.parent / "parity.json").read_text())[f"{name}.xml"]
    assert report["compression"] == name
    full = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    assert path.with_suffix(".bin").stat().st_size < 0.9 * full
    compiled = openvino.compile_model(path, "CPU", EXACT)
    images = photographs(root, 24)
    found = {output.any_name: value for output, value in compiled(images).items()}
    assert set(found) == set(PREDICTIONS)
    scores = expected(model, images)["pred_score"]
    assert np.corrcoef(found["pred_score"], scores)[0, 1] > 0.9
    kernels = {precision_of(node) for node in compiled.get_runtime_model().get_ops()}
    assert ("i8" in kernels) == (compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ})


def precision_of(node: "openvino.Node") -> str:
    """The precision that OpenVINO computes a node in."""
    return dict(node.get_rt_info().items())["runtimePrecision"].astype(str)


@pytest.mark.slow
def test_a_fixed_input_size_is_declared_and_others_are_refused(model: DeCoDiff, root: Path, tmp_path: Path) -> None:
    path = model.to_onnx(tmp_path, input_size=(80, 96), datamodule=data_of(root))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch_size", 3, 80, 96]
    assert_same(infer(session, photographs(root, 3, (80, 96))), model, photographs(root, 3, (80, 96)))
    with pytest.raises(Exception, match="Got: 64 Expected: 80"):
        infer(session, photographs(root, 1, (64, 96)))


@pytest.mark.slow
def test_the_published_method_with_an_autoencoder(tmp_path: Path) -> None:
    """Several steps, attention at every resolution, no features, clipped maps, a crop; weights are in the file once."""
    codec = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    denoiser = {"width": 32, "head_channels": 16, "context_width": 32, "norm_groups": 8}
    crop = PreProcessor(
        Compose([Resize((72, 72), antialias=True), CenterCrop(64), Normalize(mean=[0.5] * 3, std=[0.5] * 3)])
    )
    model = DeCoDiff("paper", 64, codec=codec, denoiser=denoiser, pre_processor=crop, num_steps=2)
    for parameter in model.model.denoiser.parameters():  # an untrained one predicts zeros
        torch.nn.init.normal_(parameter, std=0.03, generator=torch.Generator().manual_seed(0))
    path = model.to_onnx(tmp_path)
    weights = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    assert path.stat().st_size < 1.6 * weights
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.stack([image.numpy() for image in drawn_images(3, (100, 90))])
    found = infer(session, images)
    assert set(found) == {"pred_score", "anomaly_map"}
    assert found["pred_score"].max() > 0.01
    assert_same(found, model.eval(), images, 1e-4)


# -------------------------------------------------------------------- moving thresholds


def move(*arguments: object) -> None:
    decodiff(["threshold", *map(str, arguments)])


def copy_of(file: Path, folder: Path) -> Path:
    """A file with its weights and records."""
    for beside in (file, file.with_suffix(".bin"), file.parent / "parity.json", file.parent / "thresholds.json"):
        if beside.is_file():
            shutil.copy(beside, folder)
    return folder / file.name


def scores_of_file(file: Path, images: np.ndarray) -> np.ndarray:
    if file.suffix == ".onnx":
        return infer(onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), images)["pred_score"]
    return openvino.compile_model(file, "CPU", EXACT)(images)["pred_score"]


@pytest.mark.parametrize("kind", ["checkpoint", "onnx_file", "openvino_file"])
def test_thresholds_move_without_training(
    kind: str, request: pytest.FixtureRequest, root: Path, tmp_path: Path
) -> None:
    """Of a checkpoint and of exported files alike, to the same thresholds; a score of 0.7 becomes 0.5."""
    file = copy_of(request.getfixturevalue(kind), tmp_path)
    images = photographs(root, 6)

    def scores() -> np.ndarray:
        if kind != "checkpoint":
            return scores_of_file(file, images).flatten()
        return expected(DeCoDiff.load_from_checkpoint(file, map_location="cpu", visualizer=False).eval(), images)[
            "pred_score"
        ].flatten()

    before = scores()
    move(file, "--score", 0.7)
    odds = before / (1 - before) * 0.3 / 0.7
    np.testing.assert_allclose(scores(), odds / (1 + odds), atol=2e-3)
    move(file, "--rate", 0.01)
    np.testing.assert_allclose(scores(), before, atol=1e-3)
    move(file, "--rate", 0.2)
    assert (scores() > before).all()
    if kind != "checkpoint":
        promises = json.loads((tmp_path / "thresholds.json").read_text())[file.name]["promises"]
        assert all(promise["false_alarm_rate"] > 0.1 for promise in promises)


@pytest.mark.parametrize("kind", ["checkpoint", "onnx_file", "openvino_file"])
def test_thresholds_are_set_on_a_folder_of_normal_images(
    kind: str, request: pytest.FixtureRequest, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy_of(request.getfixturevalue(kind), tmp_path)
    folder = tmp_path / "normal"
    shutil.copytree(root / "gravel" / "test" / "good", folder)
    move(file, "--images", folder, "--category", "gravel")
    model = request.getfixturevalue("model")
    with torch.inference_mode():
        raw = torch.cat(
            [
                model.model(model.pre_processor.transform(read_image(path)[None])).pred_score
                for path in sorted(folder.iterdir())
            ]
        )
    limit = float(prediction_limit(raw, 0.01))
    printed = re.search(r"gravel: image threshold \S+ -> (\S+) ", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(limit, rel=5e-3)


def test_bad_requests_to_move_thresholds_change_nothing(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy_of(checkpoint, tmp_path)
    before = file.read_bytes()
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(next((root / "gravel" / "test" / "good").iterdir()), few)
    for arguments, message in {
        (): "Give one of --rate, --images and --score; given: none",
        ("--rate", 0.1, "--score", 0.5): "given: rate, score",
        ("--rate", 0.7): "must be between 0 and 0.5",
        ("--score", 1): "must be between 0 and 1",
        ("--rate", 0.1, "--category", "cloth"): "valid: gravel, negative",
        ("--images", few): r"has 1 images; 4 set a threshold, and 29 can promise",
        ("--images", root / "negative" / "test" / "good", "--category", "gravel"): "images are not of gravel, such as",
    }.items():
        with pytest.raises(SystemExit):
            move(file, *arguments)
        assert re.search(message, capsys.readouterr().err), arguments
    assert file.read_bytes() == before


def test_a_defect_among_the_normal_images_is_named(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy_of(checkpoint, tmp_path)
    folder = tmp_path / "normal"
    shutil.copytree(root / "gravel" / "test" / "good", folder)
    image = np.asarray(Image.open(next(folder.iterdir())).convert("RGB")).copy()
    image[100:130, 100:130] = 0
    Image.fromarray(image).save(folder / "defect.png")
    move(file, "--images", folder, "--category", "gravel")
    assert "defect.png stands out: its score is" in capsys.readouterr().err
