"""Bars and lines keep quiet where a line on stderr counts as a fault."""

from __future__ import annotations

import pytest

from curvlib.progress import bar, say


def test_nothing_is_written_where_progress_is_switched_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    say("converting")
    assert list(bar(range(2))) == [0, 1]
    assert capsys.readouterr().err == ""


def test_a_line_is_said_otherwise(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    say("converting")
    assert capsys.readouterr() == ("", "converting\n")
