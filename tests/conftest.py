"""What the folders of tests share: a toy project, how hypothesis draws, a faster look at what is installed, and image sets of a few images.

The sets lie in the files that torchvision reads. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings
from installed import read_once
from toy_project import CONFIG, SPEC, write_yaml

from nsgf.torchvision_cpu import import_torchvision

# The same cases everywhere, and no limit of time: a machine under load is slow, not wrong. A database would be a folder in the clone.
settings.register_profile(
    "any machine", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def what_is_installed_is_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_once(patch)
        yield


LONG = 10_000  # signs


@pytest.fixture(autouse=True, scope="session")
def long_texts_are_parsed_once() -> Iterator[None]:
    """Such as the spec of the reference implementation, which takes half a second each time."""
    load, known = yaml.load, {}

    def remembered(text, Loader):
        if not isinstance(text, str) or len(text) < LONG:
            return load(text, Loader)
        if (text, Loader) not in known:
            known[text, Loader] = load(text, Loader)
        return copy.deepcopy(known[text, Loader])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "load", remembered)
        yield


MNIST_COUNTS = {"train": 12, "t10k": 6}
CIFAR10_COUNTS = {**{f"data_batch_{number}": 3 for number in range(1, 6)}, "test_batch": 6}
CIFAR10_META = "batches.meta"


def write_mnist(root: Path) -> None:
    """Noise as MNIST's four files, each a header of sizes and then one byte a value."""
    stream = np.random.default_rng(0)
    for split, count in MNIST_COUNTS.items():
        write_idx(root / "MNIST/raw" / f"{split}-images-idx3-ubyte", stream.integers(0, 256, (count, 28, 28)))
        write_idx(root / "MNIST/raw" / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)


def write_idx(path: Path, values: np.ndarray) -> None:
    unsigned_bytes = 8
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, unsigned_bytes, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_cifar10(root: Path) -> dict[str, str]:
    """Noise as the seven pickles of CIFAR-10. Returns the MD5 sum of each file."""
    folder, stream = root / "cifar-10-batches-py", np.random.default_rng(1)
    contents: dict[str, dict] = {CIFAR10_META: {"label_names": [f"class {label}" for label in range(10)]}}
    for name, count in CIFAR10_COUNTS.items():
        pixels = stream.integers(0, 256, (count, 3 * 32 * 32)).astype(np.uint8)
        contents[name] = {"data": pixels, "labels": [label % 10 for label in range(count)]}
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}


@pytest.fixture(scope="session")
def written_image_sets(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    return root, write_cifar10(root)


@pytest.fixture
def image_sets(written_image_sets, monkeypatch) -> Path:
    """A data root with a few images of MNIST's and CIFAR-10's shapes.

    torchvision holds CIFAR-10's files against the MD5 sums of the real ones; here against those of these files.
    """
    root, sums = written_image_sets
    cifar10 = import_torchvision().datasets.CIFAR10
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(cifar10, files, [(name, sums[name]) for name, _ in getattr(cifar10, files)])
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": sums[CIFAR10_META]})
    return root


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The root of a toy project; the working directory is inside it."""
    root = tmp_path / "project"
    write_yaml(root / "configs" / "toy.yaml", CONFIG)
    write_yaml(root / "spec.yaml", SPEC)
    (root / "pyproject.toml").write_text('[tool.repro]\nmethod = "toy_method:METHOD"\n')
    monkeypatch.chdir(root)
    return root
