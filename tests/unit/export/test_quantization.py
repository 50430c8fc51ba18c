"""Which modules compute in integers. Compressed files are tested in integration."""

from decodiff_anomalib.export import QUANTISED_SCOPES, Pipeline
from decodiff_anomalib.presets import PRESETS
from decodiff_anomalib.torch_model import DeCoDiffModel


def test_quantised_scopes_are_modules_of_the_graph() -> None:
    pipeline = Pipeline(None, DeCoDiffModel(PRESETS["balanced"], (64, 64)), None)
    assert set(QUANTISED_SCOPES) <= {name for name, _ in pipeline.named_modules()}
