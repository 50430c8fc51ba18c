"""The runs of a benchmark, from its configuration; what no run could do is refused here, before anything is run."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anomalib.models
from anomalib.models import EfficientAd, list_models
from anomalib.models.components import AnomalibModule
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from lightning.pytorch import Trainer

from decodiff_anomalib.benchmark.record import Run, file_name
from decodiff_anomalib.data import MultiCategory

GRID_ENTRIES = ("seed", "model", "data")
MODEL_ENTRIES = ("name", "class_path", "init_args", "trainer", "data", "backbone_weights")
MODES = ("multi", "single")
KINDS: dict[type, str] = {int: "whole number", str: "text", dict: "mapping of names to values"}


def make_grid(
    grid: dict[str, Any],
    root: Path | None = None,
    categories: Sequence[str] | None = None,
    image_size: int = 256,
    accelerator: str = "auto",
    photographs: Path | None = None,
) -> list[Run]:
    """All runs of a benchmark, in both modes.

    The arguments are those of :func:`decodiff_anomalib.benchmark.command.benchmark`.

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If an entry is missing, unknown or not valid.
    """
    _refuse_unknown("benchmark", grid, GRID_ENTRIES)
    missing = [name for name in GRID_ENTRIES if name not in grid]
    if missing:
        msg = f"benchmark lacks {', '.join(missing)}; it has the layout of `anomalib benchmark`: seed, model and data."
        raise ValueError(msg)
    with _readable():
        points = list(get_iterator_from_grid_dict(grid))
        seeds, entries, data = (_distinct(point[name] for point in points) for name in GRID_ENTRIES)
    for name, values, kind in (("seed", seeds, int), ("model", entries, dict), ("data", data, dict)):
        _refuse_other_kind(f"benchmark.{name}", values, kind)
    if len(data) > 1:
        msg = f"benchmark.data is a grid of {len(data)}; give one, and each of the others an --output of its own."
        raise ValueError(msg)
    shared = _data_arguments(data[0], root, categories)
    with _readable():
        named = _named(entries)
    runs = []
    for name, entry in named.items():
        _check_model(name, entry, image_size)
        model_data = shared | entry.get("data", {})
        needs_photographs = entry["class_path"] == EfficientAd.__name__
        for mode in MODES:
            for members in [shared["categories"]] if mode == "multi" else [[one] for one in shared["categories"]]:
                runs += [
                    Run(
                        model=name,
                        class_path=entry["class_path"],
                        mode=mode,
                        seed=seed,
                        image_size=image_size,
                        accelerator=accelerator,
                        data=model_data | {"categories": members},
                        init_args=entry.get("init_args", {}),
                        trainer=entry.get("trainer", {}),
                        backbone_weights=entry.get("backbone_weights"),
                        photographs=str(photographs.resolve()) if photographs and needs_photographs else None,
                    )
                    for seed in seeds
                ]
    return runs


def choose_runs(grid: Sequence[Run], models: Sequence[str] | None, modes: Sequence[str]) -> list[Run]:
    """Runs of ``models`` (all by default) in ``modes``.

    Raises:
        ValueError: If a model is none of the benchmark's.
    """
    known = list(dict.fromkeys(run.model for run in grid))
    unknown = [name for name in models or () if name not in known]
    if unknown:
        msg = f"The benchmark has no model {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
        raise ValueError(msg)
    return [run for run in grid if run.model in (models or known) and run.mode in modes]


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what others raise at values of a kind that they do not expect into an error.

    Raises:
        ValueError: Instead of these errors.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        msg = (
            f"benchmark has a value of another kind than its place needs ({type(error).__name__}: {error}); it has the "
            "layout of `anomalib benchmark`: seed, model and data."
        )
        raise ValueError(msg) from error


def _refuse_other_kind(subject: str, values: Iterable[Any], kind: type) -> None:
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            msg = f"{subject} is {value!r}; it must be a {KINDS[kind]}."
            raise ValueError(msg)  # noqa: TRY004 - of a file, not of a program


def _distinct(values: Iterable[Any]) -> list[Any]:
    distinct: list[Any] = []  # no set: dictionaries are not hashable
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


def _title(entry: dict[str, Any]) -> str:
    if "class_path" not in entry:
        msg = f"Model {entry} has no class_path; valid: {', '.join(sorted(list_models(case='pascal')))}."
        raise ValueError(msg)
    title = entry.get("name", entry["class_path"])
    _refuse_other_kind("The name of a model", [title], str)
    return title


def _named(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name to entry of each model; where grids make several of one name, the values that differ are added to it."""
    named = {}
    for entry in entries:
        flat, alike = flatten_dict(entry), [flatten_dict(other) for other in entries if _title(other) == _title(entry)]
        varied = [key for key in flat if len(_distinct(other.get(key) for other in alike)) > 1]
        named[" ".join([_title(entry), *(f"{key.rpartition('.')[2]}={flat[key]}" for key in varied)])] = entry
    if len({file_name(name) for name in named}) < len(entries):
        msg = f"Models cannot be told apart by their names {', '.join(named)}; give each a name of its own."
        raise ValueError(msg)
    return named


def _data_arguments(entry: dict[str, Any], root: Path | None, categories: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of ``MultiCategory``, with the names of its categories; it is built once to validate them."""
    if str(entry.get("class_path", "")).rpartition(".")[2] != MultiCategory.__name__:
        msg = (
            f"benchmark.data is {entry.get('class_path')!r}; it must be MultiCategory, which reports by category and, "
            "with `datamodules`, joins any of Anomalib's datamodules."
        )
        raise ValueError(msg)
    _refuse_other_kind("benchmark.data.init_args", [entry.get("init_args", {})], dict)
    arguments = dict(entry.get("init_args", {}))
    _refuse_unknown("benchmark.data.init_args", arguments, _parameters(MultiCategory) - {"seed"})
    if root is not None:
        arguments["root"] = root
    if categories is not None:
        arguments["categories"] = list(categories)
    with _readable():
        if arguments.get("root") is not None:
            arguments["root"] = str(Path(arguments["root"]).resolve())
        return arguments | {"categories": list(MultiCategory(**arguments).categories)}


def _check_model(name: str, entry: dict[str, Any], image_size: int) -> None:
    _refuse_unknown(f"Model {name!r}", entry, MODEL_ENTRIES)
    _refuse_other_kind(f"class_path of {name!r}", [entry["class_path"]], str)
    for part in ("init_args", "trainer", "data"):
        _refuse_other_kind(f"{part} of {name!r}", [entry.get(part, {})], dict)
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
            "models get the same images. --image_size sets it."
        )
        raise ValueError(msg)


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _refuse_unknown(subject: str, given: dict[str, Any], known: Collection[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        msg = f"{subject} has no {', '.join(unknown)}; valid: {', '.join(sorted(known))}."
        raise ValueError(msg)
