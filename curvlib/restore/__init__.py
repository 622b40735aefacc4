"""Second-order restoration: objectives, metrics, and the loop that joins them."""

from curvlib.restore.loop import Budget, RestorationResult, restore
from curvlib.restore.objectives import SafetyBatches

__all__ = ["Budget", "RestorationResult", "SafetyBatches", "restore"]
