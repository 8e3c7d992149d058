"""`repro list`: the experiments and their phases, as `python -m repro list` has them."""

from repro.__main__ import add_list as add_arguments
from repro.__main__ import list_experiments as command

__all__ = ["add_arguments", "command"]
