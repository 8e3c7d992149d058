"""What the Sinkhorn flow does with minibatches of images: settings and open questions of the paper, without a network.

    python -m benchmarks.image_flow --data-root DATA     (4 minutes on one core; OMP_NUM_THREADS=1)

Sets: digits (part of scikit-learn, n = 256), mnist (n = 256), cifar10 (n = 128); where cifar10 is absent and its lossy
copy cifar10_jpeg is there, that one, labelled as what it is. Sets without files are named and left out. Source N(0, I),
training images in [-1, 1], never mirrored. What is written: benchmarks/results/image_flow.json and image-flow-*.png, and
the tables between the marks of refs/nsgf-images.md.

What is measured was fixed before the run, after a look at two minibatches of each set that are not among those measured
here; that look added "covered" and "misplaced", which nobody had asked for. Added after a first run: "near" and "far" in b,
the last two of c, and that images drawn twice into a minibatch, 8 percent of those of digits, count as one.

X_k are the particles after k of T = 5 steps, Y the targets of the minibatch, P and Q the rows of the plans between X and Y
and between X and X, u = P Y. The main target of a particle is its largest entry in P. Means and standard deviations are over
8 minibatches unless another unit is named.

a. Step size 0.1, 0.2, 0.3, 0.5 at blur 0.5, 1, 2 and scaling 0.95. With y* the main target at the last state:
   way_left = <x_k - y*, x_0 - y*> / |x_0 - y*|^2, mean over the particles, against (1 - step size)^k;
   noise and image = coefficients of x_0 and y* in the least-squares fit of x_k, against (1 - step size)^k and the rest to 1;
   off_line = |x_k - fit| / |x_k|. Also the rising step sizes of a comment in the authors' 2-D code,
   s exp((k - T) / (T / 4)): with s = 0.2, and with s such that the hand-over time is that of five steps of 0.2.
b. blur 0.5, 1, 2 times scaling 0.80, 0.85, 0.95, at step size 0.2. At states 0 and T: effective_targets = exp of the
   entropy of a row of P, mean; covered = share of the images that are somebody's main target; near and far = mass of the
   quarter of the images nearest to the mean of the minibatch, and farthest from it, over its due; self_share = largest share
   of a row of Q that is not on the particle itself. At state 0: same = share of main targets that are those of the exact
   assignment; misplaced = half the sum of |mass of an image - its due|; error_converged = |v - v_c| / |v_c| with v_c from
   converged plans in float64; iterations of the Sinkhorn loop. unchanged = share of main targets that state T shares with 0.
c. At states 0 and T - 1, with d = y_match - x and the exact assignment at state 0: cosine of v and d, mean; error = |v - d| / |d|;
   same = share of the main targets that are y_match; error_same = the error over those particles alone.
d. For k = 0 .. T: noise (as in a), effective_targets, loss_share = mean |v_k|^2 as a share of the sum over the states 0 .. T.
e. After five steps of 0.2, at t = 1 - 0.8^5: particles against mixtures t Y + (1 - t) X_0 of independent pairs (what the
   straight flow and the predictor learn on) and of pairs of the exact assignment. With image part = (x - 0.8^5 x_0) / t:
   correlation = cosine of x_0 and image part; norm |x|; nearest = distance to the nearest target of the minibatch; read_time =
   time read by a regression on band powers and quantiles that was fitted to independent mixtures of all times;
   ideal_time = E[t | x] under independent pairs with the training images, t uniform within 0.2 of the above: what the
   loss of the predictor is minimised by. Means and standard deviations over the particles of 4 minibatches, 64 of them for
   ideal_time.
f. conflict at state 0: 8 particles are fixed, the others and Y redrawn 48 times, in 4 rounds. unpredictable = E |u - E[u | x_0]|^2
   over the variance of the images, which is what independent pairs (FM) have at time 0; explained = the share of the
   variance of u that E[u | x_0] has. At states k = 1 .. T - 1, bound = E |u - h(x_k)|^2 over the variance of the images, for
   particles (u of the flow) and for independent mixtures at the same time (u = Y), h(x) being E[Y | x] under independent
   pairs with the training images: no function of x_k that knows the training set does better on mixtures, and on
   particles the best one does at least as well.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from nsgf import sinkhorn
from nsgf.figures_common import COLOURS, save
from nsgf.images import SOURCES, ImageSet, load, to_pixels
from nsgf.phases import draw_times, interpolate, optimal_assignment
from repro.errors import BadInput
from repro.randomness import generator
from repro.run import describe, versions
from repro.runtime import Runtime, progress

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "refs/nsgf-images.md"
LABELS = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar10_jpeg": "CIFAR-10 (JPEG q75)"}
PARTICLES = {"digits": 256, "mnist": 256, "cifar10": 128, "cifar10_jpeg": 128}
STEPS, STEP_SIZE, STEP_SIZES = 5, 0.2, (0.1, 0.2, 0.3, 0.5)
BLURS, SCALINGS = (0.5, 1.0, 2.0), (0.80, 0.85, 0.95)
FINE, AUTHORS = (0.5, 0.95), (2.0, 0.80)  # blur and scaling: the finest of the paper's, and those of the authors' code
MINIBATCHES, MIXTURE_BATCHES = 8, 4
FITTED, IDEAL_PARTICLES, TIME_STEP, TIME_RANGE = 8192, 64, 0.005, 0.2
FIXED, REDRAWS, ROUNDS, BOUND_PARTICLES = 8, 48, 4, 128
CHUNK = 4096
MARGINAL_TOLERANCE, MAX_ITERATIONS, CHECK_EVERY = 1e-6, 20_000, 100


@dataclass(frozen=True)
class State:
    """Particles (n, d), the plans (n, n) of their rows on the targets and on themselves, and their velocity (n, d)."""

    x: Tensor
    plan: Tensor
    self_plan: Tensor
    v: Tensor


Summary = dict[str, dict[str, float]]


def plan(p: sinkhorn.Potentials) -> Tensor:
    """(n, m): the rows that `sinkhorn.barycentric_projection` weights the targets with; each sums to 1."""
    return torch.softmax((p.reduced_g + p.inner) / p.eps, dim=1)


def state_at(x: Tensor, y: Tensor, blur: float, scaling: float) -> State:
    """The state of particles x (n, d) with targets y (n, d), at the accuracy of the truncated loop."""
    to_targets, to_selves = (plan(sinkhorn.potentials(x, z, blur=blur, scaling=scaling)) for z in (y, x))
    return State(x, to_targets, to_selves, to_targets @ y - to_selves @ x)


def follow(x_0: Tensor, y: Tensor, step_sizes: Sequence[float], blur: float, scaling: float) -> list[State]:
    """The states 0 .. T of the flow with these T step sizes; the last one is where the particles end."""
    states = [state_at(x_0, y, blur, scaling)]
    for step_size in step_sizes:
        last = states[-1]
        states.append(state_at(last.x + step_size * last.v, y, blur, scaling))
    return states


def hand_over_time(step_sizes: Sequence[float]) -> float:
    """1 - product of (1 - s): the time on the straight line if each step covers the share s of the way left."""
    return 1 - math.prod(1 - s for s in step_sizes)


def rising(last: float, steps: int) -> list[float]:
    """The schedule of the comment in the authors' 2-D code: last * exp((k - T) / (T / 4)), k = 0 .. T - 1."""
    return [last * math.exp((k - steps) / (steps / 4)) for k in range(steps)]


