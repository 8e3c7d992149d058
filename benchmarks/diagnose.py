"""How often `repro diagnose` is silent on sound phases, and how often it names a planted bug first.

    python -m benchmarks.diagnose [--seeds N] [--jobs N] [--only PATTERN] [--steps N]

Every phase of four experiments as it is, and with each bug that it can have, over seeds 0 to N - 1 (half as many for the two UNets). Pools are cut to 10 minibatches (2 for
the field of 100 steps, 8 for images); everything else is as shipped. A false alarm is any finding on a sound phase; a bug counts as found when the first
finding is of its kind, and as seen when a later one is. Results go to benchmarks/results/diagnose.json, rows that are there
already are kept, so that a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from repro.config import parse_yaml, validate
from repro.method import find_project
from repro.phases import Networks, Phase
from repro.run import git_commit, plan
from repro.runtime import Runtime, machine
from repro_tools.diagnose.diagnostics import measure
from repro_tools.diagnose.explanation import Place
from repro_tools.diagnose.hypotheses import findings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/diagnose.json"
PAGE = ROOT / "refs/debugging.md"
MARKS = ("<!-- measured:diagnose -->", "<!-- /measured:diagnose -->")
CPU = torch.device("cpu")
POOLS = {
    "2d-moons": ["phases.*.pool.batches=10", "phases.velocity_field_100.pool.batches=2"],
    "digits": ["phases.*.pool.batches=8"],
}


# --- the sound phases ----------------------------------------------------------------------------------------------


def phases_of(experiment: str) -> list[Phase]:
    """Fresh phases of `toy` (tests/toy_method.py), `line` (the kit's page), or an experiment of the reference implementation."""
    if experiment == "toy":
        sys.path.insert(0, str(ROOT / "tests"))
        import toy_method
        import toy_project

        config = validate(toy_method.Config, toy_project.CONFIG, "toy")
        return toy_method.METHOD.phases(config, Runtime(CPU))
    if experiment == "line":
        method, config = _line()
        return method.phases(config, Runtime(CPU))
    project = find_project(ROOT)
    return list(project.method.phases(plan(project, experiment, POOLS[experiment]).config, Runtime(CPU)))


@cache
def _line():
    """The project on the kit's page, from its text."""
    page = (ROOT / "templates/README.md").read_text()

    def block(name: str) -> str:
        return re.search(rf"`{re.escape(name)}`.*?```\w+\n(.*?)```", page, re.DOTALL)[1]

    module = ModuleType("line_of_the_kits_page")
    sys.modules[module.__name__] = module  # pydantic looks names of types up there
    exec(compile(block("method.py"), "method.py", "exec"), module.__dict__)
    return module.METHOD, validate(module.Config, parse_yaml(block("configs/line.yaml"), "line"), "line")


SOUND = {
    "toy": ["line", "constant"],
    "line": ["slope", "offset"],
    "2d-moons": ["velocity_field", "straight_flow", "time_predictor", "velocity_field_100", "ot_cfm"],
    "digits": ["velocity_field", "straight_flow", "time_predictor", "feature_classifier"],
}


# --- the bugs ------------------------------------------------------------------------------------------------------


def altered(phase: Phase, **methods: Callable) -> Phase:
    """The phase with methods replaced; each is called with the sound phase first."""
    kind = type(phase)

    def bound(function: Callable) -> Callable:
        return lambda self, *arguments: function(super(made, self), *arguments)

    made = type(kind.__name__, (kind,), {name: bound(function) for name, function in methods.items()})
    changed = copy.copy(phase)
    changed.__class__ = made
    return changed


def _rate(factor: float) -> Callable[[Phase], Phase]:
    def make_optimiser(sound, model):
        optimiser = sound.make_optimiser(model)
        for group in optimiser.param_groups:
            group["lr"] *= factor
        return optimiser

    return lambda phase: altered(phase, make_optimiser=make_optimiser)


def _batch(change: Callable[[dict], Mapping]) -> Callable[[Phase], Phase]:
    """The minibatch changed. `change` gets it as a dict that it may alter."""
    return lambda phase: altered(
        phase, minibatch=lambda sound, step, generator: change(dict(sound.minibatch(step, generator)))
    )


def _model(change: Callable[[nn.Module], nn.Module]) -> Callable[[Phase], Phase]:
    return lambda phase: altered(phase, make_model=lambda sound: change(sound.make_model()))


def _loss(change: Callable) -> Callable[[Phase], Phase]:
    """The loss replaced by `change(sound phase, model, batch)`."""
    return lambda phase: altered(phase, loss=change)


def _scaled(name: str):
    return _batch(lambda batch: batch | {name: 255 * batch[name]})


def _shuffled(name: str):
    return _batch(lambda batch: batch | {name: batch[name][torch.randperm(len(batch[name]))]})


def _negative(name: str):
    return _batch(lambda batch: batch | {name: -batch[name]})


def _constant(name: str):
    return _batch(lambda batch: batch | {name: torch.full_like(batch[name], 1)})


def _frozen(model: nn.Module) -> nn.Module:
    _weighted(model)[0].requires_grad_(False)
    return model


def _detached(model: nn.Module) -> nn.Module:
    _weighted(model)[0].register_forward_hook(lambda module, inputs, output: output.detach())
    return model


def _weighted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _without_activations(model: nn.Module) -> nn.Module:
    model.layers = nn.Sequential(*(layer for layer in model.layers if isinstance(layer, nn.Linear)))
    return model


def _dead(model: nn.Module) -> nn.Module:
    nn.init.constant_(_weighted(model)[1].bias, -10.0)
    return model


def _saturated(model: nn.Module) -> nn.Module:
    nn.init.constant_(_weighted(model)[-1].bias, 30.0)
    return model


class Deep(nn.Module):
    """A chain of equal layers between two others, for a point and its time."""

    def __init__(self, layers: int, activation: Callable, gain: float = 1.0, residual: bool = False):
        super().__init__()
        self.activation, self.residual = activation, residual
        self.first, self.last = nn.Linear(3, 64), nn.Linear(64, 2)
        self.chain = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))
        for layer in self.chain:
            nn.init.normal_(layer.weight, std=gain / 8)

    def forward(self, x, t):
        x = self.first(torch.cat([x, t[:, None]], dim=1))
        for layer in self.chain:
            change = self.activation(layer(x))
            x = x + change / len(self.chain) if self.residual else change
        return self.last(x)


