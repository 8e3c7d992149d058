"""torchvision beside a CPU build of torch. What is imported once stays imported, so real imports run in a fresh interpreter."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from forked import LONGEST_S

from nsgf import torchvision_cpu
from nsgf.torchvision_cpu import import_torchvision

REAL = """
import json, sys
from importlib.util import find_spec
from pathlib import Path

sys.dont_write_bytecode = True
folder = Path(find_spec("torchvision").origin).parent

def files():
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))

before, found = files(), {}
try:
    import torchvision
    found["plain import"] = "works"
except RuntimeError as error:
    found["plain import"] = str(error)

import torch
from nsgf.torchvision_cpu import import_torchvision
declared = []
define = torch.library.define
torch.library.define = lambda *arguments: (declared.append(arguments[0]), define(*arguments))
first = import_torchvision()
found["declared at first"] = list(declared)
second = import_torchvision()
import torchvision
found["declared in all"] = declared
found["one module"] = first is second is torchvision is sys.modules["torchvision"]
found["parts"] = [first.datasets.MNIST.__name__, first.transforms.PILToTensor.__name__]
try:
    kept = torch.ops.torchvision.nms(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), 0.5)
    found["nms"] = kept.tolist()
except NotImplementedError:
    found["nms"] = "not implemented"
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
found["torch-fidelity"] = FeatureExtractorInceptionV3.__name__
found["files untouched"] = files() == before
print(json.dumps(found))
"""


def run_python(code, folder=None):
    """A fresh interpreter; `folder` comes first on its path."""
    path = f"import sys; sys.path.insert(0, {str(folder)!r})\n" if folder else ""
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=LONGEST_S)


@pytest.fixture(scope="module")
def real():
    """What a fresh interpreter found with the installed torchvision, after a plain import that may have failed."""
    done = run_python(REAL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_works_twice_also_after_a_plain_import_that_failed(real):
    assert real["one module"] and real["parts"] == ["MNIST", "PILToTensor"]


def test_operators_are_declared_once_and_only_where_the_plain_import_fails(real):
    """A build for a CPU fails at nms and knows no better; a build for CUDA declares its own operators."""
    fails = real["plain import"] == "operator torchvision::nms does not exist"
    assert fails or real["plain import"] == "works"
    assert real["declared at first"] == (["torchvision::nms", "torchvision::qnms"] if fails else [])
    assert real["declared in all"] == real["declared at first"]


def test_a_declared_operator_is_no_implementation(real):
    assert real["nms"] == ("not implemented" if real["declared at first"] else [0])


def test_torch_fidelity_can_be_imported_afterwards(real):
    assert real["torch-fidelity"] == "FeatureExtractorInceptionV3"


def test_no_file_of_torchvision_is_touched(real):
    assert real["files untouched"]


def write_torchvision(folder: Path, *operators: str) -> None:
    """A package that registers shape rules as torchvision does, for operators that nothing has declared."""
    package = folder / "torchvision"
    package.mkdir()
    rules = [f'register_fake("torchvision::{name}")(lambda dets, scores, iou_threshold: dets)' for name in operators]
    lines = ["from torchvision import extension", "from torch.library import register_fake", *rules]
    (package / "__init__.py").write_text("\n".join(lines))
    (package / "extension.py").write_text("")


IMPORT = """
import sys
from nsgf.torchvision_cpu import import_torchvision
print(import_torchvision().__file__)
"""


def test_the_two_operators_that_it_declares_are_enough_for_shape_rules(tmp_path):
    write_torchvision(tmp_path, "nms", "qnms")
    done = run_python(IMPORT, tmp_path)
    assert done.stdout.strip() == str(tmp_path / "torchvision/__init__.py"), done.stderr


def test_a_third_missing_operator_is_not_swallowed(tmp_path):
    write_torchvision(tmp_path, "nms", "qnms", "roi_align")
    done = run_python(IMPORT, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("RuntimeError: operator torchvision::roi_align does not exist")


@pytest.fixture
def declared(monkeypatch):
    names = []
    monkeypatch.setattr(torch.library, "define", lambda name, *_: names.append(name))
    return names


def test_a_torchvision_that_is_there_already_is_given_as_it_is(monkeypatch, declared):
    there = types.ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", there)
    assert import_torchvision() is there and declared == []


@pytest.mark.parametrize("error", [RuntimeError("undefined symbol"), ImportError("no module named torchvision")])
def test_another_failure_is_raised_and_nothing_is_declared(monkeypatch, declared, error):
    def fail(name):
        raise error

    monkeypatch.setattr(torchvision_cpu.importlib, "import_module", fail)
    with pytest.raises(type(error), match=str(error)):
        import_torchvision()
    assert declared == []


def test_what_a_failed_import_left_behind_is_not_used_again(monkeypatch, declared):
    """Submodules of a failed import stay in sys.modules and would be taken for ready."""
    outcomes = [RuntimeError("operator torchvision::nms does not exist"), types.ModuleType("torchvision")]
    seen = []

    def import_module(name):
        seen.append("torchvision.half_done" in sys.modules)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)  # put back afterwards
    monkeypatch.setitem(sys.modules, "torchvision.half_done", types.ModuleType("torchvision.half_done"))
    monkeypatch.setitem(sys.modules, "torchvision_of_another_name", types.ModuleType("other"))
    monkeypatch.setattr(importlib, "import_module", import_module)
    import_torchvision()
    assert seen == [True, False] and "torchvision_of_another_name" in sys.modules
