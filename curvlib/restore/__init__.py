"""Second-order restoration: objectives, the loop of natural moves, and the user's door on it."""

from curvlib.restore.loop import restore
from curvlib.restore.objectives import SafetyBatches
from curvlib.restore.outcome import HeldOut, RestorationResult

__all__ = ["HeldOut", "RestorationResult", "SafetyBatches", "restore"]
