"""The cells of a session's notebook. What they do is in `repro_tools.notebook.session`, whose text the notebook carries: where it runs there
are only the engine and the method. What they say is what `Session` was given."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import repro
from repro.method import Project
from repro.run import Plan
from repro_tools.memory.measured import LEAST_STEPS
from repro_tools.memory.words import count, in_hours, in_words
from repro_tools.notebook import carry
from repro_tools.notebook import session as session_module
from repro_tools.notebook.platforms import Platform
from repro_tools.notebook.requirements import declared, imports_beyond_the_kit, requirements
from repro_tools.notebook.session import GRACE_S
from repro_tools.notebook.sizing import EVALUATION, Part, Timing, span

RESERVE_S = 1200
"""Of a session, for the cells before the run and for packing after it, beside GRACE_S (assumed)."""

PACK_EVERY_S = 1800
MOST_ROWS = 24
"""Of the table of sessions, before those of one phase become one row."""


@dataclass(frozen=True)
class Session:
    """All that the cells of a notebook say."""

    plan: Plan
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    micro_batches: Mapping[str, int]
    platform: Platform
    hours: float
    device: str
    source: str
    commit: str | None
    data_cell: str | None
    timing: Mapping[str, Timing]
    steps: Mapping[str, int]
    parts: tuple[Part, ...]
    unplanned: str | None
    storage: Mapping[str, int]

    @property
    def archive(self) -> str:
        return f"{self.plan.experiment}-runs.tar"

    @property
    def weeks(self) -> int | None:
        """Weeks of the platform's quota that the plan takes; None without a quota or a plan."""
        if not self.parts or self.platform.weekly_hours is None:
            return None
        return math.ceil(sum(part.seconds for part in self.parts) / (self.platform.weekly_hours * 3600))

    @property
    def run_s(self) -> float:
        """Seconds of a session that are for the runs."""
        return self.hours * 3600 - min(RESERVE_S + GRACE_S, self.hours * 3600 / 10)


def notebook(session: Session) -> Any:
    """The notebook, without outputs."""
    from nbformat import v4, validate

    made = []
    for name, kind, text in cells(session):
        make = v4.new_markdown_cell if kind == "markdown" else v4.new_code_cell
        made.append(make(text.strip(), id=name))  # a name of its own, or every run would give other bytes
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        **session.platform.metadata,
    }
    found = v4.new_notebook(cells=made, metadata=metadata)
    validate(found)
    return found


def cells(session: Session) -> list[tuple[str, str, str]]:
    """(name, kind, text) of every cell."""
    found = [
        ("about", "markdown", _about(session)),
        ("before", "markdown", _before(session)),
        ("settings", "code", _settings(session)),
        ("code", "code", _code(session)),
        ("helpers", "code", _helpers()),
        ("environment", "code", _environment(session)),
        ("data", "code", _data(session)),
        ("restore", "code", "session.restore(ARCHIVE.name, INPUTS, RUNS)"),
        ("run-note", "markdown", _run_note()),
        ("run", "code", _run(session)),
        ("progress", "code", "session.show_progress(RUNS)"),
        ("pack", "code", "session.pack(RUNS, ARCHIVE)"),
        ("results", "code", _results(session)),
    ]
    if session.platform.mount:
        found.insert(2, ("mount", "code", session.platform.mount))
    return found


def taken_names(session: Session) -> list[str]:
    """The names of the notebook's own, all in capitals, to which the data cell gives another meaning."""
    if session.data_cell is None:
        return []
    others = [text for name, kind, text in cells(session) if kind == "code" and name != "data"]
    return sorted(name for name in _bound(session.data_cell) & set().union(*map(_bound, others)) if name.isupper())


def _bound(code: str) -> set[str]:
    """The names that a cell binds outside of its functions; none where it is not plain Python."""
    found: set[str] = set()
    try:
        rest: list[ast.AST] = [ast.parse(code)]
    except SyntaxError:
        return found
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            rest += ast.iter_child_nodes(node)
    return found


def _about(session: Session) -> str:
    name, platform = session.plan.experiment, session.platform
    lines = [
        f"# {name} on {platform.title}",
        f"Trains and judges `{name}`, seed {_listed(session.seeds)}, over as many sessions as it takes. **Every session: do what stands "
        "under *Before*, then run all cells.** Nothing in this notebook changes from one session to the next.",
    ]
    if session.overrides:
        lines.append(
            f"Changed: {', '.join(f'`{one}`' for one in session.overrides)}. Such runs are shown and give no verdict."
        )
    if session.micro_batches:
        lines.append(
            f"Minibatches are divided, `--micro-batches {divided(session.micro_batches)}`: the same result, in less memory and more time. "
            "A run tries that before it starts, and refuses what would give another one."
        )
    lines.append(f"## What to expect\n\n{_plan_table(session)}")
    lines.append(_timing_table(session))
    if session.storage:
        listed = ", ".join(f"{one} {size / 2**30:.1f} GiB" for one, size in session.storage.items())
        lines.append(f"On the disk: {listed}.")
    facts = "\n".join(f"| {one.what} | {one.value} | {one.source} | {one.date} |" for one in platform.facts)
    lines.append(
        f"What was reported of {platform.title}; no promise:\n\n| limit | value | source | date |\n|---|---|---|---|\n{facts}"
    )
    return "\n\n".join(lines)


