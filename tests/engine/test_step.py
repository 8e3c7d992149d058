"""What a step does beyond the optimiser's: precision, warm-up, clipping, average; and that a resume has it all."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from toy_method import Config, Line
from toy_project import CONFIG

from repro import checkpoint
from repro.config import Pace, validate
from repro.errors import BadInput
from repro.loop import run_phase
from repro.phases import PLAIN, StepOptions
from repro.runtime import Runtime, arithmetic, check_precision
from repro.step import Stepper

CPU = torch.device("cpu")
STEPS = CONFIG["phases"]["line"]["iterations"]
ALL = {"warmup_steps": 8, "clip_norm": 0.1, "ema_decay": 0.7}


def options(**changes):
    return StepOptions(**(PLAIN.model_dump() | changes))


def weights(model):
    return [weight.detach().clone() for weight in model.state_dict().values()]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Watched(Line):
    """The line phase with options, and notes of each step of the optimiser: number, rate, gradient, weights before."""

    def __init__(self, step_options, dies_at=None):
        super().__init__(validate(Config, CONFIG, "toy"))
        self.options, self.dies_at = step_options, dies_at
        self.number, self.steps, self.rates, self.gradients, self.before = None, [], [], [], []

    def make_optimiser(self, model):
        optimiser = super().make_optimiser(model)
        optimiser.register_step_pre_hook(lambda *_: self.note(optimiser, model))
        return optimiser

    def note(self, optimiser, model):
        self.steps.append(self.number)
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
    assert equal(weights(whole.model), weights(resumed.model)) and whole.curve == resumed.curve


def test_each_option_changes_the_network_that_is_handed_on(tmp_path):
    kinds = [
        {},
        {"ema_decay": 0.7},
        {"warmup_steps": 8},
        {"clip_norm": 0.1},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ]
    ends = [weights(train(Watched(options(**kind)), tmp_path / str(number)).model) for number, kind in enumerate(kinds)]
    assert not any(equal(one, other) for number, one in enumerate(ends) for other in ends[:number])


def test_without_options_a_step_is_the_plain_step_of_the_optimiser_bit_for_bit():
    torch.manual_seed(0)
    stepped, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(stepped.state_dict())
    optimisers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (stepped, plain)]
    stepper = Stepper(stepped, optimisers[0], PLAIN, CPU)
    for number in range(5):
        x = torch.randn(4, 3)
        with stepper.autocast():
            loss = stepped(x).square().mean()
        stepper.step(loss, number)
        optimisers[1].zero_grad()
        plain(x).square().mean().backward()
        optimisers[1].step()
        assert equal(weights(stepped), weights(plain))
    assert stepper.result is stepped


def test_the_network_handed_on_is_the_average_of_the_weights_after_each_step(tmp_path):
    """a <- d a + (1 - d) w, from the weights after the first step, which are those of a phase without an average."""
    phase = Watched(options(ema_decay=0.7))
    handed_on = weights(train(phase, tmp_path / "average").model)
    last = weights(train(Watched(PLAIN), tmp_path / "plain").model)
    after = [*phase.before[1:], last]
    assert len(after) == STEPS
    expected = after[0]
    for step in after[1:]:
        expected = [0.7 * average + 0.3 * weight for average, weight in zip(expected, step, strict=True)]
    for one, other in zip(handed_on, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_learning_rate_grows_to_the_full_one_and_goes_on_growing_after_a_resume(tmp_path):
    full = CONFIG["phases"]["line"]["learning_rate"]
    expected = [full * min(1.0, step / 8) for step in range(1, STEPS + 1)]
    phase = Watched(options(warmup_steps=8))
    train(phase, tmp_path / "whole")
    assert phase.rates == pytest.approx(expected) and phase.rates[7] == full
    died_at(7, options(warmup_steps=8), tmp_path / "died")
    resumed = Watched(options(warmup_steps=8))
    train(resumed, tmp_path / "died")
    assert resumed.rates == phase.rates[5:]


def test_every_group_of_parameters_warms_up_to_its_own_rate():
    model = nn.Linear(1, 1)
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}]
    optimiser = torch.optim.SGD(groups)
    stepper = Stepper(model, optimiser, options(warmup_steps=2), CPU)
    for number, share in enumerate((0.5, 1.0, 1.0)):
        stepper.step(model(torch.ones(1, 1)).sum(), number)
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([share, 0.1 * share])


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
    assert 0 not in phase.steps and STEPS - 1 in phase.steps
    state = died_at(7, options(precision="fp16"), tmp_path / "died")
    assert 0 < state["scaler"]["scale"] < 65_536
    resumed = Watched(options(precision="fp16"))
    train(resumed, tmp_path / "died")
    assert resumed.steps == [step for step in phase.steps if step >= 5]


def test_no_scale_is_kept_where_none_is_used(tmp_path):
    assert died_at(7, options(precision="bf16"), tmp_path)["scaler"] == {}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_that_of_the_products_and_never_of_the_weights(precision, dtype):
    model, seen = nn.Linear(2, 2), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    optimiser = torch.optim.Adam(model.parameters())
    stepper = Stepper(model, optimiser, options(precision=precision, ema_decay=0.5), CPU)
    with stepper.autocast():
        loss = nn.functional.mse_loss(model(torch.ones(1, 2)).float(), torch.zeros(1, 2))
    stepper.step(loss, 0)
    assert seen == [dtype]
    kept = [*weights(model), *weights(stepper.result)]
    kept += [value for state in optimiser.state.values() for value in state.values()]
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
        check_precision(options(precision="bf16"), "line", gpu(hardware=False))


def test_every_other_precision_is_taken_and_bf16_where_there_is_hardware(gpu):
    check_precision(options(precision="bf16"), "line", gpu(hardware=True))
    for precision in ("float32", "fp16"):
        check_precision(options(precision=precision), "line", gpu(hardware=False))
    check_precision(options(precision="bf16"), "line", CPU)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "fp64"}, {"warmup_steps": -1}, {"clip_norm": 0.0}, {"ema_decay": 0.0}, {"ema_decay": 1.0}],
)
def test_options_without_a_meaning_are_refused(changes):
    with pytest.raises(BadInput, match=next(iter(changes))):
        validate(StepOptions, PLAIN.model_dump() | changes, "toy")
