"""Two processes of one run, joined by gloo as torchrun joins them, against one process with the same minibatches."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from forked import LONGEST_S, LOOPBACK, run, run_ranks
from tiny_project import DIGITS, UNET, merged, write_project
from torch import nn
from toy_method import Line
from toy_project import python_path

import repro_tools.run
from nsgf.config import ImageConfig
from nsgf.phases import make_phases
from repro import checkpoint, rounds, runtime
from repro import run as running
from repro.__main__ import main
from repro.config import load
from repro.errors import BadInput
from repro.randomness import derive_seed
from repro.runtime import Runtime, World, world_of_this_process
from repro.update import Update, rows_of
from repro_tools import cli

ENDED = "repro: ended by SIGTERM; go on with the same command and --resume\n"
ANOTHER = r"repro: process \d of 2: another one ended; the last saved state is kept, go on with .* --resume\n"
SMOOTH = {"network": {**UNET, "dropout": 0.0}, "precision": "float32"}
SHARED = merged(DIGITS, {"phases": {"velocity_field": SMOOTH, "straight_flow": SMOOTH}})


def quick(arguments):
    """The command line without a look through everything that is installed, which takes longer than a run."""
    running.imported_versions = dict
    return main(arguments)


def smooth(arguments):
    """The toy without dropout, whose draws each process has for itself."""
    Line.make_model = lambda self: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    return quick(arguments)


def at_step(number, act):
    """Has `act` called before the minibatch of that step of the line phase."""
    original = Line.minibatch

    def minibatch(self, step, draws):
        if step == number:
            act()
        return original(self, step, draws)

    Line.minibatch = minibatch


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def asked_at_step_3(arguments):
    at_step(3, ask)
    return quick(arguments)


def smooth_asked_at_step_3(arguments):
    at_step(3, ask)
    return smooth(arguments)


def killed_at_step_7(arguments):
    at_step(7, lambda: ask(signal.SIGKILL))
    return quick(arguments)


def failing_at_step_7(arguments):
    def fail():
        raise MemoryError("no room for step 7")

    at_step(7, fail)
    return quick(arguments)


def refused(arguments):
    def check(self, folder):
        raise BadInput("phases.line: found no room, expected some")

    Line.check = check
    return quick(arguments)


def noting_its_draws(arguments):
    """Writes what the global generator was seeded with in each loss of the line, from which dropout draws, and outside of the parts."""
    inside, outside, step, loss = [], [], Line.train_step, Line.loss

    def noting(*given):
        inside.append(torch.initial_seed())
        return loss(*given)

    def train_step(self, state, batch, update):
        if type(update) is not Update:  # one that only tries the parts
            step(self, state, batch, update)
            return
        Line.loss = noting
        outside.append(torch.initial_seed())
        step(self, state, batch, update)
        outside.append(torch.initial_seed())
        Line.loss = loss

    Line.train_step = train_step
    code = quick(arguments)
    Path(f"draws.{os.environ['RANK']}").write_text(json.dumps([inside, outside]))
    return code


def without_room_for_a_state(arguments):
    def save_file(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    checkpoint.save_file = save_file
    return quick(arguments)


def keeping_the_pool(arguments, name):
    """Copies the pool as soon as it is finished to `name`.pool; the run deletes its own."""
    seal = rounds.seal

    def keep(folder):
        made = seal(folder)
        shutil.copytree(folder / made, f"{name}.pool")
        return made

    rounds.seal = keep
    return quick(arguments)


def noting_what_it_writes(arguments, name):
    """Writes to `name`.json which files the process opened to write, renamed or deleted."""
    noted = set()

    def hook(event, details):
        if event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            noted.add(("opened", Path(str(details[0])).name))
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            noted.add((event, Path(str(details[0])).name))

    def save_file(tensors, path, metadata=None):
        noted.add(("saved", path.name))

    checkpoint.save_file = running.save_file = save_file  # which is no Python, so that no hook sees it
    sys.addaudithook(hook)
    code = quick(arguments)
    Path(f"{name}.json").write_text(json.dumps(sorted(noted)))
    return code


def in_rounds(arguments, name):
    """The line in rounds of four steps, whose data is half of the pool; notes what the process writes."""
    Line.collect_every = 4

    def collect(self, state, update):
        x = self.pool[torch.randint(len(self.pool), (32,), generator=update.generator("half"))]
        return {"x": x, "y": 2 * x + 1}

    Line.collect = collect

    def minibatch(self, step, draw):
        rows = draw.round_rows(self.config.phases.line.batch_size, last="keep")
        return {name: column[rows] for name, column in draw.collected.items()}

    Line.minibatch = minibatch
    return noting_what_it_writes(arguments, name) if os.environ.get("RANK") == "1" else quick(arguments)


def states(folder):
    """Every weight and every loss of a finished run."""
    weights, losses = {}, []
    for path in sorted(folder.glob("*/seed-0/*/model.safetensors")):
        state = checkpoint.load(path)
        weights |= {f"{path.parent.name}/{name}": weight for name, weight in state["networks"]["model"].items()}
        losses += [loss for _, loss in state["curves"]["loss"]]
    return weights, torch.tensor(losses, dtype=torch.float64)


def assert_close(one, other):
    assert one[0].keys() == other[0].keys()
    for name, weight in one[0].items():
        torch.testing.assert_close(
            weight, other[0][name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-5)


def assert_same(one, other):
    assert one[0].keys() == other[0].keys() and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert torch.equal(one[1], other[1])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The tiny digits experiment, all of it, by one process and by two."""
    root = write_project(tmp_path_factory.mktemp("digits"), "digits", SHARED)
    command = ["run", "digits", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(keeping_the_pool, [*command, "--runs", "one"], "one", output=root / "log") == 0
        ranks = [keeping_the_pool, noting_what_it_writes]
        assert run_ranks(ranks, [*command, "--runs", "two"], "two", output=root / "two.log") == [0, 0]
    return root


def test_two_processes_train_what_one_trains(digits):
    assert_close(states(digits / "one"), states(digits / "two"))


def test_a_shared_pool_is_that_of_one_process_bit_for_bit(digits):
    """It has three minibatches: one process builds two of them, the other one."""
    one, two = (
        {path.name: path.read_bytes() for path in (digits / f"{name}.pool").iterdir()} for name in ("one", "two")
    )
    assert one == two and len(one) == 4


def test_only_the_first_process_writes(digits):
    """The second fills its part of the files that the first has made."""
    assert json.loads((digits / "two.json").read_text()) == []


def test_only_the_first_process_speaks(digits):
    assert (digits / "two.log").read_text().endswith("\ntwo/digits/seed-0\n")
    assert (digits / "two.log.1").read_text() == ""


def test_the_record_says_how_many_processes_there_were(digits):
    records = [json.loads((digits / runs / "digits/seed-0/record.json").read_text()) for runs in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]


@pytest.fixture
def toy(project):
    """Runs the toy in processes that do what the functions given do, one each."""

    def train(functions, runs, *options):
        command = ["run", "toy", "--device", "cpu", "--runs", runs, *options]
        codes = run_ranks(functions, command, output=project / f"{runs}.log")
        logs = [project / f"{runs}.log", *(project / f"{runs}.log.{rank}" for rank in range(1, len(functions)))]
        found = [log.read_text() if log.exists() else "" for log in logs]
        for log in logs:
            log.unlink(missing_ok=True)
        return codes, found

    return train


def steps_done(project, runs):
    return checkpoint.load(project / runs / "toy/seed-0/1-line/running.safetensors")["steps_done"]


@pytest.mark.parametrize("asked", [0, 1])
def test_all_processes_stop_together_when_one_is_asked_to_and_go_on_to_the_same_bits(project, toy, asked):
    """Dropout is on: each process goes on with its own draws."""
    assert toy([quick, quick], "whole")[0] == [0, 0]
    functions = [quick, quick]
    functions[asked] = asked_at_step_3
    codes, logs = toy(functions, "runs")
    assert codes == [143, 143] and "".join(logs) == ENDED  # one of them says so
    assert steps_done(project, "runs") == 4
    assert toy([quick, quick], "runs", "--resume")[0] == [0, 0]
    assert_same(states(project / "whole"), states(project / "runs"))


def test_parts_draw_dropout_of_their_own_and_one_process_what_it_always_drew(project, toy):
    """Each part drops units of other examples: the same draws would tie them together. Elsewhere all processes draw the same."""
    assert toy([noting_its_draws], "one")[0] == [0]
    inside, outside = json.loads((project / "draws.0").read_text())
    assert inside == [derive_seed(0, "line", "step", step) for step in range(12)]
    assert toy([noting_its_draws] * 2, "two", "--micro-batches", "line=2")[0] == [0, 0]
    (one, before_one), (two, before_two) = (json.loads((project / f"draws.{rank}").read_text()) for rank in (0, 1))
    assert len({*inside, *one, *two}) == 5 * 12
    assert before_one == before_two and len(set(before_one)) == 2 * 12


def shuffling_before_the_parts(arguments):
    """Takes the rows of the minibatch in an order that the step draws, outside of the loop over parts."""
    step = Line.train_step

    def train_step(self, state, batch, update):
        order = torch.randperm(len(batch["x"]))
        step(self, state, {name: column[order] for name, column in batch.items()}, update)

    Line.train_step = train_step
    return smooth(arguments)


def test_what_a_step_draws_outside_of_the_parts_is_the_same_in_all_processes(project, toy):
    """Otherwise some rows would be trained on twice, and others not at all."""
    assert toy([shuffling_before_the_parts], "one")[0] == [0]
    assert toy([shuffling_before_the_parts] * 2, "two", "--micro-batches", "2")[0] == [0, 0]
    assert_close(states(project / "one"), states(project / "two"))


def test_the_data_of_a_round_is_written_by_the_first_process(project, toy):
    """Both would write one file of the same name at once."""
    codes = run_ranks([in_rounds] * 2, ["run", "toy", "--device", "cpu"], "rounds", output=project / "log")
    assert codes == [0, 0], (project / "log").read_text() + (project / "log.1").read_text()
    assert json.loads((project / "rounds.json").read_text()) == []


def test_what_two_processes_saved_one_process_ends(project, toy):
    assert toy([smooth], "whole")[0] == [0]
    assert toy([smooth, smooth_asked_at_step_3], "runs")[0] == [143, 143]
    assert toy([smooth], "runs", "--resume")[0] == [0]
    assert_close(states(project / "whole"), states(project / "runs"))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on_to_the_same_bits(project, toy, killed):
    """The last state before step 7 is that of step 5."""
    assert toy([quick, quick], "whole")[0] == [0, 0]
    functions = [quick, quick]
    functions[killed] = killed_at_step_7
    codes, _ = toy(functions, "runs")
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    assert steps_done(project, "runs") == 5
    assert toy([quick, quick], "runs", "--resume")[0] == [0, 0]
    assert_same(states(project / "whole"), states(project / "runs"))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([quick, failing_at_step_7], "MemoryError: no room for step 7"),
        ([without_room_for_a_state, quick], "No space left on device): found "),
    ],
    ids=["in a step", "in saving"],
)
def test_a_process_that_fails_ends_the_others(toy, functions, message):
    codes, logs = toy(functions, "runs")
    assert codes == [1, 1] and message in "".join(logs) and "another one ended" not in "".join(logs)