def _deep(layers: int, activation: Callable, gain: float) -> Callable[[Phase], Phase]:
    return lambda phase: altered(phase, make_model=lambda sound: Deep(layers, activation, gain))


def _groups_of_one_channel(phase: Phase) -> Phase:
    """As in the paper's MNIST network: the group norm takes out what a block adds for the time, which is one number a channel."""
    changed = copy.copy(phase)
    changed.config = phase.config.model_copy(
        update={"network": phase.config.network.model_copy(update={"groups": phase.config.network.channels})}
    )
    return changed


class _WithoutTime(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x, 0 * t)


def _time_not_passed_on(sound, model, batch):
    return sound.loss(lambda x, t: model(x, torch.zeros_like(t)), batch)


def _summed(sound, model, batch):
    return len(next(iter(batch.values()))) * sound.loss(model, batch)


def _late_times_are_nan(sound, model, batch):
    return sound.loss(model, batch) + torch.where(batch["t"] > 0.95, torch.nan, 0.0).mean()


def _predictor_broadcast(sound, model, batch):
    from nsgf.phases import interpolate

    x_t = interpolate(batch["x_0"], batch["y"], batch["t"])
    return (model(x_t).float() - batch["t"][:, None]).square().mean()


def _line_broadcast(sound, model, batch):
    return (model(batch["x"]) - batch["y"].squeeze(1)).square().mean()


FIELD, FLOW, PREDICTOR = ("2d-moons", "velocity_field"), ("2d-moons", "straight_flow"), ("2d-moons", "time_predictor")
IMAGE_PREDICTOR, CLASSIFIER = ("digits", "time_predictor"), ("digits", "feature_classifier")
UNETS = {("digits", "velocity_field"), ("digits", "straight_flow")}
"""By far the slowest: they come last."""
LINE, SLOPE, CONSTANT = ("toy", "line"), ("line", "slope"), ("toy", "constant")

