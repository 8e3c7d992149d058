"""refs/library-apis.md: every row of its tables is a test here, against the installed version that the row names, and the other way round."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import ot
import pytest
import torch
import yaml
from geomloss import SamplesLoss
from PIL import Image
from pykeops.torch import LazyTensor
from torch import nn
from torch.nn import functional

from nsgf import probes
from nsgf.torchvision_cpu import import_torchvision

PAGE = Path(__file__).parents[2] / "refs" / "library-apis.md"
ROW = re.compile(r"^\| `(?P<id>[a-z0-9-]+)` \| (?P<library>[A-Za-z-]+) (?P<version>[\w.]+) \|", re.MULTILINE)
TRAPS: dict[str, Callable[[], None]] = {}


def trap(name):
    """The test of the row `name`."""

    def register(function):
        assert name not in TRAPS, f"two tests of row {name}"
        TRAPS[name] = function
        return function

    return register


def rows(text):
    return {found["id"]: (found["library"], found["version"]) for found in ROW.finditer(text)}


def unmatched(text, names):
    """Rows without a test, and tests without a row."""
    found = rows(text)
    problems = [f"row {name}: found no test" for name in found if name not in names]
    return problems + [f"test {name}: found no row" for name in names if name not in found]


def other_version(name, library, version, installed):
    """What is wrong when another version is installed than the row is about; a local part such as +cpu is no other version."""
    if installed is None or installed.partition("+")[0] != version:
        return (
            f"refs/library-apis.md: row {name}: found {library} {installed or 'not installed'}, expected {version}; "
            "see whether its test still passes, correct what the row says, then its version"
        )
    return None


def installed(library):
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


# --- GeomLoss


def sinkhorn(**settings):
    return SamplesLoss("sinkhorn", **{"p": 2, "blur": 0.5} | settings)


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def velocity(x, y, **settings):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn(**settings)(x, y), x)
    return -len(x) * gradient


@trap("geomloss-4d")
def _():
    with pytest.raises(ValueError, match=re.escape("(N,D) or (B,N,D)")):
        sinkhorn()(normal(8, 1, 28, 28), normal(8, 1, 28, 28))


@trap("geomloss-3d")
def _():
    f, _ = sinkhorn(potentials=True)(normal(8, 28, 28), normal(8, 28, 28, seed=1))
    assert f.shape == (8, 28)


@trap("geomloss-cost")
def _():
    x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert sinkhorn(blur=0.01)(x, y).item() == pytest.approx(12.5, abs=1e-3)
    assert sinkhorn(p=1, blur=0.01)(x, y).item() == pytest.approx(5.0, abs=1e-3)


@trap("geomloss-eps")
def _():
    """Two points against the same two, a apart: the plan is known, with eps = blur**2 and cost a**2 / 2."""
    a, blur = 1.5, 0.8
    off = math.exp(-(a**2) / 2 / blur**2) / (1 + math.exp(-(a**2) / 2 / blur**2)) / 2
    on = 0.5 - off
    expected = off * a**2 + blur**2 * 2 * (on * math.log(4 * on) + off * math.log(4 * off))
    x = torch.tensor([[0.0, 0.0], [a, 0.0]])
    assert sinkhorn(blur=blur, scaling=0.99, debias=False)(x, x.clone()).item() == pytest.approx(expected, rel=1e-5)


@trap("geomloss-mass")
def _():
    x, y = normal(8, 2), normal(9, 2, seed=1)
    loss = sinkhorn()
    assert float(loss(torch.ones(8), x, torch.ones(9), y)) > 5 * float(loss(x, y))


@trap("geomloss-batch-weights")
def _():
    with pytest.raises(ValueError, match="should have the same number of dimensions"):
        sinkhorn()(torch.ones(2, 8) / 8, normal(2, 8, 2), torch.ones(8) / 8, normal(2, 8, 2))


@trap("geomloss-dtype")
def _():
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        sinkhorn()(normal(4, 2), normal(4, 2).double())


@trap("geomloss-gradient")
def _():
    x, shift = normal(256, 2), torch.tensor([3.0, 1.0])
    assert torch.allclose(velocity(x, x + shift, scaling=0.95), shift.expand(256, 2), atol=1e-3)


@trap("geomloss-second")
def _():
    x, y, step = normal(4, 2, requires_grad=True), normal(4, 2, seed=1), 1e-3

    def squared(x):
        (gradient,) = torch.autograd.grad(sinkhorn()(x, y), x, create_graph=True)
        return gradient.square().sum()

    (by_autograd,) = torch.autograd.grad(squared(x), x)
    moved = torch.zeros_like(x)
    moved[0, 0] = step
    by_difference = (squared(x + moved) - squared(x - moved)).item() / (2 * step)
    assert by_autograd[0, 0].item() < 0 < 0.1 < by_difference


@trap("geomloss-scaling")
def _():
    x, y = normal(64, 2), 2 + 2 * normal(64, 2, seed=1)
    converged = velocity(x, y, scaling=0.998)
    off = [float((velocity(x, y, scaling=s) - converged).norm() / converged.norm()) for s in (0.5, 0.8, 0.95)]
    assert off[0] > 0.05 > off[1] > 0.02 > off[2] > 0.005


@trap("geomloss-grad-mode")
def _():
    try:
        with torch.no_grad():
            sinkhorn()(normal(4, 2), normal(4, 2))
            assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


@trap("geomloss-potentials")
def _():
    f, g = sinkhorn(potentials=True)(normal(4, 2), normal(5, 2))
    assert f.shape == (1, 4) and g.shape == (1, 5)


@trap("geomloss-coincide")
def _():
    with pytest.raises(ValueError, match="Maximum allowed size exceeded"):
        sinkhorn()(torch.zeros(4, 2), torch.zeros(4, 2))


@trap("geomloss-nan")
def _():
    with pytest.raises(ValueError, match="arange: cannot compute length"):
        sinkhorn()(torch.full((4, 2), math.nan), normal(4, 2))


# --- KeOps


@trap("keops-axis")
def _():
    with pytest.raises(ValueError, match="expects an explicit 'axis' value"):
        LazyTensor(normal(4, 2))
    assert (LazyTensor(normal(4, 1, 2)) - LazyTensor(normal(1, 5, 2))).shape == (4, 5, 2)


@trap("keops-truth")
def _():
    zero = LazyTensor(torch.zeros(4, 1, 2))
    assert bool(zero == LazyTensor(torch.ones(1, 5, 2)))


@trap("keops-stdout")
def _():
    if torch.cuda.is_available():
        pytest.skip("it warns where there is no CUDA")
    quieted_by = ("KEOPS_VERBOSE", "PYKEOPS_VERBOSE")  # the first is set by nsgf
    environment = {name: value for name, value in os.environ.items() if name not in quieted_by}
    done = subprocess.run(
        [sys.executable, "-c", "import pykeops"], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.startswith("[KeOps] Warning")


# --- POT


@trap("pot-4d")
def _():
    with pytest.raises(RuntimeError, match=re.escape("einsum(): the number of subscripts")):
        ot.dist(normal(8, 1, 4, 4), normal(8, 1, 4, 4))


@trap("pot-squared")
def _():
    x, y = np.zeros((1, 2)), np.array([[3.0, 4.0]])
    assert ot.emd2([], [], ot.dist(x, y)) == 25.0 and ot.solve_sample(x, y).value == 25.0


@trap("pot-1d")
def _():
    x, y = np.zeros(1), np.array([3.0])
    assert ot.emd2_1d(x, y) == ot.wasserstein_1d(x, y, p=2) == 9.0


@trap("pot-sliced")
def _():
    found = ot.sliced_wasserstein_distance(np.zeros((1, 2)), np.array([[3.0, 4.0]]), n_projections=2_000, seed=0)
    assert found == pytest.approx(5 / 2**0.5, rel=0.02)


@trap("pot-iterations")
def _():
    stream = np.random.default_rng(0)
    cost = ot.dist(stream.normal(size=(300, 2)), stream.normal(size=(300, 2)))
    with pytest.warns(UserWarning, match="numItermax reached before optimality"):
        stopped = ot.emd2([], [], cost, numItermax=100)
    assert abs(stopped / ot.emd2([], [], cost) - 1) > 0.1


@trap("pot-mass")
def _():
    cost = ot.dist(normal(5, 2).numpy(), normal(6, 2, seed=1).numpy())
    with pytest.raises(AssertionError, match="a and b vector must have the same sum"):
        ot.emd2(np.ones(5), np.ones(6), cost)
    with pytest.warns(UserWarning, match="Problem infeasible"):
        assert ot.emd2(np.array([1.5, -0.5, 0, 0, 0]), np.ones(6) / 6, cost) == 0.0


@trap("pot-nan")
def _():
    points = np.array([[0.0, 0.0], [np.nan, 1.0], [5.0, 5.0]])
    with pytest.warns(UserWarning, match="Problem infeasible"):
        assert ot.emd2([], [], ot.dist(points, np.ones((3, 2)))) == 0.0


@trap("pot-reg")
def _():
    cost = 100 * ot.dist(normal(50, 2).numpy().astype(float), normal(50, 2, seed=1).numpy().astype(float))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = float(ot.sinkhorn2([], [], cost, reg=1e-3))
    assert found < 1e-3 * ot.emd2([], [], cost)
    assert any("numerical errors" in str(one.message) for one in said)


# --- torch


@trap("torch-broadcast")
def _():
    prediction, target = torch.zeros(4), torch.ones(4, 1)
    assert (prediction - target).shape == (4, 4)
    with pytest.warns(UserWarning, match="Using a target size"):
        functional.mse_loss(prediction, target)


@trap("torch-sqrt")
def _():
    x = torch.zeros(2, requires_grad=True)
    assert torch.autograd.grad(x.square().sum().sqrt(), x)[0].isnan().all()
    assert not torch.autograd.grad(x.norm(), x)[0].any()


@trap("torch-cdist")
def _():
    x = 1_000 + normal(100, 3)
    assert torch.cdist(x, x).diagonal().max() > 0.1
    assert not torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").diagonal().any()


@trap("torch-cross-entropy")
def _():
    logits = torch.tensor([[9.0, 0.0]])
    once, twice = (functional.cross_entropy(x, torch.tensor([0])).item() for x in (logits, logits.softmax(1)))
    assert once < 1e-3 and twice > 0.3
    assert functional.cross_entropy(normal(4, 4), normal(4, 4, seed=1)).item() < 0


@trap("torch-kl")
def _():
    p = torch.tensor([0.9, 0.1])
    # Two terms below 0.4, each a difference of logarithms: their last digit is the processor's.
    assert abs(functional.kl_div(p.log(), p, reduction="sum").item()) <= torch.finfo(p.dtype).eps
    assert functional.kl_div(p, p, reduction="sum").item() < -1


@trap("torch-seed")
def _():
    def drawn(seed, n=3):
        return torch.randn(n, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1 + 2**32))
    assert not torch.equal(drawn(1, 32)[:20], drawn(1, 20))


@trap("torch-alias")
def _():
    model = nn.Linear(1, 1)
    best = model.state_dict()
    nn.init.constant_(model.weight, 7.0)
    assert best["weight"].item() == 7.0


@trap("torch-load")
def _():
    for value in (Path("x"), np.float64(1), argparse.Namespace(a=1)):
        file = io.BytesIO()
        torch.save({"value": value}, file)
        file.seek(0)
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(file)


@trap("torch-precision")
def _():
    code = "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.get_float32_matmul_precision()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "checking the matmul precision without a specific backend name" in done.stderr


@trap("torch-clip")
def _():
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    sgd, scaler = torch.optim.SGD(net.parameters(), lr=1.0), torch.amp.GradScaler("cpu")
    scaler.scale(100 * net(torch.ones(8, 4)).square().mean() + net.weight.sum()).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.unscale_(sgd)
    assert nn.utils.get_total_norm([p.grad for p in net.parameters()]).item() * 65_536 == pytest.approx(1, abs=0.01)


@trap("torch-overflow")
def _():
    net = nn.Linear(2, 1)
    sgd, scaler = torch.optim.SGD(net.parameters(), lr=1.0), torch.amp.GradScaler("cpu")
    before = net.weight.detach().clone()
    scaler.scale(torch.ones(()))
    net.weight.grad = torch.full_like(net.weight, math.inf)
    scaler.step(sgd)
    scaler.update()
    assert torch.equal(net.weight, before) and scaler.get_scale() == 32_768


@trap("torch-autocast")
def _():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="Disabling autocast"), torch.autocast("cuda", dtype=torch.float16):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@trap("torch-tf32")
def _():
    code = "import torch; print(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


# --- torchvision


@trap("torchvision-nms")
def _():
    if "+cpu" not in torch.__version__:
        pytest.skip("the two builds fit together here")
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    assert done.stderr.strip().endswith("RuntimeError: operator torchvision::nms does not exist")
    torchvision = import_torchvision()
    assert torchvision.datasets.MNIST and torchvision.transforms.PILToTensor


@trap("torchvision-to-tensor")
def _():
    transforms = import_torchvision().transforms
    assert transforms.ToTensor()(np.full((2, 2, 1), 255, np.uint8)).max() == 1.0
    assert transforms.ToTensor()(np.full((2, 2, 1), 255.0)).max() == 255.0


@trap("torchvision-normalize")
def _():
    transforms = import_torchvision().transforms
    with pytest.raises(TypeError, match="should be a float tensor"):
        transforms.Normalize(0.5, 0.5)(torch.zeros(1, 2, 2, dtype=torch.uint8))
    assert transforms.Normalize(0.5, 0.5)(torch.tensor([[[0.0, 1.0]]])).tolist() == [[[-1.0, 1.0]]]


@trap("torchvision-resize")
def _():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    smooth = import_torchvision().transforms.Resize(4)(x)
    assert (smooth - functional.interpolate(x, 4, mode="bilinear")).abs().max() > 1


@trap("torchvision-mnist")
def _():
    probes.check_mnist_reader()  # writes files, and finds that the reader's (N, 28, 28) was given its axis


@trap("torchvision-folder")
def _():
    with tempfile.TemporaryDirectory() as folder:
        for name in ("b", "a"):
            (Path(folder) / name).mkdir()
            for index in range(3):
                Image.new("L", (1, 1)).save(Path(folder) / name / f"{index}.png")
        stored = import_torchvision().datasets.ImageFolder(folder)
        assert stored.classes == ["a", "b"] and stored.targets == [0, 0, 0, 1, 1, 1]


# --- torch-fidelity


def fidelity():
    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3, metric_fid, metric_isc

    return feature_extractor_inceptionv3, metric_fid, metric_isc


def fid(x, y):
    _, module, _ = fidelity()
    both = [module.fid_features_to_statistics(features) for features in (x, y)]
    return module.fid_statistics_to_metric(*both, verbose=False)[module.KEY_METRIC_FID]


def inception_score(logits, splits=1):
    _, _, module = fidelity()
    return module.isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=0)[module.KEY_METRIC_ISC_MEAN]


@trap("fidelity-bytes")
def _():
    probes.check_inception((1, 28, 28))


@trap("fidelity-pickle")
def _():
    extractor, _, _ = fidelity()
    assert "weights_only=False" in Path(extractor.__file__).read_text()


@trap("fidelity-count")
def _():
    reference = normal(4_000, 16)
    few, many = (fid(normal(n, 16, seed=1), reference) for n in (50, 2_000))
    assert few > 1 > 0.1 > many


@trap("fidelity-one")
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(np.linalg.LinAlgError, match="must not contain infs or NaNs"):
            fid(normal(1, 8), normal(1, 8))


@trap("fidelity-logits")
def _():
    certain = functional.one_hot(torch.arange(40) % 4, 4).float()
    assert inception_score(100 * certain) == pytest.approx(4)
    assert inception_score(certain) < 1.2


@trap("fidelity-splits")
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert math.isnan(inception_score(normal(5, 5), splits=10))


# --- torchmetrics


class Features(nn.Module):
    """Means of image quarters; keeps what it was given."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, x):
        self.given.append(x)
        return functional.adaptive_avg_pool2d(x.float(), 2).mean(1).flatten(1)


