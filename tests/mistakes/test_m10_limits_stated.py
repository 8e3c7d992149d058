"""m10: limits not stated.

The README says beside the commands what the code does not do, the command refuses a device that it cannot use instead of taking less, and a
run's record names the device that was used.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from proof import Proof

from repro import run, runtime
from repro.runtime import Runtime
from repro_tools import cli

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LIMITS = {
    "devices": r"single process on one device\. A second GPU sits idle",
    "precision": r"precision",
    "data sets": r"image experiments|MNIST",
    "platforms": r"Linux",
}
UNKNOWN_DEVICES = ["cuda:99", "gpu", "cuda:-1", ""]


@pytest.fixture(autouse=True)
def in_the_project(project, monkeypatch):
    """The method was imported: what a library prints on that occasion is no line of the command."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "imported_versions", dict)  # takes a second


def check_readme():
    """A section Limits that speaks of devices, precision, data sets and platforms."""
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^## Limits$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section Limits"
    missing = [topic for topic, words in LIMITS.items() if not re.search(words, " ".join(section[1].split()))]
    assert not missing, f"README.md, Limits: nothing about {', '.join(missing)}"


def check_command(capsys, tmp_path, devices=UNKNOWN_DEVICES):
    """A device that is not there ends the command with exit code 2 and one line; nothing is written."""
    for name in devices:
        code = cli.main(["run", "2d-moons", "--device", name, "--dry-run", "--runs", str(tmp_path / "runs")])
        told = capsys.readouterr()
        assert code == 2, f"--device '{name}': exit code {code} instead of 2, although there is no such device"
        lines = told.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"repro: --device: found '{name}', expected cpu"), told.err
        assert told.out == "" and not (tmp_path / "runs").exists()


def check_record(monkeypatch):
    """A record names the device the run was given: the processor, or the very GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU at {device}")
        found = {
            name: run.describe(ROOT, Runtime(torch.device(name)))["machine"]["device"]
            for name in ("cpu", "cuda:0", "cuda:1")
        }
    expected = {"cpu": "cpu", "cuda:0": "the GPU at cuda:0", "cuda:1": "the GPU at cuda:1"}
    assert found == expected, f"the record names {found}"


def readme(edit, monkeypatch, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(edit(README.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "README", copy)


def no_section(monkeypatch, tmp_path):
    readme(lambda text: text.replace("## Limits", "## Notes"), monkeypatch, tmp_path)


def second_gpu_not_mentioned(monkeypatch, tmp_path):
    readme(lambda text: text.replace("A second GPU sits idle", ""), monkeypatch, tmp_path)


def empty_section(monkeypatch, tmp_path):
    readme(lambda text: text.partition("## Limits")[0] + "## Limits\n", monkeypatch, tmp_path)


def another_order(monkeypatch, tmp_path):
    def reverse(text):
        before, limits = text.split("## Limits")
        return f"{before}## Limits\n- " + "\n- ".join(reversed(limits.split("\n- "))) + "\n\n## After\n"

    readme(reverse, monkeypatch, tmp_path)


def silent_fallback(monkeypatch):
    """What is not there becomes the CPU."""
    real = runtime.find_device

    def device(name, world):
        try:
            return real(name, world)
        except runtime.BadInput:
            return torch.device("cpu")

    monkeypatch.setattr(runtime, "find_device", device)


def first_gpu_named(monkeypatch):
    real = run.machine
    monkeypatch.setattr(
        run, "machine", lambda device: real(torch.device("cuda:0") if device.type == "cuda" else device)
    )


def device_not_named(monkeypatch):
    real = run.machine
    monkeypatch.setattr(run, "machine", lambda device: real(device) | {"device": "cpu"})


def refused_with_advice(monkeypatch):
    real = runtime.find_device

    def device(name, world):
        try:
            return real(name, world)
        except runtime.BadInput as error:
            raise runtime.BadInput(f"{error}; README.md, Limits, says what a run can use") from None

    monkeypatch.setattr(runtime, "find_device", device)


def measured_twice(monkeypatch):
    real = run.machine
    monkeypatch.setattr(run, "machine", lambda device: real(torch.device("cpu")) | real(device))


PROOFS = [
    Proof(
        check_readme,
        {
            no_section: "README.md has no section Limits",
            second_gpu_not_mentioned: "README.md, Limits: nothing about devices",
            empty_section: "README.md, Limits: nothing about devices, precision, data sets, platforms",
        },
        [another_order],
    ),
    Proof(
        check_command,
        {silent_fallback: "--device 'cuda:99': exit code 0 instead of 2, although there is no such device"},
        [refused_with_advice],
    ),
    Proof(
        check_record,
        dict.fromkeys([first_gpu_named, device_not_named], "the record names {'cpu': 'cpu', 'cuda:0': "),
        [measured_twice],
    ),
]


def test_proof(case):
    case()


@pytest.mark.parametrize("name", ["meta", "hpu"])
def test_devices_that_torch_knows_and_no_run_can_use(capsys, tmp_path, name):
    check_command(capsys, tmp_path, [name])


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "auto"])
def test_a_device_that_is_there(tmp_path, name):
    assert cli.main(["run", "2d-moons", "--device", name, "--dry-run", "--runs", str(tmp_path)]) == 0