BUGS: dict[str, tuple[str, dict[tuple[str, str], Callable[[Phase], Phase]]]] = {
    "loss broadcasts (n,) - (n, 1)": (
        "broadcast",
        {LINE: _loss(_line_broadcast), PREDICTOR: _loss(_predictor_broadcast), IMAGE_PREDICTOR: _loss(_predictor_broadcast)},
    ),
    "learning rate x 100": ("rate-too-large", dict.fromkeys((CONSTANT, FIELD, FLOW, PREDICTOR, IMAGE_PREDICTOR), _rate(100))),
    "learning rate x 100, harmless": ("rate-too-large", dict.fromkeys((LINE, SLOPE, CLASSIFIER), _rate(100))),
    "learning rate / 100": ("rate-too-small", dict.fromkeys((LINE, SLOPE, FIELD, FLOW, PREDICTOR, IMAGE_PREDICTOR, CLASSIFIER), _rate(0.01))),
    "inputs x 255": ("input-scale", {LINE: _scaled("x"), FIELD: _scaled("x_t"), CLASSIFIER: _scaled("x")}),
    "targets shuffled": ("no-relation", {LINE: _shuffled("y"), SLOPE: _shuffled("y"), FIELD: _shuffled("v_t"), CLASSIFIER: _shuffled("label")}),
    "targets constant": ("constant-column", {LINE: _constant("y"), FIELD: _constant("v_t"), CLASSIFIER: _constant("label")}),
    "first layer frozen": ("frozen", dict.fromkeys((LINE, FIELD, PREDICTOR, IMAGE_PREDICTOR), _model(_frozen))),
    "first layer detached": ("frozen", dict.fromkeys((LINE, FIELD, PREDICTOR, IMAGE_PREDICTOR), _model(_detached))),
    "activations missing": ("affine", dict.fromkeys((FIELD, FLOW), _model(_without_activations))),
    "time not passed on": ("input-ignored", dict.fromkeys((FIELD, FLOW), _loss(_time_not_passed_on))),
    "time ignored inside": ("input-ignored", dict.fromkeys((FIELD, FLOW), _model(_WithoutTime))),
    "sigmoid saturated": ("dead-units", dict.fromkeys((PREDICTOR, IMAGE_PREDICTOR), _model(_saturated))),
    "ten layers of sigmoids": ("gradient-spread", dict.fromkeys((FIELD, FLOW), _deep(10, torch.sigmoid, 1.0))),
    "40 layers, weights x 5": ("gradient-spread", dict.fromkeys((FIELD, FLOW), _deep(40, torch.tanh, 5.0))),
    "time normalised away": ("gradient-spread", dict.fromkeys(sorted(UNETS), _groups_of_one_channel)),
    "ReLUs dead": ("dead-units", dict.fromkeys((IMAGE_PREDICTOR, CLASSIFIER), _model(_dead))),
    "loss summed": ("summed", dict.fromkeys((LINE, FIELD, CLASSIFIER), _loss(_summed))),
    "NaN above t = 0.95": ("not-finite", dict.fromkeys((FLOW, PREDICTOR, IMAGE_PREDICTOR), _loss(_late_times_are_nan))),
    "columns of two lengths": ("column-lengths", dict.fromkeys((FLOW, PREDICTOR), _batch(lambda batch: batch | {"t": batch["t"][::2]}))),
    "sign of the target wrong": ("", {LINE: _negative("y"), FIELD: _negative("v_t")}),
}  # fmt: skip
"""By name: the kind of finding that must come first, and how to plant the bug in which phases. No kind: nothing can see it."""


# --- the rates -----------------------------------------------------------------------------------------------------


def kinds(experiment: str, name: str, bug: str | None, seed: int, steps: int) -> list[str]:
    """The findings on one phase with one bug, in order."""
    phases = phases_of(experiment)
    phase = next(one for one in phases if one.name == name)
    earlier: dict[str, Networks] = {}
    if (experiment, name) == ("line", "offset"):
        slope = phases[0].make_model()
        nn.init.constant_(slope.weight, 2.0)
        earlier = {"slope": Networks({"model": slope}).eval().requires_grad_(False)}
    if bug is not None:
        phase = BUGS[bug][1][experiment, name](phase)
    with tempfile.TemporaryDirectory() as scratch:
        phase.prepare(seed, Path(scratch), earlier)
        measured, _ = measure(phase, seed, CPU, steps)
    return [finding.kind for finding in findings(measured, Place(experiment, name, seed, steps))]


def cases() -> list[tuple[str, str, str | None]]:
    sound = [(experiment, name, None) for experiment, names in SOUND.items() for name in names]
    return sound + [(*place, bug) for bug, (_, places) in BUGS.items() for place in places]


def _one(task: tuple) -> tuple[str, list[str], float]:
    torch.set_num_threads(1)
    experiment, name, bug, seed, steps = task
    began = time.perf_counter()
    found = kinds(experiment, name, bug, seed, steps)
    return _key(experiment, name, bug), found, time.perf_counter() - began


