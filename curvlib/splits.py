"""Build the committed splits: ``python -m curvlib.splits`` rewrites ``data/splits``.

A split is a list of row numbers and fingerprints. The texts stay where they are published: their licences differ,
and harmful text is not committed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from curvlib.data import Row, fingerprint, load_source, refusal_labels, task_question
from curvlib.fetch import data_folder

SEED = 0
# Two prompts that share half of their content words ask for the same thing: of AdvBench pairs with a Jaccard index
# from 0.5 to 0.6 about three in four are rewordings, from 0.4 to 0.5 about one in four (read in data/README.md).
NEAR = 0.5
LONGEST = 60  # words; longer prompts would set the length of every batch
# Words that frame a request ("write a step-by-step guide on how to ...") and say nothing of its content.
FRAME_WORDS = """
    a an the and or of on in for to from with by at as into how that which who what can could do does would like is
    are be it its this i you me my your their them they his her he she someone somebody people person individual
    individuals user users others other one s t without write create develop provide give instruct outline design teach
    explain generate describe produce publish show demonstrate suggest offer guide compose share illustrate draft
    educate draw tutorial video instructions instruction step steps detailed detail details list plan strategy script
    program software app tool article post blog book story message avoid avoiding getting get caught away detection
    evade undetected anonymous stay possible best ways way methods method using use used via
