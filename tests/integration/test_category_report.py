"""Every test on several categories ends with their metrics: printed, saved, logged and returned, for any model."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.metrics import AUPRO
from anomalib.models import Padim
from anomalib.pipelines.benchmark.job import BenchmarkJob
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.evaluation import METRICS, RATES, CategoryReport

ROWS = ["bolt", "felt", "mean", "worst"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Noise with faintly brighter squares as defects; the second category has no masks."""
    root = tmp_path_factory.mktemp("data") / "parts"
    rng = np.random.default_rng(0)
    for category in ("bolt", "felt"):
        for (split, label), count in {("train", "good"): 14, ("test", "good"): 4, ("test", "dent"): 5}.items():
            for index in range(count):
                image = rng.integers(60, 100, (64, 64, 3)).astype(np.uint8)
                mask = np.zeros((64, 64), np.uint8)
                if label != "good":
                    mask[16:32, 16:32] = mask[44:50, 40:60] = 255
                    image[mask > 0] += 9
                save(image, root / category / split / label / f"{index:03d}.png")
                if category == "bolt" and label != "good":
                    save(mask, root / category / "ground_truth" / label / f"{index:03d}_mask.png")
    return root


@pytest.fixture(scope="module")
def datamodule(root):
    return MultiCategory(root, train_batch_size=8, eval_batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def padim(tmp_path_factory, datamodule):
    padim = make_padim()
    engine_at(tmp_path_factory.mktemp("training")).fit(padim, datamodule=datamodule)
    return padim


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_padim(layer="layer1"):
    return Padim(
        layers=[layer],
        pre_trained=False,
        n_features=4,
        pre_processor=Padim.configure_pre_processor(image_size=(64, 64)),
        visualizer=False,
    )


def engine_at(folder, **arguments):
    return Engine(default_root_dir=folder, **{"accelerator": "cpu", "logger": False} | arguments)


def saved_table(engine):
    return pd.read_csv(Path(engine.trainer.default_root_dir) / "categories.csv", index_col="category")


def last_rows(output):
    return [line.split()[0] for line in output.rstrip().splitlines()[-len(ROWS) :]]


def metrics_of_predictions(items):
    """Metrics of the images of a category, from all of their scores and pixels."""

    def ranking(scores, positive):
        precision, recall, _ = precision_recall_curve(positive, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return roc_auc_score(positive, scores), average_precision_score(positive, scores), f1.max()

    labels = np.array([bool(item.gt_label) for item in items])
    alarms = np.array([bool(item.pred_label) for item in items])
    image, pixel = ranking([float(item.pred_score) for item in items], labels), (np.nan,) * 4
    if all(item.gt_mask is not None for item in items):
        maps, masks = (torch.stack([getattr(item, field) for item in items]) for field in ("anomaly_map", "gt_mask"))
        aupro = AUPRO(fields=("anomaly_map", "gt_mask"))
        aupro.update(SimpleNamespace(anomaly_map=maps, gt_mask=masks.int()))
        pixel = (*ranking(maps.flatten().numpy(), masks.flatten().numpy()), float(aupro.compute()))
    return dict(zip(METRICS, (*image, *pixel), strict=True)) | {
        "normal": (~labels).sum(),
        "defective": labels.sum(),
        "false_alarm_rate": alarms[~labels].mean(),
        "detection_rate": alarms[labels].mean(),
    }


def test_table_equals_metrics_recomputed_from_predictions(tmp_path, padim, datamodule):
    engine = engine_at(tmp_path)
    engine.test(padim, datamodule=datamodule)
    table = saved_table(engine)

    predictions = [item for batch in engine.predict(padim, datamodule=datamodule) for item in batch]
    assert list(table.index) == ROWS
    for category in ("bolt", "felt"):
        expected = metrics_of_predictions([item for item in predictions if item.category == category])
        assert table.loc[category, list(expected)].to_dict() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 0.05 < table.loc["bolt", "pixel_aupro"] < 0.95  # not near 0 or 1, where wrong metrics could agree


def test_category_without_masks_has_image_metrics_only(tmp_path, padim, datamodule):
    engine = engine_at(tmp_path)
    engine.test(padim, datamodule=datamodule)
    felt = saved_table(engine).loc["felt"]

    assert (felt["normal"], felt["defective"]) == (4, 5)
    assert felt[list(METRICS[:3])].notna().all()
    assert felt[list(METRICS[3:])].isna().all()


def test_returned_logged_and_saved_metrics_are_the_same(tmp_path, padim, datamodule):
    engine = engine_at(tmp_path, logger=CSVLogger(tmp_path / "log"))
    (results,) = engine.test(padim, datamodule=datamodule)
    table = saved_table(engine)

    for summary in ("mean", "worst"):
        returned = {name: results[f"{summary}/{name}"] for name in (*METRICS, *RATES)}
        assert returned == pytest.approx(table.loc[summary, list(returned)].to_dict(), abs=1e-6)
    records = json.loads((Path(engine.trainer.default_root_dir) / "categories.json").read_text())
    read = pd.DataFrame(records).set_index("category")
    pd.testing.assert_frame_equal(read.astype(float), table.astype(float), rtol=1e-14)
    logged = pd.read_csv(next((tmp_path / "log").rglob("metrics.csv")))
    for row in ROWS:
        for name, value in table.loc[row, [*METRICS, *RATES]].dropna().items():
            assert logged[f"{row}/{name}"].dropna().item() == pytest.approx(value, abs=1e-6)


def test_tests_in_a_row_share_nothing(tmp_path, padim, datamodule):
    engine = engine_at(tmp_path)
    tables = []
    for _ in range(2):
        engine.test(padim, datamodule=datamodule)
        tables.append(saved_table(engine))
    engine.trainer.test(padim, datamodule=datamodule)
    tables.append(saved_table(engine))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])

    other = make_padim("layer2")
    engine.fit(other, datamodule=datamodule)
    engine.test(other, datamodule=datamodule)
    assert list(saved_table(engine)["normal"][:2]) == [4, 4]
    assert not saved_table(engine)[["pixel_ap"]].equals(tables[0][["pixel_ap"]])
    reports = [isinstance(callback, CategoryReport) for callback in engine.trainer.callbacks]
    assert reports == [False] * (len(reports) - 1) + [True]


