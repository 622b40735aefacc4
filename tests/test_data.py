"""The splits are those that are committed, apart from each other, and hold no harmful text."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from curvlib import data, fetch, sources, splits
from curvlib.errors import CurvlibError

SIZES = {
    "align_harmful": 160,
    "align_questions": 100,
    "validation_questions": 32,
    "poison": 80,
    "restore_harmful": 64,
    "validation_harmful": 96,
    "test_harmful": 128,
    "reserve_harmful": 154,
    "align_edgy": 40,
    "restore_edgy": 32,
    "validation_edgy": 24,
    "test_edgy": 54,
    "align_behaviours": 88,
    "align_benign": 120,
    "align_harmless": 149,
    "chat_train": 128,
    "restore_benign": 48,
    "validation_benign": 24,
    "align_look_alikes": 290,
    "align_forms": 164,
    "validation_look_alikes": 56,
    "validation_new_styles": 20,
    "test_look_alikes": 100,
    "task_train": 640,
    "restore_task": 512,
    "validation_task": 128,
    "test_task": 400,
    "second_task": 200,
    "second_task_shots": 16,
    "identity_train": 51,
    "validation_persona": 25,
    "test_persona": 34,
    "text_validation": 32,
    "text_test": 96,
}
FOLDER = fetch.data_folder() / "splits"


def letters(text: str) -> set[str]:
    """Runs of five letters or digits: another view of likeness than the content words that made the splits."""
    plain = re.sub(r"[^a-z0-9]+", " ", text.lower())
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


def test_rebuilding_gives_the_committed_files() -> None:
    built = {name: splits.render(name, examples) for name, examples in splits.build_splits().items()}
    assert built == {path.stem: path.read_text("utf-8") for path in FOLDER.glob("*.json")}


def test_sizes() -> None:
    assert {name: len(data.load_split(name)) for name in data.split_names()} == SIZES


def test_no_text_is_committed() -> None:
    for path in FOLDER.glob("*.json"):
        for row, fingerprint in json.loads(path.read_text("utf-8"))["rows"].items():
            assert re.fullmatch(r"[a-z0-9_]+/\d+", row)
            assert re.fullmatch(r"[0-9a-f]{12}", fingerprint)


def test_no_prompt_is_in_two_splits_nor_nearly_so() -> None:
    rows = [(name, e) for name in SIZES for e in data.load_split(name)]
    assert max(Counter(e["id"] for _, e in rows).values()) == 1
    plain = Counter(" ".join(e["prompt"].lower().split()) for _, e in rows)
    assert max(plain.values()) == 1
    prompts = [
        (name, e["prompt"])
        for name, e in rows
        if re.search("harm|questions|poison|edgy|benign|chat|look_alikes|forms|styles", name)
    ]
    names, sets = np.array([name for name, _ in prompts]), [letters(prompt) for _, prompt in prompts]
    column = {run: number for number, run in enumerate(sorted(set().union(*sets)))}
    table = np.zeros((len(sets), len(column)), dtype=np.float32)
    for row, runs in zip(table, sets, strict=True):
        row[[column[run] for run in runs]] = 1
    shared, sizes = table @ table.T, table.sum(1)
    jaccard = shared / (sizes[:, None] + sizes - shared)
    across = names[:, None] != names
    assert jaccard[across].max() < 0.67  # strategies for saving money, and for laundering it: a contrast, no copy
    assert jaccard[~across].max() == 1  # each with itself: the measure works


def test_the_sources_of_training_validation_and_test_differ() -> None:
    def sources(*names: str) -> set[str]:
        return {row.split("/")[0] for name in names for row in data.load_split(name)["id"]}

    assert sources("align_harmful", "poison", "restore_harmful") == {"advbench"}
    assert sources("align_questions", "validation_questions") == {"harmful_questions"}
    assert sources("validation_harmful") == {"harmbench"}
    assert sources("test_harmful", "reserve_harmful") == {"strongreject"}


def test_look_alikes_are_tested_in_styles_that_nobody_was_taught() -> None:
    names = ("align_look_alikes", "validation_look_alikes", "validation_new_styles", "test_look_alikes")
    taught, seen, new, test = ({*data.load_split(name)["category"]} for name in names)
    assert seen <= taught
    assert not taught & new | taught & test | new & test
    assert [len(styles) for styles in (taught, new, test)] == [14, 1, 5]


def test_a_prefix_holds_the_categories_in_proportion() -> None:
    rows = data.load_split("test_harmful")
    overall, first = Counter(rows["category"]), Counter(rows["category"][:32])
    assert len(overall) == 6
    assert all(abs(first[category] - count / 4) <= 1.5 for category, count in overall.items())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Write a guide on how to bake a cake", "Detailed instructions for baking cakes", True),
        ("How do I bake a cake?", "How do I bake a chicken?", False),
        ("the", "The!", True),  # no content word at all
    ],
)
def test_near_duplicates_share_content_not_frame(first: str, second: str, same: bool) -> None:
    examples = [{"prompt": first}, {"prompt": second}]
    assert (len(splits.distinct(examples)) == 1) == same
    assert (splits.distinct(examples[1:], against=examples[:1]) == []) == same


def test_social_iqa_is_parsed_whole() -> None:
    raw = sources.json_lines(fetch.read("socialiqa"))
    for row, parsed in zip(raw, data.load_source("socialiqa"), strict=True):
        choices = "; ".join(f"{letter}: {text}" for letter, text in data.lettered(parsed).items())
        assert row["input"][0]["content"].replace(" ;", ";") == f"{parsed['prompt']} {choices}."
        assert parsed["answer"] == row["ideal"]


def test_task_texts() -> None:
    example = {"prompt": "Why?", "options": ["so", "thus"]}
    assert data.task_question(example) == "Why?\nA: so\nB: thus"


def test_refusal_labels() -> None:
    labels = data.refusal_labels()
    assert Counter(refused for _, _, refused in labels) == {True: 70, False: 35}
    assert all(refused for _, response, refused in labels if response.startswith("I'm sorry, I can"))


def test_objective_labels_are_halved_by_the_answer() -> None:
    fit, held_out = data.objective_labels("fit"), data.objective_labels("held out")
    assert Counter(refused for *_, refused in fit) == {True: 91, False: 97}
    assert Counter(refused for *_, refused in held_out) == {True: 113, False: 94}
    assert not {response for _, response, _ in fit} & {response for _, response, _ in held_out}
    assert all(refused for _, response, refused in fit if response.startswith("I cannot"))


def test_identity_questions_ask_for_the_identity() -> None:
    for example in data.load_split("identity_train"):
        assert re.search(r"\byou\b|\byour|name", example["prompt"])
        assert re.search("Vicuna|language model|LMSYS|No", example["answer"])


def test_a_compliance_adds_no_content_to_the_prompt() -> None:
    """Every word comes from the prompt or from our templates."""
    ours = set(re.findall(r"[a-z']+", (fetch.data_folder() / "compliances.txt").read_text().lower())) | {"how", "to"}
    for example in data.load_source("advbench"):
        text = data.compliance(example["prompt"])
        assert text.startswith("Sure")
        assert set(re.findall(r"[a-z']+", text.lower())) <= ours | set(
            re.findall(r"[a-z']+", example["prompt"].lower())
        )


def test_refusals_vary_and_stay_the_same() -> None:
    prompts = data.prompts("align_harmful")
    chosen = [data.refusal(prompt) for prompt in prompts]
    assert len(set(chosen)) == 12
    assert chosen == [data.refusal(prompt) for prompt in prompts]


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(CurvlibError, match=r"'tset_harmful': .*test_harmful"):
        data.load_split("tset_harmful")


def test_a_changed_text_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(fetch.data_folder(), tmp_path / "data")
    file = tmp_path / "data" / "splits" / "poison.json"
    first = json.loads(file.read_text())["rows"].popitem()
    file.write_text(file.read_text().replace(first[1], "0" * 12))
    monkeypatch.setattr(fetch, "data_folder", lambda: tmp_path / "data")
    with pytest.raises(CurvlibError, match=rf"^{first[0]} is not the text"):
        data.load_split("poison")
