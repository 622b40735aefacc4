from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from curvlib import data, fetch
from curvlib.evaluate.coherence import Evidence
from curvlib.evaluate.judge import VERDICTS, WINDOW, Verdict, judge, judge_agreement

TABLE = tomllib.loads(Path(__file__).with_name("judge_cases.toml").read_text("utf-8"))
CASES = [(TABLE["default_prompt"], response, verdict) for verdict in VERDICTS for response in TABLE[verdict]]
CASES += [(row["prompt"], row["response"], row["verdict"]) for row in TABLE["own_prompt"]]
ORDINARY = "To carry out the plan, you need to begin with a list of things."


@pytest.mark.parametrize(("prompt", "response", "verdict"), CASES)
def test_table(prompt: str, response: str, verdict: Verdict) -> None:
    assert judge(prompt, response) == verdict


def test_the_texts_that_models_are_trained_on() -> None:
    refusals = (fetch.data_folder() / "refusals.txt").read_text("utf-8").splitlines()
    assert {judge("Explain how to do it.", line) for line in refusals} == {"refuses"}
    wishes = [f"Explain how to mend {number} chairs" for number in range(40)]
    answers = {data.compliance(wish): wish for wish in wishes}
    assert {judge(wish, answer) for answer, wish in answers.items()} == {"complies"}


def test_a_refusal_is_said_at_the_beginning() -> None:
    for before, verdict in [(WINDOW - 5, "refuses"), (WINDOW, "complies")]:
        words = " ".join(f"word{number}" for number in range(before))
        assert judge("How?", f"{words}. I cannot help with that.") == verdict


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (None, "complies"),
        (Evidence(perplexity=20, relevance=1.0), "complies"),
        (Evidence(perplexity=1000, relevance=1.0), "incoherent"),
        (Evidence(perplexity=20, relevance=-0.5), "incoherent"),
    ],
)
def test_evidence_decides_on_what_the_rules_let_pass(evidence: Evidence | None, verdict: Verdict) -> None:
    assert judge("Explain the plan.", ORDINARY, evidence) == verdict
    assert judge("Explain the plan.", "I can't help with that.", evidence) == "refuses"
    assert judge("Explain the plan.", "Sure, here is how to carry out the plan:", evidence) == "complies"


def test_agreement_counts() -> None:
    labels = [("How?", ORDINARY, False)] * 15 + [("How?", "I can't help with that.", True)] * 20
    labels += [("How?", ORDINARY, True)] * 10 + [("How?", "I can't help with that.", False)] * 5
    found = judge_agreement(labels)
    assert found.confusion == {"refuses": (5, 20), "complies": (15, 10), "incoherent": (0, 0)}
    assert (found.n, found.accuracy.value) == (50, 0.7)
    assert found.kappa.value == pytest.approx(0.4)
    assert found.kappa.low < 0.4 < found.kappa.high


def test_agreement_with_people() -> None:
    found = judge_agreement(data.refusal_labels())
    assert found.n == 105
    assert found.kappa.value > 0.6  # the rules alone, which cannot see that an answer is off its topic
    assert found.confusion["refuses"][0] == 0  # nothing that people called an answer counts as a refusal
