"""`repro memory` on the toy project: what it prints, what it advises, how it refuses."""

import json

import pytest
import torch
import toy_method
from torch import nn
from toy_project import CONFIG, SPEC, write_yaml

from repro.method import Method
from repro.phases import StepOptions, Work
from repro_tools.cli import main
from repro_tools.memory import devices, hours
from repro_tools.memory.devices import DEVICES, Device
from repro_tools.memory.fitting import fewest, largest
from repro_tools.memory.footprint import MIB

BUDGET = {"device": "L4", "hours": 1, "session_hours": 1}
SMALL_GPU = Device(
    "Small", 700 * MIB, None, 1e9, {"float32": 1e12, "tf32": None, "bf16": None, "fp16": None}, "made up"
)


@pytest.fixture(autouse=True)
def a_small_gpu(monkeypatch):
    """A device of 700 MiB, of which the allowances take 632."""
    for module in ("repro_tools.memory.command", "repro_tools.memory.devices"):
        monkeypatch.setattr(f"{module}.DEVICES", (SMALL_GPU, *DEVICES))
    return SMALL_GPU


def memory(capsys, *options):
    code = main(["memory", *options])
    return code, *capsys.readouterr()


def as_json(capsys, *options):
    code, out, _ = memory(capsys, "--json", *options)
    return code, json.loads(out)


def change(monkeypatch, **methods):
    """The toy's first phase with other methods."""
    for name, method in methods.items():
        monkeypatch.setattr(toy_method.Line, name, method)


def test_every_phase_has_a_row_with_its_networks_gradients_and_state(project, capsys):
    code, found = as_json(capsys)
    phases = found["experiments"]["toy"]["phases"]
    line, constant = (phases[name]["parts"][0] for name in ("line", "constant"))
    assert code == 0
    assert list(phases) == ["line", "constant"]
    weights = 4 * (8 + 8 + 8 + 1)
    assert line["by_kind"]["parameters"] == weights
    assert line["by_kind"]["optimiser"] == 2 * weights + 4 * 4
    assert constant["by_kind"]["earlier networks"] == weights
    assert (line["times"], phases["line"]["rows"]) == (12, 8)


def test_the_table_names_what_it_assumes_and_the_devices_that_are_large_enough(project, capsys):
    code, out, err = memory(capsys)
    assert code == 0
    assert "  line" in out
    assert "CUDA context: 0.59 GiB (assumed" in out
    assert "fragmentation: <0.01 GiB (assumed: 10%" in out
    assert "Everything fits on (usable GiB) Small (0.68), RTX 3060 12GB" in out
    assert "An estimate: nothing of it was measured on a GPU." in out
    assert max(map(len, out.splitlines())) <= 120


def test_nothing_is_written(project, capsys):
    before = sorted(path for path in project.rglob("*"))
    memory(capsys)
    assert sorted(path for path in project.rglob("*")) == before


def test_a_named_device_is_held_against_every_row(project, capsys):
    code, out, _ = memory(capsys, "toy", "--on", "t4")
    assert code == 0
    assert "T4: 14.74 GiB usable (cited: NVIDIA T4 datasheet)" in out
    assert "fits" in out.splitlines()[0]
    assert "NO" not in out


def test_what_does_not_fit_is_said_with_overrides_that_fit(project, capsys):
    """The toy fits anywhere, so its minibatch is made a hundred thousand times larger."""
    large = ["--set", "phases.line.batch_size=1000000", "--set", "phases.line.iterations=1000"]
    code, found = as_json(capsys, "--on", "Small", *large)
    (advice,) = found["experiments"]["toy"]["to_fit"]
    assert code == 1
    assert (advice["phase"], advice["part"]) == ("line", "step")
    size, iterations = (int(one.partition("=")[2]) for one in advice["overrides"])
    assert size * iterations == 1000000 * 1000
    assert advice["needed"] <= SMALL_GPU.memory_bytes
    follow = [part for one in advice["overrides"] for part in ("--set", one)]
    assert memory(capsys, "--on", "Small", *large, *follow)[0] == 0
    _, found = as_json(capsys, "--on", "Small", *large, *follow, "--set", f"phases.line.batch_size={round(1.5 * size)}")
    assert found["experiments"]["toy"]["to_fit"], "half as much again would have fitted as well"


LARGE = ["--on", "Small", "--set", "phases.line.batch_size=4000000"]