def rising_to(wanted: float, steps: int) -> list[float]:
    """The rising schedule with the hand-over time `wanted`, by bisection."""
    low, high = 0.0, math.exp(1 / (steps / 4))  # the last step is then 1, and the hand-over time too
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if hand_over_time(rising(middle, steps)) < wanted else (low, middle)
    return rising(low, steps)


def converged_plan(x: Tensor, y: Tensor, blur: float) -> tuple[Tensor, float]:
    """The plan of the fixed point in float64 and the largest error of a row or column mass that is left.

    From the annealed potentials on by the plain Sinkhorn iteration, on a kernel that already has means near 1.
    """
    x, y = x.double(), y.double()
    p = sinkhorn.potentials(x, y, blur=blur, scaling=0.99)
    kernel = ((p.f[:, None] + p.g - torch.cdist(x, y).square() / 2) / p.eps).exp() / len(y)
    rows, columns = kernel.new_ones(len(x)), kernel.new_ones(len(y))
    error = math.inf
    for iteration in range(1, MAX_ITERATIONS + 1):
        rows = 1 / (kernel @ columns)
        if iteration % CHECK_EVERY == 0:
            error = float((columns * (rows @ kernel) * len(y) / len(x) - 1).abs().max())
            if error < MARGINAL_TOLERANCE:
                break
        columns = len(x) / len(y) / (rows @ kernel)
    found = rows[:, None] * kernel * columns
    return found / found.sum(1, keepdim=True), error


class Targets:
    """The distinct images among the targets y (n, d) of a minibatch: images drawn twice cannot be told apart."""

    def __init__(self, y: Tensor):
        self.images, self.index = y.unique(dim=0, return_inverse=True)
        self.due = self.index.bincount() / len(y)
        distance = (y - y.mean(0)).norm(dim=1)[:, None]
        self.by_distance = y.new_empty(len(self.images), 1).index_copy_(0, self.index, distance)[:, 0].argsort()

    def shares(self, rows: Tensor) -> Tensor:
        """(particles, images): the rows of a plan on the targets, summed over copies of an image."""
        return rows.new_zeros(len(rows), len(self.images)).index_add_(1, self.index, rows)

    def main(self, rows: Tensor) -> Tensor:
        """(particles,): the image that has the largest share of each row."""
        return self.shares(rows).argmax(1)

    def covered(self, rows: Tensor) -> float:
        """Share of the images that are the main target of some particle."""
        return len(self.main(rows).unique()) / len(self.images)

    def misplaced(self, rows: Tensor) -> float:
        """Share of the mass that lies on images beyond their due."""
        return float((self.shares(rows).mean(0) - self.due).abs().sum() / 2)

    def near_and_far(self, rows: Tensor) -> tuple[float, float]:
        """Mass over due of the quarter of the images nearest to the mean of the minibatch, and of the farthest."""
        mass, quarter = self.shares(rows).mean(0), len(self.images) // 4
        near, far = self.by_distance[:quarter], self.by_distance[-quarter:]
        return float(mass[near].sum() / self.due[near].sum()), float(mass[far].sum() / self.due[far].sum())


def effective_targets(rows: Tensor) -> Tensor:
    """(n,): exp of the entropy of each row, 1 for a row on one image and m for an even one."""
    return torch.exp(-torch.special.xlogy(rows, rows).sum(1))


