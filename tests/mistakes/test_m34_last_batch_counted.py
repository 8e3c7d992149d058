"""m34: the last, smaller batch left out of a metric, or given the weight of a full one.

Every metric is that of all rows. Here the last batch is unlike the others, so that a mean of batch means, a batch that is left out and one that is counted as
full each give another number.
"""

from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import mean

import pytest
import torch
from proof import Proof
from torch import nn
from torch.nn.functional import one_hot

from nsgf import evaluate_images, images, inception
from nsgf.networks import ImageClassifier
from repro.config import load
from repro.runtime import Runtime

CPU = torch.device("cpu")
SEED = 0
BATCH = 16
SAMPLES, TEST = 40, 300  # the last batch has 8 of 40 samples, and 12 of 300 test images
LAST = TEST % BATCH
EVEN = 20  # divides all sets
PROTOCOL = {"samples": SAMPLES, "euler_steps": [2], "handover_times": [], "nearest": 4, "pictures": 2, "reference": "test"}  # fmt: skip
OF_ROWS = ("classifier.accuracy", "test.confidence")  # metrics that are means over the rows of the test split


class KnowsFullBatches(nn.Module):
    """Right on every test image but the last twelve."""

    def __init__(self):
        super().__init__()
        test = images.load("digits", "test", Path())
        guesses = torch.where(torch.arange(TEST) < TEST - LAST, test.labels, (test.labels + 1) % 10)
        self.guesses = dict(zip((image.numpy().tobytes() for image in test.images()), guesses.tolist(), strict=True))

    def features(self, x):
        self.found = [self.guesses.get(image.numpy().tobytes(), 0) for image in x]
        return x.flatten(1)[:, ::8]

    def scores(self, features):
        return 10.0 * one_hot(torch.tensor(self.found), 10)


class Field(nn.Module):
    def forward(self, x, t):
        return t.view(-1, 1, 1, 1) * x


class Late(nn.Module):
    """Hands over at the end of the time, but in a batch that is not full at its beginning."""

    def forward(self, x):
        return x.new_full((len(x),), 1.0 if len(x) == BATCH else 0.0)


class ByBrightness(nn.Module):
    """A time for each sample, whatever stands beside it."""

    def forward(self, x):
        return x.mean((1, 2, 3)).sigmoid()


def evaluated(project, batch_size, **networks):
    settings = [f"evaluation.{key}={value}" for key, value in (PROTOCOL | {"batch_size": batch_size}).items()]
    plus_plus = ["nsgf_plus_plus.sinkhorn_steps=3", "nsgf_plus_plus.straight_flow_step=0.1"]
    config, _ = load(project.config_class("digits"), project.experiments()["digits"], [*settings, *plus_plus])
    torch.manual_seed(SEED)
    models = {"velocity_field": Field(), "straight_flow": Field(), "time_predictor": ByBrightness()}
    models |= {"feature_classifier": ImageClassifier(image_size=8, image_channels=1, channels=[6], classes=10)}
    with torch.no_grad():
        return evaluate_images.evaluate(config, models | networks, SEED, Runtime(CPU))


def check_known_values(project):
    """Of a last batch that is wrong where the others are right, and slow where they are fast."""
    found = evaluated(project, BATCH, feature_classifier=KnowsFullBatches(), time_predictor=Late())
    assert len(found.tensors["handover.t"]) == SAMPLES, (
        f"samples: found {len(found.tensors['handover.t'])}, expected {SAMPLES}"
    )
    slow = SAMPLES % BATCH / SAMPLES
    expected = {
        "classifier.accuracy": 1 - LAST / TEST,
        "nsgf_plus_plus.nfe": 3 + 1 + slow * 10,
        "nsgf_plus_plus.handover_time.mean": 1 - slow,
    }
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value), (
            f"{name}: found {found.metrics[name]:.4g}, expected {value:.4g}"
        )


def check_any_batch_size(project):
    """The numbers do not depend on how many rows go through a network at a time."""
    even = evaluated(project, EVEN).metrics
    for batch_size in (BATCH, 7, SAMPLES):
        for name, value in evaluated(project, batch_size).metrics.items():
            assert value == pytest.approx(even[name], rel=1e-5, abs=1e-7), (
                f"{name}: found {value:.6g} in batches of {batch_size}, {even[name]:.6g} in batches of {EVEN}"
            )


def check_scores():
    """FID and the Inception score, whose network takes batches of its own."""
    stream = torch.Generator().manual_seed(SEED)
    samples, reference = (torch.randint(0, 256, (n, 1, 8, 8), generator=stream, dtype=torch.uint8) for n in (100, 120))
    samples[64:] //= 2  # unlike the first
    even = inception.scores({"x": samples}, reference, None, CPU, batch_size=EVEN)
    for name, value in inception.scores({"x": samples}, reference, None, CPU).items():
        assert value == pytest.approx(even[name], rel=1e-5), (
            f"{name}: found {value:.6g} in batches of 64, {even[name]:.6g} in batches of {EVEN}"
        )


def in_batches(sets, batch_size):
    """The test split as sets of one batch each."""
    test = sets["test"]
    parts = zip(test.pixels.split(batch_size), test.labels.split(batch_size), strict=True)
    return [replace(test, pixels=pixels, labels=labels) for pixels, labels in parts]


def measured_by(monkeypatch, change):
    """`change` gives the metrics of the classifier from (measure, sets, batch size), where measure takes the sets."""
    real = evaluate_images._in_classifier

    def measured(config, model, judged, sets, device):
        return change(lambda given: real(config, model, judged, given, device), sets, config.evaluation.batch_size)

    monkeypatch.setattr(evaluate_images, "_in_classifier", measured)


