"""A rehearsal takes the memory of a real step: on fake tensors as on real ones, and as the allocator counts it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from benchmarks.plain_models import PLAIN
from repro.errors import BadInput
from repro.loop import Loop
from repro.phases import SingleLossPhase, StepOptions
from repro.runtime import Runtime
from repro.update import Update
from repro_tools.memory.fake import (
    AsOnAGpu,
    CannotRehearse,
    Rehearsal,
    as_on_a_gpu,
    fake_tensors,
    networks,
    recurrent_layers_apart,
    reported_as,
)
from repro_tools.memory.footprint import of_phase, of_step
from repro_tools.memory.storages import REST, LiveStorages

CLOSE = 0.02


class Small(SingleLossPhase):
    """Convolutions with a normalisation, on 3 x 16 x 16 images."""

    name, iterations = "small", 100

    def __init__(self, batch_size=8, **options):
        plain = {"precision": "float32", "warmup_steps": 0, "clip_norm": None, "ema_decay": None}
        self.options, self.batch_size = StepOptions(**(plain | options)), batch_size

    def make_model(self):
        layers = [nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 256, 4))

    def make_optimiser(self, model):
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def minibatch(self, step, generator):
        return {"x": torch.randn(self.batch_size, 3, 16, 16, generator=generator)}

    def loss(self, model, batch):
        return model(batch["x"]).float().square().mean()


OPTIONS = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "clip_norm": 1.0},
    "average": {"ema_decay": 0.99, "warmup_steps": 10},
    "clipped": {"clip_norm": 1.0},
}


def total(footprint):
    return footprint.parts[0].peak.total


@pytest.mark.parametrize("name", OPTIONS)
def test_a_phase_takes_as_much_as_on_real_tensors(name):
    estimate, real = (total(of_phase(Small(**OPTIONS[name]), [Small()], fake=fake, steps=2)) for fake in (True, False))
    assert estimate == pytest.approx(real, rel=CLOSE)


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_that_knows_nothing_of_the_kit_takes_as_much_as_on_real_tensors(name):
    build, step = PLAIN[name]
    estimate = of_step(build, step, steps=2).peak.total
    with recurrent_layers_apart():
        real = of_step(build, step, steps=2, fake=False).peak.total
    assert estimate == pytest.approx(real, rel=CLOSE)


def test_the_allocator_counts_the_same():
    """An independent count. A model without convolutions: those take workspaces of their own within the operation."""
    build, step = PLAIN["causal transformer, clipping"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        made = build()
        as_on_a_gpu(made[1])
        for _ in range(2):
            step(*made)
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert of_step(build, step, steps=2).peak.total == pytest.approx(peak, rel=CLOSE)


def mostly_weights():
    net = nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))
    return net, torch.optim.Adam(net.parameters()), torch.zeros(2, 128)


def fit(net, adam, x):
    adam.zero_grad()
    net(x).square().mean().backward()
    adam.step()


def test_parameters_gradients_and_state_are_those_of_the_formula():
    """Where the worst moment is the update: 4 bytes a weight, times 1, 1 and 2."""
    kinds, weights = of_step(mostly_weights, fit).peak.by_kind, 4 * 3 * (128 * 128 + 128)
    assert (kinds["parameters"], kinds["gradients"]) == (weights, weights)
    assert kinds["optimiser"] == 2 * weights + 4 * 6  # and a step count for each of six tensors
    assert kinds[REST] >= weights  # the temporary copy of the update of all at once


# What goes wrong when it is done otherwise: each has been done, each gives a number that looks right.


def test_one_step_alone_misses_the_optimiser_s_state():
    one, three = (total(of_phase(Small(), [], steps=steps)) for steps in (1, 3))
    assert one < three * (1 - CLOSE)


def test_without_updating_all_weights_at_once_a_temporary_copy_is_missing():
    as_a_cpu, as_a_gpu = (of_step(mostly_weights, fit, on_a_gpu=flag).peak.total for flag in (False, True))
    assert as_a_cpu < as_a_gpu * (1 - CLOSE)


def test_the_order_of_the_contexts_does_not_matter():
    """PyTorch's own tracker reports nothing at all when it is entered first, without an error: one reason for one of our own."""

    def run():
        x = torch.zeros(1024, requires_grad=True)
        (x * 2).square().sum().backward()

    inside, outside, theirs = LiveStorages(), LiveStorages(), MemTracker()
    with fake_tensors(), inside:
        run()
    with outside, fake_tensors():
        run()
    with theirs, FakeTensorMode():
        run()
    assert inside.peak.total == outside.peak.total >= 3 * 4096
    assert theirs.get_tracker_snapshot("peak") == {}