def self_share(rows: Tensor) -> float:
    """The largest share of a row that is not on the particle itself."""
    return float((rows.sum(1) - rows.diagonal()).clamp(min=0).max())


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def way(x_k: Tensor, x_0: Tensor, y: Tensor) -> dict[str, float]:
    """Where x_k lies on the lines from x_0 to y: way_left, noise, image and off_line of question a, means over particles."""
    line = x_0 - y
    left = ((x_k - y) * line).sum(1) / line.square().sum(1)
    basis = torch.stack([x_0, y], dim=2)
    coefficients = torch.linalg.lstsq(basis, x_k[:, :, None]).solution
    rest = (x_k - (basis @ coefficients)[:, :, 0]).norm(dim=1) / x_k.norm(dim=1)
    noise, image = coefficients[:, :, 0].mean(0).tolist()
    return {"way_left": float(left.mean()), "noise": noise, "image": image, "off_line": float(rest.mean())}


def measure_ways(states: Sequence[State], targets: Targets) -> list[dict[str, float]]:
    """`way` at every state, towards the main targets of the last."""
    goal = targets.images[targets.main(states[-1].plan)]
    return [way(state.x, states[0].x, goal) for state in states]


def measure_targets(state: State, targets: Targets) -> dict[str, float]:
    shares = targets.shares(state.plan)
    return {"effective_targets": float(effective_targets(shares).mean()), "covered": targets.covered(state.plan)}


def measure_plans(states: Sequence[State], y: Tensor, match: Tensor, v_converged: Tensor) -> dict[str, float]:
    """Questions b and c on one minibatch; `match` (n,) is the exact assignment of the targets y."""
    first, before_last, last = states[0], states[-2], states[-1]
    targets = Targets(y)
    found = {
        "misplaced": targets.misplaced(first.plan),
        "error_converged": relative_error(first.v, v_converged),
        "unchanged": float((targets.main(first.plan) == targets.main(last.plan)).double().mean()),
    }
    for name, state in (("first", first), ("last", last)):
        measured = measure_targets(state, targets)
        measured["near"], measured["far"] = targets.near_and_far(state.plan)
        measured["self_share"] = self_share(state.self_plan)
        found |= {f"{key}.{name}": value for key, value in measured.items()}
    for name, state in (("first", first), ("before_last", before_last)):
        d, same = y[match] - state.x, targets.main(state.plan) == targets.index[match]
        found[f"cosine.{name}"] = float(torch.cosine_similarity(state.v, d, dim=1).mean())
        found[f"error.{name}"] = relative_error(state.v, d)
        found[f"same.{name}"] = float(same.double().mean())
        found[f"error_same.{name}"] = relative_error(state.v[same], d[same])
    return found


def measure_states(states: Sequence[State], targets: Targets) -> list[dict[str, float]]:
    """Question d on one minibatch, state by state."""
    squares = [float(state.v.square().sum(1).mean()) for state in states]
    return [
        {
            "noise": place["noise"],
            "effective_targets": measure_targets(state, targets)["effective_targets"],
            "loss_share": square / sum(squares),
        }
        for state, place, square in zip(states, measure_ways(states, targets), squares, strict=True)
    ]


