"""m45: a group norm with one channel a group erases what was added per channel, the time.

Every block of a UNet passes the time on, except where the paper's MNIST network does not: the three blocks at full resolution. They are found
by the gradient, and that is what `repro diagnose` says.
"""

from functools import partial

import torch
from proof import Proof
from torch import nn

from nsgf import phases, unet
from nsgf.phases import make_phases
from repro.config import load
from repro.runtime import Runtime
from repro_tools.diagnose import suspects_training
from repro_tools.diagnose.bench import Bench
from repro_tools.diagnose.explanation import Place
from repro_tools.diagnose.measured import Measured
from repro_tools.diagnose.short_training import learn

TIME_OF_BLOCK = ".time.1.weight"
CPU = torch.device("cpu")
BLIND = {"digits": [], "mnist": ["down.block_0_0", "up.block_0_0", "up.block_0_1"]}


def straight_flow(project, experiment, *overrides):
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], list(overrides))
    return make_phases(config, Runtime(CPU))[1]


def check(project, experiment):
    """The blocks whose time weights do not change the output, in float64, with no layer of zeros."""
    torch.manual_seed(0)
    network = straight_flow(project, experiment).make_model().double()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, network.image_channels, network.image_size, network.image_size, dtype=torch.float64)
    network(x, torch.tensor([0.1, 0.9])).square().sum().backward()
    pulls = {name: float(weight.grad.norm()) for name, weight in network.named_parameters() if weight.ndim > 1}
    pulls_of_time = {name: pull for name, pull in pulls.items() if name.endswith(TIME_OF_BLOCK)}
    blind = [
        name.removesuffix(TIME_OF_BLOCK) for name, pull in pulls_of_time.items() if pull < 1e-9 * max(pulls.values())
    ]
    expected = BLIND[experiment]
    assert blind == expected, f"{experiment}: blocks that know nothing of the time: found {blind}, expected {expected}"


def check_command(project, tmp_path):
    """The first findings of `repro diagnose` about the gradient, on a small network, after the ten steps that it looks at."""
    small = ["channels=8", "groups=4", "attention_resolutions=[]"]
    sizes = (f"phases.straight_flow.network.{size}" for size in small)
    phase = straight_flow(project, "digits", *sizes, "phases.straight_flow.batch_size=4")
    phase.prepare(0, tmp_path, {})
    bench = Bench(phase, 0, CPU)
    _, parameters, _ = learn(bench, [bench.minibatch(0, "held")], steps=10)
    measured = Measured(phase.name, 0, parameters=parameters)
    found = [one.measured for one in suspects_training.spread(measured, Place("digits", phase.name, 0, 10))]
    assert not found, f"repro diagnose, gradient-spread: {found[0]}"


def one_channel_a_group(monkeypatch):
    """As in the paper's MNIST network: as many groups as the first level has channels."""
    groups(monkeypatch, lambda sizes: sizes["channels"])


def instance_norm(monkeypatch):
    """The same at every level. Only the bias and the scale that it learns are kept."""
    monkeypatch.setattr(unet.nn, "GroupNorm", lambda groups, channels: nn.InstanceNorm2d(channels, affine=True))


def mended_without_a_word(monkeypatch):
    """The deviation is in no document."""
    groups(monkeypatch, lambda sizes: 8)


def groups(monkeypatch, of):
    real = phases.UNet
    monkeypatch.setattr(phases, "UNet", lambda **sizes: real(**sizes | {"groups": of(sizes)}))


def two_channels_a_group(monkeypatch):
    """The mean of the two is lost, their difference passes."""
    groups(monkeypatch, lambda sizes: sizes["channels"] // 2)


def one_group(monkeypatch):
    groups(monkeypatch, lambda sizes: 1)


def time_added_behind_the_norm(monkeypatch):
    """With one channel a group, and nothing is lost."""
    one_channel_a_group(monkeypatch)

    def forward(self, h, e):
        norm, *rest = self.after
        return self.shortcut(h) + nn.Sequential(*rest)(norm(self.before(h)) + self.time(e)[:, :, None, None])

    monkeypatch.setattr(unet.ResidualBlock, "forward", forward)


def half_the_channels(monkeypatch):
    """In half the groups: the same three blocks, in a network of other sizes."""
    real = phases.UNet
    monkeypatch.setattr(phases, "UNet", lambda **sizes: real(**sizes | {"channels": 16, "groups": 16}))


PASSES = [two_channels_a_group, one_group, time_added_behind_the_norm]
PROOFS = [
    Proof(
        partial(check, experiment="digits"),
        {
            one_channel_a_group: "know nothing of the time: found ['down.block_0_0', 'up.block_0_0', 'up.block_0_1'], expected []",
            instance_norm: "know nothing of the time: found ['down.block_0_0', 'down.block_1_0', 'middle.0', ",
        },
        PASSES,
    ),
    Proof(
        partial(check, experiment="mnist"),
        {mended_without_a_word: "know nothing of the time: found [], expected ['down.block_0_0', "},
        [half_the_channels],
    ),
    Proof(
        check_command,
        {one_channel_a_group: "; 3 of 37 matrices are 10^4 times or more below the largest"},
        PASSES,
    ),
]


def test_proof(case):
    case()
