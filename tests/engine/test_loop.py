"""The loop of a phase: rounds, curves of several names, epochs, and a restart at any step."""

import shutil
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repro import checkpoint
from repro.config import Pace
from repro.errors import BadInput, RunFailed
from repro.loop import RUNNING, Loop, run_phase
from repro.phases import Networks, Phase, SingleLossPhase
from repro.randomness import Draw
from repro.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
EVERY = 4


@dataclass
class Walk:
    network: nn.Module
    optimiser: torch.optim.Optimizer
    position: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


class Rounds(Phase[Walk]):
    """A walk that goes on across rounds, and a network that learns where it was."""

    name, steps, collect_every = "rounds", 12, EVERY
    counts = {"epochs": Fraction(1, 2)}

    def setup(self, earlier: Any) -> Walk:
        network = nn.Linear(1, 1)
        return Walk(network, torch.optim.Adam(network.parameters(), lr=0.1))

    def collect(self, state: Walk, update: Any) -> dict:
        moves = torch.randn(6, generator=update.generator("walk"))
        with torch.no_grad():
            path = state.position + moves.cumsum(0) + state.network(torch.zeros(1))
        state.position = path[-1]
        return {"where": path.unsqueeze(1)}

    def minibatch(self, step: int, draw: Draw) -> dict:
        rows = draw.round_rows(3, last="drop")
        return {"where": draw.collected["where"][rows], "noise": torch.randn(3, 1, generator=draw)}

    def train_step(self, state: Walk, batch: Any, update: Any) -> None:
        update.backward((state.network(batch["noise"]) - batch["where"]).square().mean())
        update.log("loss", update.step(state.optimiser))
        if update.step_number % 3 == 0:
            update.log("position", state.position)

    def networks(self, state: Walk) -> dict:
        return {"network": state.network}


def go(loop: Loop, upto: int) -> Loop:
    while loop.step < upto:
        loop.collect_if_due()
        loop.one_step(loop.next_batch())
        loop.write_curves(loop.numbers())
    return loop


def fresh(phase: Phase | None = None) -> Loop:
    return Loop(phase or Rounds(), seed=1, runtime=CPU, earlier={})


def packed(snapshot: dict) -> tuple[Any, dict]:
    tensors: dict[str, torch.Tensor] = {}
    return checkpoint._pack(snapshot, "snapshot", tensors), tensors


def assert_same_bits(one: dict, other: dict) -> None:
    (tree, tensors), (tree_2, tensors_2) = packed(one), packed(other)
    assert tree == tree_2
    assert all(torch.equal(tensors[name], tensors_2[name]) for name in tensors)


@pytest.mark.parametrize("killed_at", range(1, 12))
def test_a_loop_that_is_killed_at_any_step_of_its_rounds_ends_in_the_same_bits(killed_at, tmp_path):
    whole = go(fresh(), 12)
    checkpoint.save(tmp_path / "state.safetensors", go(fresh(), killed_at).snapshot())
    resumed = fresh()
    resumed.restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert_same_bits(go(resumed, 12).snapshot(), whole.snapshot())


def test_a_round_is_made_at_each_of_its_beginnings_and_drawn_from_in_epochs():
    loop, seen = fresh(), []
    for _ in range(8):
        loop.collect_if_due()
        seen.append(loop.next_batch()["where"])
        loop.one_step(loop.next_batch())
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:4])
    assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist())
    assert not set(first.flatten().tolist()) & set(torch.cat(seen[4:6]).flatten().tolist())


def test_numbers_that_come_at_different_steps_are_curves_of_their_own():
    curves = go(fresh(), 8).curves
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for step, _ in curves["position"]] == [1, 4, 7]


def run(phase: Phase, folder: Path, **named: Any) -> Any:
    pace = Pace(log_every=2, checkpoint_every=1)
    return run_phase(phase, folder=folder, identity={"x": 1}, seed=1, runtime=CPU, pace=pace, earlier={}, **named)


class Stopped(BaseException):
    pass


class KilledAt(Rounds):
    """Dies before a step, or never."""

    def __init__(self, step: int | None = None):
        self._killed_at = step

    def minibatch(self, step: int, draw: Draw) -> dict:
        if step == self._killed_at:
            raise Stopped
        return super().minibatch(step, draw)


@pytest.mark.parametrize("step", [4, 5, 8])
def test_a_run_that_is_killed_in_a_round_or_at_its_border_resumes_with_the_data_of_the_round(step, tmp_path):
    whole = run(Rounds(), tmp_path / "whole")
    with pytest.raises(Stopped):
        run(KilledAt(step), tmp_path / "killed")
    assert list((tmp_path / "killed").glob("round-*"))
    resumed = run(Rounds(), tmp_path / "killed")
    assert resumed.curves == whole.curves
    assert_same_bits(dict(resumed.networks.state_dict()), dict(whole.networks.state_dict()))
    assert not list((tmp_path / "killed").glob("round-*")), "rounds of a finished phase are swept"


