"""Predicted against measured time of a training step: phases of the reference implementation and models that are not ours.

    python -m benchmarks.step_time [--rounds N] [--device cpu|cuda|cuda:1] [--only NAME ...]
    python -m benchmarks.step_time --published
    python -m benchmarks.step_time --page

Writes benchmarks/results/step_time.json, or step_time_<device>.json for a GPU.

On the CPU, with one thread: the probes of `repro_tools.memory.this_machine` and some steps of each model take turns, so that a busy machine slows both;
of each the fastest counts. Seconds are those of the processor: waiting for other programs is not counted, sharing caches with them is. The step is predicted from its recording on fake tensors and from those probes alone. On a GPU: the median of
ten steps after five, against the data sheet of the device.

DEVELOPED_ON are the models that were looked at while the classes of operations, the probes and the spread were chosen. All others were held
out: their times were measured for the first time after that, and which is which was written down before. That first look is kept in
results/step_time_first_look.json. MENDED are held-out models whose first look showed a fault of the recording: operations that make several
passes inside. They count as looked at since.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nsgf import sinkhorn
from repro.config import load
from repro.method import find_project
from repro.run import git_commit
from repro.runtime import Runtime, arithmetic, machine
from repro.update import Update
from repro_tools.memory.cost import Cost, step_cost
from repro_tools.memory.devices import find
from repro_tools.memory.fake import fake_tensors, networks
from repro_tools.memory.roofline import Range, predict
from repro_tools.memory.this_machine import clock, combine, probe

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ROUNDS, SECONDS = 8, 1.0
"""Rounds on the CPU, and the seconds of steps that each model gets in a round (at least one step)."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A step that can be made on real and on fake tensors. make(device): everything anew, and the step.

    precision: of the products of float32 numbers; the step's own autocast is in `make`.
    """

    make: Callable[[torch.device], Step]
    what: str
    precision: str = "float32"


def on(device: torch.device, module: nn.Module) -> nn.Module:
    """The module there. On the CPU it is left as it is: `to` exchanges its weights, which fake ones do not allow."""
    return module if device.type == "cpu" else module.to(device)


def training(model: nn.Module, optimiser: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return step


def phase(experiment: str, name: str, *overrides: str) -> Callable[[torch.device], Step]:
    """A step of a phase of the reference implementation, as the trainer does it, without its data set."""

    def make(device: torch.device) -> Step:
        project = find_project(ROOT)
        config, _ = load(project.config_class(experiment), project.experiments()[experiment], list(overrides))
        phases = project.method.phases(config, Runtime(torch.device("cpu"), stand_in_data=True))
        index = [one.name for one in phases].index(name)
        one, earlier = phases[index], networks(phases[:index])
        state, update, number = one.setup(earlier), Update(one, 0, Runtime(device)), itertools.count()
        if device.type != "cpu":
            checkpoint.move(state, device)
        batch = {key: column.to(device) for key, column in one.rehearse(earlier).items()}

        def step() -> None:
            update.begin(next(number))
            with arithmetic(one.precision) if device.type == "cuda" else nullcontext():
                one.train_step(state, batch, update)
            update.end([])

        return step

    return make


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(h)) + self.shortcut(x))


def resnet(device: torch.device) -> Step:
    blocks = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    model = on(device, nn.Sequential(*stem, *(ResidualBlock(*one) for one in blocks), *head))
    x, label = torch.zeros(16, 3, 32, 32, device=device), torch.zeros(16, dtype=torch.long, device=device)
    adam = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return training(model, adam, lambda: functional.cross_entropy(model(x), label))


class Attending(nn.Module):
    """A layer of a transformer, norms first."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.query_key_value = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.project, self.after = nn.Linear(width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, positions, width = x.shape
        split = self.query_key_value(self.norm(x)).view(n, positions, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, positions, width))
        return x + self.mlp(self.after(x))


class ViT(nn.Module):
    def __init__(self, width: int = 192, layers: int = 6):
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.zeros(1, 64, width))
        self.layers = nn.Sequential(*(Attending(width, 3, causal=False) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2) + self.places).mean(1))


def vit(device: torch.device) -> Step:
    model = on(device, ViT())
    x, label = torch.zeros(16, 3, 32, 32, device=device), torch.zeros(16, dtype=torch.long, device=device)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return training(model, adam, lambda: functional.cross_entropy(model(x), label))


