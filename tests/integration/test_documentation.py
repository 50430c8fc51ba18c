"""README and docs: their programs run or parse, and the names and messages that they state exist.

``pytest -m slow`` executes every fenced block of ``bash`` and ``python``, unless a comment above says what it needs,
``<!-- needs: data -->``. Commands of blocks that are not executed are parsed.
"""

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.__main__ import main
from decodiff_anomalib.settings import GROUPS

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "configs/paper/README.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^(?:<!-- needs: ([^\n]*) -->\n)?```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = "model"  # the only need that the tests meet
NEEDS = {MODEL, "data", "gpu", "network", "long"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: Page and line.
        language: ``bash`` or ``python``.
        code: What is between the fences.
        needs: Words of the comment above it.
    """

    place: str
    language: str
    code: str
    needs: frozenset[str]

    @property
    def is_executed(self) -> bool:
        return self.needs <= {MODEL}

    @property
    def commands(self) -> Iterator[list[str]]:
        """Arguments of each command of Anomalib or this package in a block of ``bash``."""
        for line in self.code.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                    continue
                if words and words[0] in {"anomalib", "decodiff"}:
                    yield words
                words = []


def blocks_of(page: Path) -> Iterator[Block]:
    text, name = page.read_text(encoding="utf-8"), page.relative_to(REPOSITORY)
    for match in BLOCK.finditer(text):
        needs, language, code = match.groups()
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(f"{name}:{line}", language, code, frozenset((needs or "").split()))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def listed(blocks: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", blocks, ids=[block.place for block in blocks])


# ---------------------------------------------------------------- programs


def test_every_need_is_a_known_word() -> None:
    assert len(BLOCKS) > 30
    assert {block.place: set(block.needs - NEEDS) for block in BLOCKS if block.needs - NEEDS} == {}


@pytest.fixture(scope="module")
def workspace(
    anomalib: Callable[..., str], data_root: Path, gravel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what the pages suppose: files of the repository, a trained model, and images."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("configs", "docs", "tests"):
        (folder / name).symlink_to(REPOSITORY / name)
    model = ["--model", "DeCoDiff", "--model.preset", "fast", "--model.train_steps", 2, "--model.image_size", 64]
    data = ["--data", "decodiff_anomalib.data.DemoTextures", "--data.root", data_root]
    anomalib(folder, "fit", *model, *data, "--trainer.accelerator", "cpu")
    shutil.copy(next(folder.rglob("v0/weights/lightning/model.ckpt")), folder)
    shutil.rmtree(folder / "results")
    (folder / "images").mkdir()
    for file in sorted((gravel / "test" / "good").glob("*.png"))[:3]:
        shutil.copy(file, folder / "images")
    shutil.copy(file, folder / "part.png")
    return folder


@pytest.mark.slow
@listed([block for block in BLOCKS if block.is_executed])
def test_block_runs(block: Block, workspace: Path) -> None:
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    scripts = Path(sys.executable).parent  # of this environment
    result = subprocess.run(
        [*program, block.code],
        cwd=workspace,
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.slow
@listed([block for block in BLOCKS if block.language == "bash" and not block.is_executed and list(block.commands)])
def test_commands_of_block_parse(
    block: Block, anomalib: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    for program, *arguments in block.commands:
        if program == "anomalib":
            assert "DeCoDiff" in anomalib(REPOSITORY, *arguments, "--print_config") or "DeCoDiff" not in arguments
            continue
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--print_config"])
        assert not ended.value.code, capsys.readouterr().err


@listed([block for block in BLOCKS if block.language == "python" and not block.is_executed])
def test_program_compiles_and_what_it_imports_exists(block: Block) -> None:
    tree = ast.parse(block.code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    if "onnxruntime" in block.code:
        pytest.importorskip("onnxruntime")
    exec(compile(ast.Module(imports, []), block.place, "exec"), {})  # noqa: S102 - our own pages


# ---------------------------------------------------------------- names and messages


def test_every_option_of_the_model_exists() -> None:
    arguments = {*inspect.signature(DeCoDiff).parameters, "help"}
    options = {option for page in PAGES for option in re.findall(r"--model\.([\w.]*\w)", page.read_text("utf-8"))}
    assert len(options) > 10
    for option in options:
        name, *setting = option.split(".")
        assert name in arguments, option
        if setting:
            group, entry = setting
            assert entry in {known.name for known in fields(GROUPS[group])}, option


def texts_of_package() -> Iterator[str]:
    """Every text of the code, with ``…`` for what is filled in."""
    for path in (REPOSITORY / "decodiff_anomalib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sdg]", "…", node.value)


def test_every_message_of_troubleshooting_is_one_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(messages) > 40
    known = "\n".join(texts_of_package())
    for message in messages:
        assert re.search(".*?".join(map(re.escape, message.split("…"))), known), message


def test_readme_is_a_page_of_at_most_150_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
