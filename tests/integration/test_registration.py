"""Anomalib knows our classes, whatever is imported first and whatever goes wrong.

Each check needs an interpreter that has imported nothing yet, so each program runs in a process of its own. Importing
Anomalib takes seconds: the import orders run side by side, and a program checks as much as it can.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import decodiff_anomalib

IMPORT_ORDERS = [
    "import anomalib.models",
    "import anomalib.data",
    "import anomalib.engine",
    "import torch; import anomalib.data",
    "import lightning.pytorch; import anomalib.models",
    "import decodiff_anomalib.plugin; [decodiff_anomalib.plugin.register() for _ in range(3)]; import anomalib.models",
    "import decodiff_anomalib.lightning_model",
    "import decodiff_anomalib.discrepancy",
    "import decodiff_anomalib.torch_model; import decodiff_anomalib.data",
    "from decodiff_anomalib import MultiCategory, DeCoDiff",
]

KNOWN = """
import sys

import anomalib.data, anomalib.models
from anomalib.data import AnomalibDataModule, DemoTextures, MultiCategory
from anomalib.models import DeCoDiff, AnomalibModule, list_models
import decodiff_anomalib, decodiff_anomalib.data, decodiff_anomalib.plugin

assert DeCoDiff is decodiff_anomalib.DeCoDiff
assert MultiCategory is decodiff_anomalib.MultiCategory
assert DemoTextures is decodiff_anomalib.data.DemoTextures
assert "de_co_diff" in list_models()
assert [model.__name__ for model in AnomalibModule.__subclasses__()].count("DeCoDiff") == 1
assert sum(type(finder).__module__ == "decodiff_anomalib.plugin" for finder in sys.meta_path) == 1
assert type(sys.modules["anomalib.models.video"].__spec__.loader).__module__ != "decodiff_anomalib.plugin"
"""

UNKNOWN = """
import anomalib.data, anomalib.models

assert not hasattr(anomalib.models, "DeCoDiff")
assert "de_co_diff" not in anomalib.models.list_models()
assert not hasattr(anomalib.data, "MultiCategory")
"""


def run(*arguments: str, directory: Path = Path(sys.prefix), **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, away from the checkout: Python prefers what is in its working directory."""
    inherited = {key: value for key, value in os.environ.items() if key != decodiff_anomalib.plugin.SWITCH}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_anomalib(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-c", "from anomalib.cli.cli import main; main()", *arguments, COLUMNS="200", NO_COLOR="1")


def assert_runs(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert "Anomalib will not know" not in result.stderr


def copy_of_the_package(directory: Path) -> Path:
    """A copy that Python, run in ``directory``, finds before the installed package."""
    source = Path(decodiff_anomalib.__file__).parent
    return Path(shutil.copytree(source, directory / source.name, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module", autouse=True)
def _entry_point():
    found = [entry_point.value for entry_point in entry_points(group="torch.backends")]
    if "decodiff_anomalib_autoload:register" not in found:
        pytest.fail(f"torch.backends has the entry points {found}, not ours; install the package: pip install -e .")


@pytest.fixture(scope="module")
def import_orders():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(IMPORT_ORDERS, pool.map(lambda order: run("-c", order + KNOWN), IMPORT_ORDERS), strict=True))


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_every_import_order_publishes(order, import_orders):
    assert_runs(import_orders[order])


def test_get_model_accepts_every_spelling_and_diffusers_waits_for_it():
    program = """
import sys
import anomalib.models
from anomalib.models import DeCoDiff, get_model

assert "diffusers" not in sys.modules, "importing Anomalib must not pay for diffusers"
for module in ("torch_model", "weights", "export.writers", "evaluation", "benchmark"):
    assert f"decodiff_anomalib.{module}" not in sys.modules, f"importing Anomalib must not pay for {module}"
for model in ("DeCoDiff", "de_co_diff", {"class_path": "DeCoDiff"}, {"class_path": "anomalib.models.DeCoDiff"}):
    assert isinstance(get_model(model), DeCoDiff)
"""
    assert_runs(run("-c", program))


def test_command_line_knows_model_and_data():
    config = run_anomalib("train", "--model", "DeCoDiff", "--data", "MultiCategory", "--print_config")
    assert_runs(config)
    assert "class_path: decodiff_anomalib" in config.stdout
    assert "preset: " in config.stdout


def test_command_line_explains_the_model():
    explanation = run_anomalib("train", "--model.help", "DeCoDiff")
    assert_runs(explanation)
    assert "preset" in explanation.stdout


def test_switch_keeps_the_plugin_out():
    assert_runs(run("-c", f"import decodiff_anomalib{UNKNOWN}", **{decodiff_anomalib.plugin.SWITCH: "0"}))


def test_without_pytorchs_hook_importing_the_package_is_enough():
    late = f"{UNKNOWN}\nimport decodiff_anomalib\n{KNOWN}"
    assert_runs(run("-c", late, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))


def test_broken_modules_are_logged_and_leave_anomalib_working(tmp_path):
    package = copy_of_the_package(tmp_path)
    (package / "lightning_model.py").write_text("this is no Python")
    (package / "data" / "__init__.py").write_text("raise RuntimeError('out of order')")

    result = run("-c", f"import torch{UNKNOWN}", directory=tmp_path)

    assert result.returncode == 0, result.stderr
    assert "Anomalib will not know DeCoDiff: SyntaxError: " in result.stderr
    assert "Anomalib will not know MultiCategory: RuntimeError: out of order" in result.stderr
    assert f"{decodiff_anomalib.plugin.SWITCH}=0" in result.stderr


def test_names_that_are_missing_or_taken_do_no_harm(tmp_path):
    """A stand-in for a later Anomalib that has a DeCoDiff of its own, with one of our datamodules gone."""
    package = copy_of_the_package(tmp_path)
    (package / "data" / "__init__.py").write_text("class DemoTextures: ...")
    for module, text in {
        "anomalib/__init__.py": "",
        "anomalib/data/__init__.py": "from .predict import *",
        "anomalib/data/predict.py": "",
        "anomalib/models/__init__.py": "class DeCoDiff: ...\nfrom .video import *",
        "anomalib/models/video.py": "",
    }.items():
        (tmp_path / module).parent.mkdir(exist_ok=True)
        (tmp_path / module).write_text(text)
    program = """
import sys
import decodiff_anomalib, anomalib.data, anomalib.models

assert anomalib.models.DeCoDiff.__module__ == "anomalib.models"
assert "decodiff_anomalib.lightning_model" not in sys.modules, "a second class of this name breaks the command line"
assert anomalib.data.DemoTextures.__module__ == "decodiff_anomalib.data"
assert not hasattr(anomalib.data, "MultiCategory")
"""

    result = run("-c", program, directory=tmp_path)

    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("Anomalib will not know MultiCategory: AttributeError: ")
    assert result.stderr.count("Anomalib will not know") == 1


def test_public_names_are_listed_before_they_are_loaded():
    program = """
import sys
import decodiff_anomalib

assert {"DeCoDiff", "DeCoDiffModel", "DeCoDiffPostProcessor", "MultiCategory"} <= set(dir(decodiff_anomalib))
assert not {"torch", "anomalib"} & set(sys.modules), "`import torch` imports this package: it must import nothing"
"""
    assert_runs(run("-c", program))


def test_unknown_public_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'DecoDif'; its public names are DeCoDiff, "):
        _ = decodiff_anomalib.DecoDif