def test_a_process_that_is_refused_alone_ends_the_others_in_one_line_before_anything_is_written(project, toy):
    codes, logs = toy([quick, refused], "runs")
    assert codes == [1, 2] and logs == ["", "repro: phases.line: found no room, expected some\n"]
    assert not (project / "runs").exists()


def test_a_minibatch_of_fewer_rows_than_processes_is_refused_in_one_line(toy):
    codes, logs = toy([quick, quick], "runs", "--set", "phases.line.batch_size=1")
    line = "repro: phases.line.batch_size: found a minibatch of 1 rows, expected at least 2, one a process"
    assert codes == [2, 2] and [one for log in logs for one in log.splitlines() if one.startswith("repro: ")] == [line]


def test_a_batch_size_of_fewer_rows_than_processes_is_refused_before_anything_is_written(tmp_path):
    config, _ = load(ImageConfig, write_project(tmp_path, "digits", SHARED) / "configs" / "digits.yaml")
    phase = make_phases(config, Runtime(torch.device("cpu"), world=World(0, 9)))[1]
    with pytest.raises(
        BadInput, match="phases.straight_flow.batch_size: found a minibatch of 8 rows, expected at least 9"
    ):
        phase.check(tmp_path)


@pytest.mark.parametrize(("rows", "parts"), [(6, 3), (7, 3), (7, 7), (9, 4)])
def test_parts_are_all_rows_each_once(rows, parts):
    batch = {"x": torch.arange(2 * rows).reshape(rows, 2), "t": torch.arange(rows)}
    shares = [{name: column[rows_of(part, parts)] for name, column in batch.items()} for part in range(parts)]
    sizes = [len(share["x"]) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == rows
    assert sorted(row for share in shares for row in share["t"].tolist()) == list(range(rows))
    assert all(torch.equal(share["x"][:, 0], 2 * share["t"]) for share in shares)  # rows stay together
    assert sorted(item for rank in range(3) for item in World(rank, 3).share(range(7))) == list(range(7))


def with_columns_of_other_lengths(arguments):
    Line.minibatch = lambda self, step, draw: {"x": torch.zeros(8, 1), "y": torch.zeros(7, 1)}
    return quick(arguments)


def test_columns_of_other_lengths_are_refused_in_one_line(toy):
    codes, logs = toy([with_columns_of_other_lengths] * 2, "runs")
    assert codes == [1, 1]
    line = "repro: phase line, step 1: found columns of 7, 8 rows, expected the same number in each with 2 parts\n"
    assert "".join(logs) == line


# Steps whose parts are not the whole.


def normed(arguments):
    Line.make_model = lambda self: nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return quick(arguments)


def normed_as_the_paper_means_it(arguments):
    Line.parts_define = "the statistics of batch norm, section 2"
    return normed(arguments)


def normed_and_asked_at_step_3(arguments):
    at_step(3, ask)
    return normed_as_the_paper_means_it(arguments)


def record_of(project, runs):
    return json.loads((project / runs / "toy/seed-0/record.json").read_text())


def test_batch_norm_is_refused_in_one_line_and_the_record_of_the_whole_shows_it(project, toy):
    codes, logs = toy([normed] * 2, "runs")
    (line,) = "".join(logs).splitlines()
    assert codes == [2, 2] and "its batch norm takes the statistics of a part; use update.gather" in line
    assert toy([normed], "runs", "--resume")[0] == [0]
    (found,) = record_of(project, "runs")["parts"]["line"]
    assert (found["outcome"], found["processes"], found["micro_batches"]) == ("refused", 2, 1)


def test_micro_batches_of_batch_norm_are_refused_too(toy):
    codes, logs = toy([normed], "runs", "--micro-batches", "line=4")
    assert codes == [2] and "found another gradient or state in 4 parts of a minibatch than for the whole" in logs[0]


def test_what_the_paper_means_per_part_belongs_to_the_run(project, toy):
    """The buffers of the processes are the same at each save, and go on to the same bits."""
    two, three = [normed_as_the_paper_means_it] * 2, [normed_as_the_paper_means_it] * 3
    assert toy(two, "whole")[0] == [0, 0]
    functions = [normed_as_the_paper_means_it, normed_and_asked_at_step_3]
    assert toy(functions, "runs")[0] == [143, 143]
    codes, logs = toy(three, "runs", "--resume")
    (line,) = [line for log in logs for line in log.splitlines() if "goes on at phase" not in line]
    assert codes == [2, 2, 2] and "parts: found a state of 2, expected 3; resume with the configuration" in line
    assert toy(two, "runs", "--resume")[0] == [0, 0]
    assert_same(states(project / "whole"), states(project / "runs"))
    assert record_of(project, "runs")["parts"]["line"][0]["outcome"] == "per part"


def test_an_unknown_phase_has_no_micro_batches(project, toy):
    codes, logs = toy([quick], "runs", "--micro-batches", "lime=4")
    assert (
        codes == [2] and logs[0] == "repro: --micro-batches: found the phase 'lime', expected one of: line, constant\n"
    )
    assert not (project / "runs").exists()


def test_micro_batches_are_in_the_record_and_the_result_is_that_of_one(project, toy):
    assert toy([smooth], "one")[0] == toy([smooth], "four", "--micro-batches", "4", "constant=2")[0] == [0]
    assert record_of(project, "four")["micro_batches"] == {"line": 4, "constant": 2}
    assert record_of(project, "four")["config_hash"] == record_of(project, "one")["config_hash"]
    assert_close(states(project / "one"), states(project / "four"))


@pytest.mark.parametrize("value", ["0", "x", "line=0", "line="])
def test_a_number_of_micro_batches_is_whole_and_positive(toy, value):
    codes, logs = toy([quick], "runs", "--micro-batches", value)
    assert codes == [2] and re.search(r"--micro-batches: found '.*', expected a whole number of at least 1", logs[0])


# Processes that are not alike.


def on_two_threads(arguments):
    torch.set_num_threads(2)
    return quick(arguments)


def of_another_version(arguments):
    torch.__version__ = "1.2.3"
    return quick(arguments)


def of_another_configuration(arguments):
    return quick([*arguments, "--set", "phases.line.learning_rate=0.5"])


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (on_two_threads, "OMP_NUM_THREADS: process 1 found 2, expected 1 as process 0"),
        (of_another_version, "torch: process 1 found 1.2.3, expected "),
        (of_another_configuration, "configuration: process 1 found "),
    ],
)
def test_a_process_unlike_the_first_is_refused_in_one_line_before_anything_is_written(project, toy, other, found):
    codes, logs = toy([quick, other], "runs")
    assert codes == [2, 2]
    (line,) = [line for log in logs for line in log.splitlines() if not line.startswith("toy: phases.line.learning")]
    assert line.startswith(f"repro: processes of one run: {found}")
    assert not (project / "runs").exists()


