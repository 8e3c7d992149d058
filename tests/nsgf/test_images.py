import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from nsgf import images
from nsgf.images import ImageSet, load, require, to_images, to_pixels
from nsgf.laws import ImageLaws
from repro.errors import BadInput

NOWHERE = Path("no/such/folder")
DATA_ROOT = Path(os.environ.get("NSGF_DATA_ROOT", "data"))
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n, size=2, white=255):
    """n images, each of one value, its index; labels are the index as well."""
    values = torch.arange(n, dtype=torch.uint8)
    return ImageSet(values.view(-1, 1, 1, 1).expand(n, 1, size, size).contiguous(), torch.arange(n), white)


# Pixels and floats


@pytest.mark.parametrize("white", [16, 255])
def test_pixels_survive_the_way_to_floats_and_back(white):
    pixels = torch.arange(white + 1, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_images(pixels, white), white), pixels)


@pytest.mark.parametrize("white", [16, 255])
def test_black_is_minus_one_and_white_is_one(white):
    x = to_images(torch.tensor([0, white], dtype=torch.uint8), white)
    assert x.tolist() == [-1.0, 1.0] and x.dtype == torch.float32


def test_what_lies_outside_is_clipped_and_never_wraps_around():
    assert to_pixels(torch.tensor([-3.0, -1.001, 1.001, 3.0])).tolist() == [0, 0, 255, 255]


def test_a_float_becomes_the_nearest_pixel():
    """Of truncation, 0.999 of a pixel would be none."""
    x = to_images(torch.tensor([100], dtype=torch.uint8), 255)
    assert to_pixels(x + 0.9 / 255).tolist() == [100] and to_pixels(x + 1.1 / 255).tolist() == [101]


# Draws


def test_a_draw_has_the_size_that_was_asked_for_also_after_another():
    """A phase that asks for another batch size gets that batch size."""
    stored, laws = numbered(10), ImageLaws("digits", flip=False, data_root=NOWHERE)
    for n in (4, 25, 1, 4):
        x, label = stored.draw(n, stream(), flip=False)
        assert len(x) == len(label) == n
        x_0, y = laws.draw(n, stream())
        assert x_0.shape == y.shape == (n, 1, 8, 8)


def test_a_draw_is_a_function_of_the_generator_alone():
    stored = load("digits", "test", NOWHERE)
    torch.manual_seed(1)
    first, _ = stored.draw(50, stream(1), flip=True)
    stored.draw(7, stream(2), flip=False)
    torch.manual_seed(2)
    assert torch.equal(stored.draw(50, stream(1), flip=True)[0], first)
    assert not torch.equal(stored.draw(50, stream(3), flip=True)[0], first)


def test_draws_are_uniform_with_replacement():
    """10,000 draws of 10 images: each count is binomial around 1,000 with standard deviation 30; 150 is five of them."""
    _, label = numbered(10).draw(10_000, stream(), flip=False)
    counts = Counter(label.tolist())
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_a_label_belongs_to_its_image():
    x, label = numbered(200).draw(500, stream(), flip=True)
    assert torch.equal(to_pixels(x)[:, 0, 0, 0].long(), label)


def test_flipping_mirrors_about_half_of_the_images_left_to_right_and_whole():
    """5,000 draws of one image: the number of mirrored ones has standard deviation 35."""
    picture = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    x, _ = ImageSet(picture[None, None], torch.zeros(1, dtype=torch.long), 255).draw(5_000, stream(), flip=True)
    kinds = Counter(tuple(image.flatten().tolist()) for image in to_pixels(x))
    assert set(kinds) == {(0, 1, 2, 3), (1, 0, 3, 2)}
    assert abs(kinds[1, 0, 3, 2] - 2_500) < 175


def test_flipping_does_not_change_which_images_are_drawn():
    stored = numbered(50)
    assert torch.equal(stored.draw(100, stream(), flip=True)[1], stored.draw(100, stream(), flip=False)[1])


def test_without_flipping_nothing_is_mirrored():
    picture = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    x, _ = ImageSet(picture[None, None], torch.zeros(1, dtype=torch.long), 255).draw(100, stream(), flip=False)
    assert (to_pixels(x) == picture).all()


def test_the_source_of_the_laws_is_standard_normal_noise_independent_of_the_image():
    x_0, y = ImageLaws("digits", flip=False, data_root=NOWHERE).draw(2_000, stream())
    assert float(x_0.mean()) == pytest.approx(0, abs=0.02) and float(x_0.std()) == pytest.approx(1, abs=0.02)
    centred = y - y.mean(0)
    assert abs(float((x_0 * centred).mean())) < 0.02