class Keeping(Small):
    """Appends its loss to a list, with the graph behind it."""

    kept = None

    def loss(self, model, batch):
        value = super().loss(model, batch)
        self.kept = [*(self.kept or []), model(batch["x"])]
        return value


class Counting(Small):
    """Appends its loss as well, but not the graph."""

    kept = None

    def loss(self, model, batch):
        value = super().loss(model, batch)
        self.kept = [float(value.detach().nbytes), *(self.kept or [])]
        return value


def test_a_graph_that_is_kept_is_named():
    images = 8 * 3 * 16 * 16 * 4
    assert of_phase(Keeping(), []).piling_up > images


@pytest.mark.parametrize("phase", [Small, Counting])
def test_a_phase_that_keeps_nothing_piles_up_nothing(phase):
    assert of_phase(phase(), []).piling_up == 0


# What a GPU does otherwise than a CPU.


def attention(dropout, last_dimension_contiguous=True):
    live = LiveStorages()
    with fake_tensors(), live, AsOnAGpu():
        x = torch.zeros(2, 4, 256, 32) if last_dimension_contiguous else torch.zeros(2, 4, 32, 256).transpose(2, 3)
        x.requires_grad_()
        nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=dropout).sum().backward()
    return live


def test_attention_with_dropout_is_fused_as_on_a_gpu():
    assert attention(0.1).peak.total == attention(0.0).peak.total
    assert not any("softmax" in name for name in attention(0.1).operations)


def test_attention_that_no_device_fuses_keeps_its_weights():
    weights = 4 * 2 * 4 * 256 * 256
    assert attention(0.0, last_dimension_contiguous=False).peak.total > attention(0.0).peak.total + weights


class Attending(Small):
    contiguous = True

    def make_model(self):
        return nn.Linear(16, 16)

    def loss(self, model, batch):
        x = model(batch["x"])
        x = x if self.contiguous else x.transpose(2, 3)
        return nn.functional.scaled_dot_product_attention(x, x, x).square().mean()


def test_a_phase_with_attention_that_is_not_fused_is_told_so(monkeypatch):
    assert of_phase(Attending(), []).notes == ()
    monkeypatch.setattr(Attending, "contiguous", False)
    (note,) = of_phase(Attending(), []).notes
    assert note.startswith("attention is not fused")