# Processes that go apart.


def in_steps(act):
    """Has `act(state, batch, update)` called before each step of the line phase that is no trial."""
    step = Line.train_step

    def train_step(self, state, batch, update):
        if type(update) is Update:
            act(state, update)
        step(self, state, batch, update)

    Line.train_step = train_step


def rank():
    return int(os.environ["RANK"])


def asking_once_more(arguments):
    """One process reduces something of its own at step 3, where the other steps."""

    def act(state, update):
        if update.step_number == 3:
            update.all_reduce(torch.ones(5))

    in_steps(act)
    return quick(arguments)


def ending_its_phase_early(arguments):
    def act(state, update):
        if update.step_number == 3:
            raise SystemExit(0)

    in_steps(act)
    return quick(arguments)


def logging_its_own(arguments):
    in_steps(lambda state, update: update.log("rank", float(rank())))
    return quick(arguments)


def shifting_a_weight(arguments):
    def act(state, update):
        if update.step_number == 3:
            with torch.no_grad():
                next(state.model.parameters())[0] += 1e-6 * rank()

    in_steps(act)
    return quick(arguments)


@pytest.mark.parametrize(
    ("functions", "line"),
    [
        (
            [quick, asking_once_more],
            r"repro: found process \d of 2 at phase line, step 4, .* and another one elsewhere, .*",
        ),
        ([quick, ending_its_phase_early], ANOTHER.removesuffix(r"\n")),
        ([quick, killed_at_step_7], ANOTHER.removesuffix(r"\n")),
        (
            [logging_its_own] * 2,
            r"repro: phase line, step 3: update.log: found \[0.0, 1.0\] in the processes for 'rank', expected the same, .*",
        ),
        (
            [shifting_a_weight] * 2,
            r"repro: phase line, step 5: found model.state_dict.0.weight different in the processes; .*",
        ),
    ],
    ids=["one exchange more", "one ends early", "one is killed", "numbers of their own", "a weight apart"],
)
def test_processes_that_go_apart_end_in_one_line_and_lose_nothing(project, toy, functions, line):
    codes, logs = toy(functions, "runs")
    assert 1 in codes and re.fullmatch(line, "".join(logs).strip()), logs
    assert toy([quick, quick], "runs", "--resume")[0] == [0, 0]


