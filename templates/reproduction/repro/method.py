"""What a method tells the engine about itself, and how the engine finds it."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

import repro
from repro.config import RunConfig, matches
from repro.errors import BadInput
from repro.phases import Networks, Phase, Work
from repro.runtime import Runtime


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation measured: numbers by dotted name, and the tensors that figures are drawn from."""

    metrics: Mapping[str, float]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """One library call as a method makes it.

    `library` is the name of its distribution, whose version is reported; `shapes` says in words what it is
    called with. `call` makes inputs of the experiment's shapes, calls the library and returns nothing; it
    raises, by `assert` or by itself, when the answer is not the one that was constructed.
    """

    name: str
    library: str
    shapes: str
    call: Callable[[], None]


@dataclass(frozen=True)
class Method:
    """A method: its typed configuration, its phases in order, its evaluation, and what it adds to the report.

    config: the class of every experiment's configuration, or a class for each pattern of names; the first
    that matches counts.
    phases: (configuration, runtime) -> the phases, not yet prepared.
    evaluate: (configuration, finished networks by phase, seed, runtime) -> metrics; a claim of the spec names
    its metric by the same dotted name. One process calls it, also where several trained, without gradients: a
    metric that needs them enters torch.enable_grad().
    report_sections: (judgements, records, runs folder, report folder) -> Markdown; draws figures into the
    report folder. As "package.module:function" where that module needs more than a run has: the tools,
    matplotlib. Only a report imports it then.

    The rest is what the commands before a run go by, and may be left out:

    probes: (configuration, runtime) -> the library calls of an experiment, with its shapes (`repro probe`);
    or the name of such a function, as above.
    tiny: overrides that make an experiment a run of seconds, or such overrides for each pattern of names, of
    which the first that matches counts; one that matches nothing in an experiment is passed over there
    (`repro preflight`, which does two steps of each phase and sets phases.*.iterations to 2 before these
    overrides, and to twice what they are after them). What a method does every k steps it should do every 2
    at this size, or the kill between two of them is never tried.
    evaluation_work: (configuration, networks by phase, runtime) -> what the evaluation does on the device
    (`repro memory`). Only the networks are made of fake tensors when it is called; each `run` is called on
    fake tensors, without gradients.
    placeholder: in words, what of the method still stands in for the paper's ("the toy phases of the
    template"); empty when nothing does. As long as it is not, no run gets a verdict.
    """

    name: str
    config: type[RunConfig] | Mapping[str, type[RunConfig]]
    phases: Callable[[Any, Runtime], Sequence[Phase[Any]]]
    evaluate: Callable[[Any, Mapping[str, Networks], int, Runtime], Evaluation]
    report_sections: Callable[[Sequence[Any], Sequence[dict[str, Any]], Path, Path], str] | str
    probes: Callable[[Any, Runtime], Sequence[Probe]] | str = lambda config, runtime: ()
    tiny: Sequence[str] | Mapping[str, Sequence[str]] = ()
    evaluation_work: Callable[[Any, Mapping[str, Networks], Runtime], Sequence[Work]] = (
        lambda config, models, runtime: ()
    )
    placeholder: str = ""


@dataclass(frozen=True)
class Files:
    """A reproduction on disk: `root` holds spec.yaml, configs/ and reports/."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "spec.yaml"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def experiments(self) -> dict[str, Path]:
        """The configuration file of each experiment, by the experiment's name."""
        return {path.stem: path for path in sorted((self.root / "configs").glob("*.yaml"))}


@dataclass(frozen=True)
class Project(Files):
    """A reproduction whose method is there."""

    method: Method

    def config_class(self, experiment: str) -> type[RunConfig]:
        """The class of an experiment's configuration. Raises BadInput when the method names none."""
        classes = self.method.config
        if not isinstance(classes, Mapping):
            return classes
        for pattern, one in classes.items():
            if fnmatchcase(experiment, pattern):
                return one
        expected = (
            f"expected a name like {', '.join(classes)}, for which {self.method.name} has a configuration"
        )
        raise BadInput(f"{self.root / 'configs'}: found experiment '{experiment}', {expected}")

    def tiny(self, experiment: str, config: RunConfig) -> list[str]:
        """The method's overrides for a run of seconds, those that match a field of the configuration."""
        chosen = self.method.tiny
        if isinstance(chosen, Mapping):
            chosen = next((one for pattern, one in chosen.items() if fnmatchcase(experiment, pattern)), ())
        return [override for override in chosen if matches(config, override)]


class NoMethod(BadInput):
    """The files of a project are there, its method is not: `found` says what the import met instead."""

    def __init__(self, pyproject: Path, files: Files, found: str):
        super().__init__(f"{pyproject}: tool.repro.method: {found}")
        self.files, self.found = files, found


def find_project(start: Path) -> Project:
    """The project at or above `start`: the nearest pyproject.toml with a [tool.repro] table.

    `method = "package.module:OBJECT"` names the Method; `root` (default ".") is where configs/ lie, `engine`
    (default: `root`) the folder in which repro/ lies. Raises BadInput; where only the method cannot be
    imported yet, NoMethod.
    """
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            try:
                tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
                raise BadInput(f"{path}: no TOML: {error}") from None
            table = tools.get("repro") if isinstance(tools, dict) else None
            if table is not None and not isinstance(table, dict):
                raise BadInput(f"{path}: tool.repro: found {table!r}, expected a table")
            if table is not None:
                return _project(path, table)
    raise BadInput(f"{start}: found no pyproject.toml with a [tool.repro] table here or above, expected one")


def _project(path: Path, table: dict[str, Any]) -> Project:
    root = path.parent / str(table.get("root", "."))
    if not root.is_dir():
        raise BadInput(f"{path}: tool.repro.root: found no folder {root}, expected the one of configs/")
    engine = path.parent / str(table["engine"]) if "engine" in table else root
    top = engine / "repro" / "__init__.py"
    if top.exists() and not top.samefile(repro.__file__):
        found = f"found the engine of {Path(repro.__file__).parent} running, expected {top.parent}"
        raise BadInput(f"{path}: {found}; use python -m repro in {engine}")
    module_name, colon, attribute = str(table.get("method", "")).partition(":")
    if not colon:
        raise NoMethod(path, Files(root), f"found {table.get('method')!r}, expected 'package.module:OBJECT'")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # a scaffold runs before it is installed
    try:
        with redirect_stdout(sys.stderr):  # what a library prints when it is imported is no data
            method = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError) as error:
        if isinstance(error, TypeError) and not module_name.startswith("."):
            raise  # of the method's own code
        raise NoMethod(path, Files(root), str(error)) from None
    place = f"{path}: tool.repro.method"
    if not isinstance(method, Method):
        raise BadInput(f"{place}: found {type(method).__name__}, expected a repro.method.Method")
    for one in method.config.values() if isinstance(method.config, Mapping) else [method.config]:
        if not issubclass(one, RunConfig):
            expected = "expected a subclass of repro.config.RunConfig"
            raise BadInput(f"{place}: found the configuration {one.__name__}, {expected}")
    return Project(root, method)
