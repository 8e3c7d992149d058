"""Who imports whom: the engine neither the tools nor what only they need, the tools no method, and of the engine what is listed here."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE, TOOLS = ROOT / "templates/reproduction/repro", ROOT / "repro_tools"
OF_THE_ENGINE = {"repro", "torch", "numpy", "pydantic", "yaml", "safetensors", "tqdm"}

INTERFACE = """
repro
repro.__main__.EVERY
repro.__main__.add
repro.__main__.add_list
repro.__main__.add_run
repro.__main__.carried_out
repro.__main__.finished_line
repro.__main__.list_experiments
repro.__main__.names
repro.__main__.overrides
repro.__main__.planned
repro.__main__.positive
repro.__main__.prepared
repro.__main__.run_here
repro.__main__.seed
repro.checkpoint.__file__
repro.checkpoint.flush
repro.checkpoint.load
repro.checkpoint.move
repro.checkpoint.parameters
repro.checkpoint.require_finite
repro.checkpoint.save
repro.config.Change
repro.config.RunConfig
repro.config.Section
repro.config.differences
repro.config.digest
repro.config.flatten
repro.config.load
repro.config.matches
repro.config.parse_yaml
repro.config.read_yaml
repro.config.shaping
repro.config.validate
repro.errors.BadInput
repro.errors.EXIT_BAD_INPUT
repro.errors.EXIT_INTERRUPTED
repro.errors.EXIT_OK
repro.errors.EXIT_RUN_FAILED
repro.errors.EXIT_TERMINATED
repro.errors.RunFailed
repro.errors.Terminated
repro.errors.ending_at_once
repro.loop.Curve
repro.loop.FINISHED
repro.loop.Loop
repro.loop.MakeUpdate
repro.loop.RUNNING
repro.loop.load_networks
repro.method.Evaluation
repro.method.Files
repro.method.Method
repro.method.NoMethod
repro.method.Probe
repro.method.Project
repro.method.find_project
repro.phases.Networks
repro.phases.Phase
repro.phases.SingleLossPhase
repro.phases.SingleLossState
repro.phases.Work
repro.randomness.Draw
repro.randomness.generator
repro.randomness.seed_global_generators
repro.rounds.DISK_SHARE
repro.rounds.gib
repro.rounds.room
repro.run.CONFIG
repro.run.Plan
repro.run.RECORD
repro.run.SPEC
repro.run.TENSORS
repro.run.alone_in
repro.run.describe
repro.run.git_commit
repro.run.holds_run
repro.run.make_folder
repro.run.measure
repro.run.networks
repro.run.next_archive
repro.run.plan
repro.run.run_folder
repro.run.save_tensors
repro.run.versions
repro.run.write_record
repro.runtime.Runtime
repro.runtime.World
repro.runtime.arithmetic
repro.runtime.check_precision
repro.runtime.deterministic
repro.runtime.find_device
repro.runtime.machine
repro.runtime.progress
repro.runtime.say
repro.runtime.world_of_this_process
repro.split.Verdict
repro.split.split_test
repro.update.Update
repro.update.rows_of
"""
"""What the tools use of the engine. A name that goes or changes its meaning raises `repro.INTERFACE`."""


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, those of a module's attributes that it uses among them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield one.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for one in node.names:
                if node.module == "repro" and (ENGINE / f"{one.name}.py").is_file():
                    modules[one.asname or one.name] = f"repro.{one.name}"
                else:
                    yield f"{node.module}.{one.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield f"{modules[node.value.id]}.{node.attr}"


def of(folder: Path) -> set[str]:
    return {name for path in folder.rglob("*.py") for name in imported(path)}


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_the_engine_imports_what_a_run_needs_and_nothing_else():
    assert tops(of(ENGINE)) == OF_THE_ENGINE


def test_the_tools_import_no_method():
    libraries = {
        "torch",
        "pydantic",
        "safetensors",
        "scipy",
        "markdown",
        "nbformat",
        "packaging",
        "copier",
        "plumbum",
        "yaml",
    }
    assert tops(of(TOOLS)) == libraries | {"repro", "repro_tools"}


def test_what_the_tools_use_of_the_engine_is_listed():
    assert sorted(name for name in of(TOOLS) if name.partition(".")[0] == "repro") == INTERFACE.split()


def test_what_help_needs_imports_neither_pytorch_nor_the_engine():
    for name in ("__init__", "__main__", "cli", "project"):
        tree = ast.parse((TOOLS / f"{name}.py").read_text(encoding="utf-8"))
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert tops(top) <= {"repro_tools"}
