"""Several processes of one run, in which a proof does something, joined as torchrun joins them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from forked import run_ranks

from repro.runtime import Runtime, world_of_this_process


def in_processes(
    size: int, first: Sequence[Callable[[], object]], function: Callable[..., Any], *arguments: Any, folder: Path
) -> list[Any]:
    """What `function(runtime, *arguments)` gives in each process, through JSON, once it has called all of `first`.

    Raises RuntimeError with what they printed when one of them fails, which is no verdict of a proof.
    """
    folder.mkdir(parents=True)
    codes = run_ranks([_one] * size, [*first], function, arguments, str(folder), output=folder / "log")
    if any(codes):
        logs = "\n".join(path.read_text() for path in sorted(folder.glob("log*")))
        raise RuntimeError(f"found the exit codes {codes}, expected 0:\n{logs}")
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(size)]


def _one(first: list[Callable[[], object]], function: Callable[..., Any], arguments: Any, folder: str) -> int:
    warnings.simplefilter("ignore")
    for patch in first:
        patch()
    with world_of_this_process() as world:
        found = function(Runtime(torch.device("cpu"), world=world), *arguments)
    (Path(folder) / f"found.{os.environ['RANK']}").write_text(json.dumps(found))
    return 0
