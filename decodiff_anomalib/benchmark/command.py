"""``decodiff benchmark``: detectors compared under one protocol, on the same images, with the same seeds.

Each combination of model, data and seed is a run in a process of its own (:mod:`decodiff_anomalib.benchmark.run`), so
that its peak memory is measured alone and its failure ends no other run.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pandas as pd

from decodiff_anomalib.benchmark.grid import choose_runs, make_grid
from decodiff_anomalib.benchmark.plots import write_plots
from decodiff_anomalib.benchmark.record import CATEGORY_METRICS, LOG, Run, write_record
from decodiff_anomalib.benchmark.report import collect, display_names, means_table, write_tables


def benchmark(
    *,
    benchmark: dict,  # of Any, jsonargparse would call whatever a class_path in it names
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
    """Train and test several models on the same categories; tabulate their metrics and costs.

    All models get whole images of one size, and thresholds from the same held-out normal images. Finished runs are not
    repeated unless their settings changed: the same command continues where it was interrupted, and commands with other
    models or modes add to the same tables.

    Args:
        benchmark: The grid of runs, in the layout and grid language of `anomalib benchmark`: seed, model, and data,
            which is MultiCategory. Besides class_path and init_args, a model may have a name; trainer, arguments of
            Lightning's trainer, where `precision: auto` is bf16-mixed if the accelerator's device computes bfloat16
            natively and 32-true otherwise; data, arguments of MultiCategory; and backbone_weights, `packaged` or a
            file, for models built with pre_trained=false.
        root: Overrides the data's root: the folder of the categories.
        categories: Overrides the data's categories.
        models: Names of the models to run now. Defaults to all.
        modes: multi is one model of all categories, single one for each. Defaults to multi.
        image_size: Side in pixels that images are resized to; nothing is cropped.
        accelerator: As in Lightning's trainer.
        photographs: Folder of images for EfficientAd's teacher and penalty where Anomalib's are not available.
        output: Folder for runs, tables and pictures.
        timing_seconds: Duration of each timing.

    Returns:
        pd.DataFrame: The table of :func:`decodiff_anomalib.benchmark.report.summarise`.

    Raises:
        SystemExit: With status 2, if the configuration is not valid or the record of a run is damaged, before anything
            is run, or if a file cannot be written; with 1, if a run failed, after all others and the tables; with 130,
            if interrupted.
    """
    output = Path(output)
    try:
        grid = make_grid(benchmark, root, categories, image_size, accelerator, photographs)
        chosen = choose_runs(grid, models, modes or ["multi"])
        collect(grid, display_names(grid, output), output)
    except (OSError, ValueError) as error:
        print(f"decodiff benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    failed = 0
    try:
        for number, run in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {run.title}: ", end="", flush=True)
            outcome, succeeded = _execute(run, output, timing_seconds)
            print(outcome, flush=True)
            failed += not succeeded
        table = write_tables(grid, output)
        write_plots(grid, table, output)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished runs are kept; the same command continues with the others.")
        raise SystemExit(130) from None
    except OSError as error:
        print()
        print(f"decodiff benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"\n{means_table(table)}\n\nTables and pictures: {output}")
    if failed:
        print(f"{failed} of {len(chosen)} runs failed; the same command tries them again.", file=sys.stderr)
        raise SystemExit(1)
    return table


def _execute(run: Run, output: Path, timing_seconds: float) -> tuple[str, bool]:
    """Execute a run in a child process unless it is finished; returns the outcome in words and whether it succeeded."""
    previous, folder = run.read(output), run.folder(output)
    if "result" in previous:
        return "done before", True
    other_settings = folder.exists() and not previous
    shutil.rmtree(folder, ignore_errors=True)
    write_record(folder, {"configuration": asdict(run), "timing_seconds": timing_seconds})
    began = time.monotonic()
    with (folder / LOG).open("wb") as log:
        child = subprocess.run(  # noqa: S603 - this interpreter, this package
            [sys.executable, "-m", "decodiff_anomalib.benchmark.run", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    record = run.read(output)
    took = f"{'again, with other settings: ' if other_settings else ''}{time.monotonic() - began:.0f} s"
    if "result" in record:
        pixel_ap = pd.read_json(folder / CATEGORY_METRICS).set_index("category").pixel_ap["mean"]
        return f"{took}, pixel AP {pixel_ap:.3f}", True
    if "error" not in record:
        status = child.returncode
        record["error"] = (
            f"Killed by signal {-status}{' (out of memory?)' if status == -9 else ''}."
            if status < 0
            else f"Ended with status {status} and no result."
        )
        write_record(folder, record)
    return f"{took}, failed: {record['error'].splitlines()[-1]} ({folder / LOG})", False