def divided(micro_batches: Mapping[str, int]) -> str:
    """As `--micro-batches` takes them."""
    return " ".join(f"{phase}={number}" for phase, number in micro_batches.items())


def _plan_table(session: Session) -> str:
    if session.unplanned:
        changed = "".join(f" --set {shlex.quote(one)}" for one in session.overrides)
        if session.micro_batches:
            changed += f" --micro-batches {' '.join(map(shlex.quote, divided(session.micro_batches).split()))}"
        again = (
            f"repro notebook {session.plan.experiment} --platform {session.platform.name}{changed} --runs runs/timing"
        )
        measure = (
            f"python -m repro run {session.plan.experiment}{changed} --train-iters {LEAST_STEPS} --runs runs/timing"
        )
        return (
            f"How many sessions: **unknown** ({session.unplanned}). A hundred steps on the platform tell: `{measure} --device cuda`. "
            f"With that folder beside the project, `{again}` writes this notebook anew."
        )
    total, (low, high) = sum(part.seconds for part in session.parts), span(session.parts, session.timing)
    about = f"{in_words(total)} of runs" + (
        "" if low == high else f" ({in_words(low)} to {in_words(high)} if the estimates err)"
    )
    text = f"{count(session.parts[-1].session, 'session')} of {in_hours(session.hours)}, {about}"
    if session.weeks and session.platform.weekly_hours is not None:
        text += f", {count(session.weeks, 'week')} of {in_hours(session.platform.weekly_hours)}"
    rows = "\n".join(_rows(session.parts))
    return f"{text}. A plan, not a promise.\n\n| session | seed | phase | steps | time |\n|---|---|---|---|---|\n{rows}"


def _rows(parts: Sequence[Part]) -> list[str]:
    """A row for each part; where there are many, one for each phase, over several sessions."""
    found = []
    for _, group in groupby(
        parts, key=lambda part: (part.seed, part.phase, part.session if len(parts) <= MOST_ROWS else 0)
    ):
        own = list(group)
        first, last = own[0], own[-1]
        sessions = f"{first.session}" if first.session == last.session else f"{first.session} to {last.session}"
        steps = "" if first.phase == EVALUATION else f"{first.first:,} to {last.last:,}"
        seconds = sum(part.seconds for part in own)
        found.append(
            f"| {sessions} | {first.seed} | {first.phase} | {steps} | {in_words(seconds) if seconds else '?'} |"
        )
    return found


def _timing_table(session: Session) -> str:
    rows = []
    for name, one in session.timing.items():
        step = "" if name == EVALUATION else "?" if one.step_s is None else in_words(one.step_s)
        prepare = in_words(one.prepare_s) if one.prepare_s else ""
        rows.append(f"| {name} | {step} | {prepare} | {one.origin} |")
    return "| | a step | beside the steps, in each session | origin |\n|---|---|---|---|\n" + "\n".join(rows)


def _before(session: Session) -> str:
    name = session.plan.experiment
    lines = [line.format(archive=session.archive) for line in session.platform.before]
    if "://" not in session.source:
        upload = (
            "as a data set and add it as input"
            if session.platform.name == "kaggle"
            else "to the folder `repro` of your Drive"
        )
        lines.insert(
            1,
            f"Once: `git archive --format=zip --output {session.source} HEAD` in the project; upload `{session.source}` {upload}.",
        )
    lines.insert(
        0,
        f"Once, on any machine, without a GPU: `repro preflight {name}` and `repro memory {name} --on {session.platform.device}`. Where a "
        "phase does not fit, write this notebook anew with the `--micro-batches` that the latter names: the same result. Its smaller minibatch "
        "is a deviation.",
    )
    project = session.plan.project
    if declared(_pyproject(project)) is None and (found := imports_beyond_the_kit(project_folder(project))):
        lines.append(
            f"Once: the project imports {', '.join(f'`{one}`' for one in found)}, and its pyproject.toml declares no `dependencies`: "
            "declare there what the platform lacks, and write this notebook anew. The cell below installs what the engine needs only."
        )
    return "## Before\n\n" + "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def _settings(session: Session) -> str:
    platform = session.platform
    inputs = ", ".join(f"Path({str(path)!r})" for path in platform.inputs)
    return f"""
import sys
import time
from pathlib import Path

BEGAN = time.time()
EXPERIMENT = {session.plan.experiment!r}
WORK = Path({str(platform.work)!r})  # gone after the session
OUTPUT = Path({str(platform.output)!r})  # kept
INPUTS = [{inputs}]
CODE, RUNS, DATA = WORK / "code", WORK / "runs", WORK / "data"
ARCHIVE = OUTPUT / {session.archive!r}
WORK.mkdir(parents=True, exist_ok=True)
"""