def _urgency(task: tuple) -> tuple:
    """Sound phases first, then each bug in its first phase; of the rest one seed after the other, and the slowest last."""
    experiment, name, bug, seed, _ = task
    first = bug is None or next(iter(BUGS[bug][1])) == (experiment, name)
    slow = (experiment, name) in UNETS
    return (slow, not first, 0 if first else seed)


def _key(experiment: str, name: str, bug: str | None) -> str:
    return f"{experiment} {name}: {bug or 'sound'}"


def rates(rows: Mapping[str, Mapping[str, list[str]]]) -> dict[str, dict]:
    """By bug, over all its phases and seeds: how many diagnoses, how often found first, how often at all; `sound`: false alarms."""
    table: dict[str, dict] = {}
    for key, by_seed in rows.items():
        bug = key.split(": ", 1)[1]
        expected = None if bug == "sound" else BUGS[bug][0]
        row = table.setdefault(bug, {"phases": 0, "diagnoses": 0, "first": 0, "at_all": 0, "any": 0})
        row["phases"] += 1
        row["diagnoses"] += len(by_seed)
        row["first"] += sum(found[:1] == [expected] for found in by_seed.values())
        row["at_all"] += sum(expected in found for found in by_seed.values())
        row["any"] += sum(bool(found) for found in by_seed.values())
    return table


def page_table(results: Mapping) -> str:
    """The rates as they stand in refs/debugging.md."""
    lines = ["| planted | phases | named first | any finding |", "|---|---|---|---|"]
    for bug, row in results["rates"].items():
        named = "" if bug == "sound" else f"{row['first']} of {row['diagnoses']}"
        lines.append(
            f"| {'nothing' if bug == 'sound' else bug} | {row['phases']} | {named} | {row['any']} of {row['diagnoses']} |"
        )
    return "\n".join(lines)


def write_page(results: Mapping) -> None:
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{page_table(results)}\n\n{MARKS[1]}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default="*", help="pattern of 'EXPERIMENT PHASE: BUG'")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--page", action="store_true", help="write the table of refs/debugging.md from the results, measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.page:
        write_page(json.loads(options.results.read_text()))
        return
    data = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}, "seconds": {}}
    if data.get("steps", options.steps) != options.steps:
        raise SystemExit(f"{options.results}: found rates of {data['steps']} steps, expected {options.steps}")
    rows, seconds = data["rows"], data["seconds"]
    tasks = [
        (*case, seed, options.steps)
        for case in cases()
        for seed in range(options.seeds // 2 if case[:2] in UNETS else options.seeds)  # a UNet takes minutes a seed
        if fnmatchcase(_key(*case), options.only) and str(seed) not in rows.get(_key(*case), {})
    ]
    tasks.sort(key=_urgency)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        saved = time.perf_counter()
        waiting = {pool.submit(_one, task): task for task in tasks}
        for number, done in enumerate(as_completed(waiting), start=1):
            key, found, took = done.result()
            rows.setdefault(key, {})[str(waiting[done][3])] = found
            seconds[key] = round(max(took, seconds.get(key, 0.0)), 1)
            if time.perf_counter() - saved > 30 or number == len(tasks):
                _save(options, rows, seconds)
                saved = time.perf_counter()
                print(f"{number} of {len(tasks)}", file=sys.stderr)
    _save(options, rows, seconds)
    for bug, row in rates(rows).items():
        print(
            f"{bug:32} {row['diagnoses']:4} diagnoses, first {row['first']:4}, at all {row['at_all']:4}, any finding {row['any']:4}"
        )


def _save(options: argparse.Namespace, rows: dict, seconds: dict) -> None:
    ordered = {_key(*case): rows[_key(*case)] for case in cases() if _key(*case) in rows}
    by_seed = {key: dict(sorted(row.items(), key=lambda item: int(item[0]))) for key, row in ordered.items()}
    data = {
        "commit": git_commit(ROOT), "machine": machine(CPU), "torch": torch.__version__, "steps": options.steps, "seeds": options.seeds,
        "rates": rates(by_seed), "slowest_seconds": {key: seconds[key] for key in by_seed}, "rows": by_seed, "seconds": seconds,
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    partial = options.results.with_suffix(".partial")
    partial.write_text(_compact(data))
    os.replace(partial, options.results)


def _compact(data: dict) -> str:
    """One line for each phase and bug."""
    data = {key: value for key, value in data.items() if key != "seconds"} | {"seconds": data["seconds"]}
    lines = []
    for key, value in data.items():
        if isinstance(value, dict) and key in ("rates", "rows"):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