def band_features(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(n, features): what tells noise from pictures without knowing the pictures.

    Log of the mean power in rings of the Fourier plane, quantiles of the pixels, their mean, log of their deviation.
    """
    side = shape[1]
    power = torch.fft.fft2(x.view(-1, *shape), norm="ortho").abs().square().mean(1)
    frequency = torch.fft.fftfreq(side) * side
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    rings = min(8, side // 2)
    ring = (radius * rings / (side / 2)).long().clamp(max=rings - 1)
    powers = torch.stack([power[:, ring == k].mean(1) for k in range(rings)], dim=1).log()
    ordered = x.sort(1).values
    quantiles = ordered[:, [round(share * (x.shape[1] - 1)) for share in (0.1, 0.25, 0.5, 0.75, 0.9)]]
    return torch.cat([powers, quantiles, x.mean(1, keepdim=True), x.std(1, keepdim=True).log()], dim=1).double()


def fit_time_reader(x: Tensor, t: Tensor, shape: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
    """A quadratic least-squares fit of the times t (n,) of the points x (n, d) to their `band_features`."""
    features = band_features(x, shape)
    centre, scale = features.mean(0), features.std(0)
    pairs = torch.triu_indices(features.shape[1], features.shape[1])

    def design(x: Tensor) -> Tensor:
        z = (band_features(x, shape) - centre) / scale
        return torch.cat([z.new_ones(len(z), 1), z, z[:, pairs[0]] * z[:, pairs[1]]], dim=1)

    weights = torch.linalg.lstsq(design(x), t.double()[:, None], driver="gelsd").solution
    return lambda x: (design(x) @ weights)[:, 0]


def chunks(stored: ImageSet) -> Iterator[Tensor]:
    for start in range(0, len(stored), CHUNK):
        yield stored.images(slice(start, start + CHUNK)).flatten(1)


def products(x: Tensor, stored: ImageSet) -> tuple[Tensor, Tensor]:
    """<x, y> (n, N) and |y|^2 / 2 (N,) for every image y of the set."""
    parts = [(x @ y.T, y.square().sum(1) / 2) for y in chunks(stored)]
    return torch.cat([inner for inner, _ in parts], dim=1), torch.cat([half for _, half in parts])


def ideal_image(x: Tensor, t: float, stored: ImageSet) -> Tensor:
    """(n, d): E[Y | x] for x = t Y + (1 - t) X_0 with independent X_0 ~ N(0, I) and Y from the set."""
    inner, half = products(x, stored)
    weights = torch.softmax((t * inner - t**2 * half) / (1 - t) ** 2, dim=1)
    return sum(
        weights[:, start : start + len(y)] @ y
        for start, y in zip(range(0, len(stored), CHUNK), chunks(stored), strict=True)
    )


def ideal_time(x: Tensor, times: Tensor, stored: ImageSet) -> Tensor:
    """(n,): E[t | x] for the same, with t uniform on the grid `times`."""
    inner, half = products(x, stored)
    square, d = x.double().square().sum(1) / 2, x.shape[1]
    logs = []
    for t in times.tolist():
        exponents = (inner - t * half).mul_(t / (1 - t) ** 2)
        logs.append(exponents.logsumexp(1).double() - square / (1 - t) ** 2 - d * math.log(1 - t))
    return torch.softmax(torch.stack(logs, dim=1), dim=1) @ times.double()


def describe_points(x: Tensor, x_0: Tensor, y: Tensor, t: float) -> dict[str, Tensor]:
    """Question e, per particle: x (n, d) against its noise x_0 and the targets y of its minibatch."""
    return {
        "correlation": torch.cosine_similarity(x_0, (x - (1 - t) * x_0) / t, dim=1),
        "norm": x.norm(dim=1),
        "nearest": torch.cdist(x, y).amin(1),
    }


def explained_share(u: Tensor) -> tuple[float, float]:
    """Variance within and share between, of u (redraws, particles, d), summed over d: unbiased for both.

    within = E |u - E[u | particle]|^2. share = Var E[u | particle] / (that + within).
    """
    within = float(u.var(0).sum(1).mean())
    between = float(u.mean(0).var(0).sum()) - within / len(u)
    return within, between / (between + within)


def summary(rows: Sequence[Mapping[str, float]]) -> Summary:
    """Mean and standard deviation of every quantity."""
    return {
        key: {"mean": _digits(mean(row[key] for row in rows)), "std": _digits(stdev(row[key] for row in rows))}
        for key in rows[0]
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _spread(values: Tensor) -> dict[str, float]:
    return {"mean": _digits(float(values.mean())), "std": _digits(float(values.std()))}


def _key(blur: float, scaling: float) -> str:
    return f"{blur:g}/{scaling:.2f}"


@dataclass(frozen=True)
class Minibatches:
    """The minibatches of one set: the same name draws the same noise (n, d) and images (n, d) every time."""

    name: str
    stored: ImageSet

    @property
    def n(self) -> int:
        return PARTICLES[self.name]

    @property
    def shape(self) -> tuple[int, int, int]:
        return SOURCES[self.name].shape

    def draw(self, *parts: str | int, n: int | None = None) -> tuple[Tensor, Tensor]:
        stream = generator("image_flow", self.name, *parts)
        y = self.stored.draw(n or self.n, stream, flip=False)[0].flatten(1)
        return torch.randn(y.shape, generator=stream), y


def image_variance(stored: ImageSet) -> float:
    """E |Y - E Y|^2 over the images of the set."""
    total = sum(y.double().sum(0) for y in chunks(stored))
    squares = sum(float(y.double().square().sum()) for y in chunks(stored))
    return squares / len(stored) - float((total / len(stored)).square().sum())


def step_plans() -> dict[str, list[float]]:
    """The step sizes of question a, by name."""
    return {
        **{f"{step_size:g}": [step_size] * STEPS for step_size in STEP_SIZES},
        "rising": rising(STEP_SIZE, STEPS),
        "rising to the same time": rising_to(hand_over_time([STEP_SIZE] * STEPS), STEPS),
    }


def answer_steps(sets: Minibatches) -> dict[str, list[Summary]]:
    """Question a, per blur and step sizes, state by state."""
    found = {}
    for (name, step_sizes), blur in progress(list(product(step_plans().items(), BLURS)), f"{sets.name}: step sizes"):
        runs = []
        for x_0, y in (sets.draw(k) for k in range(MINIBATCHES)):
            states, targets = follow(x_0, y, step_sizes, blur, FINE[1]), Targets(y)
            ways = measure_ways(states, targets)
            runs.append([place | measure_targets(state, targets) for place, state in zip(ways, states, strict=True)])
        found[f"{blur:g}/{name}"] = [summary(rows) for rows in zip(*runs, strict=True)]
    return found


def answer_plans(sets: Minibatches) -> dict[str, dict]:
    """Questions b and c, per blur and scaling."""
    rows: dict[tuple[float, float], list] = {setting: [] for setting in product(BLURS, SCALINGS)}
    for k in progress(range(MINIBATCHES), f"{sets.name}: plans"):
        x_0, y = sets.draw(k)
        match = optimal_assignment(x_0, y)
        for blur in BLURS:
            (to_targets, error), (to_selves, _) = (converged_plan(x_0, z, blur) for z in (y, x_0))
            v_converged = (to_targets @ y.double() - to_selves @ x_0.double()).float()
            for scaling in SCALINGS:
                states = follow(x_0, y, [STEP_SIZE] * STEPS, blur, scaling)
                iterations = len(sinkhorn.epsilon_schedule(sinkhorn.bounding_diameter(x_0, y), blur, scaling)) + 1
                rows[blur, scaling].append(
                    measure_plans(states, y, match, v_converged) | {"iterations": iterations, "marginal_error": error}
                )
    return {_key(*setting): summary(found) for setting, found in rows.items()}


def answer_states(sets: Minibatches) -> dict[str, list[Summary]]:
    """Question d, per setting, state by state."""
    found = {}
    for setting in (FINE, AUTHORS):
        draws = [sets.draw(k) for k in range(MINIBATCHES)]
        runs = [measure_states(follow(x_0, y, [STEP_SIZE] * STEPS, *setting), Targets(y)) for x_0, y in draws]
        found[_key(*setting)] = [summary(rows) for rows in zip(*runs, strict=True)]
    return found


def answer_mixtures(sets: Minibatches) -> dict:
    """Question e, per kind of point, with histograms of the times that the regression read."""
    t = hand_over_time([STEP_SIZE] * STEPS)
    x_0, y = sets.draw("reader", n=FITTED)
    times = draw_times(FITTED, generator("image_flow", sets.name, "reader", "times"))
    read = fit_time_reader(interpolate(x_0, y, times), times, sets.shape)
    x_0, y = sets.draw("reader test", n=FITTED // 2)
    times = draw_times(FITTED // 2, generator("image_flow", sets.name, "reader test", "times"))
    rms = float((read(interpolate(x_0, y, times)) - times).square().mean().sqrt())
    grid = torch.arange(t - TIME_RANGE, t + TIME_RANGE, TIME_STEP)

    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "independent": lambda x_0, y: t * y + (1 - t) * x_0,
        "matched": lambda x_0, y: t * y[optimal_assignment(x_0, y)] + (1 - t) * x_0,
    }
    for setting in (FINE, AUTHORS):
        kinds[_key(*setting)] = lambda x_0, y, setting=setting: follow(x_0, y, [STEP_SIZE] * STEPS, *setting)[-1].x
    draws = [sets.draw("mixtures", k) for k in range(MIXTURE_BATCHES)]
    found, read_times = {}, {}
    for kind, make in progress(kinds.items(), f"{sets.name}: mixtures"):
        points = [make(x_0, y) for x_0, y in draws]
        parts = [describe_points(x, x_0, y, t) for x, (x_0, y) in zip(points, draws, strict=True)]
        x = torch.cat(points)
        read_times[kind] = read(x)
        found[kind] = {
            **{key: _spread(torch.cat([part[key] for part in parts])) for key in parts[0]},
            "read_time": _spread(read_times[kind]),
            "ideal_time": _spread(ideal_time(x[:: len(x) // IDEAL_PARTICLES], grid, sets.stored)),
        }
    everything = torch.cat(list(read_times.values()))
    edges = np.linspace(*everything.quantile(torch.tensor([0.001, 0.999]).double()).tolist(), 41)
    return {
        "t": _digits(t),
        "reader_rms": _digits(rms),
        "particles": len(everything) // len(kinds),
        "kinds": found,
        "histograms": {
            "edges": [_digits(edge) for edge in edges],
            **{kind: np.histogram(times, edges)[0].tolist() for kind, times in read_times.items()},
        },
    }


def answer_conflict(sets: Minibatches) -> dict:
    """Question f."""
    variance = image_variance(sets.stored)
    targets: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "assignment": lambda x, y: y[optimal_assignment(x, y)][:FIXED],
    }
    for setting in (FINE, (1.0, FINE[1]), (2.0, FINE[1]), AUTHORS):
        targets[_key(*setting)] = lambda x, y, s=setting: (sinkhorn.velocity(x, y, blur=s[0], scaling=s[1]) + x)[:FIXED]
    first = {}
    for name, target in progress(targets.items(), f"{sets.name}: conflict"):
        rows = []
        for k in range(ROUNDS):
            fixed, _ = sets.draw("fixed", k, n=FIXED)
            u = []
            for redraw in range(REDRAWS):
                x, y = sets.draw("redraws", k, redraw)
                x[:FIXED] = fixed
                u.append(target(x, y))
            within, share = explained_share(torch.stack(u))
            rows.append({"unpredictable": within / variance, "explained": share})
        first[name] = summary(rows)
    x_0, y = sets.draw("bound")
    flow = follow(x_0, y, [STEP_SIZE] * STEPS, *FINE)
    bounds = []
    for k in range(1, STEPS):
        t, some = hand_over_time([STEP_SIZE] * k), slice(BOUND_PARTICLES)
        mixed = (t * y + (1 - t) * x_0)[some]
        bounds.append(
            {
                "k": k,
                "particles": _bound(flow[k].x[some], (flow[k].x + flow[k].v)[some], t, sets.stored, variance),
                "independent": _bound(mixed, y[some], t, sets.stored, variance),
            }
        )
    return {"image_variance": _digits(variance), "state_0": first, "later": bounds}


def _bound(x: Tensor, u: Tensor, t: float, stored: ImageSet, variance: float) -> float:
    return _digits(float((u - ideal_image(x, t, stored)).square().sum(1).mean()) / variance)


def example(sets: Minibatches, shown: int = 4) -> dict[str, Tensor]:
    """Pictures of the first particles of minibatch 0: (shown, c, s, s) each, in the order of the figure's columns."""
    x_0, y = sets.draw(0)
    flow = follow(x_0, y, [STEP_SIZE] * STEPS, *FINE)
    targets = Targets(y)
    columns = {"main target": targets.images[targets.main(flow[0].plan)]}
    for blur in BLURS:
        columns[f"u, blur {blur:g}"] = state_at(x_0, y, blur, FINE[1]).plan @ y
    end = flow[-1].x
    columns["X₅, blur 0.5"] = end
    columns["X₅, blur 2"] = follow(x_0, y, [STEP_SIZE] * STEPS, 2.0, FINE[1])[-1].x
    return {name: images[:shown].view(-1, *sets.shape) for name, images in columns.items()}


def measure(sets: Minibatches) -> dict:
    """All answers for one set."""
    began = time.process_time()
    return {
        "label": LABELS[sets.name],
        "images": len(sets.stored),
        "particles": sets.n,
        "dimensions": math.prod(sets.shape),
        "steps": answer_steps(sets),
        "plans": answer_plans(sets),
        "states": answer_states(sets),
        "mixtures": answer_mixtures(sets),
        "conflict": answer_conflict(sets),
        "processor_seconds": round(time.process_time() - began),
    }


def cell(value: Mapping[str, float], places: int) -> str:
    """Mean ± standard deviation at so many decimal places."""
    return f"{value['mean']:.{places}f} ± {value['std']:.{places}f}"


def percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.0f} ± {100 * value['std']:.0f}"