def gradient_of(value, dtype=torch.float32):
    """A weight with this gradient; None for one that has none."""
    weight = nn.Parameter(torch.zeros((), dtype=dtype))
    weight.grad = None if value is None else torch.tensor(value, dtype=dtype)
    return weight


def adding_up(values):
    """Writes what the sum of the processes makes of gradients of which each has its own."""
    with world_of_this_process() as world:
        weights = [gradient_of(*given) for given in values[world.rank]]
        world.sum_gradients(weights)
        found = [None if weight.grad is None else [weight.grad.item(), str(weight.grad.dtype)] for weight in weights]
        Path(f"sum.{world.rank}").write_text(json.dumps(found))
    return 0


def test_gradients_are_added_up_and_one_that_a_process_does_not_have_counts_as_zero(project):
    """So every process takes the same step, also where a network was used in one of them only."""
    none, double = (None,), torch.float64
    first, second = [(1.0,), (2.0,), none, none, (1.0, double)], [(4.0,), none, (8.0,), none, (16.0, double)]
    assert run_ranks([adding_up] * 2, [first, second], output=project / "log") == [0, 0], (project / "log").read_text()
    sums = [json.loads((project / f"sum.{rank}").read_text()) for rank in (0, 1)]
    single = [[5.0, "torch.float32"], [2.0, "torch.float32"], [8.0, "torch.float32"], None]
    assert sums == 2 * [[*single, [17.0, "torch.float64"]]]


