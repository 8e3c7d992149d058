"""The method's own arithmetic, against answers built by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from forward_forward import data
from forward_forward.config import Config
from forward_forward.data import CLASSES, NEUTRAL, one_hot, read_idx, with_label
from forward_forward.evaluate import accumulated, confusion, error, true_and_best_wrong
from forward_forward.layers import ForwardForward, features, goodness, layer_loss, make_softmax, normalise
from forward_forward.phases import Layers, choose, make_phases, wrong_labels
from torch import nn
from torch.nn.functional import cross_entropy

from repro.config import load
from repro.errors import BadInput
from repro.randomness import generator
from repro.runtime import Runtime

ROOT = Path(__file__).parent.parent
STAND_IN = Runtime(torch.device("cpu"), stand_in_data=True)


@pytest.fixture
def config() -> Config:
    return load(Config, ROOT / "configs" / "digits.yaml")[0]


def layers_phase(config: Config, *overrides: str) -> Layers:
    config, _ = load(Config, ROOT / "configs" / "digits.yaml", list(overrides))
    phase = make_phases(config, STAND_IN)[0]
    phase.prepare(0, Path(), {})
    return phase


def network(*weights: list[list[float]]) -> ForwardForward:
    """A network of these weights, (outputs, inputs) for each layer, without biases."""
    made = ForwardForward(len(weights[0][0]), len(weights[0]), len(weights))
    for layer, values in zip(made.layers, weights, strict=True):
        layer.weight.data = torch.tensor(values)
        layer.bias.data.zero_()
    return made


# The layers


def test_goodness_is_the_sum_of_the_squares():
    assert goodness(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 2.0]])).tolist() == [14.0, 4.0]


def test_normalised_activities_have_mean_square_1_and_their_direction():
    found = normalise(torch.tensor([[3.0, 4.0, 0.0, 0.0], [30.0, 40.0, 0.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[1.2, 1.6, 0.0, 0.0]]).expand(2, -1))


def test_a_silent_layer_gives_zeros():
    assert normalise(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_the_loss_of_a_layer_is_that_of_two_logistic_decisions():
    # Odds of 3 that positive data are positive, odds of 1/4 that negative data are.
    positive, negative = torch.tensor([10 + math.log(3)]), torch.tensor([10 - math.log(4)])
    found = layer_loss(positive, negative, threshold=10.0)
    assert torch.allclose(found, torch.tensor(-math.log(3 / 4) - math.log(4 / 5)))


def test_the_loss_falls_when_positive_goodness_rises_and_negative_falls():
    positive, negative = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    layer_loss(positive, negative, threshold=1.0).sum().backward()
    assert positive.grad < 0 < negative.grad


def test_activities_are_seen_by_the_next_layer_without_their_length():
    small, large = (
        network([[scale, 0.0], [0.0, scale]], [[1.0, 2.0], [3.0, -1.0]]).activities(torch.tensor([[3.0, 4.0]]))
        for scale in (1.0, 10.0)
    )
    assert torch.allclose(large[0], 10 * small[0])
    assert torch.allclose(large[1], small[1])


@pytest.mark.parametrize("number", range(3))
def test_no_gradient_leaves_a_layer(number):
    torch.manual_seed(0)
    made = ForwardForward(pixels=12, width=6, layers=3)
    activities, _ = made(torch.rand(5, 12))
    goodness(activities[number]).sum().backward()
    moved = {name.rpartition(".")[0] for name, weight in made.named_parameters() if weight.grad is not None}
    assert moved == {f"layers.{number}"}


def test_no_gradient_leaves_the_softmax():
    made = ForwardForward(pixels=12, width=6, layers=3)
    nn.init.normal_(made.softmax.weight)
    _, logits = made(torch.rand(5, 12))
    cross_entropy(logits, torch.arange(5)).backward()
    assert {name for name, weight in made.named_parameters() if weight.grad is not None} == {
        "softmax.weight",
        "softmax.bias",
    }


def test_the_softmax_sees_all_layers_but_the_first():
    first, second, third = torch.tensor([[5.0, 5.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    expected = [[3 / math.sqrt(12.5), 4 / math.sqrt(12.5), 0.0, math.sqrt(2)]]
    assert torch.allclose(features([first, second, third]), torch.tensor(expected))


# Labels


def test_a_label_takes_the_place_of_the_first_ten_pixels_of_a_copy():
    images = torch.full((2, 12), 0.5)
    found = with_label(images, one_hot(torch.tensor([0, 9])))
    assert found.tolist() == [[1.0] + [0.0] * 9 + [0.5] * 2, [0.0] * 9 + [1.0] + [0.5] * 2]
    assert bool((images == 0.5).all())


def test_the_neutral_label_favours_no_class():
    assert torch.allclose(with_label(torch.zeros(1, 11), NEUTRAL), torch.tensor([[0.1] * 10 + [0.0]]))


def test_a_wrong_label_is_never_the_true_one():
    labels = torch.arange(CLASSES).repeat(200)
    uniforms = torch.linspace(0, 1 - 2**-24, len(labels))
    certain = 50 * one_hot(labels)  # the softmax is as sure of the truth as it can be
    assert not bool((wrong_labels(certain, labels, uniforms) == labels).any())


def test_wrong_labels_come_as_often_as_the_softmax_says():
    # Beside the true label 1: odds of 1, 2 and 5 for the labels 0, 2 and 3, nothing for the rest.
    logits = torch.tensor([0.0, 3.0, math.log(2), math.log(5), *[-1e4] * 6]).expand(800, -1)
    uniforms = (torch.arange(800) + 0.5) / 800
    found = wrong_labels(logits, torch.ones(800, dtype=torch.int64), uniforms)
    assert torch.bincount(found, minlength=CLASSES).tolist() == [100, 0, 200, 500, 0, 0, 0, 0, 0, 0]


def test_a_number_beyond_the_last_edge_falls_on_a_class_that_can_be():
    probabilities = torch.tensor([[0.3, 0.3, 0.3999, 0.0]])
    assert choose(probabilities, torch.tensor([1 - 2**-24])).tolist() == [2]


def test_uniform_negatives_ask_no_softmax(config, monkeypatch):
    phase = layers_phase(config, "phases.layers.negatives=uniform", "phases.layers.batch_size=900")
    model = phase.make_model()
    model.softmax.bias.data[7] = 50.0
    seen = _wrong_labels_of(phase, model, monkeypatch)
    assert min(torch.bincount(seen, minlength=CLASSES)) > 50


def test_hard_negatives_ask_the_softmax(config, monkeypatch):
    phase = layers_phase(config, "phases.layers.batch_size=900")
    model = phase.make_model()
    model.softmax.bias.data[7] = 50.0
    seen = _wrong_labels_of(phase, model, monkeypatch)
    assert 700 < int((seen == 7).sum()) < 900  # all but those whose true label is 7


def _wrong_labels_of(phase: Layers, model: ForwardForward, monkeypatch) -> torch.Tensor:
    """The labels of the negative half of what a step shows to the network."""
    shown, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda inputs: shown.append(inputs) or forward(inputs))
    phase.loss(model, phase.minibatch(0, generator(0, "test")))
    return shown[-1].chunk(2)[1][:, :CLASSES].argmax(1)


def test_positive_data_carry_their_own_label(config, monkeypatch):
    phase = layers_phase(config)
    model, batch = phase.make_model(), phase.minibatch(0, generator(0, "test"))
    shown, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda inputs: shown.append(inputs) or forward(inputs))
    phase.loss(model, batch)
    neutral, pairs = shown
    assert torch.equal(neutral, with_label(batch["images"], NEUTRAL))
    assert torch.equal(pairs.chunk(2)[0], with_label(batch["images"], one_hot(batch["labels"])))


def test_the_threshold_is_in_units_of_the_width(config):
    # Three layers of 200 units whose goodness begins at 100: each is 100 below its threshold.
    assert layers_phase(config).expected_initial_loss() == pytest.approx(3 * 100 + math.log(10))


@pytest.mark.parametrize("number", range(3))
def test_a_fresh_network_has_the_loss_that_theory_gives(config, number):
    torch.manual_seed(0)
    phases = make_phases(config, STAND_IN)
    earlier = {"layers": phases[0].make_model()}
    phase = phases[number]
    phase.prepare(0, Path(), earlier)
    with torch.no_grad():
        found = float(phase.loss(phase.make_model(), phase.minibatch(0, generator(0, "test"))))
    # 200 units are few: over networks the goodness of a layer has a standard deviation of sqrt(200 * 5 / 4), 16 beside a loss of 100.
    assert found == pytest.approx(phase.expected_initial_loss(), rel=0.25)


# Classification


def test_each_label_is_tried_in_the_first_ten_pixels():
    # The first layer passes the label on, the second is good for label 3 alone.
    first, second = torch.zeros(10, 12), torch.zeros(10, 10)
    first[:, :10], second[0, 3] = torch.eye(10), 1.0
    found = network(first.tolist(), second.tolist()).goodness_of_labels(torch.zeros(2, 12))
    assert found.shape == (2, 10, 2)
    assert found[:, :, 1].argmax(1).tolist() == [3, 3] and int((found[:, :, 1] > 0).sum()) == 2


def test_the_first_layer_has_no_say_in_the_label():
    by_layer = torch.zeros(1, CLASSES, 3)
    by_layer[0, :, 0] = torch.arange(CLASSES) * 100.0
    by_layer[0, 4, 1:], by_layer[0, 5, 1] = torch.tensor([2.0, 2.0]), 3.0
    scores = accumulated(by_layer)
    assert scores[0, 4] == 4.0 and scores.argmax(1).tolist() == [4]


def test_the_error_is_the_percentage_of_misses():
    scores = one_hot(torch.tensor([0, 1, 2, 2]))
    assert error(scores, torch.tensor([0, 1, 1, 2])) == 25.0


def test_the_confusion_matrix_has_the_true_label_by_row():
    counted = confusion(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]))
    assert counted.sum() == 3 and counted[0, 1] == counted[0, 0] == counted[1, 1] == 1


def test_the_best_wrong_label_is_not_the_true_one():
    scores = torch.full((2, CLASSES), -9.0)
    scores[:, :3] = torch.tensor([-1.0, -3.0, -2.0])
    assert true_and_best_wrong(scores, torch.tensor([0, 1])).tolist() == [[-1.0, -2.0], [-3.0, -1.0]]


def test_scores_of_layers_are_told_apart():
    scores = torch.zeros(1, CLASSES, 2)
    scores[0, 2], scores[0, 8] = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])
    assert true_and_best_wrong(scores, torch.tensor([2])).tolist() == [[[1.0, 4.0], [3.0, 2.0]]]


# Data


def test_no_image_is_both_learned_and_judged():
    parts = [data.load("digits", split, 297, Path()) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1200, 297, 300]
    whole = data.load("digits", "train", 1, Path()), data.load("digits", "validation", 1, Path())
    together = torch.cat([parts[0].pixels, parts[1].pixels])
    assert torch.equal(together, torch.cat([part.pixels for part in whole]))


def test_a_label_hides_nothing_of_a_digit():
    assert int(data.load("digits", "train", 297, Path()).pixels[:, :CLASSES].max()) == 0


def test_white_is_1():
    assert float(data.load("digits", "train", 297, Path()).images().max()) == 1.0


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes())


def write_mnist(root: Path) -> None:
    """Two files of five training images, two of three test images: image k is all k, its label is k."""
    for split, count in (("train", 5), ("t10k", 3)):
        values = np.arange(count, dtype=np.uint8)
        write_idx(root / "MNIST/raw" / f"{split}-images-idx3-ubyte", values[:, None, None].repeat(28, 1).repeat(28, 2))
        write_idx(root / "MNIST/raw" / f"{split}-labels-idx1-ubyte", values)


def test_mnist_is_read_from_its_files(tmp_path):
    write_mnist(tmp_path)
    parts = [data.load("mnist", split, 2, tmp_path) for split in ("train", "validation", "test")]
    assert [part.labels.tolist() for part in parts] == [[0, 1, 2], [3, 4], [0, 1, 2]]
    assert parts[1].pixels.shape == (2, 784) and parts[1].pixels.unique(dim=1).tolist() == [[3], [4]]


def test_an_idx_file_is_read_in_its_shape(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "some", values)
    assert torch.equal(read_idx(tmp_path / "some"), torch.from_numpy(values))


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08\x00", b"\0\0\x08\x01\0\0\0\x05abcd"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "some").write_bytes(content)
    with pytest.raises(BadInput, match="some: found .* expected an idx file"):
        read_idx(tmp_path / "some")


def test_missing_files_are_named_before_anything_is_done(tmp_path):
    config, _ = load(Config, ROOT / "configs" / "mnist.yaml")
    for phase in make_phases(config, Runtime(torch.device("cpu"), tmp_path)):
        with pytest.raises(BadInput, match="--data-root: found no .*train-images-idx3-ubyte"):
            phase.check(tmp_path)


def test_more_validation_images_than_there_are_is_refused():
    with pytest.raises(BadInput, match="validation_images: found 1497, expected fewer than 1497"):
        data.load("digits", "train", 1497, Path())


def test_softmax_starts_without_an_opinion():
    assert make_softmax(5)(torch.rand(3, 5)).tolist() == [[0.0] * CLASSES] * 3