def tables(results: Mapping) -> dict[str, str]:
    """The Markdown tables of the page, by the name of their mark."""
    sets = list(results["sets"].values())
    labels = [found["label"] for found in sets]
    return {
        "steps": _table(["η", "(1 − η)⁵", *_each(labels, "blur 0.5", "blur 2")], _rows_of_steps(sets)),
        "schedules": _table(
            ["set", "blur", "step sizes", "noise", "image", "off line", "targets", "covered, %"], _rows_of_schedules(sets)
        ),
        "plans": _table(
            ["set", "blur", "scaling", "iterations", "targets", "same, %", "covered, %", "misplaced, %", "near : far", "error, %", "unchanged, %", "self share"],
            [_row_of_plan(found, key) for found in sets for key in found["plans"]],
        ),
        "matches": _table(
            ["set", "blur", "scaling", "k", "cosine", "error, %", "same, %", "error of these, %"],
            [row for found in sets for row in _rows_of_match(found)],
        ),
        "states": _table(["k", "0.8ᵏ", *_each(labels, "noise", "loss, %")], _rows_of_states(sets)),
        "mixtures": _table(
            ["set", "points", "correlation", "norm", "nearest target", "time read", "ideal time"],
            [_row_of_kind(found, kind) for found in sets for kind in KINDS],
        ),
        "conflict": _table(["target of the regression", *_each(labels, "unpredictable, %", "explained, %")], _rows_of_conflict(sets)),
    }  # fmt: skip


