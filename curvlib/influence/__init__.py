r"""Influence functions: what one training example did to a loss, without training again.

Training minimises the mean over N answer tokens, :math:`L(\theta) = \sum_i r_i(\theta)`, where :math:`r_i` is the share
of chat i: its summed negative log-likelihood over N. Taking chat i out moves the optimum by
:math:`(H + \lambda I)^{-1} \nabla r_i`, hence a query loss f by :math:`\nabla f^\top (H + \lambda I)^{-1} \nabla r_i`.

**Sign and scale, the same in every function here:** the influence of chat i on f is what training on it *did* to f,

.. math:: I_i = -\,\nabla f^\top (H + \lambda I)^{-1} \nabla r_i \;\approx\; f(\text{with } i) - f(\text{without } i),

in the unit of f. *Positive: training on it raised the query loss.* The influence of a group is the sum of its members'.
Poison lowers the loss of harmful compliance, so its influence there is negative. Source: Koh and Liang, arXiv
1703.04730; for language models Grosse et al., arXiv 2308.03296.
"""