def torchmetrics():
    import_torchvision()
    import torchmetrics

    return torchmetrics


def metrics_fid(network, real, fake, **options):
    metric = torchmetrics().image.fid.FrechetInceptionDistance(feature=network, **options)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


PIXELS = torch.arange(16 * 3 * 64, dtype=torch.uint8).view(16, 3, 8, 8)


@trap("torchmetrics-import")
def _():
    if "+cpu" not in torch.__version__:
        pytest.skip("the two builds fit together here")
    done = subprocess.run([sys.executable, "-c", "import torchmetrics"], capture_output=True, text=True)
    assert done.stderr.strip().endswith("RuntimeError: operator torchvision::nms does not exist")
    assert torchmetrics().__version__


@trap("torchmetrics-range")
def _():
    network = Features()
    metrics_fid(network, PIXELS / 255, PIXELS / 255, normalize=True)
    assert network.given[0].max() <= 1  # `normalize` scales for its own Inception network alone


@trap("torchmetrics-one")
def _():
    with pytest.raises(RuntimeError, match="More than one sample is required"):
        metrics_fid(Features(), PIXELS[:1], PIXELS[:1]).compute()


@trap("torchmetrics-accumulates")
def _():
    metric = torchmetrics().MeanMetric()
    metric.update(1.0)
    metric.compute()
    metric.update(3.0)
    assert metric.compute().item() == 2.0


