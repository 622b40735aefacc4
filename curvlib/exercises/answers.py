"""The process that holds one submission: it reads the notebook's definitions and calls its functions for the grader.

The grader runs ``python -m curvlib.exercises.answers SECONDS`` in an empty folder. The notebook's path and then calls
come in as pickles of the grader's own making; replies go out as a line of JSON each, which cannot carry code.
"""

import ast
import base64
import copy
import json
import linecache
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from IPython.core.inputtransformer2 import TransformerManager

from curvlib.exercises.core import describe

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
VALUES = (ast.Assign, ast.AnnAssign)  # they may run for long, so the grader may ask to leave them out


def encode(value: Any) -> dict[str, Any]:
    """A tensor or an array for JSON, which asks this of whatever it does not know."""
    if not hasattr(value, "__array__"):
        raise TypeError(f"{type(value).__name__} was returned, which is no number, tensor or list of these")
    array = torch.as_tensor(value).detach().double()
    data = base64.b64encode(array.numpy().tobytes()).decode()
    return {"base64": data, "shape": array.shape, "graph": getattr(value, "requires_grad", False)}


def decode(item: dict[str, Any]) -> Any:
    """A JSON object as it is, or the tensor that was encoded in it.

    >>> decode(encode(torch.zeros(0, 2))).shape
    torch.Size([0, 2])
    """
    if "base64" not in item:
        return item
    data = bytearray(base64.b64decode(item["base64"]))
    flat = torch.frombuffer(data, dtype=torch.float64) if data else torch.empty(0, dtype=torch.float64)
    return flat.view(item["shape"]).requires_grad_(item["graph"])


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
        source, place = "".join(cell["source"]) if cell["cell_type"] == "code" else "", f"cell {number}"
        if source.lstrip().startswith("%%"):
            source = source.lstrip().partition("\n")[2]
        try:
            body = ast.parse(TransformerManager().transform_cell(source)).body  # magics become expressions
        except SyntaxError as error:
            remarks.append(f"{place} was not read: it has a syntax error in line {error.lineno}")
            continue
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
        for statement in body:
            text = ast.unparse(statement)
            if text.startswith(("import curvlib", "from curvlib")) and "curvlib.exercises" not in text:
                remarks.append(f"{place} uses curvlib itself: {text}")
            try:
                if isinstance(statement, kinds):
                    exec(compile(ast.Module([statement], []), place, "exec"), names)  # noqa: S102 - what grading is for
            except BaseException as error:  # sys.exit(), too
                remarks.append(f"{place}, line {statement.lineno}: {type(error).__name__}: {str(error)[:200]}")
    return names, remarks


def main(seconds: str) -> None:
    """Serve calls until the grader closes the pipe, within limits on CPU, memory and the size of a file."""
    import resource  # here, because it is missing on Windows, where only reading and releasing work

    limits = {resource.RLIMIT_CPU: int(seconds), resource.RLIMIT_AS: 8 << 30, resource.RLIMIT_FSIZE: 10_000_000}
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    for descriptor in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    print(json.dumps("ready"), file=replies)
    try:
        notebook, kinds = pickle.load(calls)  # noqa: S301 - from the grader
        names, remarks = define(notebook, DEFINITIONS + (VALUES if kinds == "values" else ()))
    except (ValueError, LookupError, TypeError, RecursionError):
        names, remarks = {}, ["the file is no notebook: ask for it again"]
    functions = sorted(name for name, value in names.items() if callable(value))
    print(json.dumps({"functions": functions, "remarks": remarks}), file=replies)
    while calls.peek(1):
        name, arguments = pickle.load(calls)  # noqa: S301 - from the grader
        try:
            before = copy.deepcopy(arguments)
            result, changes = names[name](*arguments), [change(*pair) for pair in zip(before, arguments, strict=True)]
            reply = json.dumps({"result": result, "changes": changes}, default=encode)
        except BaseException as error:
            reply = json.dumps({"error": type(error).__name__, "message": describe(error, name)})
        print(reply, file=replies)


if __name__ == "__main__":
    main(*sys.argv[1:])
