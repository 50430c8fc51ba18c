"""Anomalib's command line, a browser, and what several files train on."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from decodiff_anomalib.data import DemoTextures

CommandLine = Callable[..., str]


@contextmanager
def suppress_success() -> Iterator[None]:
    """Let a program end itself, unless it failed."""
    try:
        yield
    except SystemExit as stopped:
        if stopped.code:
            raise


@pytest.fixture(scope="session")
def anomalib() -> CommandLine:
    """Anomalib's command line in this process, run in a folder; returns what it printed."""

    def run(directory: Path, *arguments: object) -> str:
        printed, before = io.StringIO(), Path.cwd()
        os.chdir(directory)
        try:
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
                patch.setenv("COLUMNS", "200")
                patch.setenv("NO_COLOR", "1")
                with suppress_success():  # as --print_config ends
                    AnomalibCLI(args=list(map(str, arguments)))
        finally:
            os.chdir(before)
        return printed.getvalue()

    return run


@pytest.fixture(scope="session")
def anomalib_process() -> CommandLine:
    """Anomalib's command line as a user runs it: a process that has imported nothing of this package."""

    def run(directory: Path, *arguments: object) -> str:
        result = subprocess.run(
            [sys.executable, "-c", "from anomalib.cli.cli import main; main()", *map(str, arguments)],
            cwd=directory,
            env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    return run


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for ``DemoTextures``, whose images are made once."""
    root = tmp_path_factory.mktemp("demo")
    DemoTextures(root=root).prepare_data()
    return root


@pytest.fixture(scope="session")
def gravel(data_root: Path) -> Path:
    """A demo category as a plain folder in MVTec AD's layout."""
    datamodule = DemoTextures(root=data_root)
    return Path(datamodule.root) / datamodule.category


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """Headless Chromium or Chrome, light by default."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium with chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{argument}")
    with Chrome(options=options, service=Service(driver)) as opened:
        yield opened