def cut(path: Path) -> None:
    (path / "0").write_bytes((path / "0").read_bytes()[:-9])


def change(path: Path) -> None:
    content = bytearray((path / "0").read_bytes())
    content[3] ^= 1
    (path / "0").write_bytes(content)


@pytest.mark.parametrize("damage", [shutil.rmtree, cut, change, lambda path: (path / "columns.json").unlink()])
def test_a_state_whose_round_is_damaged_gives_way_to_the_one_before_it(damage, tmp_path, capsys):
    whole = run(Rounds(), tmp_path / "whole")
    with pytest.raises(Stopped):
        run(KilledAt(5), tmp_path / "killed")
    newest = checkpoint.load(tmp_path / "killed" / RUNNING)["round"]["name"]
    damage(tmp_path / "killed" / newest)
    resumed = run(Rounds(), tmp_path / "killed")
    assert "goes on from the state before it, step 4" in capsys.readouterr().err
    assert resumed.curves == whole.curves
    assert_same_bits(dict(resumed.networks.state_dict()), dict(whole.networks.state_dict()))


def test_files_of_rounds_do_not_pile_up(tmp_path):
    with pytest.raises(Stopped):
        run(KilledAt(11), tmp_path)
    assert len(list(tmp_path.glob("round-*"))) <= 2


def test_the_log_has_a_line_for_each_step_with_numbers(tmp_path):
    run(Rounds(), tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == [f'{{"step": {n}' for n in (1, 2, 4, 6, 7, 8, 10, 12)]


def test_the_networks_of_a_phase_come_by_name_and_the_only_one_by_a_call(tmp_path):
    networks = run(Rounds(), tmp_path).networks
    assert torch.equal(networks(torch.ones(1, 1)), networks["network"](torch.ones(1, 1)))
    with pytest.raises(TypeError, match="found a call of 2 networks"):
        Networks({"one": nn.Identity(), "two": nn.Identity()})(1)


class NotANumber(Rounds):
    def train_step(self, state: Walk, batch: Any, update: Any) -> None:
        super().train_step(state, batch, update)
        update.log("return", float("nan"))


def test_a_logged_number_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RunFailed, match="phase rounds, step 1: the return is nan; the last saved state is kept"):
        run(NotANumber(), tmp_path)


class NoNetwork(Rounds):
    def networks(self, state: Walk) -> dict:
        return {"renamed": state.network}


def test_networks_of_other_names_are_refused(tmp_path):
    run(Rounds(), tmp_path)
    with pytest.raises(BadInput, match=r"found the networks \['network'\], expected \['renamed'\]"):
        run(NoNetwork(), tmp_path)


def test_another_version_of_torch_is_said_and_kept(tmp_path, monkeypatch, capsys):
    with pytest.raises(Stopped):
        run(KilledAt(6), tmp_path)
    monkeypatch.setattr(torch, "__version__", "9.9.9+cpu")
    sessions = run(Rounds(), tmp_path).sessions
    assert "expected" not in capsys.readouterr().out
    assert [one["step"] for one in sessions] == [0, 6]
    assert sessions[1]["torch"] == "9.9.9+cpu" != sessions[0]["torch"]


def test_a_running_state_of_version_0_1_is_refused_by_its_format(tmp_path):
    old = {"identity": {"phase": "rounds", "x": 1}, "steps_done": 3, "model": {}, "optimiser": {}}
    checkpoint.save(tmp_path / RUNNING, old)
    with pytest.raises(
        BadInput, match="found a running state of the format repro-checkpoint-2, expected repro-checkpoint-3"
    ):
        run(Rounds(), tmp_path)


class OneLoss(SingleLossPhase):
    name, iterations = "one", 4

    def make_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def minibatch(self, step: int, draw: Draw) -> dict:
        return {"x": torch.randn(4, 1, generator=draw)}

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["x"]).square().mean()


class Falling(OneLoss):
    def learning_rate_factor(self, step: int) -> float:
        return 0.5**step


class Held(OneLoss):
    """Keeps its optimiser where `loss` reaches it."""

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        self.held = super().make_optimiser(model)
        return self.held

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.held.param_groups[0]["lr"] *= 0.25
        return super().loss(model, batch)


class SetTwice(Held, Falling):
    pass


def test_rates_that_are_set_in_two_ways_are_refused():
    go(fresh(Falling()), 4)
    with pytest.raises(RunFailed, match="step 2: found the learning rate 0.125, expected 0.5"):
        go(fresh(SetTwice()), 4)