def test_normalisations_under_autocast_are_done_in_float32_as_on_a_gpu():
    seen = []
    layer = nn.GroupNorm(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), AsOnAGpu():
        half = nn.functional.conv2d(torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 1, 1))
        seen += [half.dtype, layer(half).dtype, (half @ half).dtype]
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_without_autocast_nothing_is_cast():
    with AsOnAGpu():
        assert nn.GroupNorm(2, 8).double()(torch.zeros(1, 8, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_lstm_keeps_all_its_states():
    """As one operation, a fake one has an empty buffer in their place: an estimate far too low."""
    build, step = PLAIN["LSTM, RMSprop"]
    apart = of_step(build, step, steps=2).peak.total
    live = LiveStorages()
    with FakeTensorMode(), live:
        made = build()
        for _ in range(2):
            step(*made)
    assert live.peak.total < 0.75 * apart


# Phases that do not run on fake tensors.


class Reading(Small):
    def loss(self, model, batch):
        value = super().loss(model, batch)
        return value if value.item() < 1e9 else value / 2


class Selecting(Small):
    def loss(self, model, batch):
        return model(batch["x"][batch["x"][:, 0, 0, 0] > 0]).mean()


class Converting(Small):
    def make_model(self):
        return super().make_model().to(memory_format=torch.channels_last)


class Broken(Small):
    def make_optimiser(self, model):
        raise ValueError("no\nsuch optimiser")


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (Reading, "phase small: found code that reads the values of a tensor (aten._local_scalar_dense.default) at "),
        (Selecting, "phase small: found code that reads the values of a tensor (aten."),
        (Converting, "a fake network cannot be converted (.to, .half)"),
        (Broken, "phase small: found ValueError: no such optimiser at "),
    ],
)
def test_a_phase_that_cannot_be_rehearsed_is_named_in_one_line_with_its_place(phase, expected):
    with pytest.raises(CannotRehearse) as caught:
        of_phase(phase(), [])
    line = str(caught.value)
    assert expected in line
    assert "\n" not in line
    assert "test_fake.py:" in line


def test_bad_input_passes_through():
    with pytest.raises(BadInput, match="as it is"):
        with reported_as("phase x"):
            raise BadInput("as it is")


def test_real_tensors_from_outside_may_come_in(monkeypatch):
    mean = torch.full((3, 1, 1), 0.5)
    monkeypatch.setattr(Small, "loss", lambda self, model, batch: model(batch["x"] - mean).float().square().mean())
    assert of_phase(Small(), []).parts[0].peak.total > 0


def test_the_minibatch_is_shared_out_between_processes():
    one, two = (of_phase(Small(), [], processes=processes) for processes in (1, 2))
    assert (one.rows, two.rows) == (8, 4)
    assert total(two) < total(one)


def test_the_first_of_unequal_shares_is_the_largest_and_fewer_rows_than_processes_are_refused():
    assert of_phase(Small(), [], processes=3).rows == 3
    with pytest.raises(
        BadInput, match=r"phases\.small\.batch_size: found a minibatch of 8 rows, expected at least 9, one a process"
    ):
        of_phase(Small(), [], processes=9)


def test_what_is_built_for_the_phase_lies_on_the_host(monkeypatch):
    """A pool of 100 MB is no device memory."""
    before = total(of_phase(Small(), []))
    monkeypatch.setattr(Small, "prepare", lambda self, *_: setattr(self, "pool", torch.zeros(25_000_000)))
    assert total(of_phase(Small(), [])) == before


class Copying(torch.optim.SGD):
    """Keeps a copy of the weights from the beginning, as an optimiser with slow weights may."""

    def __init__(self, parameters, keeps):
        super().__init__(parameters, lr=0.1)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]] if keeps else []


@pytest.mark.parametrize("fake", [True, False])
def test_what_an_optimiser_makes_at_its_beginning_lies_on_the_device(monkeypatch, fake):
    found = {}
    for keeps in (False, True):
        monkeypatch.setattr(
            Small, "make_optimiser", lambda self, model, keeps=keeps: Copying(model.parameters(), keeps)
        )
        found[keeps] = of_phase(Small(), [], fake=fake).parts[0].peak
    weights = sum(weight.nbytes for weight in Small().make_model().parameters())
    assert found[True].by_kind["optimiser"] == weights and "optimiser" not in found[False].by_kind
    assert found[True].total == found[False].total + weights


def test_earlier_networks_stay_on_the_device():
    alone, third = (of_phase(Small(), before).parts[0].peak for before in ([], [Small(), Small(ema_decay=0.5)]))
    assert "earlier networks" not in alone.by_kind
    (names,) = [set(networks([Small()]))]
    assert names == {"small"}  # two phases of one name are one network here
    weights = sum(weight.nbytes for weight in Small().make_model().parameters())
    assert third.by_kind["earlier networks"] == weights
    assert third.total == alone.total + weights


