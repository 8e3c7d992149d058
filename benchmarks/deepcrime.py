"""Which of DeepCrime's mutation operators the commands notice.

    python -m benchmarks.deepcrime [--seeds N] [--steps N] [--page]

The 24 operators that DeepCrime implements (Humbatova, Jahangirova, Tonella, ISSTA 2021; names from `utils/constants.py` of its repository
dlfaults/deepcrime), each where it can be made: in a configuration, where `repro check` holds it against the spec; in the code, where only
`repro diagnose` looks. The classifier of digits and the velocity field of 2d-moons are mutated; a mutant in the code counts as seen when
`diagnose` has any finding. Results go to benchmarks/results/deepcrime.json and to the table in refs/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.diagnose import BUGS, _batch, _loss, _model, _rate, altered, kinds
from repro.config import flatten, load
from repro.method import find_project
from repro.phases import Phase
from repro.run import git_commit
from repro.runtime import machine
from repro_tools.check.coverage import contradicted
from repro_tools.spec import load_spec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/deepcrime.json"
PAGE = ROOT / "refs/coverage.md"
MARKS = ("<!-- measured:deepcrime -->", "<!-- /measured:deepcrime -->")
CLASSIFIER, FIELD = ("digits", "feature_classifier"), ("2d-moons", "velocity_field")
Places = Mapping[tuple[str, str], Callable[[Phase], Phase]]


@dataclass(frozen=True)
class Operator:
    """configuration: (experiment, key, value) of a mutant that `check` is shown. code: by place, how the mutant is made there.
    entries: what the catalogue has on it. without: why there is no mutant."""

    name: str
    what: str
    configuration: tuple[tuple[str, str, object], ...] = ()
    code: Places = field(default_factory=dict)
    entries: tuple[str, ...] = ()
    without: str = ""


# --- mutants of the code -------------------------------------------------------------------------------------------


def _some(rows: int, share: float) -> torch.Tensor:
    """Which rows a mutant changes: always the same share, whatever the minibatch."""
    return torch.arange(rows) < share * rows


def _labels_wrong(batch: dict) -> dict:
    label = batch["label"]
    return batch | {"label": torch.where(_some(len(label), 0.5), (label + 1) % 10, label)}


def _overlapping(batch: dict) -> dict:
    """Half of the images of class 0 are said to be of class 1."""
    label = batch["label"].clone()
    zeros = (label == 0).nonzero().flatten()
    label[zeros[::2]] = 1
    return batch | {"label": label}


def _unbalanced(batch: dict) -> dict:
    """One class instead of five of the ten."""
    keep = batch["label"] < 5
    chosen = torch.where(keep, torch.arange(len(keep)), int(keep.nonzero()[0]))
    return {name: column[chosen] for name, column in batch.items()}


def _half_of_the_data(batch: dict) -> dict:
    half = len(batch["label"]) // 2
    return {name: torch.cat([column[:half], column[:half]]) for name, column in batch.items()}


def _noisy(name: str) -> Callable[[dict], dict]:
    def noisy(batch: dict) -> dict:
        column = batch[name]
        noise = torch.randn(column.shape, generator=torch.Generator().manual_seed(0))
        return batch | {name: column + column.std() * noise}

    return noisy


def _activations(model: nn.Module) -> list[tuple[nn.Sequential, int]]:
    return [
        (layers, place)
        for layers in model.modules()
        if isinstance(layers, nn.Sequential)
        for place, layer in enumerate(layers)
        if isinstance(layer, nn.SiLU | nn.ReLU | nn.SELU | nn.Tanh)
    ]


def _each_activation(made: Callable[[], nn.Module], only_first: bool = False) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        found = _activations(model)
        assert found, "the mutant must change something"
        for layers, place in found[:1] if only_first else found:
            layers[place] = made()
        return model

    return change


def _output_through(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.register_forward_hook(lambda module, inputs, output: activation(output))
        return model

    return change


def _weights(initialise: Callable[[torch.Tensor], object]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        for p in model.parameters():
            if p.ndim > 1:
                initialise(p.data)
        return model

    return change


def _without_bias(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.bias = None
    return model


def _optimiser(made: Callable[[object, float], torch.optim.Optimizer]) -> Callable[[Phase], Phase]:
    def make_optimiser(sound, model):
        rate = sound.make_optimiser(model).param_groups[0]["lr"]
        return made(model.parameters(), rate)

    return lambda phase: altered(phase, make_optimiser=make_optimiser)


def _field_loss(function: Callable) -> Callable:
    return lambda sound, model, batch: function(model(batch["x_t"], batch["t"]).float(), batch["v_t"])


def _class_loss(function: Callable) -> Callable:
    return lambda sound, model, batch: function(
        model(batch["x"]).float(), nn.functional.one_hot(batch["label"], 10).float()
    )


def _both(change: Callable[[Phase], Phase]) -> Places:
    return dict.fromkeys((CLASSIFIER, FIELD), change)


CONVOLUTIONS = "phases.feature_classifier"
OPERATORS = (
    Operator("TCL", "wrong labels: half of the rows", code={CLASSIFIER: _batch(_labels_wrong)}),
    Operator("TRD", "training data removed: half of each minibatch", code={CLASSIFIER: _batch(_half_of_the_data)}, entries=("m38",)),
    Operator("TUD", "classes unbalanced: five of ten", code={CLASSIFIER: _batch(_unbalanced)}),
    Operator("TAN", "noise as large as the data", code={CLASSIFIER: _batch(_noisy("x")), FIELD: _batch(_noisy("x_t"))}),
    Operator("TCO", "two classes overlap", code={CLASSIFIER: _batch(_overlapping)}),
    Operator("HBS", "batch size", (("mnist", "phases.velocity_field.batch_size", 512),), entries=("m06",)),
    Operator("HLR", "learning rate", (("mnist", "phases.velocity_field.learning_rate", 1e-2),), _both(_rate(100)), ("m39", "m40")),
    Operator("HNE", "number of epochs or steps", (("mnist", "phases.velocity_field.iterations", 1000),), entries=("m07", "m42")),
    Operator("HDB", "no minibatches", (("mnist", "phases.velocity_field.batch_size", 60000),), entries=("m06",)),
    Operator("ACH", "other activation", (("2d-moons", "phases.velocity_field.network.activation", "relu"),), {
        CLASSIFIER: _model(_each_activation(nn.Tanh)), FIELD: _model(_each_activation(nn.Tanh))}),
    Operator("ARM", "activation removed: all of them", code=_both(_model(_each_activation(nn.Identity)))),
    Operator("AAL", "activation added: ReLU on the output", code=_both(_model(_output_through(torch.relu)))),
    Operator("RAW", "weight regularisation added: decay .1", code=_both(_optimiser(lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=0.1)))),
    Operator("RCW", "weight regularisation changed", without="the paper has none"),
    Operator("RRW", "weight regularisation removed", without="the paper has none"),
    Operator("RCD", "dropout rate", (("cifar10", "phases.velocity_field.network.dropout", 0.5),)),
    Operator("RCP", "patience of early stopping", without="the kit has no early stopping"),
    Operator("WCI", "initialisation: normal, deviation 1", code=_both(_model(_weights(lambda p: p.normal_(generator=torch.Generator().manual_seed(0)))))),
    Operator("WCI", "initialisation: zeros", code=_both(_model(_weights(lambda p: p.zero_())))),
    Operator("WAB", "bias added", without="every layer has one, as in the code that the paper cites"),
    Operator("WRB", "bias removed", code=_both(_model(_without_bias))),
    Operator("LCH", "other loss: absolute error", code={
        CLASSIFIER: _loss(_class_loss(nn.functional.l1_loss)), FIELD: _loss(_field_loss(nn.functional.l1_loss))}, entries=("m53",)),
    Operator("OCH", "other optimiser: SGD at Adam's rate", code=_both(_optimiser(lambda p, lr: torch.optim.SGD(p, lr=lr)))),
    Operator("OCG", "gradient clipping", (("cifar10", "phases.velocity_field.clip_norm", 0.01),), entries=("m46",)),
    Operator("VRM", "no validation set", without="nothing is chosen on one; the evaluation's split is in the configuration", entries=("m33", "m36")),
)  # fmt: skip


# --- who notices ---------------------------------------------------------------------------------------------------


def seen_by_check(experiment: str, key: str, value: object) -> bool:
    """Whether `repro check` names the key when the configuration has that value."""
    project = find_project(ROOT)
    configs = {name: load(project.config_class(name), path)[0] for name, path in project.experiments().items()}
    leaves = {name: flatten(config) for name, config in configs.items()}
    assert key in leaves[experiment] and leaves[experiment][key] != value, f"{experiment}: {key}: no mutant"
    leaves[experiment][key] = value
    found = contradicted(load_spec(project.spec), list(configs), leaves)
    return any(key.split(".")[-1] in finding.place + finding.found for finding in found)


def seen_by_diagnose(operator: Operator, place: tuple[str, str], seed: int, steps: int) -> list[str]:
    """The findings of `repro diagnose` on the mutant, in order."""
    BUGS["mutant"] = ("", {place: operator.code[place]})
    return kinds(*place, "mutant", seed, steps)


def measure(seeds: int, steps: int) -> list[dict]:
    rows = []
    for operator in OPERATORS:
        row = {
            "operator": operator.name,
            "what": operator.what,
            "entries": operator.entries,
            "without": operator.without,
        }
        row["check"] = [seen_by_check(*mutant) for mutant in operator.configuration]
        row["diagnose"] = {
            " ".join(place): [seen_by_diagnose(operator, place, seed, steps) for seed in range(seeds)]
            for place in operator.code
        }
        print(operator.name, row["check"], row["diagnose"], file=sys.stderr)
        rows.append(row)
    return rows


# --- the page ------------------------------------------------------------------------------------------------------


def page_table(results: Mapping) -> str:
    """The table as it stands in refs/coverage.md."""
    lines = ["| operator | mutant | `check` | `diagnose` | entry |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        check = "seen" if row["check"] and all(row["check"]) else "not seen" if row["check"] else ""
        told = "; ".join(_told(place, found) for place, found in row["diagnose"].items())
        entries = ", ".join(f"[{name}](../LEARNING.md#{name})" for name in row["entries"])
        what = row["what"] + (f" (no mutant: {row['without']})" if row["without"] else "")
        lines.append(f"| {row['operator']} | {what} | {check} | {told} | {entries} |")
    return "\n".join(lines)


def tally(results: Mapping) -> str:
    """How many of the operators are noticed, in a sentence."""
    by_name: dict[str, dict[str, list[bool]]] = {}
    for row in results["rows"]:
        one = by_name.setdefault(row["operator"], {"check": [], "diagnose": []})
        one["check"] += row["check"]
        one["diagnose"] += [bool(found) for seeds in row["diagnose"].values() for found in seeds]
    code = [one["diagnose"] for one in by_name.values() if one["diagnose"]]
    return (
        f"Of {len(by_name)} operators, {sum(bool(one['check']) for one in by_name.values())} can be made in a configuration: `check` sees "
        f"{sum(bool(one['check']) and all(one['check']) for one in by_name.values())} of them. {len(code)} were made in the code: `diagnose` sees "
        f"{sum(all(seen) for seen in code)} always, {sum(any(seen) and not all(seen) for seen in code)} sometimes, "
        f"{sum(not any(seen) for seen in code)} never. {sum(not one['check'] and not one['diagnose'] for one in by_name.values())} have no mutant here."
    )


def _told(place: str, found: list[list[str]]) -> str:
    short = "classifier" if "classifier" in place else "field"
    kinds = sorted({one[0] for one in found if one})
    count = sum(map(bool, found))
    return f"{short}: {count} of {len(found)}" + (f" ({', '.join(f'`{kind}`' for kind in kinds)})" if kinds else "")


def write_page(results: Mapping) -> None:
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{page_table(results)}\n\n{tally(results)}\n\n{MARKS[1]}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--page", action="store_true", help="write the table from the results, measure nothing")
    options = parser.parse_args(arguments)
    if not options.page:
        torch.set_num_threads(1)
        rows = measure(options.seeds, options.steps)
        origin = {"commit": git_commit(ROOT), "machine": machine(torch.device("cpu")), "torch": torch.__version__}
        body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps({**origin, "seeds": options.seeds, "steps": options.steps})[1:-1]
        RESULTS.write_text(f'{{\n {head},\n "rows": [\n{body}\n ]\n}}\n')
    write_page(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
