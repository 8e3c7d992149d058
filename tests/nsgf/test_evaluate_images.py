"""The evaluation of images, with networks whose answers are known. The images are scikit-learn's digits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nsgf import evaluate_images, images, inception
from nsgf.config import ImageConfig
from nsgf.evaluate_images import counted, evaluate, expected_handover, generate, nearest_images
from nsgf.images import ImageSet, to_images, to_pixels
from nsgf.networks import ImageClassifier
from repro.config import load
from repro.errors import BadInput, RunFailed
from repro.method import find_project
from repro.runtime import Runtime

CPU = torch.device("cpu")
WHITE = 16
DIGITS = find_project(Path(__file__).parent).experiments()["digits"]
SMALL = {
    "samples": 40,
    "batch_size": 16,
    "euler_steps": [2, 4],
    "handover_times": [0.5],
    "nearest": 10,
    "pictures": 4,
    "inception": False,
}


def configuration(*settings, **evaluation):
    """The digits, 3 steps of the Sinkhorn flow, a straight flow in steps of 0.1, few samples."""
    settings = ["nsgf_plus_plus.sinkhorn_steps=3", "nsgf_plus_plus.straight_flow_step=0.1", *settings]
    protocol = [f"evaluation.{key}={str(value).lower()}" for key, value in (SMALL | evaluation).items()]
    return load(ImageConfig, DIGITS, settings + protocol)[0]


class Field(nn.Module):
    """A velocity field given as a function of x and of t, which is shaped to multiply x. It remembers what it was asked."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x, t):
        self.calls.append((x.clone(), t.clone()))
        return self.function(x, t.view(-1, 1, 1, 1))