def test_what_does_not_fit_is_first_divided_into_the_fewest_micro_batches_that_fit(project, capsys):
    code, found = as_json(capsys, *LARGE)
    (advice,) = found["experiments"]["toy"]["to_fit"]
    count = advice["in_micro_batches"]["micro_batches"]
    assert code == 1 and count > 1 and advice["in_micro_batches"]["needed"] <= SMALL_GPU.memory_bytes
    out = memory(capsys, *LARGE)[1]
    assert out.index(f"  --micro-batches line={count}\n") < out.index(
        "Otherwise as many examples in smaller minibatches"
    )
    assert "That gives the same result where the loss is a mean over rows: no deviation." in out
    divided = ["--micro-batches", f"line={count}"]
    code, out, _ = memory(capsys, *LARGE, *divided)
    assert code == 0
    assert f"4000000/{count}" in out and "rows: of the minibatch, by the number of its micro-batches" in out
    assert "Micro-batches take more launches: how much longer was not measured." in out
    code, found = as_json(capsys, *LARGE, "--micro-batches", f"line={count - 1}")
    assert found["experiments"]["toy"]["to_fit"], "one micro-batch less would have fitted as well"
    line, constant = (found["experiments"]["toy"]["phases"][name] for name in ("line", "constant"))
    assert (line["micro_batches"], constant["micro_batches"]) == (count - 1, 1)


def test_micro_batches_that_do_not_fit_are_followed_by_more_of_them(project, capsys):
    fewer, more = (
        as_json(capsys, *LARGE, *options)[1]["experiments"]["toy"]["to_fit"][0]["in_micro_batches"]
        for options in ([], ["--micro-batches", "2"])
    )
    assert fewer == more


def test_the_micro_batches_of_several_phases_are_told_in_one_option(project, capsys):
    both = ["--on", "Small", "--set", "phases.*.batch_size=4000000"]
    out = memory(capsys, *both)[1]
    (line,) = (line for line in out.splitlines() if line.startswith("toy, all of these: --micro-batches "))
    follow = line.partition("--micro-batches ")[2].split()
    assert [one.partition("=")[0] for one in follow] == ["line", "constant"]
    assert memory(capsys, *both, "--micro-batches", *follow)[0] == 0


def with_batch_norm(self):
    return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def test_micro_batches_that_a_run_refuses_are_not_advised(project, capsys, monkeypatch):
    change(monkeypatch, make_model=with_batch_norm)
    out = memory(capsys, *LARGE)[1]
    assert "--micro-batches" not in out
    assert "No micro-batches: a run in parts is refused: its batch norm takes the statistics of a part." in out
    assert "\nAs many examples in smaller minibatches" in out
    given = " ".join(memory(capsys, *LARGE, "--micro-batches", "8")[1].split())
    assert "toy line: found 8 micro-batches, expected 1: a run in parts is refused" in given


def test_micro_batches_that_make_another_method_are_not_advised(project, capsys, monkeypatch):
    change(monkeypatch, make_model=with_batch_norm, parts_define="the statistics of batch norm")
    out = " ".join(memory(capsys, *LARGE)[1].split())
    told = "in other parts it is another method: the paper means the statistics of batch norm within each part."
    assert f"No micro-batches: {told}" in out


def test_a_minibatch_that_defines_the_method_is_not_cut_without_a_word(project, capsys, monkeypatch):
    large = ["--on", "Small", "--set", "phases.line.batch_size=1000000"]
    out = memory(capsys, *large)[1]
    assert "That changes the noise of the gradient, and is a deviation to write down." in out
    change(monkeypatch, minibatch_defines="which pairs are matched")
    out = memory(capsys, *large)[1]
    assert "That is another method: the minibatch decides which pairs are matched." in out


def test_networks_that_are_too_large_for_any_minibatch_are_said_to_be(project, capsys, monkeypatch):
    change(
        monkeypatch,
        make_model=lambda self: nn.Sequential(nn.Linear(1, 4000), nn.Linear(4000, 4000), nn.Linear(4000, 1)),
    )
    code, out, _ = memory(capsys, "--on", "Small", "--set", "phases.line.batch_size=64")
    assert code == 1
    assert "not even a minibatch of one example fits" in " ".join(out.split())


def test_work_beside_the_steps_is_counted_and_named_when_it_is_too_large(project, capsys, monkeypatch):
    small, big = (
        Work(name, lambda n=n: torch.zeros(n, n) + 1, 7) for name, n in (("a little", 10), ("the pool", 5000))
    )
    change(monkeypatch, work=lambda self: [small, big])
    code, out, _ = memory(capsys, "--on", "Small")
    _, found = as_json(capsys)
    parts = {part["name"]: part for part in found["experiments"]["toy"]["phases"]["line"]["parts"]}
    assert code == 1
    assert (
        "toy line, the pool: does not fit on Small: no training step; make what it handles at a time smaller"
        in " ".join(out.split())
    )
    assert parts["the pool"]["times"] == 7
    assert parts["the pool"]["peak_bytes"] >= 2 * 4 * 5000**2
    assert parts["a little"]["peak_bytes"] < parts["step"]["peak_bytes"] + 2000


