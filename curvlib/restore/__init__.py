"""Second-order restoration: objectives, metrics, and the loop that joins them."""

from curvlib.restore.loop import restore
from curvlib.restore.objectives import SafetyBatches
from curvlib.restore.outcome import Budget, HeldOut, RestorationResult

__all__ = ["Budget", "HeldOut", "RestorationResult", "SafetyBatches", "restore"]