def test_command_line_ends_with_the_table(root, tmp_path, anomalib):
    data = ["--data", "MultiCategory", "--data.root", root, "--data.num_workers", 0, "--data.train_batch_size", 8]
    model = ["--model", "Padim", "--model.pre_trained", "false", "--model.layers", "[layer1]", "--model.n_features", 4]
    arguments = ["train", *model, *data, "--trainer.accelerator", "cpu"]
    printed = anomalib(tmp_path, *arguments)

    assert last_rows(printed) == ROWS
    assert printed.index("Test metric") < printed.index("By category, saved to ")
    (saved,) = (tmp_path / "results" / "Padim" / "parts" / "v0").glob("categories.csv")
    assert str(saved) in printed


def test_folder_that_cannot_be_written_costs_no_table(tmp_path, padim, datamodule, capsys):
    engine = engine_at(tmp_path)
    engine.test(padim, datamodule=datamodule)
    csv = Path(engine.trainer.default_root_dir) / "categories.csv"
    csv.unlink()
    csv.mkdir()
    capsys.readouterr()

    with pytest.warns(UserWarning, match=r"could not be saved to '.*categories\.csv' and are only printed"):
        engine.test(padim, datamodule=datamodule)
    assert last_rows(capsys.readouterr().out) == ROWS


def test_quiet_tests_save_and_do_not_print(tmp_path, padim, datamodule, capsys):
    engine = engine_at(tmp_path)
    engine.test(padim, datamodule=datamodule, verbose=False)
    assert list(saved_table(engine).index) == ROWS
    assert "By category" not in capsys.readouterr().out


def test_inferred_categories_are_compared_with_the_true_ones(tmp_path, padim, datamodule, capsys):
    class Naming(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            batch.pred_category = ["unknown" if label else "bolt" for label in batch.gt_label]

    engine = engine_at(tmp_path, callbacks=[Naming()])
    engine.test(padim, datamodule=datamodule)
    table = saved_table(engine)
    assert table["category_accuracy"].to_dict() == pytest.approx({"bolt": 4 / 9, "felt": 0, "mean": 2 / 9, "worst": 0})
    assert table["unknown_rate"].to_dict() == pytest.approx(dict.fromkeys(ROWS, 5 / 9))
    assert "unknown" in capsys.readouterr().out


def test_benchmark_has_columns_of_them(datamodule):
    job = BenchmarkJob("cpu", make_padim(), datamodule, seed=0, flat_cfg={})
    result = job.run()
    assert {f"{summary}/{name}" for summary in ("mean", "worst") for name in (*METRICS, *RATES)} <= result.keys()


def test_other_data_get_no_report(root, tmp_path, padim, capsys):
    data = Folder(
        "bolt",
        root / "bolt/train/good",
        root / "bolt/test/dent",
        normal_test_dir=root / "bolt/test/good",
        num_workers=0,
    )
    engine = engine_at(tmp_path)
    (results,) = engine.test(padim, datamodule=data)
    assert not [name for name in results if "/" in name]
    assert "By category" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("categories.*"))


def test_setup_by_hand_needs_no_trainer(root):
    datamodule = MultiCategory(root, num_workers=0)
    datamodule.setup("test")
    assert len(datamodule.test_data) == 18
