"""`repro diagnose`: each planted bug is named first, a sound phase is silent, and what is printed can be run."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_method
from torch import nn

from benchmarks.diagnose import BUGS, FIELD, SOUND, UNETS, Deep, altered, cases, kinds, page_table, phases_of, rates
from repro.checkpoint import save
from repro.phases import Phase, SingleLossPhase
from repro.randomness import generator
from repro_tools import cli
from repro_tools.diagnose.bench import Bench, constants
from repro_tools.diagnose.command import _Networks, add_arguments
from repro_tools.diagnose.curves import curve_findings, curves_of, in_words
from repro_tools.diagnose.diagnostics import measure
from repro_tools.diagnose.explanation import Place
from repro_tools.diagnose.hypotheses import findings, notes
from repro_tools.diagnose.instruments import Activations, Flatness, Pairings, Unfit, outputs_replaced
from repro_tools.diagnose.measured import Column, Fit, Learning, Measured, Parameters, Rows

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PLACE = Place("some", "plain", 0, 60)
IN_THE_KIT = [(bug, *place) for bug, (_, places) in BUGS.items() for place in places if place[0] in ("toy", "line")]
UNSEEN = ("learning rate x 100, harmless", "sign of the target wrong")


class Plain(SingleLossPhase):
    """y = (x_1 x_2, x_1) at a time that says nothing, by a network of one hidden layer."""

    name, iterations = "plain", 100

    def make_model(self):
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))

    def make_optimiser(self, model):
        return torch.optim.Adam(model.parameters(), lr=1e-2)

    def minibatch(self, step, generator):
        x, t = torch.randn(64, 2, generator=generator), torch.rand(64, generator=generator)
        return {"x": x, "y": torch.stack([x[:, 0] * x[:, 1], x[:, 0]], 1), "t": t}

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()


class Classes(Plain):
    """Three classes by the sign and size of x."""

    def make_model(self):
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))

    def minibatch(self, step, generator):
        x = torch.randn(64, 2, generator=generator)
        return {"x": x, "label": (x[:, 0] > 0).long() + (x[:, 0] > 1).long()}

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["label"])


def diagnosed(phase: Phase, steps: int = 50) -> tuple[Measured, list[str]]:
    measured, _ = measure(phase, 0, CPU, steps)
    return measured, [finding.kind for finding in findings(measured, PLACE)]


# --- planted bugs and sound phases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("bug", "experiment", "phase"), [case for case in IN_THE_KIT if case[0] not in UNSEEN])
def test_a_planted_bug_is_named_first(bug, experiment, phase):
    assert kinds(experiment, phase, bug, seed=0, steps=60)[:1] == [BUGS[bug][0]]


@pytest.mark.parametrize(("experiment", "phase"), [(e, p) for e in ("toy", "line") for p in SOUND[e]])
def test_a_sound_phase_is_silent(experiment, phase):
    assert kinds(experiment, phase, None, seed=0, steps=60) == []


@pytest.mark.parametrize("phase", [Plain(), Classes()])
def test_sound_networks_with_a_hidden_layer_are_silent(phase):
    assert diagnosed(phase)[1] == []


@pytest.mark.parametrize("bug", ["ten layers of sigmoids", "40 layers, weights x 5"])
def test_a_gradient_that_is_lost_on_its_way_is_named_first(bug):
    assert kinds(*FIELD, bug, seed=0, steps=50)[:1] == ["gradient-spread"]


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(lambda: Deep(20, torch.tanh, 5 / 3), id="a gain that keeps the size"),
        pytest.param(lambda: Deep(40, torch.sigmoid, 1.0, residual=True), id="skips"),
        pytest.param(lambda: opened_late(Deep(4, torch.tanh, 1.0)), id="a last layer that begins at zero"),
    ],
)
def test_a_deep_network_through_which_the_gradient_passes_is_not_flagged(network):
    def loss(sound, model, batch):
        return (model(batch["x"], batch["t"]) - batch["y"]).square().mean()

    assert "gradient-spread" not in diagnosed(altered(Plain(), make_model=lambda sound: network(), loss=loss))[1]


def opened_late(network: Deep) -> Deep:
    nn.init.zeros_(network.last.weight)
    return network


def test_a_classifier_that_starts_far_from_chance_is_reported():
    def make_model(sound):
        model = sound.make_model()
        nn.init.normal_(model[-1].weight, std=10)
        return model

    chance = {"expected_initial_loss": lambda sound: math.log(3)}
    assert diagnosed(altered(Classes(), **chance))[1] == []
    assert "initial-loss" in diagnosed(altered(Classes(), make_model=make_model, **chance))[1]


def test_a_loss_that_raises_is_reported_with_its_message_and_the_shapes():
    phase = altered(Plain(), make_model=lambda sound: nn.Linear(3, 2))
    measured, found = diagnosed(phase)
    assert found == ["loss-raises"] and "mat1 and mat2" in findings(measured, PLACE)[0].measured
    assert "x (64, 2)" in findings(measured, PLACE)[0].measured


def test_a_minibatch_that_raises_is_reported():
    def minibatch(sound, step, generator):
        raise IndexError("index 64 is out of bounds")

    measured, found = diagnosed(altered(Plain(), minibatch=minibatch))
    assert found == ["loss-raises"] and "out of bounds (in minibatch)" in findings(measured, PLACE)[0].measured


def test_sequences_whose_length_differs_from_minibatch_to_minibatch_are_measured():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, s):
            return self.inner(s.mean(1, keepdim=True))

    def minibatch(sound, step, generator):
        s = torch.randn(32, 3 + int(torch.randint(4, (), generator=generator)), generator=generator)
        return {"s": s, "y": 2 * s.mean(1, keepdim=True)}

    phase = altered(
        Plain(),
        make_model=lambda sound: Mean(),
        minibatch=minibatch,
        loss=lambda sound, model, batch: (model(batch["s"]) - batch["y"]).square().mean(),
    )
    measured, found = diagnosed(phase)
    assert measured.raised is None and measured.learning is not None and "loss-raises" not in found


def test_rows_that_are_not_finite_are_named_by_their_time():
    def loss(sound, model, batch):
        return sound.loss(model, batch) + torch.where(batch["t"] > 0.9, torch.nan, 0.0).mean()

    measured, found = diagnosed(altered(Plain(), loss=loss))
    assert found == ["not-finite"]
    low, high = measured.bad_rows["t"]
    assert 0.9 < low < high <= 1 and 0.05 < measured.bad_count[0] / measured.bad_count[1] < 0.15


def test_a_row_that_only_a_later_minibatch_has_is_told_from_a_rate_that_is_too_large():
    def minibatch(sound, step, generator):
        batch = sound.minibatch(step, generator)
        if step == 7:
            batch["t"][5] = 2.0
        return batch

    def loss(sound, model, batch):
        return sound.loss(model, batch) + 0 * (1.5 - batch["t"]).sqrt().mean()

    measured, found = diagnosed(altered(Plain(), minibatch=minibatch, loss=loss))
    assert found == ["not-finite"] and measured.bad_rows["t"] == (2.0, 2.0)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_named():
    def loss(sound, model, batch):
        return sound.loss(model, batch) + (0 * model(batch["x"])).square().sum(1).sqrt().mean()

    assert diagnosed(altered(Plain(), loss=loss))[1] == ["gradient-not-finite"]


def test_a_column_with_nan_comes_before_the_loss_that_it_spoils():
    def minibatch(sound, step, generator):
        batch = sound.minibatch(step, generator)
        batch["x"][3] = torch.nan
        return batch

    assert diagnosed(altered(Plain(), minibatch=minibatch))[1] == ["column-not-finite", "not-finite"]


def test_a_time_at_which_the_target_blows_up_is_named():
    def minibatch(sound, step, generator):
        batch = sound.minibatch(step, generator)
        late = batch["t"] > 0.9
        batch["y"][late] = 30 * torch.randn(int(late.sum()), 2, generator=generator)
        return batch

    measured, found = diagnosed(altered(Plain(), minibatch=minibatch), steps=20)
    assert "one-time" not in found  # a constant does no better there: noise, and not the network's fault

    def loss(sound, model, batch):
        sign = torch.where(batch["t"] > 0.9, -30.0, 1.0)[:, None]
        return (sign * model(batch["x"]) - batch["y"]).square().mean()

    measured, found = diagnosed(altered(Plain(), loss=loss, make_optimiser=_slow))
    assert "one-time" in found
    assert "0.9 to 1.0" in next(f.title for f in findings(measured, PLACE) if f.kind == "one-time")


def _slow(sound, model):
    return torch.optim.Adam(model.parameters(), lr=1e-4)


def test_parameters_that_the_optimiser_was_not_given_are_named():
    phase = altered(Plain(), make_optimiser=lambda sound, model: torch.optim.Adam(model[2].parameters(), lr=1e-2))
    measured, found = diagnosed(phase)
    assert found[0] == "frozen" and "0.weight" in findings(measured, PLACE)[0].measured


def test_a_loss_that_reaches_no_parameter_is_reported():
    phase = altered(Plain(), loss=lambda sound, model, batch: sound.loss(lambda x: model(x).detach(), batch))
    assert "frozen" in diagnosed(phase)[1]


def test_a_loss_that_compares_clouds_by_design_is_noted_and_not_a_finding():
    def loss(sound, model, batch):
        out, y = model(batch["x"]), batch["y"]
        return torch.cdist(out[None], y[None]).mean() - 0.5 * torch.cdist(out[None], out[None]).mean()

    measured, found = diagnosed(altered(Plain(), loss=loss))
    assert "broadcast" not in found
    assert any("compared with each other" in note for note in notes(measured))


def test_a_loss_that_draws_is_noted_and_not_judged_by_its_rows():
    def loss(sound, model, batch):
        return sound.loss(model, {**batch, "y": batch["y"] + 0.1 * torch.randn_like(batch["y"])})

    measured, found = diagnosed(altered(Plain(), loss=loss))
    assert found == [] and measured.rows.random and measured.rows.ratio is None


def test_a_generator_seeded_in_the_loop_is_noted():
    def minibatch(sound, step, generator_):
        return sound.minibatch(step, torch.Generator().manual_seed(0))

    measured, found = diagnosed(altered(Plain(), minibatch=minibatch))
    assert any("seeded in the loop" in note for note in notes(measured))


def test_three_affine_layers_are_a_finding_and_two_a_note():
    def layers(count):
        return lambda sound: nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))

    assert "affine" in diagnosed(altered(Plain(), make_model=layers(3)))[1]
    measured, found = diagnosed(altered(Plain(), make_model=layers(2)))
    assert "affine" not in found and any("affine" in note for note in notes(measured))


# --- thresholds, by hand -------------------------------------------------------------------------------------------

HEALTHY = Measured(
    phase="plain", seed=0, batch_rows=64, initial=1.2, zero=1.0, constant=1.0,
    fit=Fit(4, 60, 1.0, {1.0: 0.01}), learning=Learning(60, 0.3, 1.0, None),
    parameters=Parameters({"w": 1.0, "z": 1.0}, (), (), (), (), {"w": 1.0, "z": 1e-3}, {"w": -2.5}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("initial-loss", {"initial": 11.0}),
        ("no-relation", {"learning": Learning(60, 0.97, 1.0, None)}),
        ("rate-too-large", {"learning": Learning(60, 1.6, 1.0, None)}),
        ("rate-too-large", {"learning": Learning(60, math.nan, 1.0, 5)}),
        ("rate-too-large", {"fit": Fit(4, 60, 1.0, {0.01: 0.1, 0.1: 0.4, 1.0: 0.9, 10.0: 2.0, 100.0: 9.0})}),
        ("rate-too-small", {"learning": Learning(60, 0.9, 0.95, None, faster=0.3)}),
        ("not-fitted", {"fit": Fit(4, 60, 1.0, {0.01: 1.0, 0.1: 1.0, 1.0: 0.9, 10.0: 1.0, 100.0: 1.0})}),
        ("update-size", {"parameters": replace(HEALTHY.parameters, updates={"w": 0.4})}),
        ("update-size", {"parameters": replace(HEALTHY.parameters, updates={"w": -7.0})}),
        ("gradient-spread", {"parameters": replace(HEALTHY.parameters, pulls={"w": 1.0, "z": 1e-5})}),
        ("still", {"parameters": replace(HEALTHY.parameters, still=("w",))}),
    ],
)
def test_one_measurement_out_of_its_range_is_one_finding(kind, changes):
    assert findings(HEALTHY, PLACE) == []
    assert kind in [finding.kind for finding in findings(replace(HEALTHY, **changes), PLACE)]


def test_a_short_fit_is_not_judged():
    short = replace(HEALTHY, fit=Fit(4, 20, 1.0, {0.01: 1.0, 0.1: 1.0, 1.0: 0.9, 10.0: 1.0, 100.0: 1.0}))
    assert findings(short, PLACE) == [] and any("--steps 50" in note for note in notes(short))
    slower = replace(HEALTHY, fit=Fit(4, 2, 1.0, {0.01: 0.4, 0.1: 0.4, 1.0: 0.9}), learning=Learning(2, 1.6, 1.0, None))
    assert findings(slower, PLACE) == []
    assert [one.kind for one in findings(replace(slower, learning=Learning(2, math.nan, None, 1)), PLACE)] == [
        "rate-too-large"
    ]


# --- the instruments -----------------------------------------------------------------------------------------------


def test_the_best_constant_of_a_squared_error_is_the_mean():
    bench = Bench(Plain(), 0, CPU)
    batches = [bench.minibatch(0, "held", k) for k in range(3)]
    y = torch.cat([batch["y"] for batch in batches])
    zero, best = constants(bench, bench.model(), batches)
    assert zero == pytest.approx(float(y.square().mean()), rel=1e-5)
    assert best == pytest.approx(float(y.var(0, unbiased=False).mean()), rel=1e-5)


def test_the_best_constant_of_a_cross_entropy_has_the_entropy_of_the_labels():
    bench = Bench(Classes(), 0, CPU)
    batches = [bench.minibatch(0, "held", k) for k in range(3)]
    share = torch.cat([batch["label"] for batch in batches]).bincount() / 192
    zero, best = constants(bench, bench.model(), batches)
    assert zero == pytest.approx(math.log(3), rel=1e-5)
    assert best == pytest.approx(float(-(share * share.log()).sum()), rel=1e-4)


@pytest.mark.parametrize("draw", [[], ["draws"]])  # the search ends at a huge value, or at none
def test_a_loss_without_a_best_constant_is_told_apart(draw):
    phase = altered(Plain(), loss=lambda sound, model, batch: -model(batch["x"]).pow(3).mean())
    bench = Bench(phase, 0, CPU)
    with pytest.raises(Unfit):
        constants(bench, bench.model(), [bench.minibatch(0, *draw)])


def test_tables_by_accident_are_told_from_tables_on_purpose():
    x, y = torch.randn(7), torch.randn(7, 1)
    with Pairings(7) as tables:
        _ = x[None] - y, y - y, x - x, x * 2
        assert tables.found == []
        _ = (x - y).square()
        _ = nn.functional.l1_loss(x, y)
    assert [name.split()[0] for name in tables.found] == ["sub", "l1_loss"]


def test_dead_units_are_counted_for_modules_and_functions_alike():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.second = nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)
            nn.init.constant_(self.first.bias, -100.0)
            nn.init.constant_(self.second.bias, 50.0)

        def forward(self, x):
            return torch.sigmoid(self.second(self.act(self.first(x))))

    model = Both()
    with torch.no_grad(), Activations(model) as seen:
        model(torch.randn(16, 2))
        torch.relu(torch.full((3, 3), -1.0))  # not this model's
    assert [(flat.operation, flat.place, flat.dead, flat.units) for flat in seen.found] == [
        ("relu", "act", 4, 4),
        ("sigmoid", "", 3, 3),
    ]


def test_an_output_that_is_no_tensor_is_refused_by_name():
    model = nn.LSTM(2, 2)
    with pytest.raises(Unfit, match="tuple"), outputs_replaced(model, lambda out: out):
        model(torch.randn(3, 2))


# --- curves --------------------------------------------------------------------------------------------------------


def curve(*losses: float) -> list[tuple[int, float]]:
    return [(10 * (number + 1), loss) for number, loss in enumerate(losses)]


def falling(count: int = 40) -> list[float]:
    return [0.3 + 0.7 * 0.8**k + 0.02 * (-1) ** k for k in range(count)]


@pytest.mark.parametrize(
    ("kind", "losses"),
    [
        ("curve-rises", [*falling(), *[4.0] * 6]),
        ("curve-spikes", [*falling(36), 0.3, 9.0, 0.3, 0.3]),
        ("plateau", [1.2 * 0.9**k + 1 for k in range(60)]),
        ("still-falls", [0.9**k for k in range(40)]),
    ],
)
def test_a_curve_that_ends_badly_is_named(kind, losses):
    found = list(curve_findings(curve(*losses), "runs/x", 1.0, 1.5, PLACE))
    assert [finding.kind for finding in found] == [kind]


def test_sound_and_short_curves_are_silent():
    assert list(curve_findings(curve(*falling()), "runs/x", 1.0, 1.5, PLACE)) == []
    assert list(curve_findings(curve(1.0, 9.0), "runs/x", 1.0, 1.5, PLACE)) == []
    assert "too few" in in_words(curve(1.0, 9.0))


def test_curves_come_from_the_record_or_from_a_log_that_a_kill_cut_short(tmp_path):
    log = tmp_path / "2-plain" / "log.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.5}\n{"step": 30, "lo')
    assert curves_of(tmp_path) == {"plain": [(10, 2.0), (20, 1.5)]}
    (tmp_path / "record.json").write_text(json.dumps({"curves": {"plain": [[10, 3.0]]}}))
    assert curves_of(tmp_path) == {"plain": [(10, 3.0)]}


# --- the command ---------------------------------------------------------------------------------------------------


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if "__pycache__" not in path.parts}


def test_a_sound_project_gives_no_findings_and_nothing_is_written(project, capsys):
    before = files(project)
    assert cli.main(["diagnose", "toy"]) == 0
    told = capsys.readouterr().out
    assert "line  (prepared" in told and "constant  (prepared" in told and told.count("findings          none") == 2
    assert files(project) == before and max(map(len, told.splitlines())) <= 120


def test_a_finding_is_told_with_three_explanations_and_a_test_and_the_exit_code_is_1(project, capsys, monkeypatch):
    monkeypatch.setattr(
        toy_method.Line, "loss", lambda self, model, batch: (model(batch["x"]) - batch["y"][:, 0]).square().mean()
    )
    assert cli.main(["diagnose", "toy", "--phase", "line", "--set", "pool_size=32"]) == 1
    told = capsys.readouterr().out
    assert "1. broadcast" in told and all(f"     {role}" in told for role in ("likely", "subtle", "null", "test"))
    assert 'open_phase("toy", "line", 0, [\'pool_size=32\'])' in told


def test_json_holds_measurements_and_findings(project, capsys, monkeypatch):
    monkeypatch.setattr(
        toy_method.Constant, "make_optimiser", lambda self, model: torch.optim.SGD(model.parameters(), lr=9.0)
    )
    assert cli.main(["diagnose", "toy", "--phase", "constant", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["phases"][0]["measured"]["fit"]["losses"]["100.0"] == "inf"
    assert told["phases"][0]["findings"][0]["kind"] == "rate-too-large"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["toy", "--phase", "lin"], "--phase: found no phase 'lin', expected one of: line, constant"),
        (["toys"], "found no experiment 'toys'"),
        (["toy", "--runs", "none"], "--runs: found no folder none/toy"),
    ],
)
def test_bad_input_is_one_line(project, capsys, arguments, problem):
    assert cli.main(["diagnose", *arguments]) == 2
    told = capsys.readouterr()
    assert problem in told.err and told.out == ""


def test_the_curves_of_a_run_are_looked_at(project, capsys):
    runs = project / "runs"
    assert cli.main(["run", "toy", "--runs", str(runs)]) == 0
    log = [{"step": step, "loss": 0.9**step} for step in range(1, 40)]
    other = runs / "toy" / "seed-1" / "1-line"
    other.mkdir(parents=True)
    (other / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    capsys.readouterr()
    assert cli.main(["diagnose", "toy", "--phase", "line", "--runs", str(runs)]) == 1
    told = capsys.readouterr().out
    assert "seed-0" in told and "1. still-falls" in told and "seed-1" in told


def test_a_phase_gets_the_networks_before_it_from_a_run_or_trained_here(tmp_path):
    phases = phases_of("line")
    here = _Networks(phases, 0, CPU, 100, None)
    assert float(here.before(phases[1])["slope"].weight) == pytest.approx(2.0, abs=0.1)
    assert here.told == ["slope: trained here for 100 steps"]
    slope = phases[0].make_model()
    nn.init.constant_(slope.weight, 7.0)
    save(tmp_path / "1-slope" / "model.safetensors", {"model": slope.state_dict()})
    kept = _Networks(phases, 0, CPU, 100, tmp_path)
    assert float(kept.before(phases[1])["slope"].weight) == 7.0 and "of the run" in kept.told[0]
    assert len(kept.before(phases[0])) == 0


def test_every_test_that_is_printed_can_be_run(project):
    """Code is run, commands are parsed."""
    changed = [
        replace(HEALTHY, learning=Learning(60, 0.97, 1.0, None)),
        replace(HEALTHY, learning=Learning(60, 1.6, 1.0, None)),
        replace(HEALTHY, learning=Learning(60, 0.9, 0.95, None, faster=0.3)),
        replace(HEALTHY, parameters=replace(HEALTHY.parameters, still=("w",), none=("w",), updates={"w": 1.0})),
        replace(HEALTHY, parameters=replace(HEALTHY.parameters, pulls={"w": 1.0, "z": 1e-5})),
        replace(HEALTHY, initial=math.nan, bad_rows={"t": (0.9, 1.0)}, bad_count=(1, 9)),
        replace(HEALTHY, raised="RuntimeError: x"),
        replace(HEALTHY, ignored=("t",), affine_layers=3, initial=20.0),
        replace(HEALTHY, rows=Rows(7, 7.0, 0.1, (), False), flat=(Flatness("relu", "1", 8, 8),)),
        replace(HEALTHY, rows=Rows(7, 1.1, 0.0, ("sub of (7,) and (7, 1)",), False)),
        replace(HEALTHY, columns=(Column("x", (8, 1), "float32", 1.0, 0.0, 1.0, 1.0, False, True, 1),)),
        replace(HEALTHY, arguments=(Column("x", (8, 1), "float32", 100.0, 9.0, 0.0, 255.0, True, False, 0),)),
        replace(HEALTHY, times=((0.1, 1.0), (0.1, 1.0), (9.0, 1.0))),
    ]
    place = Place("toy", "line", 0, 60, ("pool_size=32",), " --device cpu")
    found = [finding for one in changed for finding in findings(one, place)]
    assert {"summed", "broadcast", "dead-units", "constant-column", "input-scale", "one-time", "gradient-spread"} <= {
        f.kind for f in found
    }
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    for test in {finding.test for finding in found}:
        if test.startswith("repro diagnose "):
            assert parser.parse_args(shlex.split(test)[2:]).experiment == "toy"
        else:
            exec("from repro_tools.diagnose.command import open_phase\n" + test, {})


# --- the measured rates --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((ROOT / "benchmarks/results/diagnose.json").read_text())


def test_the_rates_are_of_all_phases_and_bugs_over_many_seeds(results):
    expected = {f"{experiment} {phase}: {bug or 'sound'}" for experiment, phase, bug in cases()}
    assert set(results["rows"]) == expected
    for experiment, phase, bug in cases():
        seeds = 10 if (experiment, phase) in UNETS else 20  # a UNet takes minutes a seed
        assert len(results["rows"][f"{experiment} {phase}: {bug or 'sound'}"]) >= seeds
    assert results["rates"] == rates(results["rows"])


def test_the_page_shows_the_rates(results):
    assert page_table(results) in (ROOT / "refs/debugging.md").read_text()


def test_the_generator_of_a_minibatch_is_that_of_the_run():
    phase = Plain()
    bench = Bench(phase, 3, CPU)
    own = phase.minibatch(5, generator(3, "plain", "draws", 5))
    assert torch.equal(bench.minibatch(5, "draws")["x"], own["x"])


def test_rows_of_an_epoch_are_those_of_the_run_and_the_held_ones_are_others():
    data, drawn = Plain().minibatch(0, generator("data")), []

    def minibatch(sound, step, draw):
        rows = draw.epoch_rows(64, 8, last="drop")
        drawn.append(tuple(rows.tolist()))
        return {name: column[rows] for name, column in data.items()}

    measured, found = diagnosed(altered(Plain(), minibatch=minibatch))
    assert "loss-raises" not in found and not measured.same_minibatch
    first, second, *held = drawn[:34]
    assert not set(first) & set(second) and len({first, second, *held}) == 34
