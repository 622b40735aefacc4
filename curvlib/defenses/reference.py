"""What the defences are compared with: the aligned model, and the fine-tune that nothing defends."""

from __future__ import annotations

from curvlib.defenses.method import Defended, Method, Setting
from curvlib.landscape.directions import multiply_adapter


def undefended(setting: Setting) -> Defended:
    """Fine-tune as a user would. It is trained here again, so that its cost is measured like that of the others."""
    model = setting.start()
    return Defended(model, setting.train(model, setting.examples()))


def aligned(setting: Setting) -> Defended:
    """Set the adapter to zero: the way back that costs the whole task."""
    model = setting.start()
    multiply_adapter(model, lambda _: 0.0)
    return Defended(model)


UNDEFENDED = Method("undefended", "reference", "fine-tuning as it is", undefended)
ALIGNED = Method("aligned", "reference", "before fine-tuning", aligned)
