"""Thresholds of an exported file: named tables in its graph, and ``thresholds.json`` beside it.

The record holds what the graph does not: the scores of the normal images that the thresholds were set on, from which
they can be set anew and what they promise can be told.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from decodiff_anomalib.post_processor import DeCoDiffPostProcessor

if TYPE_CHECKING:
    import onnx_ir

RECORD = "thresholds.json"
TABLES = ("image_thresholds", "pixel_thresholds")
"""Names of the tables, in graphs and in the record: of each category, and last the one of unknown images."""


def name_tables(graph: "onnx_ir.Graph", post_processor: DeCoDiffPostProcessor) -> None:
    """Give the tables of a graph their names; exporters number constants."""
    for value in list(graph.initializers.values()):
        for name in TABLES:
            table = getattr(post_processor, name).numpy()
            constant = value.const_value
            if constant is not None and constant.shape == table.shape and np.array_equal(constant.numpy(), table):
                value.name = name


def make_record(post_processor: DeCoDiffPostProcessor, white_level: float | None) -> dict[str, Any]:
    """Plain data of thresholds, what they promise, and what is needed to set them anew."""
    return {
        "white_level": white_level,
        "promises": [promise._asdict() for promise in post_processor.promises()],
        **{name: getattr(post_processor, name).tolist() for name in TABLES},
        "post_processor": post_processor.checkpoint_config(),
    }


def read_record(file: Path) -> dict[str, Any]:
    """The record of an exported file.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = file.parent / RECORD
    try:
        records = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        msg = f"{path} is damaged: {error}. Export {file.name} again."
        raise ValueError(msg) from error
    if file.name not in records:
        msg = (
            f"{path} has no thresholds of {file.name}. It was exported by an earlier version, by another program or "
            "without thresholds; export it again."
        )
        raise ValueError(msg)
    return records[file.name]


def restore_post_processor(record: Mapping[str, Any]) -> DeCoDiffPostProcessor:
    """The post-processor that a record describes."""
    post_processor = DeCoDiffPostProcessor()
    post_processor.load_checkpoint_config(record["post_processor"])
    for name in TABLES:
        getattr(post_processor, name).copy_(torch.tensor(record[name]))
    return post_processor


def write_onnx_tables(source: Path, target: Path, tables: Mapping[str, np.ndarray]) -> None:
    """Write the graph of ``source`` to ``target`` with other tables.

    Raises:
        ValueError: If it does not have them.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    found = {initializer.name: initializer for initializer in model.graph.initializer if initializer.name in tables}
    _check_found(source, found, tables)
    for name, initializer in found.items():
        initializer.CopyFrom(onnx.numpy_helper.from_array(tables[name].astype(np.float32), name))
    onnx.save(model, target)


def write_openvino_tables(source: Path, target: Path, tables: Mapping[str, np.ndarray]) -> None:
    """Write the graph of ``source`` to ``target`` and its ``.bin`` with other tables, in the precision they have.

    Raises:
        ValueError: If it does not have them.
    """
    import openvino

    model = openvino.Core().read_model(source)
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    found = {node.get_friendly_name(): node for node in constants if node.get_friendly_name() in tables}
    _check_found(source, found, tables)
    for name, node in found.items():
        values = tables[name].astype(node.get_element_type().to_dtype())
        replacement = openvino.opset13.constant(values, name=name)
        node.output(0).replace(replacement.output(0))
    openvino.save_model(model, target, compress_to_fp16=False)


def _check_found(source: Path, found: Mapping[str, object], tables: Mapping[str, np.ndarray]) -> None:
    if missing := sorted(tables.keys() - found.keys()):
        msg = f"{source} has no {' and no '.join(missing)}. It was exported by an earlier version; export it again."
        raise ValueError(msg)
