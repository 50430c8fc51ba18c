"""The rule of dependencies: who may know whom, stated once and checked in every import, lazy ones included."""

import ast
from pathlib import Path

import pytest

import decodiff_anomalib

PACKAGE = Path(decodiff_anomalib.__file__).parent

METHOD = {
    "calibration",
    "codec",
    "conditioning",
    "corruption",
    "denoiser",
    "discrepancy",
    "exemplars",
    "features",
    "image_io",
    "latent_groups",
    "learning_rate",
    "paper",
    "precision",
    "schedule",
}
KNOWN_TO_METHOD = {
    "torch",
    "torchvision",
    "timm",
    "diffusers",
    # array mathematics and files
    "numpy",
    "scipy",
    "PIL",
    "safetensors",
    "jsonargparse",  # the command that trains a codec
}
EXCEPTIONS = {"discrepancy": {"anomalib.models.components.filters"}}
"""Anomalib's Gaussian blur is a plain torch module, and better kept than one of our own."""

LAYERS = (
    METHOD | {"atomic_write", "folder_names", "plugin", "quiet", "torch_autoload"},
    {"presets", "settings", "weights"},
    {"torch_model"},
    {
        "callbacks",
        "checkpoint",
        "data",
        "evaluation",
        "export",
        "post_processor",
        "report",
        "scale",
        "views",
        "visualizer",
    },
    {"lightning_model"},
    {"model_file"},
    {"benchmark", "demo", "refine", "thresholds"},
    {"__main__"},
)
"""From the bottom up. A module imports from its own layer and those below it, never from above."""

ROOT = {"__version__", ""}  # the package itself: its version, and registration


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Full names of all modules that a module imports anywhere, type checking included."""
    found: set[str] = set()
    parent = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parent.split(".")[: len(parent.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            }
    return found


def home(module: str) -> str:
    """The name below the package by which layers list a module."""
    return module.removeprefix("decodiff_anomalib").removeprefix(".").split(".")[0]


def layer_of(name: str) -> int:
    (index,) = (index for index, layer in enumerate(LAYERS) if name in layer)
    return index


INNER = {module: {name for name in imports(module) if name in MODULES} for module in MODULES}
OF_PACKAGE = sorted(module for module in MODULES if home(module))


def test_every_module_has_a_layer() -> None:
    names = {home(module) for module in OF_PACKAGE}
    assert names == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(names)


@pytest.mark.parametrize("module", OF_PACKAGE)
def test_no_import_goes_up(module: str) -> None:
    upward = {name for name in INNER[module] if home(name) and layer_of(home(name)) > layer_of(home(module))}
    assert not upward, f"{module} imports {', '.join(sorted(upward))}, which lie above it"


@pytest.mark.parametrize("module", [module for module in OF_PACKAGE if home(module) in METHOD])
def test_the_method_knows_no_framework(module: str) -> None:
    standard = set(__import__("sys").stdlib_module_names)
    foreign = {name for name in imports(module) if name.split(".")[0] not in {"decodiff_anomalib", *standard}}
    allowed = EXCEPTIONS.get(home(module), set())
    unknown = {
        name
        for name in foreign
        if name.split(".")[0] not in KNOWN_TO_METHOD and not any(name.startswith(known) for known in allowed)
    }
    assert not unknown, f"{module} imports {', '.join(sorted(unknown))}"


def test_only_command_line_and_package_know_the_benchmark() -> None:
    users = {home(module) for module in MODULES if any(home(name) == "benchmark" for name in INNER[module])}
    assert users <= {"benchmark", "__main__"}


def test_no_module_takes_part_in_a_circle() -> None:
    """Peel off modules that import nothing any more; whatever is left at the end is a circle."""
    left = {module: set(INNER[module]) - {module, "decodiff_anomalib"} for module in OF_PACKAGE}
    while True:
        free = {module for module, names in left.items() if not names & left.keys()}
        if not free:
            break
        left = {module: names for module, names in left.items() if module not in free}
    assert not left, f"these modules import each other: {', '.join(sorted(left))}"