class Times(nn.Module):
    """A time predictor given as a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def early_or_late(x):
    """0.25 where the first pixel is positive, else 0.75: 8 or 3 steps of at most 0.1 to time 1."""
    return torch.where(x[:, 0, 0, 0] > 0, 0.25, 0.75)


def networks(velocity_field=None, straight_flow=None, time_predictor=None):
    torch.manual_seed(0)
    return {
        "velocity_field": velocity_field or Field(lambda x, t: -x),
        "straight_flow": straight_flow or Field(lambda x, t: torch.ones_like(x)),
        "time_predictor": time_predictor or Times(early_or_late),
        "feature_classifier": ImageClassifier(image_size=8, image_channels=1, channels=[6], classes=10),
    }


@torch.no_grad()
def run(config, models=None, seed=0):
    return evaluate(config, models or networks(), seed, Runtime(CPU, Path("no/such/folder")))


def noise(n=40, seed=3):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def made(config, models, x_0):
    return generate(config, models, x_0, WHITE, CPU)


# What is generated


def test_network_evaluations_are_those_that_the_hand_over_times_ask_for():
    """3 steps of the Sinkhorn flow, 1 prediction, and 8 or 3 steps of the straight flow."""
    x_0 = noise()
    early = float((x_0[:, 0, 0, 0] > 0).double().mean())  # the flow shrinks a sample and keeps its sign
    methods, _ = made(configuration(), networks(), x_0)
    assert 0 < early < 1
    assert methods["nsgf_plus_plus"].nfe == pytest.approx(3 + 1 + early * 8 + (1 - early) * 3)


def test_network_evaluations_of_the_other_methods_need_no_prediction():
    methods, _ = made(configuration(), networks(), noise())
    found = {name: samples.nfe for name, samples in methods.items() if name != "nsgf_plus_plus"}
    assert found == {"nsgf": 3, "handover_50": 3 + 5, "fm.2": 2, "fm.4": 4}


def test_network_evaluations_are_counted_and_not_computed():
    """A straight flow that calls itself a second time costs twice as much."""

    class Twice(Field):
        def forward(self, x, t):
            return super().forward(x, t)

        def __call__(self, x, t):
            super().__call__(x, t)
            return super().__call__(x, t)

    methods, _ = made(configuration(), networks(straight_flow=Twice(lambda x, t: x)), noise())
    assert (methods["fm.4"].nfe, methods["handover_50"].nfe) == (8, 3 + 10)


def test_every_sample_goes_on_from_its_own_predicted_time():
    """Under velocity 1 a sample gains what is left of the time; three steps of 0.2 towards 0 leave 0.8^3 of it."""
    x_0 = noise()
    methods, t = made(configuration(), networks(), x_0)
    x = 0.8**3 * x_0
    assert torch.equal(t, early_or_late(x))
    assert torch.equal(methods["nsgf"].pixels, to_pixels(x, WHITE))
    expected = to_pixels(x + (1 - t).view(-1, 1, 1, 1), WHITE).int()
    assert (methods["nsgf_plus_plus"].pixels - expected).abs().max() <= 1  # half a pixel may round either way


def test_the_sinkhorn_flow_is_asked_at_the_times_of_its_pool():
    """Step k of 5 was stored at time k / 5, also where only 3 are taken."""
    models = networks()
    made(configuration(batch_size=40), models, noise())
    asked = [t.unique().tolist() for _, t in models["velocity_field"].calls]
    assert asked == [pytest.approx([k / 5]) for k in range(3)]


def test_at_a_fixed_hand_over_every_sample_goes_on_from_that_time():
    config, models = configuration(batch_size=40, euler_steps=[2]), networks()
    x_0 = noise()
    methods, _ = made(config, models, x_0)
    after = [(x, t) for x, t in models["straight_flow"].calls if len(x) == 40][-2 - 5 : -2]  # 2 calls of fm.2 follow
    assert [t.unique().tolist() for _, t in after] == [pytest.approx([0.5 + 0.1 * k]) for k in range(5)]
    assert torch.allclose(after[0][0], 0.8**3 * x_0)
    expected = to_pixels(0.8**3 * x_0 + 0.5, WHITE).int()
    assert (methods["handover_50"].pixels - expected).abs().max() <= 1


def test_the_straight_flow_alone_starts_from_the_noise_at_time_zero():
    models = networks(straight_flow=Field(lambda x, t: torch.zeros_like(x)))
    x_0 = noise()
    methods, _ = made(configuration(), models, x_0)
    assert torch.equal(methods["fm.4"].pixels, to_pixels(x_0, WHITE))
    assert [t.unique().tolist() for _, t in models["straight_flow"].calls[-4:]] == [[0.0], [0.25], [0.5], [0.75]]


def test_how_many_samples_go_at_a_time_changes_none():
    x_0 = noise()
    (whole, t), (parts, t_of_parts) = (made(configuration(batch_size=size), networks(), x_0) for size in (40, 7))
    assert torch.equal(t, t_of_parts) and list(whole) == list(parts)
    for name, samples in whole.items():
        assert torch.equal(samples.pixels, parts[name].pixels) and samples.nfe == pytest.approx(parts[name].nfe)


def test_samples_are_kept_as_pixels_of_the_set_on_the_cpu():
    """One byte a pixel: 50,000 samples of CIFAR-10 take 154 MB a method instead of 614."""
    methods, _ = made(configuration(), networks(), noise())
    assert {samples.pixels.dtype for samples in methods.values()} == {torch.uint8}
    assert all(samples.pixels.shape == (40, 1, 8, 8) and samples.pixels.max() <= WHITE for samples in methods.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_refused_and_not_taken_for_black(value):
    models = networks(straight_flow=Field(lambda x, t: torch.full_like(x, value)))
    with pytest.raises(RunFailed, match="found samples of nsgf_plus_plus that are not finite"):
        made(configuration(), models, noise())


def test_counting_ends_with_its_block_also_after_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError), counted(model) as evaluations:
        model(torch.zeros(5, 2))
        raise KeyError
    model(torch.zeros(7, 2))
    assert evaluations() == 5 and not model._forward_hooks


# The expected hand-over


def test_five_steps_of_a_fifth_are_expected_to_hand_over_at_two_thirds():
    assert expected_handover(5, 0.2) == pytest.approx(0.67232)


def test_steps_that_cover_a_share_of_the_way_left_are_at_the_expected_time():
    """One particle and one target: the velocity is the way that is left, so after k steps it is on the line at that time."""
    x, y = -1.0, 4.0
    start = x
    for _ in range(3):
        x += 0.3 * (y - x)
    assert (x - start) / (y - start) == pytest.approx(expected_handover(3, 0.3))


# Nearest images


def stored_pixels(n, seed, white=255, size=4):
    values = torch.randint(0, white + 1, (n, 1, size, size), generator=torch.Generator().manual_seed(seed))
    return ImageSet(values.to(torch.uint8), torch.zeros(n, dtype=torch.long), white)


@pytest.mark.parametrize("chunk", [7, 30, 1000])
def test_nearest_images_are_those_of_a_search_in_whole_numbers(monkeypatch, chunk):
    """Few grey levels and pixels, so that many stored images are as near: the first counts, in every division into chunks."""
    monkeypatch.setattr(evaluate_images, "NEAREST_CHUNK", chunk)
    stored, x = stored_pixels(100, 0, white=1, size=2), stored_pixels(40, 1, white=1, size=2).pixels
    squared = (x.numpy()[:, None].astype(int) - stored.pixels.numpy()[None].astype(int)) ** 2
    squared = squared.sum((2, 3, 4))
    distance, index = nearest_images(x, stored, CPU, mirrored=False)
    assert np.array_equal(index.numpy(), squared.argmin(1))
    assert np.allclose(distance.numpy(), 2 * np.sqrt(squared.min(1)), rtol=1e-7)


def test_distances_are_exact_where_single_precision_would_not_be():
    """Images of CIFAR-10's size that are all white but for one level: a squared distance of 1 beside lengths of 2e8."""
    stored = ImageSet(torch.full((3, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(3), 255)
    x = stored.pixels[:1].clone()
    x[0, 0, 0, 0] = 254
    assert float(nearest_images(x, stored, CPU, mirrored=False)[0]) == pytest.approx(2 / 255)
    assert float(nearest_images(stored.pixels[:1], stored, CPU, mirrored=False)[0]) == 0


def test_the_distance_is_that_of_images_between_minus_one_and_one():
    stored, x = stored_pixels(20, 0, white=16), stored_pixels(5, 1, white=16)
    distance, index = nearest_images(x.pixels, stored, CPU, mirrored=False)
    assert torch.allclose(distance, (x.images() - stored.images(index)).flatten(1).norm(dim=1))


def test_a_mirrored_copy_is_a_copy_where_training_images_are_mirrored():
    stored = stored_pixels(20, 0)
    x = stored.pixels[[4, 9]].flip(3)
    distance, index = nearest_images(x, stored, CPU, mirrored=True)
    assert distance.tolist() == [0, 0] and index.tolist() == [4, 9]
    assert (nearest_images(x, stored, CPU, mirrored=False)[0] > 0).all()
    assert nearest_images(stored.pixels[:3], stored, CPU, mirrored=True)[1].tolist() == [0, 1, 2]


class Memoriser(Field):
    """A straight flow that ends in training images, whatever it starts from."""

    def __init__(self, pixels):
        images_in_turn = to_images(pixels, WHITE)
        super().__init__(lambda x, t: (images_in_turn[torch.arange(len(x)) % len(pixels)] - x) / (1 - t))


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_memoriser_is_caught(mirrored):
    """Its samples lie on training images, where test images do not. With flips in training it may be the mirror images."""
    train = images.load("digits", "train", Path()).pixels[:10]
    models = networks(straight_flow=Memoriser(train.flip(3) if mirrored else train))
    config = configuration(f"data.flip={str(mirrored).lower()}", batch_size=40)
    models["time_predictor"] = Times(lambda x: torch.zeros(len(x)))
    found = run(config, models).metrics
    assert found["nsgf_plus_plus.nearest_train"] == 0 and found["nsgf_plus_plus.nearest_train_min"] == 0
    assert found["test.nearest_train"] > 1


def test_one_copy_among_many_samples_shows_in_the_smallest_distance():
    """The median of ten does not see it."""
    copy = to_images(images.load("digits", "train", Path()).pixels[:1], WHITE)

    def once(x, t):
        target = torch.cat([copy, torch.zeros_like(x[1:])])
        return (target - x) / (1 - t)

    models = networks(straight_flow=Field(once), time_predictor=Times(lambda x: torch.zeros(len(x))))
    found = run(configuration(batch_size=40), models).metrics
    assert found["nsgf_plus_plus.nearest_train_min"] == 0 and found["nsgf_plus_plus.nearest_train"] > 1


def test_test_images_are_held_against_training_images():
    found = run(configuration())
    train, test = (images.load("digits", split, Path()) for split in ("train", "test"))
    expected = torch.cdist(test.images()[:10].flatten(1).double(), train.images().flatten(1).double()).amin(1)
    assert torch.allclose(found.tensors["nearest.test"].double(), expected, rtol=1e-6)
    assert found.metrics["test.nearest_train"] == pytest.approx(float(expected.float().median()))


# What is measured


def test_the_metrics_have_their_names():
    """What is measured in the classifier's features is never called FID."""
    methods = ["nsgf_plus_plus", "nsgf", "handover_50", "fm.2", "fm.4"]
    expected = {f"{name}.nfe" for name in methods}
    expected |= {f"{name}.{metric}" for name in [*methods, "floor"] for metric in ("classifier_frechet", "confidence")}
    expected |= {f"{name}.nearest_train{kind}" for name in ("nsgf_plus_plus", "test") for kind in ("", "_min")}
    expected |= {f"nsgf_plus_plus.handover_time.{kind}" for kind in ("mean", "std", "expected")}
    assert set(run(configuration()).metrics) == expected | {"test.confidence", "classifier.accuracy"}


def test_hand_over_times_are_kept_and_summed_up():
    found = run(configuration())
    t = found.tensors["handover.t"]
    assert t.shape == (40,) and set(t.tolist()) == {0.25, 0.75}
    assert found.metrics["nsgf_plus_plus.handover_time.mean"] == pytest.approx(float(t.mean()))
    assert found.metrics["nsgf_plus_plus.handover_time.std"] == pytest.approx(float(t.std()))
    assert found.metrics["nsgf_plus_plus.handover_time.expected"] == pytest.approx(1 - 0.8**3)


def test_the_seed_decides_and_nothing_else():
    first, again, other = run(configuration()), run(configuration()), run(configuration(), seed=1)
    assert first.metrics == again.metrics
    assert torch.equal(first.tensors["pictures.noise"], again.tensors["pictures.noise"])
    assert not torch.equal(first.tensors["pictures.noise"], other.tensors["pictures.noise"])


def test_every_image_that_the_classifier_sees_is_made_of_whole_pixels():
    """Samples with 3.7 of 16 levels would be told from digits by that alone."""
    models, seen = networks(), []
    models["feature_classifier"].convolutions.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    run(configuration(), models)
    levels = (torch.cat(seen) + 1) * WHITE / 2
    assert torch.equal(levels, levels.round()) and float(levels.min()) == 0 and float(levels.max()) == WHITE


@pytest.fixture
def judged(monkeypatch):
    """The sets of pixels that are judged, by name, of the last run."""
    seen, real = {}, evaluate_images._in_classifier

    def look(config, model, judged, sets, device):
        seen.update(judged)
        return real(config, model, judged, sets, device)

    monkeypatch.setattr(evaluate_images, "_in_classifier", look)
    return seen


@pytest.mark.parametrize("reference, other", [("test", "train"), ("train", "test")])
def test_the_floor_are_images_of_the_split_that_is_not_the_reference_each_once(judged, reference, other):
    run(configuration(reference=reference))
    pool = {image.numpy().tobytes() for image in images.load("digits", other, Path()).pixels}
    floor = [image.numpy().tobytes() for image in judged["floor"]]
    assert len(floor) == len(set(floor)) == 40 and set(floor) <= pool


def test_the_floor_takes_a_whole_split_where_that_is_smaller_than_the_samples(judged):
    run(configuration(reference="train", samples=400, batch_size=400, euler_steps=[1], handover_times=[]))
    assert len(judged["floor"]) == 300 and len(judged["nsgf_plus_plus"]) == 400


def test_the_floor_is_drawn_and_not_the_first_images(judged):
    run(configuration())
    assert not torch.equal(judged["floor"], images.load("digits", "train", Path()).pixels[:40])


class ByBrightness(nn.Module):
    """A classifier that takes the brightness of an image of one grey for its class."""

    def features(self, x):
        return x.flatten(1)

    def scores(self, features):
        return -50 * (features.mean(1, keepdim=True) - to_images(torch.arange(10), WHITE)).abs()

    def forward(self, x):
        return self.scores(self.features(x))


@pytest.mark.parametrize("reference", ["test", "train"])
def test_the_accuracy_is_that_on_the_test_split(monkeypatch, reference):
    """Here the classifier knows nine of ten test images and not one training image."""
    grey = torch.arange(10, dtype=torch.uint8).repeat(30).view(-1, 1, 1, 1).expand(300, 1, 8, 8)
    labels = torch.arange(10).repeat(30)
    sets = {
        "train": ImageSet(grey.flip(0), (labels.flip(0) + 1) % 10, WHITE),
        "test": ImageSet(grey, torch.where(labels == 7, 0, labels), WHITE),
    }
    monkeypatch.setattr(images, "load", lambda name, split, root, *, stand_in: sets[split])
    found = run(configuration(reference=reference), networks() | {"feature_classifier": ByBrightness()}).metrics
    assert found["classifier.accuracy"] == pytest.approx(0.9)


@pytest.mark.parametrize("reference", ["test", "train"])
def test_samples_are_compared_with_the_reference_split(monkeypatch, reference):
    """Samples that are the reference have no distance; the other split, here of another grey, has one."""
    sets = {
        split: ImageSet(torch.full((40, 1, 8, 8), grey, dtype=torch.uint8), torch.zeros(40, dtype=torch.long), WHITE)
        for split, grey in (("train", 3), ("test", 9))
    }
    monkeypatch.setattr(images, "load", lambda name, split, root, *, stand_in: sets[split])
    models = networks(straight_flow=Memoriser(sets[reference].pixels)) | {"feature_classifier": ByBrightness()}
    found = run(configuration(batch_size=40, reference=reference), models).metrics
    assert found["nsgf_plus_plus.classifier_frechet"] == pytest.approx(0, abs=1e-9)
    assert found["floor.classifier_frechet"] == pytest.approx(64 * (6 * 2 / WHITE) ** 2)


def test_confidence_is_the_mean_share_of_the_likeliest_class():
    models, found = networks(), {}
    found = run(configuration(), models).metrics
    with torch.no_grad():
        shares = models["feature_classifier"](images.load("digits", "test", Path()).images()).softmax(1)
    assert found["test.confidence"] == pytest.approx(float(shares.amax(1).mean()), rel=1e-6)


# Pictures


def test_pictures_are_bytes_from_black_to_white_whatever_the_set():
    tensors = run(configuration()).tensors
    shown = {name: x for name, x in tensors.items() if name.startswith("pictures.")}
    names = ("noise", "nsgf", "nsgf_plus_plus", "fm", "real", "nearest")
    assert set(shown) == {f"pictures.{name}" for name in names}
    assert all(x.dtype == torch.uint8 and x.shape == (4, 1, 8, 8) for x in shown.values())
    assert int(shown["pictures.real"].max()) == 255


def test_the_straight_flow_is_shown_at_its_largest_number_of_steps(judged):
    """Under velocity 4 t, two steps lead to 1 and four to 1.5."""
    tensors = run(configuration(), networks(straight_flow=Field(lambda x, t: 4 * t + torch.zeros_like(x)))).tensors
    few, many = (to_pixels(to_images(judged[f"fm.{steps}"][:4], WHITE)) for steps in (2, 4))
    assert torch.equal(tensors["pictures.fm"], many) and not torch.equal(few, many)


def test_beside_each_sample_stands_its_nearest_training_image():
    train = images.load("digits", "train", Path()).pixels[:10]
    models = networks(straight_flow=Memoriser(train), time_predictor=Times(lambda x: torch.zeros(len(x))))
    tensors = run(configuration(batch_size=40), models).tensors
    assert torch.equal(tensors["pictures.nearest"], tensors["pictures.nsgf_plus_plus"])
    assert torch.equal(tensors["pictures.nearest"], to_pixels(to_images(train[:4], WHITE)))


# Inception


def test_without_weights_a_line_says_so_and_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(inception, "find_weights", lambda root: None)
    found = run(configuration(inception=True)).metrics
    assert found == run(configuration()).metrics
    line = capsys.readouterr().err
    assert line.startswith("FID and IS are not measured: found no") and line.count("\n") == 1


@pytest.mark.parametrize("reference", ["test", "train"])
def test_inception_is_given_bytes_of_three_sets_and_of_the_reference(monkeypatch, judged, reference):
    asked = {}

    def scores(sets, reference, weights, device):
        asked.update(sets, reference=reference)
        return {f"{name}.fid": 1.0 for name in sets}

    monkeypatch.setattr(inception, "find_weights", lambda root: Path("weights"))
    monkeypatch.setattr(inception, "scores", scores)
    found = run(configuration(reference=reference, inception=True)).metrics
    names = {"nsgf_plus_plus", "fm.4", "floor"}
    assert {name for name in found if name.endswith(".fid")} == {f"{name}.fid" for name in names}
    expected = {name: judged[name] for name in names}
    expected["reference"] = images.load("digits", reference, Path()).pixels
    for name, pixels in expected.items():
        assert asked[name].dtype == torch.uint8
        assert torch.equal(asked[name].double(), (pixels.double() * 255 / WHITE).round())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"handover_times": [0.671, 0.674]}, "hand-over times that differ by a percent or more"),
        ({"inception": True, "samples": 9}, "at least 10 samples for the splits of the Inception score"),
    ],
)
def test_a_protocol_that_cannot_be_carried_out_is_refused(changed, reason):
    with pytest.raises(BadInput, match=reason):
        configuration(**changed)
