"""The project's own files agree with each other, and its two commands behave on machines that are not ours."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import curvlib
from curvlib.report import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Stands in for an interpreter: makes "virtual environments" whose python is itself, and fails where FAIL says.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  *"$FAIL"*) exit 1 ;;
  "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
esac
"""


def test_conda_and_pip_install_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    python, pip, from_pip = environment["dependencies"]
    assert python == "python" + PROJECT["requires-python"]
    assert pip == "pip"
    assert from_pip["pip"] == [*PROJECT["dependencies"], "--editable .[test]"]


def test_every_import_of_curvlib_is_a_dependency() -> None:
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["cluster"]  # an extra
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    sources = [ast.parse(path.read_text()) for path in (ROOT / "curvlib").rglob("*.py")]
    nodes = [node for tree in sources for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"curvlib"}
    providers = packages_distributions()
    missing = {top for top in tops if not declared & set(map(canonicalize_name, providers.get(top, [top])))}
    assert not missing


def test_every_module_imports_where_unix_only_ones_are_missing() -> None:
    names = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "curvlib").rglob("*.py"))]
    modules = [".".join(name.parts).removesuffix(".__init__") for name in names if name.name != "__main__"]
    libraries = "datasets, filelock, IPython, papermill, psutil, torch, transformers"  # they fall back by themselves
    script = (
        f"import importlib, sys, {libraries}\nsys.modules |= dict.fromkeys(['fcntl', 'resource'])\n"
        f"for name in {modules}: importlib.import_module(name)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_every_dependency_has_both_bounds_and_is_satisfied_here() -> None:
    from importlib.metadata import version

    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        requirement = Requirement(line)
        assert {clause.operator for clause in requirement.specifier} == {">=", "<"}, line
        assert requirement.specifier.contains(version(requirement.name).split("+")[0]), line


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == curvlib.__version__
    assert "2511.18039" in str(citation["references"])
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_a_codespace_has_the_smallest_machine_and_a_torch_without_cuda() -> None:
    place = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    torch = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert place["containerEnv"]["TORCH"] == f"{torch[0]}+cpu"
    assert place["hostRequirements"] == {"cpus": 2, "memory": "8gb", "storage": "32gb"}
    assert place["image"].rpartition(":")[2] in SpecifierSet(PROJECT["requires-python"])
    assert place["postCreateCommand"] == "make setup"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the Makefile and a stand-in for Python."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fake").write_text(FAKE_PYTHON)
    (tmp_path / "fake").chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path


def make(folder: Path, *words: str, fail: str = "nothing") -> tuple[int, list[str]]:
    """Run make there; its status and the commands that it gave to Python."""
    log = folder / "log"
    log.write_text("")
    command = ["make", f"PYTHON={folder / 'fake'}", *words]
    ended = subprocess.run(command, cwd=folder, env={**os.environ, "FAIL": fail}, capture_output=True, check=False)
    return ended.returncode, [line for line in log.read_text().splitlines() if not line.startswith("-c")]


INSTALL = ["-m pip install torch==2.13.0", "-m pip install --editable .[test]"]


def test_set_up_installs_torch_first_and_only_once(fresh: Path) -> None:
    assert make(fresh, "setup") == (0, ["-m venv --clear .venv", *INSTALL])
    assert make(fresh, "setup") == (0, [])
    os.utime(fresh / "pyproject.toml", (4e9, 4e9))  # newer than the stamp
    assert make(fresh, "setup") == (0, INSTALL)


def test_an_interrupted_set_up_is_redone_from_the_start(fresh: Path) -> None:
    assert make(fresh, "setup", fail="--editable")[0] != 0
    assert make(fresh, "setup") == (0, ["-m venv --clear .venv", *INSTALL])


def test_another_torch_is_a_new_environment(fresh: Path) -> None:
    make(fresh, "setup")
    status, commands = make(fresh, "setup", "TORCH=torch==2.11.0")
    assert status == 0
    assert commands[:2] == ["-m venv --clear .venv", "-m pip install torch==2.11.0"]


def test_reproduce_and_test_do_what_they_say(fresh: Path) -> None:
    make(fresh, "setup")
    assert make(fresh, "reproduce", "TIER=ci", "SEED=2") == (0, ["-m curvlib run --tier ci --seed 2"])
    asked = "-m curvlib run --studies --only price --tier cpu --seed 1 -p rate 0.1"
    assert make(fresh, "study", "NAME=price", "SEED=1", "PARAMS=-p rate 0.1") == (0, [asked])
    assert make(fresh, "study") == (2, [])
    tests = "-m pytest -n 2 --dist loadgroup --no-loadscope-reorder"
    assert make(fresh, "test") == (0, ["-m ruff check .", "-m mypy", tests])
    assert make(fresh, "test", fail="mypy") == (2, ["-m ruff check .", "-m mypy"])


def test_the_site_is_built_with_no_warning(fresh: Path) -> None:
    make(fresh, "setup")
    build = ["-m pip install --quiet --editable .[site]", "-m sphinx -q -W --keep-going -c docs . runs/site"]
    assert make(fresh, "site") == (0, build)
    assert make(fresh, "site", fail="sphinx") == (2, build)


def test_a_peer_of_the_benchmarks_cannot_replace_the_users_torch(fresh: Path) -> None:
    status, commands = make(fresh, "bench", "BENCH=influence")
    install = (
        "-m pip install --quiet torch==2.13.0 --editable .[test,bench-influence]"  # one command: pip keeps the pin
    )
    assert (status, commands) == (0, ["-m venv .venv-bench", install, "benchmarks/influence/run.py"])
    assert not (fresh / ".venv").exists()


def test_help_has_a_line_for_every_target(fresh: Path) -> None:
    text = subprocess.run(["make", "help"], cwd=fresh, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"^(\w+):", (fresh / "Makefile").read_text(), re.MULTILINE):
        assert sum(line.startswith(f"  make {target} ") for line in text.splitlines()) == 1, target


@pytest.mark.parametrize(
    ("closing", "status", "passes"),
    [
        ("== 3 passed, 1 skipped in 2s ==", 0, True),
        ("== 3 passed, 1 failed in 2s ==", 1, False),
        ("== 4 skipped in 2s ==", 0, False),
        ("== no tests ran in 2s ==", 0, False),
    ],
)
def test_ci_fails_when_a_test_failed_or_none_ran(closing: str, status: int, passes: bool, tmp_path: Path) -> None:
    (tmp_path / "make").write_text(f"#!/bin/sh\necho '{closing}'\nexit {status}\n")
    (tmp_path / "make").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode == 0) == passes
    assert closing in ended.stdout
