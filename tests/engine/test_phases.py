import json

import pytest
import torch
from toy_method import Config, Line
from toy_project import CONFIG

from repro import checkpoint
from repro.__main__ import main
from repro.config import Pace, validate
from repro.errors import BadInput, RunFailed
from repro.loop import run_phase
from repro.phases import PLAIN
from repro.runtime import Runtime

CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def config():
    return validate(Config, CONFIG, "toy")


def train(config, folder, phase=None, **changes):
    arguments = {
        "identity": {"seed": 1},
        "seed": 1,
        "runtime": CPU,
        "pace": Pace(log_every=3, checkpoint_every=5),
        "earlier": {},
        **changes,
    }
    return run_phase(phase or Line(config), folder=folder, **arguments)


def killed_at(monkeypatch, step):
    """Makes the line phase die when its minibatch of `step` is asked for, as a killed process would."""
    original = Line.minibatch

    def minibatch(self, number, generator):
        if number == step:
            raise KeyboardInterrupt
        return original(self, number, generator)

    monkeypatch.setattr(Line, "minibatch", minibatch)


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.networks.state_dict().values(), other.networks.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("step", [0, 1, 4, 5, 6, 9, 10, 11])
def test_a_phase_killed_anywhere_ends_in_the_bits_of_an_uninterrupted_one(config, tmp_path, step):
    """Dropout is on and Adam has momentum: only weights, optimiser and every draw restored can give the same bits."""
    whole = train(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        killed_at(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed")
    torch.manual_seed(step)  # another process has another global state
    resumed = train(config, tmp_path / "killed")
    assert same(whole, resumed) and whole.curves == resumed.curves
    assert (tmp_path / "killed" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_a_resumed_phase_repeats_no_saved_step(config, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    steps, original = [], Line.minibatch
    monkeypatch.setattr(
        Line, "minibatch", lambda self, step, draws: (steps.append(step), original(self, step, draws))[1]
    )
    train(config, tmp_path)
    assert steps == [10, 11]  # 12 steps, the last saved state is that of step 10


def test_two_seeds_differ_and_one_seed_does_not(config, tmp_path):
    one, again, other = (train(config, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert same(one, again) and not same(one, other)


def test_a_finished_phase_is_loaded_not_repeated(config, tmp_path, monkeypatch):
    first = train(config, tmp_path)
    monkeypatch.setattr(Line, "minibatch", None)
    again = train(config, tmp_path)
    assert same(first, again) and first.curves == again.curves and first.wall_s == again.wall_s


def test_an_error_of_the_method_while_a_network_is_rebuilt_is_no_fault_of_the_file(config, tmp_path, monkeypatch):
    train(config, tmp_path)

    def make_model(self):
        raise TypeError("a mistake of the method")

    monkeypatch.setattr(Line, "make_model", make_model)
    with pytest.raises(TypeError, match="a mistake of the method"):
        train(config, tmp_path)


def test_a_finished_model_is_frozen_and_in_eval_mode(config, tmp_path):
    model = train(config, tmp_path).networks
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_state_of_another_configuration_is_refused(config, tmp_path):
    train(config, tmp_path)
    with pytest.raises(BadInput, match="seed: found a state of 1, expected 2; resume with"):
        train(config, tmp_path, identity={"seed": 2})


def test_the_curve_has_every_logged_step_and_the_last(config, tmp_path):
    assert [
        step for step, _ in train(config, tmp_path, pace=Pace(log_every=5, checkpoint_every=100)).curves["loss"]
    ] == [
        5,
        10,
        12,
    ]


def test_a_line_cut_short_by_a_kill_is_dropped(config, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed")
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert train(config, tmp_path / "killed").curves == train(config, tmp_path / "whole").curves


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_state(config, tmp_path, monkeypatch):
    original, calls = Line.loss, []

    def loss(self, model, batch):
        calls.append(1)
        return original(self, model, batch) * (float("nan") if len(calls) > 7 else 1)

    monkeypatch.setattr(Line, "loss", loss)
    with pytest.raises(RunFailed, match="phase line, step 9: the loss is nan"):
        train(config, tmp_path)
    state = checkpoint.load(tmp_path / "running.safetensors")
    assert state["steps_done"] == 5 and all(
        torch.isfinite(value).all() for value in state["state"]["model"]["state_dict"].values()
    )


def test_a_finished_phase_leaves_its_model_and_its_log_only(config, tmp_path):
    train(config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "model.safetensors"]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3, 6, 9, 12]


class Watched(Line):
    """The line phase under another name, with its initial weights and its minibatches."""

    def __init__(self, config, name, draws_as=""):
        super().__init__(config)
        self.name, self.draws_as, self.weights, self.drawn = name, draws_as, None, []

    def make_model(self):
        model = super().make_model()
        self.weights = self.weights or [weight.detach().clone() for weight in model.parameters()]
        return model

    def minibatch(self, step, generator):
        batch = super().minibatch(step, generator)
        self.drawn += batch.values()
        return batch


@pytest.mark.parametrize("draws_as", ["", "line"])
def test_a_phase_may_draw_as_another_one(config, tmp_path, draws_as):
    line, other = Watched(config, "line"), Watched(config, "other", draws_as)
    for phase in (line, other):
        train(config, tmp_path / phase.name, phase)
    for one, two in ((line.weights, other.weights), (line.drawn, other.drawn)):
        assert len(one) == len(two) > 0 and all(map(torch.equal, one, two)) == bool(draws_as)


class Watching(Line):
    """Says of its network how large it is, and draws random numbers while it does."""

    def __init__(self, config, dies_at=None):
        super().__init__(config)
        self.dies_at, self.seen = dies_at, []

    def minibatch(self, step, generator):
        if step == self.dies_at:
            raise KeyboardInterrupt
        return super().minibatch(step, generator)

    def watch(self, networks):
        self.seen.append((networks.training, torch.is_grad_enabled()))
        return {"size": sum(weight.square().sum() for weight in networks.parameters()), "noise": torch.rand(()).item()}


def test_what_a_phase_watches_stands_beside_the_loss_and_changes_no_bit(config, tmp_path):
    phase = Watching(config)
    watched, plain = train(config, tmp_path / "watched", phase), train(config, tmp_path / "plain")
    assert same(watched, plain) and plain.watched == []
    assert [step for step, _ in watched.watched] == [step for step, _ in watched.curves["loss"]] == [3, 6, 9, 12]
    assert set(phase.seen) == {(False, False)}
    size = sum(float(weight.square().sum()) for weight in watched.networks.parameters())
    assert watched.watched[-1][1]["size"] == pytest.approx(size)
    lines = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    assert [(line.pop("step"), line.pop("loss")) for line in lines] == watched.curves["loss"]
    assert lines == [values for _, values in watched.watched]


def test_a_resumed_phase_watches_what_an_uninterrupted_one_does(config, tmp_path):
    whole = train(config, tmp_path / "whole", Watching(config))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "died", Watching(config, dies_at=7))
    resumed = train(config, tmp_path / "died", Watching(config))
    assert resumed.watched == whole.watched and same(resumed, whole)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "died")]
    assert logs[0] == logs[1]


def test_the_average_is_watched_where_it_is_what_the_phase_hands_on(config, tmp_path):
    phase = Watching(config)
    phase.options = PLAIN.model_copy(update={"ema_decay": 0.9})
    result = train(config, tmp_path, phase)
    size = sum(float(weight.square().sum()) for weight in result.networks.parameters())
    assert result.watched[-1][1]["size"] == pytest.approx(size)


def test_a_finished_phase_of_version_0_1_is_loaded(config, tmp_path, monkeypatch):
    """It had one network, one curve, a format of its own, and neither watched nor said which versions there were."""
    now = train(config, tmp_path)
    state = checkpoint.load(tmp_path / "model.safetensors")
    state |= {"model": state.pop("networks")["model"], "curve": state.pop("curves")["loss"]}
    del state["watched"], state["sessions"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.OLDER)
        checkpoint.save(tmp_path / "model.safetensors", state)
    then = train(config, tmp_path)
    assert same(now, then) and now.curves == then.curves and (then.watched, then.sessions) == ([], [])


def test_the_record_of_a_run_keeps_what_was_watched(project, monkeypatch):
    monkeypatch.setattr(Line, "watch", lambda self, networks: {"validation.error": 0.5})
    assert main(["run", "toy", "--seeds", "0", "--device", "cpu"]) == 0
    record = json.loads((project / "runs/toy/seed-0/record.json").read_text())
    assert record["watched"] == {"line": [[step, {"validation.error": 0.5}] for step in (3, 6, 9, 12)]}


@pytest.mark.parametrize("options", [[], ["--determinism", "warn"]], ids=["strict", "warn"])
def test_the_record_of_a_run_says_how_strict_it_was_with_algorithms(project, options):
    assert main(["run", "toy", "--device", "cpu", *options]) == 0
    record = json.loads((project / "runs/toy/seed-0/record.json").read_text())
    assert record["determinism"] == (options or ["strict"])[-1] and "sessions" not in record