def test_the_laws_draw_training_images_only():
    train = {image.numpy().tobytes() for image in load("digits", "train", NOWHERE).pixels}
    _, y = ImageLaws("digits", flip=False, data_root=NOWHERE).draw(500, stream())
    assert all(image.numpy().tobytes() in train for image in to_pixels(y, white=16))


# Digits


def test_the_digits_are_split_into_1497_and_300():
    train, test = load("digits", "train", NOWHERE), load("digits", "test", NOWHERE)
    assert train.pixels.shape == (1497, 1, 8, 8) and test.pixels.shape == (300, 1, 8, 8)
    assert len(train.labels) == 1497 and len(test.labels) == 300


def test_every_digit_is_in_one_split_and_in_no_other():
    splits = [load("digits", split, NOWHERE) for split in ("train", "test")]
    found = Counter(image.numpy().tobytes() for one in splits for image in one.pixels)
    assert found == Counter(image.astype(np.uint8).tobytes() for image in load_digits().images)
    assert not {*map(bytes, splits[0].pixels.numpy())} & {*map(bytes, splits[1].pixels.numpy())}


def test_digits_keep_their_labels():
    stored, bunch = load("digits", "test", NOWHERE), load_digits()
    assert stored.labels.tolist() == bunch.target[::6].tolist() and stored.labels.dtype == torch.int64
    assert torch.equal(stored.pixels[:, 0].double(), torch.from_numpy(bunch.images[::6]))


def test_digits_use_their_whole_range():
    x = load("digits", "train", NOWHERE).images()
    assert (float(x.min()), float(x.max()), x.dtype) == (-1.0, 1.0, torch.float32)


def test_every_class_of_digits_is_in_both_splits():
    assert all(set(load("digits", split, NOWHERE).labels.tolist()) == set(range(10)) for split in ("train", "test"))


# Sets on disk, of a few images


@pytest.fixture
def jpeg_folder(tmp_path):
    """cifar10-jpeg/split/class/*.jpg: in every class two images for training and one for testing, of the class' own grey."""
    for split, count in (("train", 2), ("test", 1)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "cifar10-jpeg" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (20 * number + index,) * 3).save(folder / f"{index:04}.jpg")
    return tmp_path


@pytest.mark.parametrize("name, shape, counts", [("mnist", (1, 28, 28), (12, 6)), ("cifar10", (3, 32, 32), (15, 6))])
def test_a_set_on_disk_has_its_shape_and_its_splits(image_sets, name, shape, counts):
    splits = [load(name, split, image_sets) for split in ("train", "test")]
    assert [tuple(one.pixels.shape) for one in splits] == [(count, *shape) for count in counts]
    assert all(one.pixels.dtype == torch.uint8 and one.labels.dtype == torch.int64 for one in splits)
    assert images.SOURCES[name].shape == shape


def test_mnist_is_read_byte_by_byte(image_sets):
    stored = (image_sets / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert load("mnist", "test", image_sets).pixels.numpy().tobytes() == stored


def test_cifar10_keeps_its_planes_of_red_green_and_blue(image_sets):
    """A row of CIFAR-10's files is 1,024 red values, then green, then blue, row by row."""
    stored = pickle.loads((image_sets / "cifar-10-batches-py/test_batch").read_bytes())
    found = load("cifar10", "test", image_sets)
    assert torch.equal(found.pixels.flatten(1), torch.from_numpy(stored["data"]))
    assert found.labels.tolist() == stored["labels"]


def test_the_lossy_copy_of_cifar10_is_read_by_its_folders(jpeg_folder):
    train, test = (load("cifar10_jpeg", split, jpeg_folder) for split in ("train", "test"))
    assert train.pixels.shape == (20, 3, 32, 32) and test.pixels.shape == (10, 3, 32, 32)
    assert test.labels.tolist() == list(range(10)) and train.labels.tolist() == [k for k in range(10) for _ in "01"]
    assert (test.pixels.float().mean((1, 2, 3)) - 20 * torch.arange(10)).abs().max() <= 2  # what JPEG loses


# What is not there or damaged


@pytest.mark.parametrize(
    "name, first", [("mnist", "MNIST"), ("cifar10", "cifar-10-batches-py"), ("cifar10_jpeg", "cifar10-jpeg")]
)
def test_a_folder_that_is_not_there_is_named_in_one_line(tmp_path, name, first):
    with pytest.raises(BadInput) as refusal:
        load(name, "train", tmp_path)
    assert str(refusal.value).startswith(f"--data-root: found no {tmp_path / first}")
    assert str(refusal.value).endswith(f", expected the data set {name} there")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name, file", [("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"), ("cifar10", "cifar-10-batches-py/test_batch")]
)
def test_a_missing_file_of_the_other_split_is_found_before_any_training(image_sets, tmp_path, name, file):
    """The test split is read when training is over, which is too late to say that it is not there."""
    shutil.copytree(image_sets, tmp_path / "data")
    (tmp_path / "data" / file).unlink()
    with pytest.raises(BadInput, match=re.escape(f"found no {tmp_path}/data/{file}")):
        ImageLaws(name, flip=False, data_root=tmp_path / "data").check()


