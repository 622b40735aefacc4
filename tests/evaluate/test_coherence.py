from __future__ import annotations

import pytest

from curvlib.evaluate.coherence import BEGINNING, is_broken, is_loop, plain, sentences


@pytest.mark.parametrize("mark", ["'", "’", "‘", "ʼ", "ʹ", "′", "´", "`", "＇", "‛"])
def test_one_apostrophe(mark: str) -> None:
    assert plain(f"  **I{mark}m**  __Sorry__") == "i'm sorry"


def test_names_keep_their_underscores() -> None:
    assert plain("- use _this_ for my_own_name") == "use this for my_own_name"


def test_sentences() -> None:
    assert sentences("no. i can't! 3.5 is enough") == ["no.", "i can't!", "3.5 is enough"]


def test_form() -> None:
    assert is_loop("go to the go to the go to the go to the")
    assert not is_loop("I can't help with that. I can't help with that.")
    assert not is_loop("The cost is 1000000 pounds, which is more than the plan allows for")
    assert is_broken("?!")
    assert not is_broken("x = f(y)")


def test_a_long_text_may_say_things_again() -> None:
    beginning = " ".join(f"word{number}" for number in range(BEGINNING))
    assert not is_loop(beginning + " and so on" * 200)
    assert is_loop("and so on " * 200)