@trap("torchmetrics-accuracy")
def _():
    kind, found, true = (
        torchmetrics().classification.MulticlassAccuracy,
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([0, 0, 0, 2]),
    )
    assert kind(num_classes=3)(found, true).item() == pytest.approx(1 / 3)
    assert kind(num_classes=3, average="micro")(found, true).item() == 0.75


@trap("torchmetrics-nan")
def _():
    metric = torchmetrics().MeanMetric()
    with pytest.warns(UserWarning, match="Will be removed"):
        metric.update(math.nan)
    metric.update(2.0)
    assert metric.compute().item() == 2.0


# --- torchdiffeq


class Growth:
    """y' = y, which counts its evaluations: y(1) = e."""

    def __init__(self):
        self.times = []

    def __call__(self, t, y):
        self.times.append(t)
        return y


def solved(function=None, times=(0.0, 1.0), y=None, **options):
    from torchdiffeq import odeint

    y = torch.ones(1) if y is None else y
    return odeint(function or Growth(), y, torch.tensor(times), **options)


@trap("torchdiffeq-steps")
def _():
    growth = Growth()
    assert solved(growth, method="euler")[-1].item() == 2.0 and len(growth.times) == 1
    assert solved(growth, method="euler", options={"step_size": 0.1})[-1].item() == pytest.approx(1.1**10)


