"""Two models are never taken for one another, wherever they lie and whatever they are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from curvlib import models, stages
from curvlib.models import identity
from curvlib.tiers import get_tier
from tests.evaluate import toys


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer and generation settings, in a folder."""
    folder = tmp_path_factory.mktemp("org") / "chat"
    toys.llama().save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return folder


def twin(checkpoint: Path, place: Path) -> Path:
    return Path(shutil.copytree(checkpoint, place))


def test_models_of_one_organisation_and_revisions_of_one_model_differ(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache names the folder of a revision after its commit, and so does this stand-in."""
    commit = {"Qwen/A": "aaa1", "Qwen/B": "aaa1"}

    def downloaded(hub_id: str, **_: object) -> str:
        folder = tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / commit[hub_id]
        return str(folder if folder.exists() else twin(checkpoint, folder))

    monkeypatch.setattr(models, "snapshot_download", downloaded)
    first, other = identity("Qwen/A"), identity("Qwen/B")
    assert (first, other) == ("Qwen/A@aaa1", "Qwen/B@aaa1")
    commit["Qwen/A"] = "aaa2"
    assert identity("Qwen/A") == "Qwen/A@aaa2"
    tier = get_tier("ci")
    assert stages.key(tier, "Qwen/A") != stages.key(tier, "Qwen/B")


def test_a_folder_is_what_it_holds_and_not_where_it_lies(checkpoint: Path, tmp_path: Path) -> None:
    here, there = twin(checkpoint, tmp_path / "one" / "model"), twin(checkpoint, tmp_path / "two" / "other name")
    assert identity(here) == identity(str(there))
    toys.llama(seed=1).save_pretrained(there)
    beside = twin(there, tmp_path / "one" / "model 2")
    assert len({identity(folder) for folder in (here, beside)}) == 2


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "chat_template.jinja", "tokenizer.json"])
def test_every_file_counts(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = twin(checkpoint, tmp_path / "model")
    before, file = identity(folder), folder / name
    if name.endswith(".jinja"):
        file.write_text("{{ messages }}")
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.7}))
    assert identity(folder) != before


def test_where_a_configuration_came_from_does_not_count(checkpoint: Path, tmp_path: Path) -> None:
    folder = twin(checkpoint, tmp_path / "model")
    before, file = identity(folder), folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "/elsewhere"}))
    (folder / "README.md").write_text("a model card")
    assert identity(folder) == before


def test_the_device_and_the_type_are_in_the_key() -> None:
    key = stages.key(get_tier("ci"), models.DEFAULT)
    assert (key["device"], key["dtype"]) == ("cpu", "torch.float32")
    assert key["models"][0].startswith("smollm2@")
