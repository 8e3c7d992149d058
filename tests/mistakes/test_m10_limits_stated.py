"""m10: limits not stated.

The README says beside the commands what the code does not do, the command refuses a device that it cannot use instead of taking less, and a
run's record names the device that was used.
"""

import re
from pathlib import Path

import pytest
import torch

from repro import arguments, cli, runinfo
from repro.runtime import Runtime

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LIMITS = {
    "devices": r"single process on one device\. A second GPU sits idle",
    "precision": r"precision",
    "data sets": r"image experiments|MNIST",
    "platforms": r"Linux",
}
UNKNOWN_DEVICES = ["cuda:99", "gpu", "cuda:-1", ""]


def check_readme(text):
    """A section Limits that speaks of devices, precision, data sets and platforms."""
    section = re.search(r"^## Limits$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section Limits"
    missing = [topic for topic, words in LIMITS.items() if not re.search(words, " ".join(section[1].split()))]
    assert not missing, f"README.md, Limits: nothing about {', '.join(missing)}"


def check_command(capsys, folder, devices=UNKNOWN_DEVICES):
    """A device that is not there ends the command with exit code 2 and one line; nothing is written."""
    for name in devices:
        code = cli.main(["run", "2d-moons", "--device", name, "--dry-run", "--runs", str(folder / "runs")])
        told = capsys.readouterr()
        assert code == 2, f"--device '{name}': exit code {code} instead of 2, although there is no such device"
        lines = told.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"repro: --device: found '{name}', expected cpu"), told.err
        assert told.out == "" and not (folder / "runs").exists()


def check_record(monkeypatch):
    """A record names the device the run was given: the processor, or the very GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU at {device}")
        found = {
            name: runinfo.describe(ROOT, Runtime(torch.device(name)))["machine"]["device"]
            for name in ("cpu", "cuda:0", "cuda:1")
        }
    expected = {"cpu": "cpu", "cuda:0": "the GPU at cuda:0", "cuda:1": "the GPU at cuda:1"}
    assert found == expected, f"the record names {found}"


def plant_silent_fallback(monkeypatch):
    """What is not there becomes the CPU."""
    real = arguments.device

    def device(name, world):
        try:
            return real(name, world)
        except arguments.BadInput:
            return torch.device("cpu")

    monkeypatch.setattr(arguments, "device", device)


def plant_first_gpu_named(monkeypatch):
    real = runinfo.machine
    monkeypatch.setattr(
        runinfo, "machine", lambda device: real(torch.device("cuda:0") if device.type == "cuda" else device)
    )


def plant_device_not_named(monkeypatch):
    real = runinfo.machine
    monkeypatch.setattr(runinfo, "machine", lambda device: real(device) | {"device": "cpu"})


innocent = ["cpu", "cpu:0", "auto"]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_holds_for_the_readme():
    check_readme(README.read_text(encoding="utf-8"))


def test_holds_for_the_command(capsys, tmp_path):
    check_command(capsys, tmp_path)


def test_holds_for_the_record(monkeypatch):
    check_record(monkeypatch)


@pytest.mark.parametrize(
    "name",
    [
        "meta",
        "hpu",
    ],
)
def test_holds_for_devices_that_torch_knows_and_no_run_can_use(capsys, tmp_path, name):
    check_command(capsys, tmp_path, [name])


@pytest.mark.parametrize("name", innocent)
def test_silent_on_a_device_that_is_there(tmp_path, name):
    assert cli.main(["run", "2d-moons", "--device", name, "--dry-run", "--runs", str(tmp_path)]) == 0


def test_silent_on_a_readme_in_another_order():
    text = README.read_text(encoding="utf-8")
    before, limits = text.split("## Limits")
    items = limits.split("\n- ")
    check_readme(f"{before}## Limits\n- " + "\n- ".join(reversed(items)) + "\n\n## After\n")


def test_catches_a_readme_without_limits():
    text = README.read_text(encoding="utf-8")
    for without, reason in (
        (text.replace("## Limits", "## Notes"), "README.md has no section Limits"),
        (text.replace("A second GPU sits idle", ""), "README.md, Limits: nothing about devices"),
        (
            text.partition("## Limits")[0] + "## Limits\n",
            "README.md, Limits: nothing about devices, precision, data sets, platforms",
        ),
    ):
        with pytest.raises(AssertionError, match=re.escape(reason)):
            check_readme(without)


def test_catches_a_silent_fallback(proof, capsys, tmp_path):
    reason = "--device 'cuda:99': exit code 0 instead of 2, although there is no such device"
    proof.caught(lambda: check_command(capsys, tmp_path), plant_silent_fallback, reason)


@pytest.mark.parametrize("plant", [plant_first_gpu_named, plant_device_not_named])
def test_catches_a_record_of_another_device(proof, monkeypatch, plant):
    proof.caught(lambda: check_record(monkeypatch), plant, "the record names {'cpu': 'cpu', 'cuda:0': ")