@trap("torchdiffeq-last-step")
def _():
    growth = Growth()
    solved(growth, method="euler", options={"step_size": 0.3})
    assert [round(float(t), 1) for t in growth.times] == [0.0, 0.3, 0.6, 0.9]


@trap("torchdiffeq-option")
def _():
    with pytest.warns(UserWarning, match="Unexpected arguments"):
        assert solved(method="euler", options={"step": 0.1})[-1].item() == 2.0


@trap("torchdiffeq-path")
def _():
    assert solved(times=(0.0, 0.5, 1.0), y=torch.ones(3, 2)).shape == (3, 3, 2)


@trap("torchdiffeq-time")
def _():
    growth = Growth()
    solved(growth, y=torch.ones(3, 2), method="euler")
    assert growth.times[0].shape == ()
    with pytest.raises(TypeError, match="must be a floating point Tensor"):
        solved(times=(0, 1))


@trap("torchdiffeq-batch")
def _():
    def first_of(beside):
        ends = solved(lambda t, y: -y * torch.tensor([1.0, beside]), y=torch.ones(2), rtol=1e-2, atol=1e-2)
        return ends[-1, 0].item()

    assert abs(first_of(1.0) - first_of(100.0)) > 0.01


@trap("torchdiffeq-half")
def _():
    with pytest.raises(AssertionError, match="underflow in dt"):
        solved(y=torch.ones(1).half())


