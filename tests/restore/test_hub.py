"""Base and adapter by their Hub ids, from a stand-in of the Hub on this machine: the result is that of the folders."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from tests.restore.test_door import _fresh, line, measured, place, run  # noqa: F401  fixtures

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """Answers what ``snapshot_download`` asks: the commit, the files of a repository, and each of them."""

    def __init__(self, repositories: Mapping[str, Path], *rest: Any) -> None:
        self.repositories = repositories
        super().__init__(*rest)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/").removeprefix("api/models/").split("/")
        folder, rest = self.repositories.get("/".join(path[:2])), path[2:]
        if folder is None:
            return self.send_error(404)
        files = [file for file in folder.iterdir() if file.is_file()]
        if rest[:1] == ["resolve"]:
            body = (folder / rest[2]).read_bytes()
        elif rest[:1] == ["tree"]:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            body = json.dumps(rows).encode()
        else:
            names = [{"rfilename": file.name} for file in files]
            body = json.dumps({"id": "/".join(path[:2]), "sha": COMMIT, "siblings": names}).encode()
        self.send_response(200)
        headers = {"Content-Length": str(len(body)), "ETag": f'"{rest[-1] if rest else ""}"', "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  the name that http.server calls

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def served(repositories: Mapping[str, Path]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, repositories))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_hub_ids_give_what_the_folders_give(
    run: Any,  # noqa: F811
    place: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("--metric", "identity", out=tmp_path / "here") == 0
    measured.seen = []  # type: ignore[attr-defined]
    with served({"org/base": place / "base", "org/adapter": place / "adapter"}) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        assert run("--metric", "identity", base="org/base", adapter="org/adapter", out=tmp_path / "there") == 0
        capsys.readouterr()
        assert run(base="org/base", adapter="org/none", out=tmp_path / "none") == 1
        assert "cannot load 'org/none'" in line(capsys)
    here, there = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("here", "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert "base_model: org/base" in (tmp_path / "there" / "README.md").read_text("utf-8")