def environment(monkeypatch, **values):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_process_alone_needs_no_group(monkeypatch, values):
    environment(monkeypatch, **values)
    with world_of_this_process() as world:
        assert world == World(0, 1) and not torch.distributed.is_initialized()
        assert world.any(True) and world.total(3.0) == 3.0
        weight = gradient_of(3.0)
        world.sum_gradients([weight])
        assert weight.grad == 3.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "WORLD_SIZE: found 4 processes, 2 of them here, expected all"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: found 2 processes, expected them started by torchrun .*RANK"),
    ],
)
def test_a_world_that_cannot_be_joined_is_refused(project, capsys, monkeypatch, values, expected):
    environment(monkeypatch, **values)
    assert main(["run", "toy", "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(expected, lines[0])
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--device", "cuda:0"], "--device: found 'cuda:0', expected cuda, auto or cpu with 2 processes"),
    ],
)
def test_options_that_several_processes_cannot_have_are_refused(project, capsys, monkeypatch, options, expected):
    monkeypatch.setattr(runtime, "world_of_this_process", lambda: nullcontext(World(0, 2)))
    assert main(["run", "toy", "--device", "cpu", *options]) == 2
    assert capsys.readouterr().err.startswith(f"repro: {expected}")
    assert not (project / "runs").exists()