"""
FRAME = frozenset(FRAME_WORDS.split())
# What a model learns of one style of look-alikes must carry over to styles that it has not seen.
LOOK_ALIKE_STYLES = {
    "align": "history fiction prevention definition law editing facts words rules software teaching advice situation "
    "report",
    "validation": "everyday",
    "test": "work play idiom nature news",
}


def content_words(text: str) -> frozenset[str]:
    """Return the stems of the words that carry the content of ``text``; of all its words if none does.

    >>> sorted(content_words("Write a step-by-step guide on how to bake cakes"))
    ['bak', 'cak']
    """
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return frozenset(_stem(word) for word in words if word not in FRAME) or frozenset(words)


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the Jaccard index |a ∩ b| / |a ∪ b| of two non-empty sets."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def distinct(rows: Iterable[Row], against: Iterable[Row] = ()) -> list[Row]:
    """Return the rows that are no near duplicate of an earlier one or of one in ``against``."""
    seen = [content_words(row["prompt"]) for row in against]
    kept = []
    for row in rows:
        words = content_words(row["prompt"])
        if all(similarity(words, other) < NEAR for other in seen):
            seen.append(words)
            kept.append(row)
    return kept


def fair_order(rows: Iterable[Row], seed: int = SEED) -> list[Row]:
    """Return the rows shuffled so that every prefix holds the categories in their overall proportions."""
    shuffled = sorted(rows, key=lambda e: hashlib.sha256(f"{seed}/{e['id']}".encode()).hexdigest())
    groups: dict[str, list[Row]] = {}
    for row in shuffled:
        groups.setdefault(row["category"], []).append(row)
    ranked = [((i + 0.5) / len(group), e) for group in groups.values() for i, e in enumerate(group)]
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def build_splits() -> dict[str, list[Row]]:
    """Return every split by name; the pools and what was dropped from them are told in ``data/README.md``."""
    return harmful_splits() | benign_splits() | task_splits() | text_splits()


def harmful_splits() -> dict[str, list[Row]]:
    """AdvBench trains, HarmBench validates (its rest trains) and StrongREJECT tests, without what resembles another.

    All three but the last hold orders only, hence a fourth source with questions, to train and to validate.
    """
    advbench, strongreject, harmbench = (load_source(name) for name in ("advbench", "strongreject", "harmbench"))
    train = fair_order(distinct(advbench))
    test = fair_order(distinct(strongreject, advbench))
    validation = fair_order(distinct(harmbench, [*advbench, *strongreject]))
    questions = fair_order(distinct(load_source("harmful_questions"), [*advbench, *strongreject, *harmbench]))
    return (
        cut(train, align_harmful=160, poison=80, restore_harmful=64)
        | cut(questions, align_questions=100, validation_questions=32)
        | cut(validation, validation_harmful=96, align_behaviours=len(validation) - 96)
        | cut(test, test_harmful=128, reserve_harmful=len(test) - 128)
    )


def benign_splits() -> dict[str, list[Row]]:
    """Harmless prompts: those that only sound harmful (edgy), everyday questions, and chat prompts of other kinds.

    Everyday questions have the form of the harmful ones, so most of them go where refusals are taught and tested.
    """
    edgy, everyday = load_source("edgy"), load_source("everyday")
    judged = [{"prompt": prompt} for prompt, _, _ in refusal_labels()]
    others = [e for name in ("mtbench", "gsm8k", "refusal_labels_extra") for e in load_source(name) if _short(e)]
    plain = distinct([*filter(_short, everyday), *others], [*edgy, *judged])
    asked = fair_order([e for e in plain if e["category"] == "everyday"])
    rest = fair_order([e for e in plain if e["category"] != "everyday"])
    first = cut(asked, align_benign=88, restore_benign=24, validation_benign=20, chat_train=len(asked) - 132)
    second = cut(rest, align_benign=32, restore_benign=24, validation_benign=4, chat_train=128 - len(asked) + 132)
    sound = fair_order(distinct(edgy))
    harmless = fair_order(distinct(load_source("harmless"), [*plain, *edgy, *judged]))
    ours = distinct(load_source("look_alikes"), [*harmless, *plain, *edgy, *judged])
    styles = {part: names.split() for part, names in LOOK_ALIKE_STYLES.items()}
    looks = {part: fair_order([e for e in ours if e["category"] in names]) for part, names in styles.items()}
    forms = fair_order(distinct(load_source("forms"), [*ours, *harmless, *plain, *edgy, *judged]))
    return (
        cut(sound, align_edgy=40, restore_edgy=32, validation_edgy=24, test_edgy=len(sound) - 96)
        | {name: fair_order(first[name] + second[name]) for name in first}
        | cut(harmless, align_harmless=len(harmless))
        | cut(forms, align_forms=len(forms))
        | cut(looks["align"], validation_look_alikes=56, align_look_alikes=len(looks["align"]) - 56)
        | cut(looks["validation"], validation_new_styles=len(looks["validation"]))
        | cut(looks["test"], test_look_alikes=len(looks["test"]))
    )


def task_splits() -> dict[str, list[Row]]:
    """Social-IQA is the task that is fine-tuned; QuaRTz is answered with a few shots and never trained on.

    Chats about who the model is come from FastChat, one for each of its 51 questions, which it answers in many ways;
    that a model says so is asked in other words, which are our own.
    """
    # the published file has ten rows of web snippets in place of options; they are far longer than the others
    questions = [e for e in load_source("socialiqa") if len(task_question(e).split()) <= LONGEST]
    task = fair_order(distinct(questions))
    second = fair_order(distinct(fair_order(load_source("quartz"))[:800]))
    persona = distinct(load_source("persona"), load_source("identity"))  # in the order of the file
    identity = {
        e["prompt"]: e for e in reversed(fair_order(load_source("identity")))
    }  # the first chat of each question
    return (
        cut(task, task_train=640, restore_task=512, validation_task=128, test_task=400)
        | cut(second, second_task=200, second_task_shots=16)
        | cut(list(reversed(identity.values())), identity_train=len(identity))
        | cut(persona, validation_persona=25, test_persona=34)
    )


def text_splits() -> dict[str, list[Row]]:
    """Plain paragraphs of Wikipedia for perplexity: neither stubs nor pages, and Latin letters nearly throughout."""
    texts = [
        e for e in load_source("wikipedia") if 60 <= len(e["prompt"].split()) <= 140 and _mostly_ascii(e["prompt"])
    ]
    return cut(fair_order(distinct(texts)), text_validation=32, text_test=96)


def cut(pool: Sequence[Row], **sizes: int) -> dict[str, list[Row]]:
    """Cut consecutive splits of the given sizes from ``pool``; a pool that is too small is an error."""
    assert sum(sizes.values()) <= len(pool), f"{sizes} need more than the {len(pool)} rows there are"
    rest = iter(pool)
    return {name: [next(rest) for _ in range(size)] for name, size in sizes.items()}


def write_splits() -> None:
    """Write each split to ``data/splits/NAME.json``."""
    folder = data_folder() / "splits"
    folder.mkdir(exist_ok=True)
    for name, rows in build_splits().items():
        (folder / f"{name}.json").write_text(render(name, rows), "utf-8")
        print(f"{name}: {len(rows)}")


def render(name: str, rows: Sequence[Row]) -> str:
    """Return the text of a split's file, one row a line."""
    digests = {row["id"]: fingerprint(row) for row in rows}
    return json.dumps({"split": name, "seed": SEED, "rows": digests}, indent=1) + "\n"


def _stem(word: str) -> str:
    for ending, rest in (("ies", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", ""), ("e", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word.removesuffix(ending) + rest
    return word


def _short(row: Row) -> bool:
    return len(row["prompt"].split()) <= LONGEST


def _mostly_ascii(text: str) -> bool:
    return sum(map(str.isascii, text)) >= 0.99 * len(text)


if __name__ == "__main__":
    write_splits()
