"""What a step of one loss does beyond the optimiser's: precision, warm-up, clipping, average; and that a resume has it all."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR
from toy_method import Config, Line
from toy_project import CONFIG

from repro import checkpoint
from repro.config import Pace, validate
from repro.errors import BadInput, RunFailed
from repro.loop import Loop, run_phase
from repro.phases import PLAIN, SingleLossPhase, StepOptions, cosine, linear, milestones
from repro.runtime import Runtime, arithmetic, check_precision

CPU = torch.device("cpu")
STEPS, FULL = (CONFIG["phases"]["line"][name] for name in ("iterations", "learning_rate"))
ALL = {"warmup_steps": 8, "clip_norm": 0.1, "ema_decay": 0.7}


def options(**changes):
    return StepOptions(**(PLAIN.model_dump() | changes))


class Small(SingleLossPhase):
    """A linear layer without data: what the loop does with `options` and nothing else."""

    name, iterations = "small", 8

    def __init__(self, step_options=PLAIN, optimiser=lambda model: torch.optim.Adam(model.parameters(), lr=1e-2)):
        self.options, self.optimiser = step_options, optimiser

    def make_model(self):
        return nn.Linear(3, 2)

    def make_optimiser(self, model):
        return self.optimiser(model)

    def minibatch(self, step, draw):
        return {"x": torch.randn(4, 3, generator=draw)}

    def loss(self, model, batch):
        return model(batch["x"]).float().square().mean()


def start(phase):
    return Loop(phase, seed=1, runtime=Runtime(CPU), earlier={})


def weights(model):
    return [weight.detach().clone() for weight in model.state_dict().values()]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Watched(Line):
    """The line phase with options, and notes of each step of the optimiser: number, rate, gradient, weights before."""

    def __init__(self, step_options, dies_at=None):
        super().__init__(validate(Config, CONFIG, "toy"))
        self.options, self.dies_at = step_options, dies_at
        self.number, self.stepped, self.rates, self.gradients, self.before = None, [], [], [], []

    def make_optimiser(self, model):
        optimiser = super().make_optimiser(model)
        optimiser.register_step_pre_hook(lambda *_: self.note(optimiser, model))
        return optimiser

    def note(self, optimiser, model):
        self.stepped.append(self.number)
        self.rates.append(optimiser.param_groups[0]["lr"])
        self.gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        self.before.append(weights(model))

    def minibatch(self, step, generator):
        if step == self.dies_at:
            raise KeyboardInterrupt
        self.number = step
        return super().minibatch(step, generator)


def train(phase, folder):
    return run_phase(
        phase,
        folder=folder,
        identity={},
        seed=1,
        runtime=Runtime(CPU),
        pace=Pace(log_every=3, checkpoint_every=5),
        earlier={},
    )


def died_at(step, step_options, folder):
    """The saved state of a phase that died before `step`."""
    with pytest.raises(KeyboardInterrupt):
        train(Watched(step_options, dies_at=step), folder)
    return checkpoint.load(folder / "running.safetensors")


@pytest.mark.parametrize(
    "changes",
    [{"ema_decay": 0.7}, {"warmup_steps": 8}, {"clip_norm": 0.1}, {"precision": "bf16"}, {"precision": "fp16"},
     {"precision": "fp16", **ALL}],
    ids=["average", "warm-up", "clipping", "bf16", "fp16", "everything"],
)  # fmt: skip
def test_a_resumed_phase_ends_in_the_same_bits(tmp_path, changes):
    whole = train(Watched(options(**changes)), tmp_path / "whole")
    assert died_at(7, options(**changes), tmp_path / "died")["steps_done"] == 5
    resumed = train(Watched(options(**changes)), tmp_path / "died")
    assert equal(weights(whole.networks), weights(resumed.networks)) and whole.curves == resumed.curves


def test_each_option_changes_the_network_that_is_handed_on(tmp_path):
    kinds = [
        {},
        {"ema_decay": 0.7},
        {"warmup_steps": 8},
        {"clip_norm": 0.1},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ]
    ends = [
        weights(train(Watched(options(**kind)), tmp_path / str(number)).networks) for number, kind in enumerate(kinds)
    ]
    assert not any(equal(one, other) for number, one in enumerate(ends) for other in ends[:number])


def test_without_options_a_step_is_the_plain_step_of_the_optimiser_bit_for_bit():
    loop, plain = start(Small()), nn.Linear(3, 2)
    plain.load_state_dict(loop.state.model.state_dict())
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for _ in range(5):
        batch = loop.next_batch()
        loop.one_step(batch)
        optimiser.zero_grad()
        loss = plain(batch["x"]).square().mean()
        loss.backward()
        optimiser.step()
        assert equal(weights(loop.state.model), weights(plain))
        assert loop.update.logged["loss"] == (loop.step, loss)
    assert loop.phase.networks(loop.state) == {"model": loop.state.model}


def test_the_network_handed_on_is_the_average_of_the_weights_after_each_step(tmp_path):
    """a <- d a + (1 - d) w, from the weights after the first step, which are those of a phase without an average."""
    phase = Watched(options(ema_decay=0.7))
    handed_on = weights(train(phase, tmp_path / "average").networks)
    last = weights(train(Watched(PLAIN), tmp_path / "plain").networks)
    after = [*phase.before[1:], last]
    assert len(after) == STEPS
    expected = after[0]
    for step in after[1:]:
        expected = [0.7 * average + 0.3 * weight for average, weight in zip(expected, step, strict=True)]
    for one, other in zip(handed_on, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_learning_rate_grows_to_the_full_one_and_goes_on_growing_after_a_resume(tmp_path):
    expected = [FULL * min(1.0, step / 8) for step in range(1, STEPS + 1)]
    phase = Watched(options(warmup_steps=8))
    train(phase, tmp_path / "whole")
    assert phase.rates == pytest.approx(expected) and phase.rates[7] == FULL
    died_at(7, options(warmup_steps=8), tmp_path / "died")
    resumed = Watched(options(warmup_steps=8))
    train(resumed, tmp_path / "died")
    assert resumed.rates == phase.rates[5:]


def two_groups(model):
    return torch.optim.SGD([{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}])


def test_every_group_of_parameters_warms_up_to_its_own_rate():
    loop = start(Small(options(warmup_steps=2), two_groups))
    for share in (0.5, 1.0, 1.0):
        loop.one_step(loop.next_batch())
        assert [group["lr"] for group in loop.state.optimiser.param_groups] == pytest.approx([share, 0.1 * share])


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_gradient_is_clipped_to_the_norm_and_a_smaller_one_left_alone(tmp_path, precision):
    """Of the gradient that the optimiser is given, without the factor of the loss that fp16 needs."""
    phase, whole = Watched(options(clip_norm=0.1, precision=precision)), Watched(options(precision=precision))
    train(phase, tmp_path / "clipped")
    train(whole, tmp_path / "whole")
    norms = torch.stack([gradient.norm() for gradient in phase.gradients])
    assert norms.max().item() == pytest.approx(0.1, rel=1e-4)
    first = whole.gradients[0]  # the same weights, the same minibatch
    assert first.norm() > 0.1
    torch.testing.assert_close(phase.gradients[0], first * (0.1 / first.norm()), rtol=1e-3, atol=1e-6)

    loose = Watched(options(clip_norm=1e6, precision=precision))
    train(loose, tmp_path / "loose")
    torch.testing.assert_close(loose.gradients[0], first)


def test_a_loss_that_is_scaled_too_much_costs_its_step_and_the_lower_scale_is_saved(tmp_path):
    """The scale begins at 65,536, with which this gradient overflows; a resumed phase must not begin there again."""
    phase = Watched(options(precision="fp16"))
    train(phase, tmp_path / "whole")
    assert 0 not in phase.stepped and STEPS - 1 in phase.stepped
    state = died_at(7, options(precision="fp16"), tmp_path / "died")
    assert 0 < state["scaler"]["scale"] < 65_536
    resumed = Watched(options(precision="fp16"))
    train(resumed, tmp_path / "died")
    assert resumed.stepped == [step for step in phase.stepped if step >= 5]


def test_no_scale_is_kept_where_none_is_used(tmp_path):
    assert died_at(7, options(precision="bf16"), tmp_path)["scaler"] == {}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_that_of_the_products_and_never_of_the_weights(precision, dtype):
    loop, seen = start(Small(options(precision=precision, ema_decay=0.5))), []
    loop.state.model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loop.one_step(loop.next_batch())
    assert seen == [dtype]
    kept = [*weights(loop.state.model), *weights(loop.state.average.module)]
    kept += [value for state in loop.state.optimiser.state.values() for value in state.values()]
    assert {value.dtype for value in kept} == {torch.float32}


def test_tf32_is_set_for_the_block_only():
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for precision in ("tf32", "float32", "bf16", "fp16"):
        with pytest.raises(KeyboardInterrupt), arithmetic(precision):
            assert [flag.allow_tf32 for flag in flags] == 2 * [precision == "tf32"]
            raise KeyboardInterrupt
        assert [flag.allow_tf32 for flag in flags] == before


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of our invention; the answer to whether it has bfloat16 in hardware is set by the test."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1080")

    def has_bf16(hardware):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: hardware or including_emulation
        )
        return torch.device("cuda", 0)

    return has_bf16


def test_bf16_is_refused_on_a_gpu_that_only_emulates_it(gpu):
    expected = "^phases.line.precision: found bf16, expected float32 or fp16 on GeForce GTX 1080$"
    with pytest.raises(BadInput, match=expected):
        check_precision("bf16", "line", gpu(hardware=False))


def test_every_other_precision_is_taken_and_bf16_where_there_is_hardware(gpu):
    check_precision("bf16", "line", gpu(hardware=True))
    for precision in ("float32", "fp16"):
        check_precision(precision, "line", gpu(hardware=False))
    check_precision("bf16", "line", CPU)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "fp64"}, {"warmup_steps": -1}, {"clip_norm": 0.0}, {"ema_decay": 0.0}, {"ema_decay": 1.0}],
)
def test_options_without_a_meaning_are_refused(changes):
    with pytest.raises(BadInput, match=next(iter(changes))):
        validate(StepOptions, PLAIN.model_dump() | changes, "toy")


# --- rates that fall

OF_TORCH = {
    "cosine": (lambda step: cosine(step, 20, 0.1), lambda sgd: CosineAnnealingLR(sgd, 20, eta_min=0.1)),
    "linear": (lambda step: linear(step, 20, 0.1), lambda sgd: LinearLR(sgd, 1.0, 0.1, 20)),
    "milestones": (lambda step: milestones(step, (8, 15), 0.1), lambda sgd: MultiStepLR(sgd, (8, 15), 0.1)),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_formula_gives_the_rates_of_torch(name):
    ours, theirs = OF_TORCH[name]
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = theirs(sgd)
    for step in range(20):
        assert math.isclose(sgd.param_groups[0]["lr"], ours(step), rel_tol=1e-9), step
        sgd.step()
        schedule.step()


@pytest.mark.parametrize("formula", [cosine, linear])
def test_before_the_fall_it_is_1_and_after_it_the_least(formula):
    assert [formula(step, 10, 0.2) for step in (-3, 0)] == [1.0, 1.0]
    assert [formula(step, 10, 0.2) for step in (10, 11, 100)] == pytest.approx([0.2] * 3)
    assert 0.2 < formula(9, 10, 0.2) < formula(1, 10, 0.2) < 1


class Falling(Watched):
    def learning_rate_factor(self, step):
        return cosine(step, STEPS)


def test_every_step_has_its_rate_on_top_of_the_warm_up(tmp_path):
    phase = Falling(options(warmup_steps=4))
    train(phase, tmp_path)
    expected = [FULL * min(1, (step + 1) / 4) * cosine(step, STEPS) for step in range(STEPS)]
    assert phase.rates == pytest.approx(expected)


def test_a_resumed_phase_has_the_same_rates_and_ends_in_the_same_bits(tmp_path):
    whole, died, resumed = Falling(PLAIN), Falling(PLAIN, dies_at=7), Falling(PLAIN)
    ends = weights(train(whole, tmp_path / "whole").networks)
    with pytest.raises(KeyboardInterrupt):
        train(died, tmp_path / "died")
    assert equal(weights(train(resumed, tmp_path / "died").networks), ends)
    assert resumed.rates == whole.rates[5:]


class Lowered(Small):
    """Small with a rate that `factor` gives of the step."""

    def __init__(self, factor):
        super().__init__(PLAIN, two_groups)
        self.factor = factor

    def learning_rate_factor(self, step):
        return self.factor(step)


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_what_no_rate_can_have_is_refused(factor):
    loop = start(Lowered(lambda step: factor if step == 3 else 1.0))
    with pytest.raises(RunFailed, match=r"learning_rate_factor\(3\): found .*, expected a finite number"):
        for _ in range(4):
            loop.one_step(loop.next_batch())


def test_every_group_of_parameters_falls_from_its_own_rate():
    loop = start(Lowered(lambda step: linear(step, 4)))
    for _ in range(3):
        loop.one_step(loop.next_batch())
    assert [group["lr"] for group in loop.state.optimiser.param_groups] == pytest.approx([0.5, 0.05])