def test_no_rate_that_the_author_set_is_overwritten():
    loop = go(fresh(Held()), 3)
    assert loop.state.optimiser.param_groups[0]["lr"] == 0.5 * 0.25**3


@pytest.mark.parametrize("last,sizes", [("drop", [3, 3, 3]), ("keep", [3, 3, 1])])
def test_an_epoch_goes_once_through_the_rows(last, sizes):
    drawn = [Draw(0, "p", "draws", step, step=step).epoch_rows(7, 3, last=last) for step in range(3)]
    assert [len(rows) for rows in drawn] == sizes
    epoch = torch.cat(drawn[: 3 if last == "keep" else 2]).tolist()
    assert len(set(epoch)) == len(epoch) == (7 if last == "keep" else 6)


def test_each_epoch_has_an_order_of_its_own_whichever_steps_were_drawn_before():
    orders: dict = {}
    drawn = [Draw(0, "p", step=step, orders=orders).epoch_rows(6, 3, last="drop") for step in range(4)]
    assert not torch.equal(torch.cat(drawn[:2]), torch.cat(drawn[2:]))
    assert torch.equal(drawn[3], Draw(0, "p", step=3).epoch_rows(6, 3, last="drop"))


def test_a_minibatch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="found a minibatch of 8, expected 1 to 7"):
        Draw(0, "p").epoch_rows(7, 8, last="drop")


class Continued(OneLoss):
    """Begins with the weights of an earlier phase."""

    name = "continued"

    def setup(self, earlier: Any) -> Any:
        state = super().setup(earlier)
        state.model.load_state_dict(earlier["one"]["model"].state_dict())
        return state


def test_a_phase_may_begin_with_the_weights_of_an_earlier_one(tmp_path):
    pace = Pace(log_every=2, checkpoint_every=1)
    earlier = {}
    for phase in (OneLoss(), Continued()):
        result = run_phase(
            phase, folder=tmp_path / phase.name, identity={}, seed=1, runtime=CPU, pace=pace, earlier=earlier
        )
        earlier[phase.name] = result.networks
    plain = go(fresh(OneLoss()), 4)
    continued = Loop(Continued(), seed=1, runtime=CPU, earlier=earlier)
    assert torch.equal(continued.state.model.weight, plain.state.model.weight)
    assert not torch.equal(earlier["continued"]["model"].weight, plain.state.model.weight)


class Filled(Rounds):
    """The same rounds, their columns filled in place."""

    def collect(self, state: Walk, update: Any) -> dict:
        given = super().collect(state, update)
        made = update.room(6, {"where": (1,)})
        made.add(**given)
        return made


class FilledAndKilled(Filled, KilledAt):
    pass


def test_columns_that_are_filled_in_place_are_those_that_were_returned(tmp_path):
    whole, filled = run(Rounds(), tmp_path / "whole"), run(Filled(), tmp_path / "filled")
    assert filled.curves == whole.curves
    assert_same_bits(dict(filled.networks.state_dict()), dict(whole.networks.state_dict()))


@pytest.mark.parametrize("step", [0, 3, 4, 5])
def test_a_run_that_is_killed_goes_on_with_the_columns_that_it_filled(step, tmp_path):
    whole = run(Filled(), tmp_path / "whole")
    with pytest.raises(Stopped):
        run(FilledAndKilled(step), tmp_path / "killed")
    resumed = run(Filled(), tmp_path / "killed")
    assert resumed.curves == whole.curves
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["log.jsonl", "model.safetensors"]


class Collected(Rounds):
    """Counts its rounds."""

    def __init__(self) -> None:
        self.made = 0

    def collect(self, state: Walk, update: Any) -> dict:
        self.made += 1
        return super().collect(state, update)


def test_the_first_round_is_saved_before_the_first_step(tmp_path):
    """To build it may take longer than all that follows."""
    with pytest.raises(Stopped):
        run(KilledAt(0), tmp_path)
    phase = Collected()
    run(phase, tmp_path)
    assert phase.made == Rounds.steps // EVERY - 1


class OtherColumns(Filled):
    def collect(self, state: Walk, update: Any) -> dict:
        return {"where": super().collect(state, update)["where"].clone()}


def test_columns_beside_those_that_were_made_room_for_are_refused(tmp_path):
    expected = "step 1: collect: found other columns than update.room gave, expected those"
    with pytest.raises(RunFailed, match=f"phase rounds, {expected}"):
        run(OtherColumns(), tmp_path)


class InTheSame(FilledAndKilled):
    """Shows what lies in the folder when a round is made."""

    def __init__(self, folder: Path, died_at: int | None = None):
        super().__init__(died_at)
        self.folder, self.lay = folder, list[int]()

    def collect(self, state: Walk, update: Any) -> dict:
        rows = super().collect(state, update)
        self.lay.append(len(list(self.folder.glob("round*"))))
        return rows


