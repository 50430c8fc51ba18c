"""What ``import torch`` runs imports our package or warns, whatever is found under its name.

Each check needs an interpreter that has imported nothing yet; the file lies beside the package, as installed.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from decodiff_anomalib import torch_autoload

PROGRAM = """
import sys
sys.path[:] = [*{paths!r}, *(path for path in sys.path if "site-packages" not in path)]
import decodiff_anomalib_autoload
decodiff_anomalib_autoload.register()
standard = {{"decodiff_anomalib_autoload", "__main__", *sys.stdlib_module_names}}
print(sorted({{name.split(".")[0] for name in sys.modules}} - standard))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A stand-in for site-packages that holds the installed file only."""
    folder = tmp_path / "site"
    folder.mkdir()
    shutil.copy(torch_autoload.__file__, folder / "decodiff_anomalib_autoload.py")
    return folder


def import_torch(*paths: Path) -> tuple[str, str]:
    """What else was imported, and the warning, with the given folders as the module search path."""
    program = PROGRAM.format(paths=[str(path) for path in paths])
    result = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=paths[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr.strip()


def write(folder: Path, **modules: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_the_package_is_registered(site: Path) -> None:
    write(site / "decodiff_anomalib", __init__="", plugin="def register(): print('registered', end=' ')")
    assert import_torch(site) == ("registered ['decodiff_anomalib']", "")


def test_the_package_itself_is_registered_without_a_warning(site: Path) -> None:
    assert import_torch(site, Path(torch_autoload.__file__).parents[1]) == ("['decodiff_anomalib']", "")


def test_a_package_that_is_gone_is_told_with_the_way_out(site: Path) -> None:
    imported, warning = import_torch(site)
    assert imported == "[]"
    assert "the package is gone" in warning
    assert "install it again" in warning
    assert "`pip uninstall decodiff_anomalib`" in warning
    assert len(warning.splitlines()) == 1


@pytest.mark.parametrize("installed", [True, False])
def test_a_file_of_the_current_folder_is_not_run(installed: bool, site: Path, tmp_path: Path) -> None:
    if installed:
        write(site / "decodiff_anomalib", __init__="", plugin="def register(): print('registered', end=' ')")
    current = write(tmp_path / "current", decodiff_anomalib="raise SystemExit('ran')")
    imported, warning = import_torch(current, site)
    assert imported == "[]"
    assert f"Python finds {current / 'decodiff_anomalib.py'} in place of decodiff_anomalib" in warning


def test_folders_of_that_name_are_not_the_package(site: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other" / "decodiff_anomalib", __init__="raise SystemExit('ran')")
    no_package = write(tmp_path / "no_package" / "decodiff_anomalib", plugin="raise SystemExit('ran')")
    for folder, named in ((other, other / "__init__.py"), (no_package, no_package)):
        imported, warning = import_torch(folder.parent, site)
        assert imported == "[]"
        assert f"Python finds {named} in place of decodiff_anomalib" in warning


def test_a_failing_package_is_told(site: Path) -> None:
    write(site / "decodiff_anomalib", __init__="raise RuntimeError('out of order')", plugin="")
    imported, warning = import_torch(site)
    assert imported == "[]"
    assert "the package fails with RuntimeError: out of order" in warning