def test_the_evaluation_is_done_without_gradients_on_all_networks(project, capsys, monkeypatch):
    seen = []

    def work(config, models, runtime):
        def run():
            x = models["line"](torch.zeros(1000, 1))
            seen.append((x.requires_grad, any(model.training for model in models.values())))
            return x

        return [Work("sampling", run, 3)]

    monkeypatch.setattr(toy_method, "METHOD", Method("toy", toy_method.Config, toy_method.METHOD.phases, toy_method.evaluate, lambda *_: "", evaluation_work=work))  # fmt: skip
    _, found = as_json(capsys)
    evaluation = found["experiments"]["toy"]["phases"]["evaluation"]
    assert set(seen) == {(False, False)}
    assert (evaluation["rows"], evaluation["parts"][0]["times"]) == (None, 3)
    assert evaluation["parts"][0]["by_kind"]["parameters"] == 4 * (25 + 2)


def test_what_is_kept_on_the_host_is_named(project, capsys, monkeypatch):
    change(monkeypatch, storage=lambda self: {"pool": 3 * 2**30})
    assert "On the disk: pool of toy line 3.00 GiB" in memory(capsys)[1]


def test_a_graph_that_is_kept_is_a_remark_and_an_innocent_phase_has_none(project, capsys, monkeypatch):
    assert "after each step" not in memory(capsys)[1]
    real = toy_method.Line.loss

    def loss(self, model, batch):
        self.losses = [*getattr(self, "losses", []), real(self, model, batch)]
        return self.losses[-1] + model(batch["x"]).mean()

    change(monkeypatch, loss=loss)
    out = " ".join(memory(capsys)[1].split())
    assert "bytes more are alive after each step: something keeps a graph" in out


@pytest.mark.parametrize(("device", "told"), [("T4", True), ("L4", False)])
def test_bf16_is_named_where_there_is_no_hardware_for_it(project, capsys, monkeypatch, device, told):
    options = StepOptions(precision="bf16", warmup_steps=0, clip_norm=None, ema_decay=None)
    change(monkeypatch, options=options)
    out = " ".join(memory(capsys, "--on", device)[1].split())
    assert ("found precision bf16, expected fp16 or float32 on T4, which have no hardware for it" in out) == told


def test_a_phase_that_cannot_be_rehearsed_does_not_hide_the_others(project, capsys, monkeypatch):
    def loss(self, model, batch):
        return model(batch["x"]).mean() * batch["x"].sum().item()

    change(monkeypatch, loss=loss)
    write_yaml(project / "spec.yaml", SPEC | {"budget": BUDGET})
    for device, place in (("L4", "on L4"), ("all", "on any of these devices")):
        code, out, _ = memory(capsys, "--on", device)
        assert code == 1
        assert out.count("toy phase line: found code that reads the values of a tensor") == 1
        assert "test_memory.py:" in out
        assert "  constant" in out
        assert "Everything" not in out
        assert f"1 experiment, 2 seeds {place}: no total: phase line could not be estimated" in out
        assert "in all" not in out and "budget" not in out
    found = as_json(capsys, "--on", "L4")[1]["time"]["devices"]["L4"]["toy"]
    assert list(found["phases"]) == ["constant"]
    assert found["no_total"] == "phase line could not be estimated"
    assert (found["hours"], found["hours_of_a_seed"], found["sessions"]) == (None, None, None)


@pytest.mark.parametrize("device", ["L4", "all"])
def test_where_no_phase_can_be_rehearsed_there_is_no_table(project, capsys, monkeypatch, device):
    def minibatch(self, step, generator):
        return {"x": torch.zeros(4, 1)[torch.zeros(4) > 1], "y": torch.zeros(0, 1)}

    for phase in (toy_method.Line, toy_method.Constant):
        monkeypatch.setattr(phase, "minibatch", minibatch)
    code, out, _ = memory(capsys, "--on", device)
    first, second, total = (line for line in out.splitlines() if line)
    assert code == 1
    assert first.startswith("toy phase line: found code") and second.startswith("toy phase constant: found code")
    assert total.endswith("no total: phases line, constant could not be estimated")


