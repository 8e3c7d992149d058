"""What a step costs, and how long that takes: against counts made by hand, and against planted mistakes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from repro.errors import BadInput
from repro_tools.cli import main
from repro_tools.memory import cost, duration, roofline, this_machine, words
from repro_tools.memory.cost import Cost, Op, step_cost
from repro_tools.memory.devices import DEVICES, find
from repro_tools.memory.duration import (
    DISK_BYTES_S,
    PartCost,
    PhaseCost,
    sessions,
    time_of,
    warnings_of,
)
from repro_tools.memory.fake import fake_tensors
from repro_tools.memory.measured import Measured, read_measured
from repro_tools.memory.roofline import Range, predict
from repro_tools.memory.this_machine import Curve
from repro_tools.memory.this_machine import Measured as MeasuredMachine

FLOAT = 4


def recorded(make):
    """The cost of the call that `make()` returns, all made on fake tensors."""
    with fake_tensors():
        return step_cost(make())


def of_kind(found, kind):
    return {op: times for op, times in found.ops.items() if op.kind == kind}


# Arithmetic


def test_a_linear_step_counts_three_products():
    def make():
        layer, x = nn.Linear(20, 30, bias=False), torch.zeros(8, 20, requires_grad=True)
        return lambda: layer(x).sum().backward()

    assert recorded(make).flops == 3 * 2 * 8 * 20 * 30  # forward, gradient of the weight, gradient of the input


def test_the_gradient_of_an_input_that_needs_none_is_not_counted():
    def make():
        layer, x = nn.Linear(20, 30, bias=False), torch.zeros(8, 20)
        return lambda: layer(x).sum().backward()

    assert recorded(make).flops == 2 * 2 * 8 * 20 * 30


@pytest.mark.parametrize("groups, stride, side", [(1, 1, 10), (4, 1, 10), (1, 2, 5)])
def test_a_convolution_step_counts_three_products(groups, stride, side):
    """PyTorch's own counter takes the gradient of a grouped weight `groups` times (torch 2.13)."""

    def make():
        layer = nn.Conv2d(8, 12, 3, stride, padding=1, groups=groups, bias=False)
        x = torch.zeros(2, 8, 10, 10, requires_grad=True)
        return lambda: layer(x).sum().backward()

    assert recorded(make).flops == 3 * 2 * 2 * side * side * 12 * (8 // groups) * 9


def test_a_transposed_convolution_counts_the_positions_of_its_input():
    def make():
        layer, x = nn.ConvTranspose2d(8, 12, 4, 2, 1, bias=False), torch.zeros(2, 8, 10, 10, requires_grad=True)
        return lambda: layer(x).sum().backward()

    assert recorded(make).flops == 3 * 2 * 2 * 10 * 10 * 8 * 12 * 16


def test_attention_counts_two_products_forward_and_five_backward():
    def make():
        query, key, value = (torch.zeros(2, 3, 64, 16, requires_grad=True) for _ in range(3))
        return lambda: functional.scaled_dot_product_attention(query, key, value).sum().backward()

    found = recorded(make)
    product = 2 * 2 * 3 * 64 * 64 * 16
    assert {op.kind: op.flops for op in found.ops if op.flops} == {
        "attention": 2 * product,
        "attention backward": 5 * product,  # the fused kernel computes the weights again
    }


def test_an_lstm_counts_its_gates():
    """Taken apart, as it is on fake tensors; the first step's hidden state is a constant and needs no gradient."""

    def make():
        layer, x = nn.LSTM(10, 16), torch.zeros(5, 3, 10)
        return lambda: layer(x)[0].sum().backward()

    of_inputs, of_hidden = (2 * 5 * 3 * 4 * 16 * width for width in (10, 16))
    assert recorded(make).flops == 2 * (of_inputs + of_hidden) + of_hidden * 4 // 5


def test_an_lstm_in_one_piece_counts_the_same_forward():
    """As it is on a real CPU."""
    layer, x = nn.LSTM(10, 16), torch.zeros(5, 3, 10)
    with torch.no_grad():
        found = step_cost(lambda: layer(x))
    assert found.flops == 2 * 5 * 3 * 4 * 16 * (10 + 16)


def test_distances_count_their_product():
    def make():
        x, y = torch.zeros(50, 7), torch.zeros(40, 7)
        return lambda: torch.cdist(x, y)

    assert recorded(make).flops == 2 * 50 * 40 * 7


def test_products_are_told_by_their_precision():
    def make():
        layer, x = nn.Linear(20, 30), torch.zeros(8, 20)

        def call():
            with torch.autocast("cpu", torch.bfloat16):
                layer(x)

        return call

    found = recorded(make)
    assert {op.dtype for op in found.ops if op.flops} == {"bfloat16"}
    assert found.has_half_products


def test_what_nobody_counts_is_named():
    def make():
        matrix = torch.eye(6)
        return lambda: torch.linalg.qr(matrix)

    assert recorded(make).unknown == ("aten.linalg_qr",)


# Traffic


def test_an_elementwise_operation_reads_its_inputs_and_writes_its_result():
    def make():
        x, y = torch.zeros(10, 10), torch.zeros(10, 10)
        return lambda: x + y

    (op,) = recorded(make).ops
    assert (op.kind, op.read, op.written, op.flops) == ("elementwise", 2 * 100 * FLOAT, 100 * FLOAT, 0)


@pytest.mark.parametrize(
    "call, read, written",
    [
        (lambda x, y: x.add_(y), 2, 1),
        (lambda x, y: x.copy_(y), 1, 1),
        (lambda x, y: x.zero_(), 0, 1),
        (lambda x, y: x * x, 1, 1),
        (lambda x, y: torch.add(x, y[:1].expand(100, 1)), 1, 1),
        (lambda x, y: torch._foreach_add_([x, y], 1.0), 2, 2),
    ],
    ids=["in place", "copy", "fill", "the same twice", "expanded", "a list in place"],
)
def test_bytes_are_those_that_move(call, read, written):
    def make():
        x, y = torch.zeros(100, 1), torch.zeros(100, 1)
        return lambda: call(x, y)

    found = recorded(make)
    extra = FLOAT if "expand" in str([op.name for op in found.ops]) else 0  # the one number that is repeated
    moved = [(op.read - extra, op.written) for op in found.ops if op.kind != "view"]
    assert moved == [(read * 100 * FLOAT, written * 100 * FLOAT)]


def test_views_are_free_but_the_host_hands_them_out():
    def make():
        x = torch.zeros(6, 6)
        return lambda: x.view(36).unflatten(0, (4, 9)).transpose(0, 1)[1:].detach()

    found = recorded(make)
    assert (found.bytes, found.kernels) == (0, 0)
    assert found.calls >= 4


def test_of_a_table_only_the_rows_that_are_taken_move():
    def make():
        table, rows = torch.zeros(1000, 8), torch.zeros(5, dtype=torch.long)
        return lambda: table.index_select(0, rows)

    assert recorded(make).bytes == 2 * 5 * 8 * FLOAT + 5 * 8


def test_allocating_moves_nothing():
    assert recorded(lambda: lambda: torch.empty(1000)).bytes == 0


def test_operations_made_of_others_count_their_passes():
    """logsumexp is one operation for a mode, and seven kernels for a GPU."""

    def make():
        x = torch.zeros(100, 100)
        return lambda: x.logsumexp(1)

    (op,) = (op for op in recorded(make).ops if op.kind != "view")
    assert op.kernels == 7
    assert op.bytes == 6 * 10_000 * FLOAT


def test_fake_and_real_tensors_cost_the_same():
    def make():
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        adam, x = torch.optim.Adam(network.parameters()), torch.zeros(4, 3, 8, 8)

        def step():
            adam.zero_grad()
            network(x).square().mean().backward()
            adam.step()

        step()
        return step

    assert recorded(make).ops == step_cost(make()).ops


def test_costs_add_up():
    op = Op("mm", "product", "float32", 10, 20, 30, 5, False, 1)
    twice = Cost({op: 1}) + Cost({op: 2}, ("aten.qr",))
    assert (twice.flops, twice.bytes, twice.calls, twice.unknown) == (30, 150, 3, ("aten.qr",))


# Time


def large_product(dtype="float32", n=8192):
    size = n * n * (4 if dtype == "float32" else 2)
    return Cost({Op("mm", "product", dtype, 2 * n**3, 2 * size, size, n * n, False, 1): 1})


def traffic(size=2**30):
    return Cost({Op("add", "elementwise", "float32", 0, 2 * size, size, size // 4, False, 1): 1})


def small_operations(count=10_000):
    return Cost({Op("add", "elementwise", "float32", 0, 8, 4, 1, False, 1): count})


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("work", [large_product(), traffic(), small_operations()], ids=["product", "traffic", "small"])
def test_a_range_is_in_order_and_never_beats_the_data_sheet(device, work):
    found = predict(work, device)
    assert 0 < found.low < found.likely < found.high
    assert found.low >= work.flops / device.peak("float32")
    assert found.low >= work.bytes / device.bandwidth_bytes_s


def test_a_large_product_takes_its_share_of_the_peak():
    found, flops = predict(large_product(), find("A100-40")), 2 * 8192**3
    share = roofline.UTILISATION["product float32"].likely
    assert found.likely == pytest.approx(flops / (19.5e12 * share), rel=0.01)


def test_many_small_operations_take_the_time_of_handing_them_out():
    """Planted: overhead left out. Ten thousand additions of one number would take 0.3 microseconds."""
    found = predict(small_operations(), find("H100-SXM"))
    assert found.likely == pytest.approx(10_000 * roofline.CALL_S.likely)


@pytest.mark.parametrize("faster, slower", [("H100-SXM", "A100-40"), ("A100-40", "T4"), ("RTX 4090", "RTX 3060")])
@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("work", [large_product(), traffic(), small_operations()], ids=["product", "traffic", "small"])
def test_a_faster_device_is_never_slower(faster, slower, precision, work):
    fast, slow = predict(work, find(faster), precision), predict(work, find(slower), precision)
    assert fast.low <= slow.low
    assert fast.likely <= slow.likely
    assert fast.high <= slow.high


def test_precision_chooses_the_peak_of_products_and_of_nothing_else():
    a100 = find("A100-40")
    times = [predict(large_product(), a100, precision).likely for precision in ("float32", "tf32", "bf16")]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[2] > 5
    assert predict(traffic(), a100, "bf16") == predict(traffic(), a100)


def test_what_stays_float32_under_autocast_is_not_made_faster():
    mixed = large_product("bfloat16") + large_product()
    assert predict(mixed, find("A100-40"), "bf16") == predict(mixed, find("A100-40"), "float32")


def test_bf16_on_a_t4_is_refused_in_one_line():
    with pytest.raises(BadInput, match=r"^precision: found bf16, expected float32 or fp16 on T4$"):
        predict(large_product("bfloat16"), find("T4"))


def test_tf32_on_a_t4_is_float32_as_in_pytorch():
    assert predict(large_product(), find("T4"), "tf32") == predict(large_product(), find("T4"))


def test_a_range_out_of_order_is_no_range():
    with pytest.raises(ValueError, match="in order"):
        Range(2.0, 1.0, 3.0)


def test_counting_the_forward_pass_alone_is_noticed():
    """Planted: the step without its gradients is a third of the arithmetic."""

    def make(backward):
        layer, x = nn.Linear(512, 512, bias=False), torch.zeros(4096, 512, requires_grad=True)
        return (lambda: layer(x).sum().backward()) if backward else (lambda: layer(x))

    whole, forward = (predict(recorded(lambda: make(backward)), find("T4")) for backward in (True, False))
    assert whole.likely > 2.5 * forward.likely


def test_a_sparse_peak_is_noticed():
    """Planted: the figure that the data sheet prints, with sparsity, halves the time of a large product."""
    h100 = find("H100-SXM")
    sparse = replace(h100, peak_flops={**h100.peak_flops, "bf16": 2 * h100.peak("bf16")})
    work = large_product("bfloat16", 32768)
    assert predict(work, h100).likely == pytest.approx(2 * predict(work, sparse).likely, rel=0.01)
    assert work.flops / predict(work, h100).low < 989.5e12


# Phases, sessions, checkpoints


def phase_cost(steps=1000, work=None, state_bytes=10**9, section=None):
    parts = (PartCost("step", steps, work or large_product()), PartCost("pool", 10, traffic()))
    return PhaseCost("first", parts, "float32", state_bytes, section or {})


def test_hours_of_a_phase_are_steps_and_work_and_saving():
    t4 = find("T4")
    found = time_of(phase_cost(), t4, every=100)
    step = predict(large_product(), t4).likely + duration.TRAINER.likely
    expected = 1000 * step + 10 * predict(traffic(), t4).likely + 10 * 1e9 / DISK_BYTES_S
    assert found.hours.likely * 3600 == pytest.approx(expected)


def test_sessions_are_whole():
    assert sessions(Range(0.1, 9.0, 9.1), 9.0) == (1, 1, 2)


def test_states_that_lie_too_far_apart_are_warned_of():
    found = time_of(phase_cost(steps=100_000), find("T4"), every=50_000)
    (line,) = warnings_of(found, session_hours=9.0)
    fitting = int(0.1 * 9 * 3600 / found.parts[0].once.high)
    assert "more than a tenth of a session of 9 h" in line
    assert line.endswith(f"--set pace.checkpoint_every={fitting}")
    assert warnings_of(time_of(phase_cost(steps=100_000), find("T4"), every=fitting), session_hours=9.0) == []


def test_a_phase_shorter_than_its_pace_is_not_warned_of():
    assert warnings_of(time_of(phase_cost(steps=10), find("T4"), every=50_000), session_hours=9.0) == []


def test_saving_that_takes_its_time_is_warned_of():
    found = time_of(phase_cost(), find("T4"), every=10)
    (line,) = warnings_of(found, session_hours=None)
    assert "saving 1000 MB every 10 steps" in line
    every = int(line.rpartition("=")[2])
    assert warnings_of(time_of(phase_cost(), find("T4"), every=every), session_hours=None) == []


# Measured times


def measured(seconds=0.5, device="Tesla T4", section=None):
    return Measured("line", "first", seconds, device, 1, section or {}, "record.json")


def test_a_measured_step_takes_the_place_of_the_prediction():
    found = time_of(phase_cost(), find("T4"), 100, "line", [measured(0.5), measured(0.7), measured(0.6)])
    assert found.parts[0].once == Range(0.5, 0.6, 0.7)
    assert found.parts[0].basis == "measured, 3 records"


def test_another_device_is_scaled_by_the_ratio_of_the_predictions():
    t4, a100 = find("T4"), find("A100-40")
    predicted = [time_of(phase_cost(), device, 100).parts[0].once for device in (t4, a100)]
    found = time_of(phase_cost(), a100, 100, "line", [measured(0.5)]).parts[0]
    assert found.once.likely == pytest.approx(0.5 * predicted[1].likely / predicted[0].likely, rel=0.01)
    assert found.once.low < found.once.likely < found.once.high
    assert found.basis == "scaled from T4, measured"


@pytest.mark.parametrize(
    "other", [measured(section={"batch_size": 8}), measured(device="cpu"), replace(measured(), experiment="curve")]
)
def test_what_was_measured_of_something_else_is_passed_over(other):
    found = time_of(phase_cost(section={"batch_size": 16}), find("T4"), 100, "line", [other])
    assert found.parts[0].basis == "data sheet"


def test_too_few_steps_are_passed_over_but_not_all_steps_of_a_short_phase():
    few, whole = (replace(measured(), steps=steps) for steps in (99, 40))
    (found, one) = (
        time_of(phase_cost(steps=steps), find("T4"), 100, "line", [given])
        for steps, given in ((1000, few), (40, whole))
    )
    assert found.parts[0].basis == "data sheet" and found.passed_over == ((few, "fewer than 100 steps"),)
    assert one.parts[0].basis == "measured, 1 record" and one.passed_over == ()


def record(**changes):
    phases = {"first": {"iterations": 100, "batch_size": 16, "learning_rate": 0.1}}
    machine = {"device": "Tesla T4", "threads": 2}
    whole = {
        "experiment": "line",
        "config": {"phases": phases},
        "wall_s": {"first": 60.0},
        "prepare_s": {"first": 10.0},
    }
    return whole | {"machine": machine, "processes": 1} | changes


def test_a_record_gives_seconds_per_step_without_the_preparation(tmp_path):
    (tmp_path / "runs" / "line").mkdir(parents=True)
    (tmp_path / "runs" / "line" / "record.json").write_text(json.dumps(record()))
    (found,) = read_measured(tmp_path)
    assert (found.seconds, found.device, found.section) == (0.5, "Tesla T4", {"batch_size": 16})


def test_records_of_several_processes_are_passed_over(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(record(processes=2)))
    with pytest.raises(BadInput, match="found no record of a run"):
        read_measured(tmp_path)


def test_a_small_file_gives_seconds_per_step(tmp_path):
    path = tmp_path / "steps.yaml"
    path.write_text("device: T4\nseconds_per_step:\n  line: {first: 0.25}\n")
    (found,) = read_measured(path)
    assert (found.experiment, found.phase, found.seconds, found.device) == ("line", "first", 0.25, "T4")


@pytest.mark.parametrize(
    "text, complaint", [("device: T4\n", "seconds_per_step"), ("seconds_per_step: {a: {b: -1}}\ndevice: T4\n", "a.b")]
)
def test_a_small_file_that_says_something_else_is_refused(tmp_path, text, complaint):
    path = tmp_path / "steps.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=complaint):
        read_measured(path)


@pytest.mark.parametrize("content", ["{}", "no json", '{"machine": 3}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(BadInput, match="found no record of a run"):
        read_measured(path)


# This machine


def test_a_probe_measures_what_it_counts():
    """No wall-clock assertion: the speed is the counted work by the time that a given clock says it took."""
    x = torch.zeros(256)
    size, speed = this_machine._rate([lambda: x + x], "bytes", bare_s=0.0)
    assert size == 2 * 256 * FLOAT
    assert speed > 0


def test_curves_run_through_their_points_and_stay_level_beyond():
    curve = Curve([1e3, 1e6], [1e9, 4e9])
    assert [curve(size) for size in (1, 1e3, 1e6, 1e9)] == pytest.approx([1e9, 1e9, 4e9, 4e9])
    assert curve(math.sqrt(1e9)) == pytest.approx(2e9)


def test_measured_speeds_predict_in_order():
    level = Curve([1.0], [1e10])
    keys = [("product", False, False), ("product", False, True)]
    found = MeasuredMachine(1, dict.fromkeys(keys, level), {"elementwise": level}, 1e-6, 1e-7, 0.0).speeds
    predicted = predict(large_product() + small_operations(), found)
    assert predicted.low < predicted.likely < predicted.high
    assert predicted.low > 2 * 8192**3 / 1e10 / this_machine.IN_A_STEP.low


def test_a_formula_for_every_kind_of_product_has_a_share_of_the_peak():
    assert {f"{kind} {unit}" for kind in cost.PRODUCTS for unit in ("float32", "tensor")} <= set(
        roofline.UTILISATION
    ) | {"recurrent tensor"}


# The command


def test_the_command_gives_hours_of_every_phase(project, capsys):
    assert main(["memory", "toy", "--on", "T4", "--session-hours", "9", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)["time"]["devices"]["T4"]["toy"]
    assert found["missing"] == []
    for phase in found["phases"].values():
        low, likely, high = phase["hours"]
        assert 0 < low < likely < high
    assert found["hours"][1] > found["hours_of_a_seed"][1]
    assert found["sessions"] == [1, 1, 1]


def test_the_command_measures_this_machine_when_asked(project, capsys, monkeypatch):
    from repro_tools.memory import hours

    level = Curve([1.0], [1e9])
    keys = [(kind, False, half) for kind in cost.PRODUCTS for half in (False, True)]
    probes = MeasuredMachine(1, dict.fromkeys(keys, level), {"elementwise": level}, 1e-6, 1e-7, 0.0)
    monkeypatch.setattr(hours, "measure", lambda: probes)
    main(["memory", "toy", "--on", "this"])
    assert "probes of this machine" in capsys.readouterr().out


def toy_record(project, name="toy", **changes):
    """A finished run of the toy, all of its steps."""
    sections = {"line": (12, 8), "constant": (9, 4)}
    phases = {
        phase: {"iterations": steps, "batch_size": rows, "learning_rate": 0.01}
        for phase, (steps, rows) in sections.items()
    }
    path = project / "runs" / name / "seed-0" / "record.json"
    path.parent.mkdir(parents=True)
    whole = {"experiment": "toy", "config": {"phases": phases}, "wall_s": {"line": 24.0, "constant": 9.0}}
    path.write_text(json.dumps(record(**(whole | {"prepare_s": {}} | changes))))
    return phases


def page_of(capsys, *options):
    main(["memory", "toy", "--on", "T4", "--measured", "runs", *options])
    return capsys.readouterr().out


def test_where_every_time_is_measured_the_page_names_the_folder_and_no_estimate(project, capsys):
    toy_record(project)
    page = page_of(capsys).partition("time: likely")[2]
    assert "Every time was measured on this device." in page and "estimate" not in page and "passed over" not in page
    assert "Measured times are from runs/toy (1 file)" in page


def test_records_of_a_cpu_are_passed_over_aloud(project, capsys):
    toy_record(project, machine={"device": "cpu", "threads": 1})
    page = page_of(capsys).partition("time: likely")[2]
    assert "1 record passed over: measured on cpu\n" in page and "Measured times are from" not in page


def test_short_runs_are_passed_over_aloud(project, capsys):
    short = toy_record(project)
    toy_record(project, "smoke", config={"phases": {name: one | {"iterations": 5} for name, one in short.items()}})
    page = page_of(capsys)
    assert "2 phases of 1 record passed over: fewer than 100 steps\n" in page
    assert "Measured times are from runs/toy (1 file)\n" in page


def test_records_of_other_experiments_and_settings_are_passed_over_aloud(project, capsys):
    toy_record(project, experiment="curve")
    phases = toy_record(project, "other")
    (project / "runs/other/seed-0/record.json").unlink()
    toy_record(project, "wide", config={"phases": {name: one | {"batch_size": 99} for name, one in phases.items()}})
    page = page_of(capsys)
    assert "1 record passed over: of other experiments: curve\n" in page
    assert "2 phases of 1 record passed over: another setting of the phase\n" in page


def test_starting_a_run_is_said_to_be_missing(project, capsys):
    main(["memory", "toy", "--on", "T4"])
    assert "Not in it: starting a run" in capsys.readouterr().out


def test_one_of_a_thing_has_no_s_and_a_range_of_equal_ends_is_one_number(project, capsys):
    toy_record(project)
    page = page_of(capsys, "--session-hours", "1")
    assert "; 1 session of 1 h\n" in page and "2,000\n" not in page
    assert "2.0 (" not in page and " 2,000 " in page  # milliseconds, measured once


@pytest.mark.parametrize(
    "seconds, expected",
    [(0, "0 s"), (1e-6, "< 0.01 ms"), (0.00094, "0.94 ms"), (0.062, "62 ms"), (0.5, "0.5 s"), (42, "42 s"), (300, "5 min"), (359, "6 min"), (360, "0.1 h"), (3600, "1 h"), (90_000, "25 h")],
)  # fmt: skip
def test_times_in_words(seconds, expected):
    assert words.in_words(seconds) == expected


@pytest.mark.parametrize(
    "hours, expected", [(1, "1 hour"), (1.5, "1.5 hours"), (9, "9 hours"), (0.05, "3 min"), (0.005, "18 s")]
)
def test_hours_in_words(hours, expected):
    assert words.in_hours(hours) == expected


def test_a_path_without_records_is_refused_before_anything_is_printed(project, capsys):
    assert main(["memory", "toy", "--on", "T4", "--measured", "nowhere"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--measured: found no nowhere" in said.err


@pytest.mark.gpu
def test_a_step_on_this_gpu_lies_in_its_range():
    """Not yet run: no GPU was at hand. One product that fills the device, against its data sheet."""
    sheet = find(torch.cuda.get_device_name())
    n = 8192
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = False
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        a @ b
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1e3 / 10
    found = predict(large_product(n=n), sheet)
    assert found.low <= seconds <= found.high


@pytest.mark.parametrize(("iterations", "unit"), [(12, "min"), (10**9, "hours")])
def test_the_table_of_times_has_the_unit_that_suits_its_longest_phase(project, capsys, iterations, unit):
    assert main(["memory", "--on", "T4", "--set", f"phases.*.iterations={iterations}"]) in (0, 1)
    (header,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("time: likely"))
    assert header.split()[-2:] == [unit, "from"]
