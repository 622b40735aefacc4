"""The plain baseline during fine-tuning: mix the safety data into the fine-tuning set.

Refusals, benign answers and task chats of the safety budget are put into the set, ``repeats`` times each; steps grow in
proportion, so that the task is seen as often as without them.
"""

from __future__ import annotations

from curvlib.batches import taken_apart
from curvlib.defenses.method import Defended, Method, Setting


def mixture(setting: Setting, repeats: int) -> Defended:
    """Fine-tune on the mixture; cost: the additional steps."""
    examples, model = setting.examples(), setting.start()
    mixed = [*examples, *taken_apart(setting.safety_batches) * repeats]
    return Defended(model, setting.train(model, mixed, config=setting.longer(len(mixed) / len(examples))))


MIXTURE = Method("safety mixture", "during", "baseline", mixture, ({"repeats": 1}, {"repeats": 2}, {"repeats": 4}))
