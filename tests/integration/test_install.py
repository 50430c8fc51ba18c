"""The package as users get it: installed from a wheel or editable, registered, and gone without trace."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]

INSTALLED = """
from importlib.metadata import entry_points, version

from anomalib.models import DeCoDiff, list_models
import decodiff_anomalib

assert "de_co_diff" in list_models()
assert decodiff_anomalib.__version__ == version("decodiff_anomalib")
assert [entry_point.name for entry_point in entry_points(group="torch.backends")].count("decodiff_anomalib") == 1
print(decodiff_anomalib.__file__)
"""

MOVED = """
import sys

sys.stderr = sys.stdout
import torch
from anomalib.models import list_models

assert "padim" in list_models()
assert "de_co_diff" not in list_models()
"""

UNINSTALLED = """
from importlib.util import find_spec

from anomalib.models import list_models

assert find_spec("decodiff_anomalib") is None
assert find_spec("decodiff_anomalib_autoload") is None
assert "padim" in list_models()
assert "de_co_diff" not in list_models()
"""


def run(*command: str | Path, directory: Path) -> str:
    """Run a command away from the checkout, whose package would be found in the working directory."""
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", directory, PROJECT, directory=directory)
    return next(directory.glob("*.whl"))


@pytest.fixture
def binaries(tmp_path):
    """Commands of a fresh environment that borrows what is installed here, except this package."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for entry in (entry for path in sys.path if Path(path).name == "site-packages" for entry in Path(path).iterdir()):
        if not entry.name.startswith(("decodiff_anomalib", "_decodiff_anomalib", "pip", "_virtualenv")):
            link = borrowed / entry.name
            if not link.exists():
                link.symlink_to(entry)
    site_packages = next(environment.glob("[Ll]ib/**/site-packages"))
    (site_packages / "borrowed.pth").write_text(str(borrowed))
    return Path(next(environment.rglob("activate"))).parent


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_installed_package_registers_and_uninstalls_cleanly(editable, binaries, wheel, tmp_path):
    python = binaries / "python"
    source = ("-e", PROJECT) if editable else (wheel,)
    run(python, "-m", "pip", "install", "--no-deps", *source, directory=tmp_path)

    location = Path(run(python, "-c", INSTALLED, directory=tmp_path).splitlines()[-1])
    assert location.is_relative_to(PROJECT if editable else tmp_path)
    assert run(binaries / "decodiff", "--version", directory=tmp_path).startswith("decodiff ")

    run(python, "-m", "pip", "uninstall", "-y", "decodiff_anomalib", directory=tmp_path)
    run(python, "-c", UNINSTALLED, directory=tmp_path)


def test_an_environment_survives_a_checkout_that_moved(binaries, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(PROJECT, checkout, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "notebooks"))
    python = binaries / "python"
    run(python, "-m", "pip", "install", "--no-deps", "-e", checkout, directory=tmp_path)
    checkout.rename(tmp_path / "moved")
    (tmp_path / "decodiff_anomalib.py").write_text("raise SystemExit('a file of the working directory was run')")

    for directory, found in ((tmp_path / "moved", ""), (binaries, "gone"), (tmp_path, "decodiff_anomalib.py in place")):
        program = MOVED if found else INSTALLED
        printed = run(python, "-c", program, directory=directory)
        assert printed.count("Anomalib will not know DeCoDiff") == bool(found)
        assert found in printed


def test_wheel_holds_every_file_of_the_package(wheel):
    files = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "decodiff_anomalib").rglob("*.*")}
    moved = {"decodiff_anomalib/torch_autoload.py": "decodiff_anomalib_autoload.py"}
    packed = set(ZipFile(wheel).namelist())
    assert {moved.get(file, file) for file in files if "__pycache__" not in file} <= packed
    assert {"LICENSE", "THIRD_PARTY_NOTICES.md"} <= {Path(file).name for file in packed}