def test_digits_need_no_file():
    require("digits", NOWHERE)


@pytest.mark.parametrize(
    "name, file, damage",
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", lambda content: content[:-1]),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", lambda content: content + b"0"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", lambda content: b""),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", lambda content: b"\0\0\x0a" + content[3:]),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", lambda content: b"<html>no such file</html>"),
        ("cifar10", "cifar-10-batches-py/data_batch_3", lambda content: content[:-1]),
        ("cifar10", "cifar-10-batches-py/batches.meta", lambda content: b"I1\n."),
    ],
    ids=["cut", "longer", "empty", "another type", "a web page", "a batch cut", "other names"],
)
def test_a_damaged_file_is_said_in_one_line(image_sets, tmp_path, name, file, damage):
    root = tmp_path / "data"
    shutil.copytree(image_sets, root)
    (root / file).write_bytes(damage((root / file).read_bytes()))
    with pytest.raises(BadInput) as refusal:
        load(name, "train", root)
    message = str(refusal.value)
    assert message.startswith(f"--data-root: {root}: found {name} damaged (")
    assert message.endswith("), expected a readable train split")
    assert "\n" not in message and "download" not in message


class Trace:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_of_cifar10_with_another_sum_are_never_opened(image_sets, tmp_path):
    """A pickle can run any code."""
    root, trace = tmp_path / "data", tmp_path / "opened"
    shutil.copytree(image_sets, root)
    (root / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Trace(trace)))
    with pytest.raises(BadInput):
        load("cifar10", "train", root)
    assert not trace.exists()


def test_labels_of_another_number_are_refused(image_sets, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(image_sets, root)
    raw = root / "MNIST/raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    with pytest.raises(BadInput, match=r"found 12 images \(1, 28, 28\) and 6 labels, expected as many of both"):
        load("mnist", "train", root)


def test_images_of_another_size_are_refused(jpeg_folder):
    for path in (jpeg_folder / "cifar10-jpeg/test").rglob("*.jpg"):
        Image.new("RGB", (28, 28)).save(path)
    with pytest.raises(BadInput, match=r"found 10 images \(3, 28, 28\) .* images \(3, 32, 32\) in the test split"):
        load("cifar10_jpeg", "test", jpeg_folder)


def test_a_damaged_picture_is_said_in_one_line(jpeg_folder):
    path = jpeg_folder / "cifar10-jpeg/train/cat/0001.jpg"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="found cifar10_jpeg damaged"):
        load("cifar10_jpeg", "train", jpeg_folder)


def test_a_class_without_a_folder_is_refused(jpeg_folder):
    """The labels of all later classes would move by one, in this split only."""
    shutil.rmtree(jpeg_folder / "cifar10-jpeg/test/bird")
    with pytest.raises(BadInput, match="9 folders of classes instead of 10"):
        load("cifar10_jpeg", "test", jpeg_folder)


# The real files, where they are


@pytest.mark.skipif(
    not (DATA_ROOT / "MNIST/raw").is_dir(), reason=f"no MNIST in {DATA_ROOT}; NSGF_DATA_ROOT names another folder"
)
def test_the_real_mnist_has_70_000_images_of_ten_classes():
    train, test = load("mnist", "train", DATA_ROOT), load("mnist", "test", DATA_ROOT)
    assert train.pixels.shape == (60_000, 1, 28, 28) and test.pixels.shape == (10_000, 1, 28, 28)
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(train.pixels.float().mean() / 255) == pytest.approx(0.1307, abs=5e-5)


@pytest.mark.skipif(
    not (DATA_ROOT / "cifar-10-batches-py").is_dir(),
    reason=f"no CIFAR-10 in {DATA_ROOT}; NSGF_DATA_ROOT names another folder",
)
def test_the_real_cifar10_has_60_000_images_of_ten_classes():
    train, test = load("cifar10", "train", DATA_ROOT), load("cifar10", "test", DATA_ROOT)
    assert train.pixels.shape == (50_000, 3, 32, 32) and test.pixels.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10 and train.labels.bincount().tolist() == [5000] * 10
    assert (train.pixels.float().mean((0, 2, 3)) / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
