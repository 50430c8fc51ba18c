"""What an export is made of: resizing, folding, the judgement of differences, delivery. Files are in integration."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.deploy.export import ExportType
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from decodiff_anomalib import export
from decodiff_anomalib.denoiser import Denoiser, DenoiserSize, FoldedDenoiser, build_denoiser
from decodiff_anomalib.export import AntialiasedResize, ParityError, Run, exportable
from decodiff_anomalib.features import FeatureNovelty
from decodiff_anomalib.presets import PRESETS
from decodiff_anomalib.torch_model import DeCoDiffModel


@pytest.mark.parametrize("target", [(256, 256), (64, 96)])
@pytest.mark.parametrize("source", [(256, 256), (64, 64), (1, 1), (100, 333), (257, 255), (700, 500), (1999, 1201)])
def test_resizing_is_torchs_with_antialiasing(source: tuple[int, int], target: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(images, target, mode="bilinear", antialias=True)
    torch.testing.assert_close(AntialiasedResize(target)(images), expected, atol=1e-5, rtol=0)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    images = torch.rand(2, 3, 48, 80)
    assert torch.equal(AntialiasedResize((48, 80))(images), images)


@pytest.mark.parametrize("interpolation", ["bilinear", InterpolationMode.BILINEAR])  # as made and as restored
def test_antialiasing_survives(interpolation: str | InterpolationMode) -> None:
    transform = Resize((64, 96), interpolation, antialias=True)
    images = torch.rand(1, 3, 300, 200)
    torch.testing.assert_close(exportable(transform)(images), transform(images), atol=1e-5, rtol=0)


def test_only_what_exporters_do_not_understand_is_replaced() -> None:
    whole = exportable(Compose([Resize((64, 64), antialias=True), CenterCrop(48), Normalize([0.5] * 3, [0.5] * 3)]))
    assert [type(part).__name__ for part in whole.transforms] == [
        "AntialiasedResize",
        "ExportableCenterCrop",
        "Normalize",
    ]
    for kept in (Resize((64, 64), antialias=False), Resize(64, antialias=True)):
        assert isinstance(exportable(kept), Resize)
    assert exportable(None) is None


def denoiser_of(name: str | DenoiserSize) -> Denoiser:
    denoiser = build_denoiser(name, latent_channels=6, num_categories=3, sample_size=16).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():  # an untrained one predicts nothing
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return denoiser


@pytest.mark.parametrize("name", ["nano", DenoiserSize(16, 8, 12, norm_groups=4)])
def test_a_folded_denoiser_predicts_the_same(name: str | DenoiserSize) -> None:
    denoiser = denoiser_of(name)
    folded = FoldedDenoiser(denoiser, [9, 4, 0])
    latents = torch.randn(4, 6, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    category = torch.arange(4)  # the last is unknown
    with torch.no_grad():
        for timestep in (9, 4, 0):
            expected = denoiser(latents, torch.full((4,), timestep), category)
            torch.testing.assert_close(folded(latents, timestep, category), expected, atol=1e-12, rtol=0)


def test_folding_leaves_convolutions_and_self_attention_and_shares_their_weights() -> None:
    for size, kept in {"nano": ".time_emb_proj.", DenoiserSize(16, 8, 12, norm_groups=4): None}.items():
        denoiser = denoiser_of(size)
        folded = FoldedDenoiser(denoiser, [9, 4])
        ours = {parameter.data_ptr() for parameter in denoiser.parameters()}
        assert {parameter.data_ptr() for parameter in folded.parameters()} < ours
        names = {name.split(".", 2)[2] for name, _ in folded.named_parameters(remove_duplicate=False)}
        embedding = [name for name in names if "emb" in name]
        assert all(kept and kept in name for name in embedding)
        assert not [name for name in names if "attn2" in name]
        assert any("attn1" in name for name in names)


def test_a_folded_model_sees_the_same_and_leaves_the_model_alone() -> None:
    model = DeCoDiffModel(replace(PRESETS["balanced"], num_steps=3), (64, 64), num_categories=2).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    model.fit(images, torch.tensor([0, 0, 1, 1]), generator)
    for parameter in model.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    with torch.no_grad():
        before = model(images)
        folded = model.folded().requires_grad_(requires_grad=False)
        for ours, theirs in zip(folded(images), before, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(images).anomaly_map, before.anomaly_map)
    assert all(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_norms_of_remembered_features_follow_a_checkpoint() -> None:
    novelty, restored = FeatureNovelty([2, 3], 2), FeatureNovelty([2, 3], 2)
    novelty.fit(1, torch.randn(4, 5, 8, 8), torch.Generator().manual_seed(0))
    restored.load_state_dict(novelty.state_dict())
    assert "bank_energy" not in novelty.state_dict()
    torch.testing.assert_close(restored.bank_energy, restored.bank.square().sum(2))


# -------------------------------------------------------------------- parity


def judge(found: dict[str, list], expected: dict[str, list], tolerance: float | None = 1e-3) -> dict:
    def arrays(outputs: dict[str, list]) -> list[dict[str, np.ndarray]]:
        return [{name: np.asarray(value) for name, value in outputs.items()}]

    return export._judge(Run("this", lambda _: {}, tolerance), arrays(expected), arrays(found), "model.onnx")


def test_differences_are_measured_by_name() -> None:
    expected = {"pred_score": [0.2, 0.9], "pred_label": [False, True], "category": [0, 1]}
    found = {"pred_score": [0.2005, 0.9], "pred_label": [False, True], "category": [0, 1]}
    result = judge(found, expected)
    assert result["largest_difference"] == {"pred_score": pytest.approx(0.0005)}
    assert result["different"] == {"pred_label": 0, "category": 0}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"pred_score": [0.2, 0.8], "pred_label": [False, True]}, "pred_score differs by 0.1; 0.001 is allowed"),
        ({"pred_score": [0.2, 0.9], "pred_label": [True, True]}, "pred_label differs 1 times"),
        ({"pred_score": [0.2, float("nan")], "pred_label": [False, True]}, "pred_score differs by nan"),
    ],
)
def test_more_than_tolerated_fails_with_the_numbers(found: dict, message: str) -> None:
    expected = {"pred_score": [0.2, 0.9], "pred_label": [False, True]}
    with pytest.raises(ParityError, match=r"model\.onnx does not give what the model gives \(this\)") as caught:
        judge(found, expected)
    assert message in str(caught.value)
    judge(found, expected, tolerance=None)  # measured only


def test_a_label_may_differ_only_at_the_threshold() -> None:
    expected = {"pred_score": [0.4999, 0.9], "pred_label": [False, True]}
    result = judge({"pred_score": [0.5001, 0.9], "pred_label": [True, True]}, expected)
    assert result["different"] == result["undecided"] == {"pred_label": 1}


@pytest.mark.parametrize("size", [(64, 64), (33, 90)])
def test_drawn_images_repeat_and_differ(size: tuple[int, int]) -> None:
    images = torch.stack(export._drawn(12, size))
    assert images.shape == (12, 3, *size)
    assert torch.equal(images, torch.stack(export._drawn(12, size)))
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.mean((1, 2, 3)).std() > 0.1


# -------------------------------------------------------------------- delivery


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def deliver(content: str, *, fail: bool) -> None:
        with export._delivery(tmp_path, ExportType.ONNX) as (folder, target):
            (folder / "model.onnx").write_text(content)
            assert not (target / "model.onnx").exists() or (target / "model.onnx").read_text() == "first"
            if fail:
                raise ParityError

    deliver("first", fail=False)
    with pytest.raises(ParityError):
        deliver("second", fail=True)
    assert [path.name for path in (tmp_path / "weights" / "onnx").iterdir()] == ["model.onnx"]
    assert (tmp_path / "weights" / "onnx" / "model.onnx").read_text() == "first"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    with (
        pytest.raises(OSError, match=r"export_root='.*' cannot be written to: .* Give another folder"),
        export._delivery(tmp_path, ExportType.ONNX),
    ):
        pass


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "nncf" else object())
    export._require("onnx", "openvino")
    with pytest.raises(ModuleNotFoundError, match=r'needs nncf: pip install "decodiff_anomalib\[openvino\]"'):
        export._require("onnx", "nncf")


def test_the_report_keeps_what_it_says_of_other_files(tmp_path: Path) -> None:
    reports = tmp_path / "parity.json"
    for name in ("model.onnx", "other.onnx", "model.onnx"):
        folder = tmp_path / ".unproven"
        folder.mkdir(exist_ok=True)
        export._keep({"images": 1}, folder / name)
        (folder / "parity.json").replace(reports)
    assert set(json.loads(reports.read_text())) == {"model.onnx", "other.onnx"}
