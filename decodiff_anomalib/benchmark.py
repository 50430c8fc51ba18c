"""``decodiff benchmark``: detectors compared under one protocol, on the same images, with the same seeds.

Each combination of model, data and seed is a run in a process of its own, see :mod:`decodiff_anomalib.benchmark_run`:
its peak memory is its own, and so is its failure. Runs that have ended are kept and not repeated. Tables and pictures
are made of them by :mod:`decodiff_anomalib.benchmark_report`.
"""

import inspect
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import anomalib.models
import pandas as pd
from anomalib.models import EfficientAd, list_models
from anomalib.models.components import AnomalibModule
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from lightning.pytorch import Trainer

from decodiff_anomalib.benchmark_report import write_report
from decodiff_anomalib.benchmark_run import FIGURES_OF_CATEGORIES, LOG, Run, file_name, write_record
from decodiff_anomalib.data import MultiCategory

GRID_ENTRIES = ("seed", "model", "data")
MODEL_ENTRIES = ("name", "class_path", "init_args", "trainer", "data", "backbone_weights")
MODES = ("multi", "single")


def benchmark(
    *,
    benchmark: dict[str, Any],
    root: Path | None = None,
    categories: list[str] | None = None,
    models: list[str] | None = None,
    modes: list[Literal["multi", "single"]] | None = None,
    image_size: int = 256,
    accelerator: str = "auto",
    photographs: Path | None = None,
    output: Path = Path("results/benchmark"),
    timing_seconds: float = 3.0,
) -> pd.DataFrame:
    """Train and test several models on the same categories; tabulate their figures and costs.

    All see whole images of one size and have thresholds from the same held-out normal images. Runs that ended are not
    repeated unless their settings changed, so that the same command goes on where it was interrupted, and commands with
    other models or modes add to the same tables.

    Args:
        benchmark: What to combine, in the layout and grid language of `anomalib benchmark`: seed, model, and data,
            which is MultiCategory. Besides class_path and init_args, a model may have a name; trainer, arguments of
            Lightning's trainer; data, arguments of MultiCategory; and backbone_weights, `packaged` or a file, for
            models built with pre_trained=false.
        root: Overrides the data's root: the folder of the categories.
        categories: Overrides the data's categories.
        models: Names of those to run now. Defaults to all.
        modes: multi is one model of all categories, single one for each. Defaults to multi.
        image_size: Side in pixels that images are resized to; nothing is cropped.
        accelerator: As Lightning's.
        photographs: Folder of images that EfficientAd's teacher and penalty need where Anomalib's are not at hand.
        output: Folder for runs, tables and pictures.
        timing_seconds: How long each timing goes on.

    Returns:
        pd.DataFrame: What :func:`decodiff_anomalib.benchmark_report.summarise` gives.

    Raises:
        SystemExit: With status 2, if the configuration is not valid, before anything is run; with 1, if a run failed,
            after all others and the tables; with 130, if interrupted.
    """
    output = Path(output)
    try:
        grid = make_grid(benchmark, root, categories, image_size, accelerator, photographs)
        wanted = _choose(grid, models, modes or ["multi"])
    except (OSError, ValueError) as error:
        print(f"decodiff benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    failed = 0
    try:
        for number, run in enumerate(wanted, 1):
            print(f"[{number}/{len(wanted)}] {run.title}: ", end="", flush=True)
            outcome, ended = _ensure(run, output, timing_seconds)
            print(outcome, flush=True)
            failed += not ended
    except KeyboardInterrupt:
        print("\nInterrupted. Runs that ended are kept; the same command goes on with the others.")
        raise SystemExit(130) from None
    table = write_report(grid, output)
    if failed:
        print(f"{failed} of {len(wanted)} runs failed; the same command tries them again.", file=sys.stderr)
        raise SystemExit(1)
    return table


# ---------------------------------------------------------------- what is to be run


def make_grid(
    grid: dict[str, Any],
    root: Path | None = None,
    categories: Sequence[str] | None = None,
    image_size: int = 256,
    accelerator: str = "auto",
    photographs: Path | None = None,
) -> list[Run]:
    """Every run of a benchmark, in both modes: see :func:`benchmark` for the arguments.

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If an entry is missing, unknown or not valid.
    """
    _refuse_unknown("benchmark", grid, GRID_ENTRIES)
    missing = [name for name in GRID_ENTRIES if name not in grid]
    if missing:
        msg = f"benchmark lacks {', '.join(missing)}; it has the layout of `anomalib benchmark`: seed, model and data."
        raise ValueError(msg)
    points = list(get_iterator_from_grid_dict(grid))
    seeds, entries, data = (_distinct(point[name] for point in points) for name in GRID_ENTRIES)
    if len(data) > 1:
        msg = f"benchmark.data is a grid of {len(data)}; give one, and each of the others an --output of its own."
        raise ValueError(msg)
    shared = _data_arguments(data[0], root, categories)
    runs = []
    for name, entry in _named(entries).items():
        _check_model(name, entry, image_size)
        own = shared | entry.get("data", {})
        for mode in MODES:
            for chosen in [shared["categories"]] if mode == "multi" else [[one] for one in shared["categories"]]:
                runs += [
                    Run(
                        model=name,
                        class_path=entry["class_path"],
                        mode=mode,
                        seed=seed,
                        image_size=image_size,
                        accelerator=accelerator,
                        data=own | {"categories": chosen},
                        init_args=entry.get("init_args", {}),
                        trainer=entry.get("trainer", {}),
                        backbone_weights=entry.get("backbone_weights"),
                        photographs=str(photographs.resolve())
                        if photographs and entry["class_path"] == EfficientAd.__name__
                        else None,
                    )
                    for seed in seeds
                ]
    return runs


def _choose(grid: Sequence[Run], models: Sequence[str] | None, modes: Sequence[str]) -> list[Run]:
    known = list(dict.fromkeys(run.model for run in grid))
    unknown = [name for name in models or () if name not in known]
    if unknown:
        msg = f"The benchmark has no model {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
        raise ValueError(msg)
    return [run for run in grid if run.model in (models or known) and run.mode in modes]


def _distinct(values: Iterable[Any]) -> list[Any]:
    distinct = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


def _title(entry: dict[str, Any]) -> str:
    if "class_path" not in entry:
        msg = f"Model {entry} has no class_path; valid: {', '.join(sorted(list_models(case='pascal')))}."
        raise ValueError(msg)
    return entry.get("name", entry["class_path"])


def _named(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Entries of models by name; those of one name, as grids make them, are told apart by what differs."""
    named = {}
    for entry in entries:
        own, alike = flatten_dict(entry), [flatten_dict(other) for other in entries if _title(other) == _title(entry)]
        varied = [key for key in own if len(_distinct(other.get(key) for other in alike)) > 1]
        named[" ".join([_title(entry), *(f"{key.rpartition('.')[2]}={own[key]}" for key in varied)])] = entry
    if len({file_name(name) for name in named}) < len(entries):
        msg = f"Models cannot be told apart by their names {', '.join(named)}; give each a name of its own."
        raise ValueError(msg)
    return named


def _data_arguments(entry: dict[str, Any], root: Path | None, categories: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of ``MultiCategory``, tried out, with its categories by name."""
    if entry.get("class_path", "").rpartition(".")[2] != MultiCategory.__name__:
        msg = (
            f"benchmark.data is {entry.get('class_path')!r}; it must be MultiCategory, which reports by category and, "
            "with `datamodules`, joins any of Anomalib's datamodules."
        )
        raise ValueError(msg)
    arguments = dict(entry.get("init_args", {}))
    _refuse_unknown("benchmark.data.init_args", arguments, _parameters(MultiCategory) - {"seed"})
    if root is not None:
        arguments["root"] = root
    if arguments.get("root") is not None:
        arguments["root"] = str(Path(arguments["root"]).resolve())
    if categories is not None:
        arguments["categories"] = list(categories)
    return arguments | {"categories": list(MultiCategory(**arguments).categories)}


def _check_model(name: str, entry: dict[str, Any], image_size: int) -> None:
    """Refuse what no run could do."""
    _refuse_unknown(f"Model {name!r}", entry, MODEL_ENTRIES)
    model_class = getattr(anomalib.models, entry["class_path"], None)
    if not (inspect.isclass(model_class) and issubclass(model_class, AnomalibModule)):
        msg = (
            f"Model {name!r} has class_path={entry['class_path']!r}, which Anomalib does not know; "
            f"valid: {', '.join(sorted(list_models(case='pascal')))}."
        )
        raise ValueError(msg)
    init_args = entry.get("init_args", {})
    _refuse_unknown(f"init_args of {name!r}", init_args, _parameters(model_class))
    _refuse_unknown(f"trainer of {name!r}", entry.get("trainer", {}), _parameters(Trainer))
    protocol = {"root", "categories", "datamodules", "seed"}
    _refuse_unknown(f"data of {name!r}", entry.get("data", {}), _parameters(MultiCategory) - protocol)
    if init_args.get("image_size", image_size) != image_size:
        msg = (
            f"Model {name!r} has image_size={init_args['image_size']}, the benchmark {image_size}; leave it out, all "
            "models see the same images. --image_size sets it."
        )
        raise ValueError(msg)


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _refuse_unknown(what: str, given: dict[str, Any], known: Collection[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        msg = f"{what} has no {', '.join(unknown)}; valid: {', '.join(sorted(known))}."
        raise ValueError(msg)


# ---------------------------------------------------------------- running it


def _ensure(run: Run, output: Path, timing_seconds: float) -> tuple[str, bool]:
    """Have a run end, now or before; says what came of it and whether it did."""
    before, folder = run.read(output), run.folder(output)
    if "result" in before:
        return "done before", True
    other_settings = folder.exists() and not before
    shutil.rmtree(folder, ignore_errors=True)
    write_record(folder, {"configuration": asdict(run), "timing_seconds": timing_seconds})
    began = time.monotonic()
    with (folder / LOG).open("wb") as log:
        ended = subprocess.run(  # noqa: S603 - this interpreter, this package
            [sys.executable, "-m", "decodiff_anomalib.benchmark_run", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    record = run.read(output)
    took = f"{'again, with other settings: ' if other_settings else ''}{time.monotonic() - began:.0f} s"
    if "result" in record:
        pixel_ap = pd.read_json(folder / FIGURES_OF_CATEGORIES).set_index("category").pixel_ap["mean"]
        return f"{took}, pixel AP {pixel_ap:.3f}", True
    if "error" not in record:
        status = ended.returncode
        record["error"] = (
            f"Killed by signal {-status}{' (out of memory?)' if status == -9 else ''}."
            if status < 0
            else f"Ended with status {status} and no result."
        )
        write_record(folder, record)
    return f"{took}, failed: {record['error'].splitlines()[-1]} ({folder / LOG})", False
