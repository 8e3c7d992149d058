"""torchvision beside a CPU build of torch.

The wheels of torchvision on PyPI are built against a CUDA build of torch. Beside a CPU build their compiled part cannot be
loaded, and `import torchvision` ends in "RuntimeError: operator torchvision::nms does not exist": it registers shape rules
for two detection operators (nms, then qnms) which the compiled part would have declared. Data sets and transforms need
neither. Declaring the two, without an implementation, is enough; to call one remains an error.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

OPERATORS = ("nms", "qnms")


def import_torchvision() -> ModuleType:
    """The module torchvision with its submodules `datasets` and `transforms`. Raises ImportError where it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    for operator in OPERATORS:
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
