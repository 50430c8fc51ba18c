"""Every notebook runs from top to bottom as it stands: ``pytest -m notebook``."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes of a notebook, with its pictures
OF_A_MACHINE = re.compile(r"/(?:tmp|root|home|work|Users|var)/|[A-Z]:\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs_of(notebook: NotebookNode) -> Iterator[NotebookNode]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def said_in(output: NotebookNode) -> Iterator[str]:
    """What a reader sees of an output, besides pictures."""
    yield from output.get("text", "").splitlines()
    for kind, content in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield from content.splitlines()


@each_notebook
def test_outputs_are_committed_and_are_for_every_reader(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    outputs = list(outputs_of(notebook))
    assert outputs, f"{path.name} was committed without outputs: execute it"
    assert path.stat().st_size < LARGEST
    assert [line for output in outputs for line in said_in(output) if OF_A_MACHINE.search(line)] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@pytest.mark.notebook
@each_notebook
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}  # where Jupyter runs it
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=folder).execute()
    assert [output.text for output in outputs_of(notebook) if output.get("name") == "stderr"] == []
