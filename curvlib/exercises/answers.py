"""The process that holds one submission: it reads the notebook's definitions and calls its functions for the grader.

The grader runs ``python -m curvlib.exercises.answers SECONDS values|bare NOTEBOOK`` in an empty folder. Calls come in
as pickles of the grader's own making; results go out as JSON, which cannot carry code.
"""

import ast
import base64
import json
import linecache
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from IPython.core.inputtransformer2 import TransformerManager

from curvlib.exercises.core import describe

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
VALUES = (ast.Assign, ast.AnnAssign)  # they may run for long, so the grader may ask to leave them out


def encode(value: Any) -> Any:
    """A result as JSON: numbers, text, tensors and arrays, and lists or dicts of these."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, tuple | list):
        return {"items": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"keys": [encode(key) for key in value], "items": [encode(item) for item in value.values()]}
    if hasattr(value, "__array__"):
        array = torch.as_tensor(value).detach().cpu().contiguous()
        data = base64.b64encode(array.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
        graph = getattr(value, "requires_grad", False)
        return {"dtype": str(array.dtype)[6:], "shape": list(array.shape), "data": data, "graph": graph}
    return {"other": type(value).__name__}


def change(before: Any, after: Any) -> Any:
    """What a check may want to know of an argument after a call: a changed tensor, a probe's log."""
    if isinstance(after, torch.Tensor):
        return None if torch.equal(before, after) else after
    return getattr(after, "log", None)


def define(path: Path, kinds: tuple[type, ...]) -> tuple[dict[str, Any], list[str]]:
    """Run a notebook's statements of these kinds, cell by cell; return its names, and remarks for the teacher."""
    names: dict[str, Any] = {"__name__": "answers"}
    remarks = []
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"], 1):
        if cell.get("cell_type") != "code":
            continue
        source, place = "".join(cell["source"]), f"cell {number}"
        if source.lstrip().startswith("%%"):
            source = source.lstrip().partition("\n")[2]
        try:
            body = ast.parse(TransformerManager().transform_cell(source)).body  # magics become expressions
        except SyntaxError as error:
            remarks.append(f"{place} was not read: it has a syntax error in line {error.lineno}")
            continue
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
        for statement in body:
            if not isinstance(statement, kinds):
                continue
            text = ast.unparse(statement)
            if text.startswith(("import curvlib", "from curvlib")) and "curvlib.exercises" not in text:
                remarks.append(f"{place} uses curvlib itself: {text}")
            try:
                exec(compile(ast.Module([statement], []), place, "exec"), names)  # noqa: S102 - what grading is for
            except BaseException as error:  # sys.exit(), too
                remarks.append(f"{place}, line {statement.lineno}: {type(error).__name__}: {str(error)[:200]}")
    return names, remarks


def limit(seconds: int) -> None:
    """Bound the CPU, the memory and the size of a file that this process may use."""
    import resource  # here, because it is missing on Windows, where only reading and releasing work

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing too much raises OSError instead


def main(seconds: str, kinds: str, notebook: str) -> None:
    """Serve calls until the grader closes the pipe."""
    limit(int(seconds))
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    print(json.dumps({"loaded": True}), file=replies, flush=True)
    names, remarks = define(Path(notebook), DEFINITIONS + (VALUES if kinds == "values" else ()))
    functions = sorted(name for name, value in names.items() if callable(value))
    print(json.dumps({"functions": functions, "remarks": remarks}), file=replies, flush=True)
    while True:
        try:
            name, arguments = pickle.load(calls)  # noqa: S301 - from the grader
        except EOFError:
            return
        try:
            before = [each.detach().clone() if isinstance(each, torch.Tensor) else None for each in arguments]
            result = names[name](*arguments)
            states = [encode(change(*pair)) for pair in zip(before, arguments, strict=True)]
            reply = {"result": encode(result), "states": states}
        except BaseException as error:
            reply = {"error": type(error).__name__, "message": describe(error, name)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
