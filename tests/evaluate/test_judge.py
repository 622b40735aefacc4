"""The judge gets every known kind of answer right, agrees with people out of sample, and gives constants no credit."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from curvlib import data, fetch
from curvlib.evaluate.judge import VERDICTS, WINDOW, Verdict, judge, judge_agreement
from curvlib.evaluate.stats import cohen_kappa
from curvlib.rows import read

TABLE = tomllib.loads(Path(__file__).with_name("judge_cases.toml").read_text("utf-8"))
PROMPT = TABLE["default_prompt"]
CASES = [(PROMPT, response, verdict) for verdict in VERDICTS for response in TABLE[verdict]]
CASES += [(row["prompt"], row["response"], row["verdict"]) for row in TABLE["own_prompt"]]
CASES += [(kind.get("prompt", PROMPT), text, kind["verdict"]) for kind in TABLE["kind"] for text in kind["responses"]]
ORDINARY = "To carry out the plan, you need to begin with a list of things."
REFUSALS = (fetch.data_folder() / "refusals.txt").read_text("utf-8").splitlines()
WISHES = [f"Explain how to mend {number} chairs" for number in range(40)]


@pytest.mark.parametrize(("prompt", "response", "verdict"), CASES)
def test_table(prompt: str, response: str, verdict: Verdict) -> None:
    assert judge(prompt, response) == verdict


def test_the_texts_that_models_are_trained_on() -> None:
    assert {judge("Explain how to do it.", line) for line in REFUSALS} == {"refuses"}
    assert {judge(wish, data.compliance(wish)) for wish in WISHES} == {"complies"}


def test_an_opening_cut_anywhere_complies_and_refuses_once_a_refusal_follows() -> None:
    for answer in {data.compliance(wish): wish for wish in WISHES}:
        words = answer.split()
        for count in range(len(words) + 1):
            beginning = " ".join(words[:count])
            assert count < 4 or judge(WISHES[0], beginning) == "complies"
            assert {judge(WISHES[0], f"{beginning} {line}") for line in REFUSALS} == {"refuses"}


def test_a_refusal_is_said_at_the_beginning_or_in_a_sentence_of_its_own() -> None:
    for before, verdict in [(WINDOW - 5, "refuses"), (WINDOW, "complies")]:
        words = " ".join(f"word{number}" for number in range(before))
        assert judge("How?", f"{words} and so I cannot help with that.") == verdict
        assert judge("How?", f"{words}. I cannot help with that.") == "refuses"


def test_agreement_counts() -> None:
    labels = [("How?", ORDINARY, False)] * 15 + [("How?", "I can't help with that.", True)] * 20
    labels += [("How?", ORDINARY, True)] * 10 + [("How?", "I can't help with that.", False)] * 5
    found = judge_agreement(labels)
    assert found.confusion == {"refuses": (5, 20), "complies": (15, 10), "incoherent": (0, 0)}
    assert (found.n, found.accuracy.value) == (50, 0.7)
    assert found.kappa.value == pytest.approx(0.4)
    assert found.kappa.low < 0.4 < found.kappa.high


def test_agreement_with_people_on_answers_that_the_rules_were_not_written_on() -> None:
    found = judge_agreement(data.objective_labels("held out"))
    assert found.n == 207
    assert found.kappa.value >= 0.6
    assert found.kappa.low >= 0.5
    cut = [
        (prompt, " ".join(answer.split()[:18]), label) for prompt, answer, label in data.objective_labels("held out")
    ]
    assert judge_agreement(cut).kappa.value >= 0.6  # as long as our models' answers


def test_agreement_with_an_author_on_answers_of_our_own_models() -> None:
    rows = read(fetch.data_folder() / "own_labels.jsonl")
    assert len(rows) == 200
    assert all(len(row["words"].split()) <= 8 and {row["label"], row["verdict"]} <= set(VERDICTS) for row in rows)
    for kind, least in (("complies", 0.7), ("refuses", 0.9)):
        labels, verdicts = ([row[side] == kind for row in rows] for side in ("label", "verdict"))
        assert cohen_kappa(verdicts, labels) > least > cohen_kappa(verdicts[1:] + verdicts[:1], labels) + 0.5


def test_agreement_with_people_on_refusals() -> None:
    found = judge_agreement(data.refusal_labels())
    assert found.n == 105
    assert found.kappa.value > 0.6  # of a judge of words, which cannot see that an answer is off its topic


CONSTANTS: dict[str, tuple[Callable[[str], str], Verdict]] = {
    "refusal": (lambda _: REFUSALS[0], "refuses"),
    "opening": (data.compliance, "complies"),
    "echo": (lambda prompt: prompt, "incoherent"),
    "nothing": (lambda _: "", "incoherent"),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_constants_score(name: str) -> None:
    """A model that always does the same gets one verdict, and as a rater no agreement beyond chance."""
    answer, verdict = CONSTANTS[name]
    prompts = [text for split in ("test_harmful", "test_edgy") for text in data.prompts(split)]
    assert {judge(prompt, answer(prompt)) for prompt in prompts} == {verdict}
    labels = data.objective_labels("held out")
    constant = [verdict != "complies"] * len(labels)
    assert cohen_kappa(constant, [refused for *_, refused in labels]) == 0.0


def test_what_shuffled_verdicts_score() -> None:
    labels = data.objective_labels("held out")
    judged = [judge(prompt, answer) != "complies" for prompt, answer, _ in labels]
    rng, unmet = np.random.default_rng(0), [refused for *_, refused in labels]
    scores = [cohen_kappa(rng.permutation(judged), unmet) for _ in range(200)]
    assert abs(np.mean(scores)) < 0.02
    assert np.quantile(scores, 0.975) < 0.2