def test_a_rehearsal_does_the_engine_s_steps():
    """On real tensors: the same weights as a loop's, after warm-up, clipping and averaging."""
    phase = Small(clip_norm=0.5, warmup_steps=3, ema_decay=0.9)
    torch.manual_seed(0)
    rehearsal = Rehearsal(phase, {})
    rehearsal.draw()
    loop = Loop(phase, seed=0, runtime=Runtime(torch.device("cpu")), earlier={})
    torch.manual_seed(0)
    loop.state = phase.setup({})
    as_on_a_gpu(loop.state.optimiser)
    for number in range(3):
        rehearsal(number)
        loop.one_step(rehearsal.minibatch)
    for found, expected in zip(rehearsal.average.parameters(), loop.state.average.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_blocks_of_the_allocator_are_counted():
    live = LiveStorages()
    with live:
        kept = [torch.zeros(1) for _ in range(10)]
    assert (len(kept), live.peak.total, live.peak.in_blocks) == (10, 40, 5120)


def test_storages_are_counted_once_and_until_the_last_view_is_gone():
    with LiveStorages() as live:
        x = torch.zeros(256)
        view = x[10:].reshape(2, -1)
        del x
        assert live.alive == 1024
        del view
        assert live.alive == 0
        assert live.peak.total == 1024


# Micro-batches.


def divided(phase, count, **options):
    return of_phase(phase, [], micro_batches=count, steps=2, **options)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_micro_batches_take_as_much_as_on_real_tensors_with_all_of_them_computed(count):
    """Real steps of the engine itself, on a counter of its own: rehearsed are two of the micro-batches."""
    phase, live = Small(), LiveStorages()
    with live:
        rehearsal = Rehearsal(phase, {}, micro_batches=count)
        live.label("parameters", rehearsal.model.parameters())
        rehearsal.draw()
        live.forget()
        live.restart()
        parts = Update(phase, 0, Runtime(torch.device("cpu"), micro_batches={"*": count}))
        with AsOnAGpu():
            for step in range(2):
                parts.begin(step)
                phase.train_step(rehearsal._state, rehearsal.minibatch, parts)
                parts.end([])
    assert total(divided(Small(), count)) == pytest.approx(live.peak.total, rel=CLOSE)


def test_micro_batches_keep_weights_and_state_and_shrink_activations():
    one, four, eight = (divided(Small(), count).parts[0].peak.by_kind for count in (1, 4, 8))
    for kind in ("parameters", "optimiser", "minibatch"):
        assert one[kind] == four[kind] == eight[kind]
    assert one[REST] > 2 * four[REST] > 2 * eight[REST]


def test_parts_of_one_row_lie_on_the_device_with_all_rows():
    found = divided(Small(), 8)
    assert (found.rows, found.micro_batches, found.parts[0].peak.by_kind["minibatch"]) == (8, 8, 8 * 3 * 16 * 16 * 4)


class Normed(Small):
    def make_model(self):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 196, 4))


class NormedAtRest(Normed):
    def loss(self, model, batch):
        model[1].eval()
        return super().loss(model, batch)


class NormedAlone(Normed):
    def make_model(self):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(4 * 196, 4))


class NormedByPart(Normed):
    parts_define = "the statistics of batch norm"


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (Small, ""),
        (NormedAtRest, ""),
        (NormedAlone, ""),
        (Normed, "a run in parts is refused: its batch norm takes the statistics of a part"),
        (NormedByPart, "another method: the paper means the statistics of batch norm within each part"),
    ],
)
def test_what_binds_the_rows_of_a_minibatch_is_told(phase, told):
    found = divided(phase(), 1).bound
    assert told in found and bool(told) == bool(found)