def _code(session: Session) -> str:
    """Brings the project, and with it the engine: before it is there, there is only Python."""
    paths = ", ".join("CODE" if path == "." else f"CODE / {path!r}" for path in _kit(session.plan.project))
    return f"""
{_clone(session) if "://" in session.source else _unpack(session)}
PATHS = [{paths}]
sys.path[:0] = [str(path) for path in PATHS]
"""


def _helpers() -> str:
    """Writes the modules that the other cells call, as they are now."""
    texts = "\n".join(
        f"HELPERS.joinpath({one.__name__.rpartition('.')[2] + '.py'!r}).write_text(r'''{inspect.getsource(one)}''', encoding=\"utf-8\")"
        for one in (carry, session_module)
    )
    return f"""
# What the cells below call, so that neither the tools nor anything else is installed for it. Nothing here is to be changed.
HELPERS = WORK / "helpers" / "repro_tools" / "notebook"
HELPERS.mkdir(parents=True, exist_ok=True)
for package in (HELPERS.parent, HELPERS):
    package.joinpath("__init__.py").touch()
{texts}
sys.path.insert(0, str(HELPERS.parents[1]))
from repro_tools.notebook import session
"""


def _clone(session: Session) -> str:
    commit = (
        ""
        if session.commit is None
        else f'    subprocess.run(["git", "checkout", "--quiet", {session.commit!r}], cwd=CODE, check=True)\n'
    )
    return f"""import subprocess

if not CODE.exists():
    subprocess.run(["git", "clone", "--quiet", {session.source!r}, str(CODE)], check=True)
{commit}print(subprocess.run(["git", "log", "-1", "--format=commit %H of %cs"], cwd=CODE, check=True, capture_output=True, text=True).stdout)
"""


def _unpack(session: Session) -> str:
    return f"""import shutil


def find(name):  # a few folders deep in what is attached
    return sorted(path for place in INPUTS for depth in range(5) for path in place.glob("*/" * depth + name))


if not CODE.exists():
    packed = find({session.source!r})
    unpacked = [path for path in find("pyproject.toml") if "[tool.repro]" in path.read_text()]  # the platform may have done it
    if not packed and not unpacked:
        raise SystemExit("found no " + {session.source!r} + ": upload it and attach it as the text above says")
    shutil.unpack_archive(packed[0], CODE) if packed else shutil.copytree(unpacked[0].parent, CODE)
CODE = next(path.parent for depth in range(2) for path in CODE.glob("*/" * depth + "pyproject.toml"))
"""


def _environment(session: Session) -> str:
    wanted = json.dumps(requirements(_pyproject(session.plan.project)), indent=4)
    return f"session.show_machine(WORK)\nsession.install_missing({wanted})"


def _data(session: Session) -> str:
    text = "DATA.mkdir(exist_ok=True)\n"
    if session.data_cell is None:
        return (
            text
            + "# Copy or link the data sets that the experiment reads into DATA here; experiments that draw their data need none.\n"
        )
    return text + session.data_cell


def _run_note() -> str:
    return (
        "## The run\n\nThe same command in every session: it starts what was never started, goes on with what was, and skips what is "
        "finished. `timeout` asks it to end before the session does; the phase then finishes its step and saves. What is saved so far is "
        f"packed every {PACK_EVERY_S // 60} minutes. To stop by hand, interrupt the cell: the state is saved as well."
    )


def _run(session: Session) -> str:
    words = [
        "sys.executable",
        *map(repr, ["-m", "repro", "run", session.plan.experiment, "--seeds", *map(str, session.seeds)]),
    ]
    words += [repr(f"--set={one}") for one in session.overrides]
    if session.micro_batches:
        words += map(repr, ["--micro-batches", *divided(session.micro_batches).split()])
    words += ["'--resume'", "'--device'", repr(session.device), "'--data-root'", "DATA", "'--runs'", "RUNS"]
    return f"""
seconds = session.seconds_left(BEGAN, {session.hours!r}, {round(session.hours * 3600 - session.run_s)})
command = ["timeout", "--signal=TERM", "--kill-after={GRACE_S}", str(seconds)]
command += [{", ".join(words)}]
state = session.run(command, CODE, RUNS, ARCHIVE, paths=PATHS, every_s={PACK_EVERY_S})
"""


def _results(session: Session) -> str:
    return f"""
if state == session.FINISHED:
    session.show_results(RUNS, ARCHIVE)
else:
    print(state, "- next:", {session.platform.next_session!r})
"""


def project_folder(project: Project) -> Path:
    """The folder of pyproject.toml, which may lie above the project's root."""
    for folder in (project.root, *project.root.parents):
        path = folder / "pyproject.toml"
        if path.is_file() and "repro" in tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}):
            return folder.resolve()
    return project.root.resolve()


def _pyproject(project: Project) -> dict[str, Any]:
    path = project_folder(project) / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _kit(project: Project) -> list[str]:
    """Where Python finds the engine and the method, from the folder of pyproject.toml: usually there itself."""
    root = project_folder(project)
    kit = Path(repro.__file__).resolve().parents[1]
    found = [kit, project.root.resolve()]
    inside = [os.path.relpath(path, root) for path in found if path.is_relative_to(root)]
    return list(dict.fromkeys(inside)) or ["."]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