KINDS = {
    "independent": "mixtures, independent pairs",
    "matched": "mixtures, exact assignment",
    _key(*FINE): "particles, blur 0.5, scaling 0.95",
    _key(*AUTHORS): "particles, blur 2, scaling 0.80",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _each(labels: Sequence[str], *columns: str) -> list[str]:
    return [f"{label}: {column}" for label in labels for column in columns]


def _rows_of_steps(sets: Sequence[Mapping]) -> list[list[str]]:
    return [
        [f"{size:g}", f"{(1 - size) ** STEPS:.3f}"]
        + [
            f"{found['steps'][f'{blur:g}/{size:g}'][-1]['way_left']['mean']:.3f}"
            for found in sets
            for blur in (0.5, 2.0)
        ]
        for size in STEP_SIZES
    ]


def _rows_of_schedules(sets: Sequence[Mapping]) -> list[list[str]]:
    rows = []
    for found, blur in product(sets, (0.5, 2.0)):
        for name, label in ((f"{STEP_SIZE:g}", "constant"), ("rising to the same time", "rising")):
            end = found["steps"][f"{blur:g}/{name}"][-1]
            rows.append(
                [
                    found["label"] if (blur, label) == (0.5, "constant") else "",
                    f"{blur:g}",
                    label,
                    cell(end["noise"], 3),
                    cell(end["image"], 3),
                    cell(end["off_line"], 3),
                    f"{end['effective_targets']['mean']:.1f}",
                    percent(end["covered"]),
                ]
            )
    return rows


def _row_of_plan(found: Mapping, key: str) -> list[str]:
    row, (blur, scaling) = found["plans"][key], key.split("/")
    return [
        found["label"] if key == _key(BLURS[0], SCALINGS[0]) else "",
        blur,
        scaling,
        f"{row['iterations']['mean']:.0f}",
        f"{row['effective_targets.first']['mean']:.1f} → {row['effective_targets.last']['mean']:.1f}",
        percent(row["same.first"]),
        f"{100 * row['covered.first']['mean']:.0f} → {100 * row['covered.last']['mean']:.0f}",
        percent(row["misplaced"]),
        f"{row['near.last']['mean']:.2f} : {row['far.last']['mean']:.2f}",
        percent(row["error_converged"]),
        percent(row["unchanged"]),
        f"{row['self_share.first']['mean']:.3f} → {row['self_share.last']['mean']:.3f}",
    ]


def _rows_of_match(found: Mapping) -> list[list[str]]:
    rows = []
    for key, (at, k) in product((_key(*FINE), _key(*AUTHORS)), (("first", 0), ("before_last", STEPS - 1))):
        row = found["plans"][key]
        values = [cell(row[f"cosine.{at}"], 3), *(percent(row[f"{of}.{at}"]) for of in ("error", "same", "error_same"))]
        rows.append([found["label"] if not rows else "", *key.split("/"), str(k), *values])
    return rows


def _rows_of_states(sets: Sequence[Mapping]) -> list[list[str]]:
    return [
        [str(k), f"{(1 - STEP_SIZE) ** k:.3f}"]
        + [
            text
            for state in (found["states"][_key(*FINE)][k] for found in sets)
            for text in (f"{state['noise']['mean']:.3f}", f"{100 * state['loss_share']['mean']:.1f}")
        ]
        for k in range(STEPS + 1)
    ]


def _row_of_kind(found: Mapping, kind: str) -> list[str]:
    row = found["mixtures"]["kinds"][kind]
    places = {"correlation": 3, "norm": 2, "nearest": 2, "read_time": 3, "ideal_time": 3}
    return [
        found["label"] if kind == "independent" else "",
        KINDS[kind],
        *(cell(row[of], n) for of, n in places.items()),
    ]


def _rows_of_conflict(sets: Sequence[Mapping]) -> list[list[str]]:
    rows = [["image of an independent pair", *(text for _ in sets for text in ("100", "0"))]]
    for key in sets[0]["conflict"]["state_0"]:
        blur, _, scaling = key.partition("/")
        name = f"blur {blur}, scaling {scaling}" if scaling else "image of the exact assignment"
        states = [found["conflict"]["state_0"][key] for found in sets]
        rows.append(
            [name, *(text for row in states for text in (percent(row["unpredictable"]), percent(row["explained"])))]
        )
    return rows


def fill(page: str, results: Mapping) -> str:
    """The page with each table between its marks. Raises ValueError for a mark that is not there exactly once."""
    for name, table in tables(results).items():
        opening, closing = f"<!-- measured:image-flow:{name} -->", f"<!-- /measured:image-flow:{name} -->"
        if [page.count(mark) for mark in (opening, closing)] != [1, 1]:
            raise ValueError(f"the place of the table {name} is not marked exactly once")
        before, _, rest = page.partition(opening)
        page = f"{before}{opening}\n\n{table}\n\n{closing}{rest.partition(closing)[2]}"
    return page


BLUR_COLOURS = {0.5: "#00365a", 1.0: COLOURS["nsgf"], 2.0: COLOURS["nsgf_resampled"]}
KIND_STYLES = {
    "independent": ("independent pairs", COLOURS["fm"]),
    "matched": ("exact assignment", COLOURS["ot_cfm"]),
    _key(*FINE): ("particles, blur 0.5", COLOURS["nsgf"]),
    _key(*AUTHORS): ("particles, blur 2", COLOURS["nsgf_resampled"]),
}


def _panels(sets: Mapping[str, dict], height: float, **kwargs) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(
        1, len(sets), figsize=(3.3 * len(sets), height), squeeze=False, layout="constrained", **kwargs
    )
    for axis, found in zip(axes[0], sets.values(), strict=True):
        axis.set_title(found["label"], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _legend(figure: plt.Figure, axis: plt.Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def draw_ways(sets: Mapping[str, dict]) -> plt.Figure:
    figure, axes = _panels(sets, 3.4, sharey=True)
    states = range(STEPS + 1)
    for axis, found in zip(axes, sets.values(), strict=True):
        for step_size in STEP_SIZES:
            theory = [(1 - step_size) ** k for k in states]
            axis.plot(states, theory, color="0.6", lw=1, label="(1 − η)$^k$" if step_size == STEP_SIZES[0] else None)
            axis.annotate(
                f"η = {step_size:g}", (STEPS, theory[-1]), xytext=(7, -3), textcoords="offset points", fontsize=8
            )
            for blur, marker in ((0.5, "o"), (2.0, "^")):
                values = [row["way_left"]["mean"] for row in found["steps"][f"{blur:g}/{step_size:g}"]]
                axis.plot(
                    states, values, marker, ms=4.5, color=BLUR_COLOURS[blur], mfc="none" if blur == 2 else None,
                    label=f"measured, blur {blur:g}" if step_size == STEP_SIZES[0] else None,
                )  # fmt: skip
        axis.set(xlabel="steps taken", ylim=(0, 1.03), xlim=(-0.2, STEPS + 0.9), xticks=list(states))
    axes[0].set_ylabel("share of the way left")
    _legend(figure, axes[0])
    return figure


def draw_targets(sets: Mapping[str, dict]) -> plt.Figure:
    figure, axes = _panels(sets, 3.2, sharey=True)
    for axis, found in zip(axes, sets.values(), strict=True):
        for blur in BLURS:
            values = [row["effective_targets"]["mean"] for row in found["steps"][f"{blur:g}/{STEP_SIZE:g}"]]
            axis.plot(range(STEPS + 1), values, "o-", ms=4, lw=1.2, color=BLUR_COLOURS[blur], label=f"blur {blur:g}")
        axis.axhline(found["particles"], color="0.6", lw=0.8, ls=":")
        axis.annotate(
            f"all {found['particles']}",
            (0, found["particles"]),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color="0.4",
        )
        axis.set(xlabel="steps taken", yscale="log", yticks=[1, 3, 10, 30, 100], ylim=(0.9, 400))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.minorticks_off()
    axes[0].set_ylabel("effective targets of a particle")
    _legend(figure, axes[0])
    return figure


def draw_read_times(sets: Mapping[str, dict]) -> plt.Figure:
    figure, axes = _panels(sets, 3.0)
    for axis, found in zip(axes, sets.values(), strict=True):
        histograms, t = found["mixtures"]["histograms"], found["mixtures"]["t"]
        for kind, (label, colour) in KIND_STYLES.items():
            filled = kind == "independent"
            axis.stairs(histograms[kind], histograms["edges"], fill=filled, color=colour, alpha=0.35 if filled else 1,
                        lw=1.4, label=label)  # fmt: skip
        axis.axvline(t, color="0.2", lw=1, ls="--")
        axis.set(xlabel="time read", yticks=[])
        axis.spines["left"].set_visible(False)
        axis.annotate(f"{t:.3f}", (t, 1), xycoords=("data", "axes fraction"), xytext=(3, -8),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    _legend(figure, axes[0])
    return figure


def draw_conflict(sets: Mapping[str, dict]) -> plt.Figure:
    figure, axes = _panels(sets, 3.2, sharey=True)
    for axis, found in zip(axes, sets.values(), strict=True):
        conflict = found["conflict"]
        later = {kind: [row[kind] for row in conflict["later"]] for kind in ("independent", "particles")}
        first = conflict["state_0"][_key(*FINE)]["unpredictable"]["mean"]
        straight, sinkhorn_flow = COLOURS["fm"], COLOURS["nsgf"]
        axis.plot(
            range(STEPS),
            [1.0, *later["independent"]],
            "o-",
            ms=4,
            lw=1.2,
            color=straight,
            label="straight flow, same time",
        )
        axis.plot(0, first, "o", ms=5, color=sinkhorn_flow, label="Sinkhorn flow")
        axis.plot(
            range(1, STEPS),
            later["particles"],
            "o--",
            ms=4,
            lw=1.2,
            mfc="white",
            color=sinkhorn_flow,
            label="Sinkhorn flow, upper bound",
        )
        axis.set(xlabel="state k", ylim=(0, 1.05), xticks=range(STEPS))
    axes[0].set_ylabel("unpredictable share of\nthe images' variance")
    _legend(figure, axes[0])
    return figure


def draw_pictures(sets: Mapping[str, dict], pictures: Mapping[str, Mapping[str, Tensor]]) -> plt.Figure:
    columns = list(next(iter(pictures.values())))
    figure, axes = plt.subplots(
        len(sets), len(columns), figsize=(1.75 * len(columns), 1.75 * len(sets)), squeeze=False, layout="constrained"
    )
    for row, (name, found) in zip(axes, sets.items(), strict=True):
        for axis, column in zip(row, columns, strict=True):
            tiles = to_pixels(pictures[name][column]).permute(0, 2, 3, 1).numpy()
            tiles = np.pad(tiles, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
            grid = np.concatenate([np.concatenate(list(tiles[at : at + 2]), axis=1) for at in (0, 2)])[:-1, :-1]
            axis.imshow(grid.repeat(3, axis=2) if grid.shape[2] == 1 else grid, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if name == next(iter(sets)):
                axis.set_title(column, fontsize=9)
        row[0].set_ylabel(found["label"], fontsize=9)
    return figure


def draw_all(sets: Mapping[str, dict], stored: Mapping[str, ImageSet], out: Path) -> None:
    """Every figure. That of the pictures needs the images of all sets, and is kept as it is without them."""
    figures = {
        "way": draw_ways(sets),
        "targets": draw_targets(sets),
        "times": draw_read_times(sets),
        "conflict": draw_conflict(sets),
    }
    if sets.keys() <= stored.keys():
        figures["pictures"] = draw_pictures(sets, {name: example(Minibatches(name, stored[name])) for name in sets})
    for name, figure in figures.items():
        save(figure, out / f"image-flow-{name}.png")


def readable(data_root: Path) -> tuple[dict[str, ImageSet], dict[str, str]]:
    """The sets that are there, and why the others are not. Of CIFAR-10 and its lossy copy the first that is there."""
    found: dict[str, ImageSet] = {}
    skipped: dict[str, str] = {}
    for name in PARTICLES:
        if name == "cifar10_jpeg" and "cifar10" in found:
            continue
        try:
            found[name] = load(name, "train", data_root)
        except (BadInput, ImportError) as error:
            skipped[name] = str(error)
    return found, skipped


def as_text(results: Mapping) -> str:
    """JSON with a line for each quantity: mean and spread side by side."""
    text = json.dumps(results, indent=1)
    return re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def measure_all(stored: Mapping[str, ImageSet], skipped: Sequence[str], data_root: Path) -> dict:
    """What is kept: the answers for every set that is there, and where they come from."""
    began = time.perf_counter()
    origin = describe(Path(__file__).parent, Runtime(torch.device("cpu"))) | {"versions": versions()}
    origin["command"] = f"python -m benchmarks.image_flow --data-root {data_root.name}"
    answers = {name: measure(Minibatches(name, images)) for name, images in stored.items()}
    origin["minutes"] = round((time.perf_counter() - began) / 60, 1)
    origin["processor_minutes"] = round(time.process_time() / 60, 1)
    return {"origin": origin, "left_out": list(skipped), "sets": answers}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.image_flow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="for a run without all three sets: another folder")
    parser.add_argument("--redraw", action="store_true", help="figures and tables again, from the kept results")
    options = parser.parse_args()
    kept = options.out / "image_flow.json"
    stored, skipped = readable(options.data_root)
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if not options.redraw:
        if len(stored) < 3 and options.out == RESULTS:
            print(
                f"--out: found {len(stored)} sets and the kept results, expected 3 sets or another folder",
                file=sys.stderr,
            )
            return 2
        options.out.mkdir(parents=True, exist_ok=True)
        kept.write_text(as_text(measure_all(stored, list(skipped), options.data_root)))
    results = json.loads(kept.read_text())
    draw_all(results["sets"], stored, options.out)
    if options.out == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