def mean_of_batches(monkeypatch):
    """Each batch is measured, and the mean taken of what was found."""

    def averaged(measure, sets, batch_size):
        found = [measure(sets | {"test": part}) for part in in_batches(sets, batch_size)]
        return measure(sets) | {name: mean(one[name] for one in found) for name in OF_ROWS}

    measured_by(monkeypatch, averaged)


def distance_of_batches(monkeypatch):
    """A distance between laws is taken of a few images at a time, and averaged."""

    def averaged(measure, sets, batch_size):
        found = [measure(sets | {"test": part}) for part in in_batches(sets, batch_size)]
        return measure(sets) | {name: mean(one[name] for one in found) for name in found[0] if name.endswith("frechet")}

    measured_by(monkeypatch, averaged)


def last_batch_left_out(monkeypatch):
    """drop_last in the loader of the test split."""

    def full_ones(measure, sets, batch_size):
        whole = len(sets["test"]) // batch_size * batch_size
        return measure(sets | {"test": in_batches(sets, whole)[0]})

    measured_by(monkeypatch, full_ones)


def last_batch_counted_as_full(monkeypatch):
    """Right answers over batches times their size."""

    def divided(measure, sets, batch_size):
        n = len(sets["test"])
        found = measure(sets)
        return found | {"classifier.accuracy": found["classifier.accuracy"] * n / (ceil(n / batch_size) * batch_size)}

    measured_by(monkeypatch, divided)


def chunks(real, config, models, x_0, *rest):
    return [real(config, models, chunk, *rest) for chunk in x_0.split(config.evaluation.batch_size)]


def together(made, weights):
    """One result of those of the chunks, network evaluations weighted."""
    methods = {
        name: evaluate_images.Samples(
            torch.cat([one[0][name].pixels for one in made]),
            sum(weight * one[0][name].nfe for weight, one in zip(weights, made, strict=True)) / sum(weights),
        )
        for name in made[0][0]
    }
    return methods, torch.cat([times for _, times in made])


def evaluations_averaged_over_chunks(monkeypatch):
    real = evaluate_images.generate

    def generate(*arguments):
        made = chunks(real, *arguments)
        return together(made, [1] * len(made))

    monkeypatch.setattr(evaluate_images, "generate", generate)


def full_chunks_generated(monkeypatch):
    """As many samples as whole batches give."""
    real = evaluate_images.generate

    def generate(config, models, x_0, *rest):
        size = config.evaluation.batch_size
        return real(config, models, x_0[: len(x_0) // size * size], *rest)

    monkeypatch.setattr(evaluate_images, "generate", generate)


def full_batches_seen(monkeypatch):
    """Inception's network sees whole batches only."""
    real = inception.look
    monkeypatch.setattr(
        inception, "look", lambda net, x, device, size: real(net, x[: len(x) // size * size], device, size)
    )


def evaluations_weighted(monkeypatch):
    """The same mean, with the sizes of the chunks as weights."""
    real = evaluate_images.generate

    def generate(*arguments):
        made = chunks(real, *arguments)
        return together(made, [len(times) for _, times in made])

    monkeypatch.setattr(evaluate_images, "generate", generate)


def means_weighted(monkeypatch):
    """Of the metrics that are means of rows; a distance is taken of all rows."""

    def averaged(measure, sets, batch_size):
        parts = in_batches(sets, batch_size)
        found = [measure(sets | {"test": part}) for part in parts]
        sums = {name: sum(len(part) * one[name] for part, one in zip(parts, found, strict=True)) for name in OF_ROWS}
        return measure(sets) | {name: total / len(sets["test"]) for name, total in sums.items()}

    measured_by(monkeypatch, averaged)


def padded_and_cut(monkeypatch):
    """The last batch is filled up, as a compiled network asks for, and what was added is cut off again."""
    real = inception.look

    def look(net, x, device, size):
        filled = torch.cat([x, x[:1].expand(-len(x) % size, -1, -1, -1)])
        return tuple(column[: len(x)] for column in real(net, filled, device, size))

    monkeypatch.setattr(inception, "look", look)


PROOFS = [
    Proof(
        check_known_values,
        plant={
            mean_of_batches: "classifier.accuracy: found 0.9474, expected 0.96",
            last_batch_left_out: "classifier.accuracy: found 1, expected 0.96",
            last_batch_counted_as_full: "classifier.accuracy: found 0.9474, expected 0.96",
            evaluations_averaged_over_chunks: "nsgf_plus_plus.nfe: found 7.333, expected 6",
            full_chunks_generated: "samples: found 32, expected 40",
        },
        innocent=[means_weighted, evaluations_weighted],
    ),
    Proof(
        check_any_batch_size,
        plant={
            mean_of_batches: "test.confidence: found",
            distance_of_batches: "nsgf_plus_plus.classifier_frechet: found",
            full_chunks_generated: "in batches of 16",
        },
        innocent=[means_weighted, evaluations_weighted],
    ),
    Proof(check_scores, plant={full_batches_seen: "x.fid: found"}, innocent=[padded_and_cut]),
]


def test_proof(case):
    case()


def test_a_distance_averaged_over_batches_has_a_higher_floor(project, monkeypatch):
    """Of real images of one law, in batches of 16."""
    whole = evaluated(project, BATCH).metrics["floor.classifier_frechet"]
    distance_of_batches(monkeypatch)
    assert evaluated(project, BATCH).metrics["floor.classifier_frechet"] / whole == pytest.approx(3.6, abs=0.1)
