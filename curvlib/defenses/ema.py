r"""Exponential moving average of the weights during fine-tuning (arXiv 2508.12531).

.. math:: \bar\theta_t = \beta\,\bar\theta_{t-1} + (1-\beta)\,\theta_t, \qquad \bar\theta_0 = \theta_0,

after each optimiser step; :math:`\bar\theta_T` is deployed. Only the abstract and third-party code (β = 0.995) were at
hand: the paper's own β is not known here, so it is searched. We average the factors A and B, not their product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.defenses.method import Defended, Method, Setting
from curvlib.parameters import Tensors, assign, flatten, trainable


class Average:
    """A moving average of parameters, at first equal to them; memory: one copy (P,).

    >>> average = Average([theta := torch.zeros(1)], beta=0.5)
    >>> _ = theta.fill_(1.0), average.update(), average.update()
    >>> average.value  # 1 - 0.5²
    tensor([0.7500])
    """

    def __init__(self, parameters: Tensors, beta: float) -> None:
        self.parameters, self.beta, self.value = parameters, beta, flatten(parameters)

    @torch.no_grad()
    def update(self) -> Tensor:
        """Take in the parameters as they are now, and return the average (P,)."""
        return self.value.lerp_(flatten(self.parameters), 1 - self.beta)


def ema(setting: Setting, beta: float) -> Defended:
    """Fine-tune and deploy the average; cost: that of the fine-tune, and a copy of the adapter."""
    model = setting.start()
    average = Average(trainable(model), beta)
    spent = setting.train(model, setting.examples(), on_step=average.update)
    assign(average.parameters, average.value)
    return Defended(model, spent)


EMA = Method("EMA", "during", "2508.12531", ema, ({"beta": 0.97}, {"beta": 0.9}, {"beta": 0.995}))