def test_a_phase_that_one_device_cannot_do_keeps_the_totals_of_the_others(project, capsys, monkeypatch):
    options = StepOptions(precision="bf16", warmup_steps=0, clip_norm=None, ema_decay=None)
    change(monkeypatch, options=options)
    out = memory(capsys, "--on", "T4", "L4")[1]
    of_t4, of_l4 = (next(line for line in out.splitlines() if line.startswith(name)) for name in ("T4 ", "L4 "))
    assert "no total: phase line could not be estimated" in of_t4
    assert " min" in of_l4 and "no total" not in of_l4
    assert out.count("toy line: precision: found bf16, expected float32 or fp16 on T4") == 1


def test_the_budget_may_be_of_the_machine_at_hand(project, capsys, monkeypatch):
    write_yaml(project / "spec.yaml", SPEC | {"budget": BUDGET | {"device": "this"}})
    monkeypatch.setattr(hours.Times, "_here", lambda self: devices.find("T4"))
    out = memory(capsys, "--on", "this")[1]
    assert "The budget is 1 hour on the machine at hand: within" in out


def test_processes_share_the_minibatch_and_keep_buckets_of_gradients(project, capsys):
    _, found = as_json(capsys, "--processes", "2")
    line = found["experiments"]["toy"]["phases"]["line"]
    assert line["rows"] == 4
    assert {"name": "gradient buckets", "size": 100}.items() <= line["parts"][0]["allowances"][-1].items()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--on", "T5"], "device: found 'T5', expected"),
        (["nothing"], "found no experiment 'nothing', expected one of: toy"),
        (["--set", "phases.line.batch_size=many"], 'phases.line.batch_size: found "many", expected'),
        (["--micro-batches", "circle=2"], "--micro-batches: found the phase 'circle', expected one of: constant, line"),
        (["--micro-batches", "line=0"], "--micro-batches: found '0', expected a whole number of at least 1"),
        (["--processes", "0"], "expected a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line(project, capsys, options, line):
    try:
        code = main(["memory", *options])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.splitlines()) == 1


def test_overrides_are_printed_as_a_run_prints_them(project, capsys):
    assert "toy: phases.line.batch_size: 8 -> 16" in memory(capsys, "--set", "phases.line.batch_size=16")[2]


def test_a_configuration_without_the_conventional_key_is_told_so(project, capsys, monkeypatch):
    """The phase's minibatch is another key: nothing is guessed."""
    write_yaml(project / "configs" / "toy.yaml", {**CONFIG, "pool_size": 4000000})
    change(monkeypatch, minibatch=lambda self, step, generator: {"x": torch.zeros(self.config.pool_size, 1), "y": torch.zeros(self.config.pool_size, 1)})  # fmt: skip
    code, out, _ = memory(capsys, "--on", "Small")
    assert code == 1
    assert "--set" not in out


@pytest.mark.parametrize(("room", "expected"), [(1000, 90), (700, 60), (699, 59), (119, 1), (109, None)])
def test_the_largest_minibatch_is_found_where_memory_grows_in_proportion(room, expected):
    """100 bytes and 10 a row, for a number of examples that only 1 and 7 divide."""
    assert largest(lambda size: 100 + 10 * size, 97, 1070, room, iterations=7) == expected


def test_sizes_that_divide_the_number_of_examples_are_preferred():
    assert largest(lambda size: 100 + 10 * size, 100, 1100, 930, iterations=6) == 75  # and not 83


def test_a_size_that_needs_more_than_the_line_says_is_not_advised():
    """An algorithm with a workspace takes over below 60 rows: at 50 the line says 600 bytes, it is 800."""

    def needs(size):
        return 100 + 10 * size + (0 if size > 60 or size == 48 else 200)

    found = largest(needs, 97, 1070, 650, iterations=1)
    assert needs(found) <= 650


def test_the_largest_minibatch_is_a_multiple_of_the_processes():
    assert largest(lambda size: size, 96, 96, 50, multiple=8) == 48


@pytest.mark.parametrize(
    ("room", "now", "expected"),
    [(1069, 1, 2), (600, 1, 2), (350, 1, 4), (180, 1, 13), (110, 1, 97), (109, 1, None), (350, 3, 4)],
)
def test_the_fewest_micro_batches_are_found_where_memory_grows_in_proportion(room, now, expected):
    """100 bytes and 10 a row, of 97 rows."""
    tried = []

    def needs(count):
        tried.append(count)
        return 100 + 10 * -(-97 // count)

    assert fewest(needs, 97, needs(now), room, now) == expected
    assert len(tried) <= 7


def test_the_fewest_micro_batches_are_found_where_the_line_is_wrong():
    """A workspace below 30 rows: no line goes through these points."""

    def needs(count):
        rows = -(-256 // count)
        return 100 + rows**2 + (700 if 8 < rows < 30 else 0)

    found = fewest(needs, 256, needs(1), 500)
    assert needs(found) <= 500 < needs(found - 1)
