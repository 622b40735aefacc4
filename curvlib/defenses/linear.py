r"""Merge the models before and after fine-tuning by a straight line (arXiv 2412.19512).

.. math:: \theta = (1-\lambda)\,\theta_\text{base} + \lambda\,\theta_\text{ft} .

The paper tries λ of 0.2, 0.4, 0.6 and 0.8, best near 0.5 to 0.6 (equation and settings as gathered for this course).
In effective weights, :math:`\theta_\text{ft} = \theta_\text{base} + s\,BA`: the adapter is scaled, and stays one.
"""

from __future__ import annotations

from curvlib.defenses.method import Defended, Method, Setting
from curvlib.landscape.directions import multiply_adapter


def linear(setting: Setting, share: float) -> Defended:
    """Keep the share λ of the fine-tuning step; cost: one pass over the adapter."""
    model = setting.tuned()
    multiply_adapter(model, lambda _: share)
    return Defended(model)


LINEAR = Method("linear merge", "after", "2412.19512", linear, ({"share": 0.6}, {"share": 0.4}, {"share": 0.8}))