@pytest.mark.parametrize("checkpoint_every", [1, 3, 100])
def test_rounds_that_no_state_names_do_not_pile_up(checkpoint_every, tmp_path):
    phase = InTheSame(tmp_path)
    phase.collect_every = 2
    pace = Pace(log_every=100, checkpoint_every=checkpoint_every)
    run_phase(phase, folder=tmp_path, identity={}, seed=1, runtime=CPU, pace=pace, earlier={})
    assert len(phase.lay) == 6 and max(phase.lay) <= 3  # of two states, and the one that is made


def test_the_state_before_keeps_its_round_across_a_resume_at_a_border(tmp_path):
    """Saved at 4, before the second round, and at 6; then the state of 6 is damaged."""
    pace = Pace(log_every=100, checkpoint_every=2)
    given = {"folder": tmp_path / "killed", "identity": {}, "seed": 1, "runtime": CPU, "pace": pace, "earlier": {}}
    for step in (5, 7):
        with pytest.raises(Stopped):
            run_phase(InTheSame(tmp_path, step), **given)
    (tmp_path / "killed" / RUNNING).write_bytes(b"damaged")
    resumed = run_phase(InTheSame(tmp_path), **given)
    whole = run_phase(InTheSame(tmp_path), **(given | {"folder": tmp_path / "whole"}))
    assert_same_bits(dict(resumed.networks.state_dict()), dict(whole.networks.state_dict()))


class FromSeed(KilledAt):
    """Rounds that are a function of seed and step."""

    collects_from_seed = True

    def __init__(self, died_at: int | None = None):
        super().__init__(died_at)
        self.made = list[int]()

    def collect(self, state: Walk, update: Any) -> dict:
        self.made.append(update.step_number)
        rows = update.room(6, {"where": (1,)})
        rows.add(where=torch.randn(6, 1, generator=update.generator("where")))
        return rows


@pytest.mark.parametrize(("lose", "made"), [(lambda folder: None, [8]), (shutil.rmtree, [4, 8])], ids=["kept", "lost"])
def test_a_round_of_the_seed_that_is_lost_is_made_again_in_the_middle(lose, made, tmp_path):
    whole = run(FromSeed(), tmp_path / "whole")
    with pytest.raises(Stopped):
        run(FromSeed(6), tmp_path / "killed")
    lose(tmp_path / "killed" / "scratch")
    phase = FromSeed()
    resumed = run(phase, tmp_path / "killed")
    assert phase.made == made and resumed.curves == whole.curves
    assert_same_bits(dict(resumed.networks.state_dict()), dict(whole.networks.state_dict()))


class NotFromSeed(FromSeed):
    """Says so, and reads the state."""

    def collect(self, state: Walk, update: Any) -> dict:
        rows = super().collect(state, update)
        with torch.no_grad():
            rows["where"].add_(state.network.weight.sum())
        return rows


@pytest.mark.parametrize(("kind", "warned"), [(FromSeed, False), (NotFromSeed, True)])
def test_a_round_that_is_made_again_otherwise_is_told(kind, warned, tmp_path, capsys):
    with pytest.raises(Stopped):
        run(kind(6), tmp_path)
    shutil.rmtree(tmp_path / "scratch")
    run(kind(), tmp_path)
    told = "phase rounds, step 6: found other data in the round that was made again, round-"
    assert (told in capsys.readouterr().err) == warned


class WithoutCollect(Rounds):
    collect = Phase.collect


def test_rounds_without_collect_are_refused(tmp_path):
    with pytest.raises(BadInput, match="phase rounds: found collect_every 4 and no `collect`, expected both"):
        run(WithoutCollect(), tmp_path)


class Uneven(Rounds):
    def __init__(self, other: torch.Tensor):
        self.other = other

    def collect(self, state: Walk, update: Any) -> dict:
        return super().collect(state, update) | {"other": self.other}


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (torch.zeros(5), r"rows: found \[5, 6\], expected the same number in every column"),
        (torch.zeros(()), "rows: found one number as other, expected one for every row"),
    ],
)
def test_columns_of_unequal_lengths_are_refused(other, found, tmp_path):
    with pytest.raises(RunFailed, match=f"phase rounds, step 1: collect: {found}"):
        run(Uneven(other), tmp_path)


class Partly(Rounds):
    def collect(self, state: Walk, update: Any) -> dict:
        made = update.room(7, {"where": (1,)})
        made.put(1, **super().collect(state, update))
        return made


def test_rows_that_were_not_filled_are_refused(tmp_path):
    with pytest.raises(RunFailed, match="phase rounds, step 1: collect: found 6 rows filled, expected 7"):
        run(Partly(), tmp_path)