# --- PyYAML


@trap("yaml-float")
def _():
    assert yaml.safe_load("lr: 1e-4")["lr"] == "1e-4" and yaml.safe_load("lr: 1.0e-4")["lr"] == 1e-4


@trap("yaml-off")
def _():
    assert yaml.safe_load("schedule: off")["schedule"] is False


# --- the page and the tests


def test_every_row_has_a_test_and_every_test_a_row():
    assert unmatched(PAGE.read_text(encoding="utf-8"), TRAPS) == []


@pytest.mark.parametrize(("name", "library", "version"), [(name, *row) for name, row in rows(PAGE.read_text()).items()])
def test_row(name, library, version):
    found = installed(library)
    if found is None and library in ("torchmetrics", "torchdiffeq"):
        pytest.skip(f"{library} is not installed: pip install --no-deps {library}=={version}")
    problem = other_version(name, library, version, found)
    assert problem is None, problem
    TRAPS[name]()


def test_a_row_without_a_test_and_a_test_without_a_row_are_reported():
    page = "| `a-b` | torch 2.13.0 | x |\n| `c` | POT 0.9.7.post1 | x |\n"
    assert rows(page) == {"a-b": ("torch", "2.13.0"), "c": ("POT", "0.9.7.post1")}
    assert unmatched(page, {"a-b": None, "d": None}) == ["row c: found no test", "test d: found no row"]
    assert unmatched(page, {"a-b": None, "c": None}) == []


def test_another_version_is_reported_and_a_local_part_is_none():
    assert other_version("a", "torch", "2.13.0", "2.13.0+cpu") is None
    said = other_version("a", "torch", "2.13.0", "2.14.0")
    assert said.startswith("refs/library-apis.md: row a: found torch 2.14.0, expected 2.13.0; ")
    assert "found torch not installed" in other_version("a", "torch", "2.13.0", None)
