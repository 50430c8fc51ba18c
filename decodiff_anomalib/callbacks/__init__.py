"""What DeCoDiff adds to a training or a prediction, each as a callback of Lightning."""

from decodiff_anomalib.callbacks.drift_monitor import DriftMonitor
from decodiff_anomalib.callbacks.hold_out_normals import HoldOutNormals
from decodiff_anomalib.callbacks.image_files import ImageFiles
from decodiff_anomalib.callbacks.interruption import Interruption
from decodiff_anomalib.callbacks.loader_limits import LoaderLimits
from decodiff_anomalib.callbacks.prediction_table import PredictionTable
from decodiff_anomalib.callbacks.repeatable_order import RepeatableOrder
from decodiff_anomalib.callbacks.training_duration import TrainingDuration
from decodiff_anomalib.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "DriftMonitor",
    "HoldOutNormals",
    "ImageFiles",
    "Interruption",
    "LoaderLimits",
    "PredictionTable",
    "RepeatableOrder",
    "TrainingDuration",
    "WeightAveraging",
]
