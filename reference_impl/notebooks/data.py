# ruff: noqa: F821 (a cell of the notebooks beside it: DATA, EXPERIMENT, PATHS and sys are theirs)
import subprocess
import urllib.request

sets = {"mnist": "MNIST", "mnist-reduced": "MNIST", "cifar10": "CIFAR10"}
download = f"""
import sys
sys.path[:0] = {[str(path) for path in PATHS]}
from nsgf.torchvision_cpu import import_torchvision
import_torchvision().datasets.{sets[EXPERIMENT]}({str(DATA)!r}, download=True)
"""
subprocess.run([sys.executable, "-c", download], check=True)
# For FID and the Inception score. Their SHA-256 is checked before they are opened.
weights = "weights-inception-2015-12-05-6726825d.pth"
if not (DATA / weights).exists():
    release = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    urllib.request.urlretrieve(release + weights, DATA / weights)
