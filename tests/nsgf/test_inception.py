"""FID and Inception score through torch-fidelity, offline: a network of random weights at a small input size.

What the real weights give is torch-fidelity's business; here is tested that its network, its statistics and its two scores
are put together right.
"""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nsgf import inception
from nsgf.metrics import frechet_distance
from nsgf.torchvision_cpu import import_torchvision
from repro.errors import BadInput

import_torchvision()

from torch_fidelity import feature_extractor_inceptionv3 as extractor  # noqa: E402
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402

CPU = torch.device("cpu")


class Trace:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pictures(n, seed, channels=3, size=8):
    """Noise around the grey of `seed`, so that two seeds are two laws."""
    noise = torch.randint(0, 60, (n, channels, size, size), generator=torch.Generator().manual_seed(seed))
    return (noise + 60 * seed).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file of weights for the network, random, and the SHA-256 of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = extractor.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # torch's own initialisation would lose the signal over 90 layers
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.normal_(network.fc.weight, std=0.5)
    path = tmp_path_factory.mktemp("weights") / inception.WEIGHTS
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def weights(random_weights, monkeypatch):
    """The file, whose hash now is the expected one; 192 features instead of 2,048, whose covariances take seconds."""
    path, sha256 = random_weights
    monkeypatch.setattr(inception, "SHA256", sha256)
    monkeypatch.setattr(inception, "FEATURES", "192")
    monkeypatch.setattr(extractor.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    return path


@pytest.fixture(scope="module")
def loaded(random_weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "SHA256", random_weights[1])
        patch.setattr(inception, "FEATURES", "192")
        return inception.load_network(random_weights[0])


@pytest.fixture
def network(loaded, weights, monkeypatch):
    """Loaded once for the tests that are about numbers; `weights` makes its input small."""
    monkeypatch.setattr(inception, "load_network", lambda weights: loaded)
    return loaded


# The scores


def test_a_set_has_no_distance_to_itself_and_two_sets_have_one(weights):
    same, other = pictures(12, seed=1), pictures(12, seed=2)
    found = inception.scores({"same": same, "other": other}, same, weights, CPU)
    assert set(found) == {"same.fid", "same.inception_score", "other.fid", "other.inception_score"}
    assert abs(found["same.fid"]) < 1e-3 * found["other.fid"]


def test_fid_is_our_frechet_distance_of_the_same_features(weights, network):
    """Two computations of one number: eigenvalues of S S' there, of a symmetric matrix here. With 12 images the covariances
    of 192 features are singular, which costs digits."""
    x, y = pictures(12, seed=1), pictures(12, seed=2)
    found = inception.scores({"x": x}, y, weights, CPU)["x.fid"]
    features = [inception.look(network, pixels, CPU, 64)[0] for pixels in (x, y)]
    assert found == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert found > 1e-3


def test_torch_fidelity_and_we_agree_where_covariances_are_regular():
    x, y = (torch.randn(200, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    y = 2 * y + 0.3
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    assert theirs["frechet_inception_distance"] == pytest.approx(frechet_distance(x, y), rel=1e-5)


def test_the_reference_is_looked_at_once_for_all_sets(weights, network, monkeypatch):
    looked, real = [], inception.look
    monkeypatch.setattr(
        inception, "look", lambda network, x, *rest: (looked.append(len(x)), real(network, x, *rest))[1]
    )
    inception.scores({"a": pictures(10, 1), "b": pictures(11, 2)}, pictures(12, 3), weights, CPU)
    assert looked == [12, 10, 11]


def test_the_inception_score_is_the_mean_over_ten_splits_of_a_fixed_permutation(weights, network):
    """exp of the mean KL divergence of p(class | image) from their mean, by the definition of Salimans et al. 2016."""
    x = pictures(40, seed=1)
    x[::2] = pictures(20, seed=3)  # images of one kind would score 1
    found = inception.scores({"x": x}, pictures(10, 2), weights, CPU)["x.inception_score"]
    p = inception.look(network, x, CPU, 64)[1].double().softmax(1)[np.random.RandomState(2020).permutation(40)]
    splits = [(part * (part.log() - part.mean(0).log())).sum(1).mean().exp() for part in p.split(4)]
    assert len(splits) == 10
    assert found == pytest.approx(float(torch.stack(splits).mean()), rel=1e-6) and found > 1.01


def test_scores_are_the_same_numbers_again(weights, network):
    x, y = pictures(12, seed=1), pictures(12, seed=2)
    assert inception.scores({"x": x}, y, weights, CPU) == inception.scores({"x": x}, y, weights, CPU)


# The network


def test_features_do_not_depend_on_how_many_images_go_at_a_time(network):
    x = pictures(7, seed=1)
    whole, parts = inception.look(network, x, CPU, 64), inception.look(network, x, CPU, 3)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_a_grey_image_is_looked_at_as_three_equal_channels(network):
    grey = pictures(3, seed=1, channels=1)
    one, three = (inception.look(network, x, CPU, 64) for x in (grey, grey.repeat(1, 3, 1, 1)))
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


def test_class_scores_leave_out_the_bias(network, monkeypatch):
    """As torch-fidelity's IS does, and TensorFlow's before it."""
    x = pictures(2, seed=1)
    before = inception.look(network, x, CPU, 64)[1]
    monkeypatch.setattr(network.fc.bias, "data", network.fc.bias + torch.arange(1008.0))
    assert torch.equal(inception.look(network, x, CPU, 64)[1], before)


def test_the_three_channels_are_told_apart(network):
    x = pictures(3, seed=1)
    assert not torch.allclose(inception.look(network, x, CPU, 64)[0], inception.look(network, x.flip(1), CPU, 64)[0])


def test_the_protocol_is_that_of_the_published_numbers():
    assert (inception.FEATURES, inception.INCEPTION_SPLITS, inception.SPLIT_SEED) == ("2048", 10, 2020)
    assert extractor.URL_INCEPTION_V3 == inception.URL and inception.SHA256.startswith("6726825d")
    assert extractor.FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE == 299
    layer = extractor.FeatureExtractorInceptionV3.get_default_feature_layer_for_metric
    assert (layer("fid"), layer("isc")) == (inception.FEATURES, "logits_unbiased")


def test_the_network_is_fixed_and_in_eval_mode(network):
    assert not network.training and not any(p.requires_grad for p in network.parameters())


# The weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    return tmp_path / "hub/checkpoints"


@pytest.fixture
def content(monkeypatch):
    """Bytes that have the expected hash, and are no weights."""
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(b"right").hexdigest())
    return b"right"


def test_weights_are_found_in_the_data_root_first_and_then_with_torch_hub(hub, tmp_path, content):
    assert inception.find_weights(tmp_path / "data") is None
    (hub / inception.WEIGHTS).write_bytes(content)
    assert inception.find_weights(tmp_path / "data") == hub / inception.WEIGHTS
    (tmp_path / "data" / inception.WEIGHTS).write_bytes(content)
    assert inception.find_weights(tmp_path / "data") == tmp_path / "data" / inception.WEIGHTS


def test_a_file_of_the_right_name_with_other_bytes_is_passed_over(hub, tmp_path, content):
    (tmp_path / "data" / inception.WEIGHTS).write_bytes(content + b"!")
    assert inception.find_weights(tmp_path / "data") is None
    (hub / inception.WEIGHTS).write_bytes(content)
    assert inception.find_weights(tmp_path / "data") == hub / inception.WEIGHTS


def test_missing_weights_are_said_in_one_line_with_places_and_address(hub, tmp_path):
    line = inception.missing(tmp_path / "data")
    assert line == (
        f"found no {inception.WEIGHTS}, expected SHA-256 6726825d... in {tmp_path / 'data'} or {hub}; "
        "it is at https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"
    )


def test_damaged_weights_are_named(hub, tmp_path):
    path = tmp_path / "data" / inception.WEIGHTS
    path.write_bytes(b"half a download")
    assert inception.missing(tmp_path / "data").startswith(f"found {path} with another SHA-256, expected")


def test_bytes_with_another_hash_are_never_opened(tmp_path):
    """The file is a pickle that would leave a trace."""
    trace, path = tmp_path / "opened", tmp_path / inception.WEIGHTS
    path.write_bytes(pickle.dumps(Trace(trace)))
    with pytest.raises(BadInput, match=r"found SHA-256 .{8}\.\.\., expected 6726825d"):
        inception.scores({"x": pictures(2, 1)}, pictures(2, 2), path, CPU)
    assert not trace.exists()


def test_what_is_opened_are_the_bytes_that_were_checked(weights, monkeypatch, tmp_path):
    """A file that is exchanged between check and opening changes nothing."""
    path = tmp_path / inception.WEIGHTS
    path.write_bytes(weights.read_bytes())
    opened, real = [], torch.load
    monkeypatch.setattr(inception, "_sha256", lambda content: (path.write_bytes(b"other"), inception.SHA256)[1])
    monkeypatch.setattr(torch, "load", lambda source, **options: (opened.append(source), real(source, **options))[1])
    inception.load_network(path)
    assert path.read_bytes() == b"other" and len(opened) == 1


def test_nothing_is_downloaded(weights, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.setattr(extractor, "load_state_dict_from_url", fail)
    inception.load_network(weights)
