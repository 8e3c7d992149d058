"""NSGF and NSGF++ as the kit sees them."""

from nsgf.config import Config
from nsgf.evaluate import evaluate
from nsgf.figures import report_sections
from nsgf.phases import make_phases
from repro.method import Method

METHOD = Method("NSGF++", Config, make_phases, evaluate, report_sections)