def test_processes_of_one_run_are_no_jobs(project, capsys, monkeypatch):
    monkeypatch.setattr(repro_tools.run, "world_of_this_process", lambda: nullcontext(World(0, 2)))
    assert cli.main(["run", "toy", "--device", "cpu", "--jobs", "2"]) == 2
    assert capsys.readouterr().err.startswith("repro: --jobs: found 2, expected 1 with 2 processes on one run")
    assert not (project / "runs").exists()


DYING = """
import os, signal
from toy_method import METHOD, Line
from repro.update import Update

step = Line.train_step

def train_step(self, state, batch, update):
    if os.environ.get("DIES") == os.environ["RANK"] and update.step_number == 7 and type(update) is Update:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, state, batch, update)

Line.train_step = train_step
"""


@pytest.mark.slow
def test_torchrun_runs_an_experiment_and_goes_on_to_the_same_bits_when_a_process_was_killed(project, monkeypatch):
    """With micro-batches, workers and dropout."""
    environment(monkeypatch, PYTHONPATH=f"{python_path()}{os.pathsep}{project}", OMP_NUM_THREADS="1", **LOOPBACK)
    (project / "dying.py").write_text(DYING)
    (project / "pyproject.toml").write_text('[tool.repro]\nmethod = "dying:METHOD"\n')

    def torchrun(runs, *options):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "repro",
        ]
        command += ["run", "toy", "--device", "cpu", "--micro-batches", "2", "--workers", "1", "--runs", runs, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)

    ended = torchrun("whole")
    assert ended.returncode == 0 and ended.stdout == "whole/toy/seed-0\n", ended.stderr
    assert record_of(project, "whole")["processes"] == 2
    monkeypatch.setenv("DIES", "1")
    ended = torchrun("runs")
    told = [line for line in ended.stderr.splitlines() if line.startswith("repro: ")]
    assert ended.returncode == 1 and len(told) <= 1, ended.stderr  # torchrun may end the other before it has told
    monkeypatch.delenv("DIES")
    ended = torchrun("runs", "--resume")
    assert ended.returncode == 0, ended.stderr
    assert_same(states(project / "whole"), states(project / "runs"))