class CausalTransformer(nn.Module):
    def __init__(self, symbols: int = 1000, width: int = 256, layers: int = 4, positions: int = 128):
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(positions, width)
        self.layers = nn.Sequential(*(Attending(width, 4, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.layers(self.symbols(x) + self.places(places))))


def causal_transformer(device: torch.device) -> Step:
    model = on(device, CausalTransformer())
    x = torch.zeros(8, 128, dtype=torch.long, device=device)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return training(model, adam, lambda: functional.cross_entropy(model(x).flatten(0, 1), x.flatten()))


class Recurrent(nn.Module):
    def __init__(self, symbols: int = 100, width: int = 256):
        super().__init__()
        self.symbols, self.cell = nn.Embedding(symbols, width), nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.symbols(x))[0])


def lstm(device: torch.device) -> Step:
    model = on(device, Recurrent())
    x = torch.zeros(32, 64, dtype=torch.long, device=device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    return training(model, adam, lambda: functional.cross_entropy(model(x).flatten(0, 1), x.flatten()))


def gan(device: torch.device) -> Step:
    """A step of a DCGAN for 32x32 images: the discriminator's, then the generator's."""

    def up(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    def down(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]

    first = [nn.ConvTranspose2d(100, 256, 4, 1, 0, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
    last = [nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh()]
    generator = on(device, nn.Sequential(*first, *up(256, 128), *up(128, 64), *last))
    layers = [*down(3, 64), *down(64, 128), *down(128, 256), nn.Flatten(), nn.Linear(256 * 16, 1)]
    discriminator = on(device, nn.Sequential(*layers))
    adams = [torch.optim.Adam(one.parameters(), lr=2e-4) for one in (generator, discriminator)]
    noise, real = torch.zeros(32, 100, 1, 1, device=device), torch.zeros(32, 3, 32, 32, device=device)
    ones, zeros = torch.ones(32, 1, device=device), torch.zeros(32, 1, device=device)
    judge = functional.binary_cross_entropy_with_logits

    def step() -> None:
        fake = generator(noise)
        adams[1].zero_grad()
        (judge(discriminator(real), ones) + judge(discriminator(fake.detach()), zeros)).backward()
        adams[1].step()
        adams[0].zero_grad()
        judge(discriminator(fake), ones).backward()
        adams[0].step()

    return step


class CheckpointedMLP(nn.Module):
    """Its activations are computed again in the backward pass."""

    def __init__(self, width: int = 512, layers: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return x


def checkpointed_mlp(device: torch.device) -> Step:
    model, x = on(device, CheckpointedMLP()), torch.zeros(256, 512, device=device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    return training(model, adam, lambda: model(x).square().mean())


def sinkhorn_velocity(n: int, d: int, blur: float, scaling: float) -> Callable[[torch.device], Step]:
    """One velocity, on the way that a GPU takes: fake tensors take it too, real CPU tensors a faster one of their own."""

    def make(device: torch.device) -> Step:
        x, y = torch.randn(n, d).to(device), torch.randn(n, d).to(device)

        def step() -> None:
            with mock.patch.object(sinkhorn, "_is_eager_cpu", return_value=False):
                sinkhorn.velocity(x, y, blur=blur, scaling=scaling, diameter=3.0 * d**0.5)

        return step

    return make


DEVELOPED_ON = ("2d straight flow", "digits UNet", "ResNet", "ViT")

MENDED = ("MNIST UNet", "Sinkhorn, points", "Sinkhorn, images")

CASES: Mapping[str, Case] = {
    "2d straight flow": Case(phase("2d-moons", "straight_flow"), "2d-moons, MLP, 256 points"),
    "digits UNet": Case(phase("digits", "straight_flow"), "digits"),
    "ResNet": Case(resnet, "6 blocks, 16 images of 32x32"),
    "ViT": Case(vit, "6 layers of 192, 16 images of 32x32"),
    "2d time predictor": Case(phase("2d-moons", "time_predictor"), "2d-moons, MLP"),
    "digits time predictor": Case(phase("digits", "time_predictor"), "digits, CNN"),
    "MNIST reduced UNet, bf16": Case(phase("mnist-reduced", "straight_flow"), "mnist-reduced"),
    "MNIST reduced UNet": Case(
        phase("mnist-reduced", "straight_flow", "phases.*.precision=float32"), "mnist-reduced, float32"
    ),
    "MNIST reduced time predictor": Case(phase("mnist-reduced", "time_predictor"), "mnist-reduced, CNN"),
    "MNIST UNet": Case(phase("mnist", "straight_flow", "phases.*.batch_size=64"), "mnist, batch 64"),
    "CIFAR-10 UNet": Case(phase("cifar10", "straight_flow", "phases.*.batch_size=4"), "cifar10, batch 4"),
    "Sinkhorn, points": Case(sinkhorn_velocity(256, 2, 0.25, 0.95), "256 points, the way of a GPU"),
    "Sinkhorn, images": Case(sinkhorn_velocity(256, 784, 0.5, 0.95), "256 images of 28x28, the way of a GPU"),
    "causal transformer": Case(causal_transformer, "4 layers of 256, 8 x 128 symbols"),
    "LSTM": Case(lstm, "2 layers of 256, 32 x 64 symbols"),
    "GAN": Case(gan, "DCGAN, 32 images of 32x32"),
    "checkpointed MLP": Case(checkpointed_mlp, "8 layers of 512, 256 rows"),
}


class Bottleneck(nn.Module):
    """ResNet-50 v1.5: the stride is in the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()

        def unit(*sizes: int) -> list[nn.Module]:
            return [nn.Conv2d(*sizes, bias=False), nn.BatchNorm2d(sizes[1])]

        first, second = unit(inputs, width, 1), unit(width, width, 3, stride, 1)
        self.body = nn.Sequential(*first, nn.ReLU(True), *second, nn.ReLU(True), *unit(width, 4 * width, 1))
        shortcut = nn.Sequential(*unit(inputs, 4 * width, 1, stride))
        self.shortcut = shortcut if stride > 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True)]
    layers += [nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            layers.append(Bottleneck(inputs, 64 * 2**stage, 2 if stage and not index else 1))
            inputs = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def resnet50_step(images: int, trains: bool, half: bool) -> Step:
    model = resnet50()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    x, label = torch.zeros(images, 3, 224, 224), torch.zeros(images, dtype=torch.long)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=half):
            return functional.cross_entropy(model(x).float(), label)

    if trains:
        return training(model, sgd, loss)
    model.eval().requires_grad_(False)
    return loss


def gpt2_step() -> Step:
    """GPT-2 of 124 million parameters with attention in parts, as nanoGPT had it in December 2022: 12 texts of 1024 symbols, bf16."""
    width, heads, positions, texts = 768, 12, 1024, 12

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
            self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            self.register_buffer("past", torch.ones(positions, positions).tril().bool()[None, None])

        def forward(self, x: Tensor) -> Tensor:
            split = self.query_key_value(self.norm(x)).view(texts, positions, 3, heads, width // heads)
            query, key, value = split.permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(-2, -1)) * (width // heads) ** -0.5
            weights = weights.masked_fill(~self.past, float("-inf")).softmax(-1)
            x = x + self.project((weights @ value).transpose(1, 2).reshape(texts, positions, width))
            return x + self.mlp(self.after(x))

    symbols, places = nn.Embedding(50304, width), nn.Embedding(positions, width)
    model = nn.Sequential(*(Layer() for _ in range(12)), nn.LayerNorm(width))
    weights = [*symbols.parameters(), *places.parameters(), *model.parameters()]
    adam = torch.optim.AdamW(weights, lr=1e-4, foreach=True)
    x = torch.zeros(texts, positions, dtype=torch.long)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(symbols(x) + places(torch.arange(positions)))
            scores = functional.linear(hidden, symbols.weight)
        return functional.cross_entropy(scores.flatten(0, 1).float(), x.flatten())

    return training(model, adam, loss)


NVIDIA = "NVIDIA DeepLearningExamples, PyTorch ResNet-50 v1.5, README (pytorch-21.03 container)"
PUBLISHED = (
    ("ResNet-50 training", "A100-SXM-80GB", "tf32", 128, 128 / 938, lambda: resnet50_step(128, True, False), NVIDIA),
    ("ResNet-50 training, mixed", "A100-SXM-80GB", "fp16", 128, 128 / 2470, lambda: resnet50_step(128, True, True), NVIDIA),
    ("ResNet-50 training", "V100-SXM2-16GB", "float32", 128, 128 / 367, lambda: resnet50_step(128, True, False), NVIDIA),
    ("ResNet-50 training, mixed", "V100-SXM2-16GB", "fp16", 128, 128 / 1200, lambda: resnet50_step(128, True, True), NVIDIA),
    ("ResNet-50 inference", "V100-SXM2-16GB", "float32", 128, 0.10926, lambda: resnet50_step(128, False, False), NVIDIA),
    ("ResNet-50 inference, mixed", "V100-SXM2-16GB", "fp16", 128, 0.04355, lambda: resnet50_step(128, False, True), NVIDIA),
    ("ResNet-50 inference", "T4", "float32", 128, 0.30926, lambda: resnet50_step(128, False, False), NVIDIA),
    ("ResNet-50 inference, mixed", "T4", "fp16", 128, 0.11424, lambda: resnet50_step(128, False, True), NVIDIA),
    ("ResNet-50 inference, 1 image", "T4", "float32", 1, 0.0107, lambda: resnet50_step(1, False, False), NVIDIA),
    ("GPT-2 training, bf16", "A100-SXM-40GB", "float32", 12, 0.250, gpt2_step,
     "nanoGPT README, December 2022, without torch.compile"),
)  # fmt: skip
"""What others measured: name, device, precision of float32 products, batch, seconds of a step, the step, where it stands. The shares of the
peaks in `repro_tools.memory.roofline` were written down before these were looked up, and are unchanged since."""


def against_published() -> dict:
    """Predictions from data sheets against times that others published."""
    rows = []
    for name, device, precision, batch, seconds, make, source in PUBLISHED:
        with fake_tensors():
            step = make()
            step()
            cost = step_cost(step)
        found = predict(cost, find(device), precision)
        rows.append(
            {
                "name": name,
                "device": device,
                "batch": batch,
                "predicted_ms": [round(1e3 * one, 2) for one in (found.low, found.likely, found.high)],
                "published_ms": round(1e3 * seconds, 2),
                "ratio": round(found.likely / seconds, 3),
                "within": found.low <= seconds <= found.high,
                "source": source,
            }
        )
    return {"torch": torch.__version__, "commit": git_commit(ROOT), "rows": rows}


def recorded(case: Case) -> Cost:
    """The cost of a step on fake tensors, as a CPU does it."""
    with fake_tensors():
        step = case.make(torch.device("cpu"))
        step()
        return step_cost(step)


def measure_on_cpu(cases: Mapping[str, Case], rounds: int) -> dict:
    """The fastest step of each case, and the probes of the same rounds."""
    torch.set_num_threads(1)
    costs = {name: recorded(case) for name, case in cases.items()}
    steps = {name: case.make(torch.device("cpu")) for name, case in cases.items()}
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    probes, loads = [], []
    for number in range(rounds):
        loads.append(os.getloadavg()[0])
        probes.append(probe())
        for name, step in steps.items():
            end = time.perf_counter() + SECONDS
            while True:
                start = clock()
                step()
                taken[name].append(clock() - start)
                if time.perf_counter() >= end:
                    break
        print(f"round {number + 1} of {rounds}, load {loads[-1]:.1f}", flush=True)
    speeds = combine(probes).speeds
    rows = {}
    for name, case in cases.items():
        cost = costs[name]
        rows[name] = _row(name, case, cost, predict(cost, speeds, case.precision), min(taken[name]), taken[name])
    return {"device": speeds.name, "rounds": rounds, "load": [round(one, 2) for one in loads], "cases": rows}


def measure_on_gpu(cases: Mapping[str, Case], device: torch.device) -> dict:
    """The median of ten steps after five, against the data sheet. Raises BadInput for a GPU that is not in `repro_tools.memory.devices`."""
    sheet = find(torch.cuda.get_device_name(device))
    rows = {}
    for name, case in cases.items():
        step, taken = case.make(device), []
        for number in range(15):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            step()
            torch.cuda.synchronize(device)
            if number >= 5:
                taken.append(time.perf_counter() - start)
        cost = recorded(case)
        rows[name] = _row(name, case, cost, predict(cost, sheet, case.precision), statistics.median(taken), taken)
    return {"device": sheet.name, "cases": rows}


def _row(name: str, case: Case, cost: Cost, predicted: Range, measured: float, taken: list[float]) -> dict:
    return {
        "what": case.what,
        "held_out": name not in (*DEVELOPED_ON, *MENDED),
        "gflop": round(cost.flops / 1e9, 3),
        "mb": round(cost.bytes / 1e6, 1),
        "calls": cost.calls,
        "unknown": list(cost.unknown),
        "predicted_ms": [round(1e3 * one, 3) for one in (predicted.low, predicted.likely, predicted.high)],
        "measured_ms": round(1e3 * measured, 3),
        "median_ms": round(1e3 * statistics.median(taken), 3),
        "steps": len(taken),
        "ratio": round(predicted.likely / measured, 3),
    }


PAGE = ROOT / "refs" / "time.md"
FIRST_LOOKS = ("step_time_first_look.json", "step_time_published_first_look.json")


def cpu_table() -> str:
    """Markdown: measured and predicted steps on the CPU, the ratio now and at the first look."""
    now, first = (json.loads((RESULTS / name).read_text()) for name in ("step_time.json", FIRST_LOOKS[0]))
    lines = [
        "| model | | measured ms | predicted ms | predicted / measured | at the first look |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in now["cases"].items():
        kind = "held out" if row["held_out"] else "mended" if name in MENDED else "looked at"
        low, likely, high = (_short(one) for one in row["predicted_ms"])
        ratio = f"{row['ratio']:.2f}" if 1 / 1.5 <= row["ratio"] <= 1.5 else f"**{row['ratio']:.2f}**"
        before = first["cases"][name]["ratio"]
        lines.append(
            f"| {name} ({row['what']}) | {kind} | {_short(row['measured_ms'])} | {likely} ({low} to {high}) | {ratio} | {before:.2f} |"
        )
    return "\n".join(lines)


def published_table() -> str:
    """Markdown: times that others published, and predictions from data sheets."""
    now, first = (json.loads((RESULTS / name).read_text()) for name in ("step_time_published.json", FIRST_LOOKS[1]))
    lines = [
        "| step | device | published ms | predicted ms | predicted / published | at the first look |",
        "|---|---|---|---|---|---|",
    ]
    for row, before in zip(now["rows"], first["rows"], strict=True):
        low, likely, high = (_short(one) for one in row["predicted_ms"])
        outside = "" if before["within"] else ", outside"
        ratio = f"{row['ratio']:.2f}" if row["within"] else f"**{row['ratio']:.2f}**"
        lines.append(
            f"| {row['name']}, batch {row['batch']} | {row['device']} | {_short(row['published_ms'])} | {likely} ({low} to {high}) | {ratio} "
            f"| {before['ratio']:.2f}{outside} |"
        )
    return "\n".join(lines)


def page_with_tables(text: str) -> str:
    """refs/time.md with what stands between its markers made anew."""
    for name, table in (("steps", cpu_table()), ("published", published_table())):
        begin, end = f"<!-- {name}: made by benchmarks/step_time.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.1f}" if number >= 9.95 else f"{number:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="NAME")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help="make the tables of refs/time.md anew, measure nothing")
    parser.add_argument("--published", action="store_true", help="against figures of others, in place of measuring")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page_with_tables(PAGE.read_text()))
        return
    if options.published:
        found = against_published()
        (RESULTS / "step_time_published.json").write_text(json.dumps(found, indent=1) + "\n")
        for row in found["rows"]:
            low, likely, high = row["predicted_ms"]
            print(
                f"{row['name']:30} {row['device']:16} published {row['published_ms']:7.1f}  predicted {low:7.1f} {likely:7.1f} {high:7.1f}  ratio {row['ratio']:.2f}"
            )
        return
    cases = {name: case for name, case in CASES.items() if options.only is None or name in options.only}
    device = torch.device(options.device)
    found = measure_on_cpu(cases, options.rounds) if device.type == "cpu" else measure_on_gpu(cases, device)
    described = {"commit": git_commit(ROOT), "machine": machine(device), "torch": torch.__version__}
    name = "step_time.json" if device.type == "cpu" else f"step_time_{found['device'].replace(' ', '-').lower()}.json"
    path = options.out or RESULTS / name
    path.write_text(json.dumps(described | found, indent=1) + "\n")
    for name, row in found["cases"].items():
        low, likely, high = row["predicted_ms"]
        mark = " " if row["held_out"] else "*"
        print(
            f"{mark} {name:30} measured {row['measured_ms']:9.2f}  predicted {low:9.2f} {likely:9.2f} {high:9.2f}  ratio {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
