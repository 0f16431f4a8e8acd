"""A data set's `map` in several processes, in which the error of one comes back as a file.

`datasets` ends its processes by `Pool.terminate` where one of them raises, which can wait for ever. So a process that
fails writes its error down and ends its work as if there were no more rows; the others find the file and skip theirs.
"""

import os
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import datasets

Columns = dict[str, list]


def map_rows(
    rows: datasets.Dataset, workers: int, function: Callable[..., Columns], **arguments: Any
) -> datasets.Dataset:
    """Return `rows.map(function, ...)` in so many processes.

    Args:
        arguments: the others of `datasets.Dataset.map`; `batched`, `features` and `fn_kwargs` are among them.

    Raises:
        Exception: the first one that `function` raised in any process.
    """
    if workers <= 1:
        return rows.map(function, **arguments)
    with tempfile.TemporaryDirectory(prefix="tokenizing_") as folder:
        failure = os.path.join(folder, "error")
        arguments["fn_kwargs"] = {"function": function, "failure": failure, "named": arguments["fn_kwargs"]}
        arguments["fn_kwargs"]["nothing"] = {name: [] for name in arguments["features"]}
        table = rows.map(_or_write_down, num_proc=workers, **arguments)
        if os.path.exists(failure):
            with open(failure, "rb") as file:
                raise pickle.load(file)
    return table


def _or_write_down(
    columns: Columns, function: Callable[..., Columns], failure: str, named: dict[str, Any], nothing: Columns
) -> Columns:
    """Return what `function` does, or no rows once a process has failed; write down the error where it is this one."""
    if os.path.exists(failure):
        return nothing
    try:
        return function(columns, **named)
    except Exception as err:
        own = f"{failure}.{os.getpid()}"
        with open(own, "wb") as file:
            file.write(_pickled(err))
        os.replace(own, failure)
        return nothing


def _pickled(err: Exception) -> bytes:
    """Return the error as bytes; its words alone where it can't be read back."""
    try:
        content = pickle.dumps(err)
        pickle.loads(content)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(err).__name__}: {err}"))
    return content
