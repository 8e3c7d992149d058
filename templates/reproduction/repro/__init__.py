"""The engine: configurations, phases, rounds, checkpoints, runs and their records.

To read it: `phases` is what a method writes, `update` what a step of it can do, `loop` trains a phase, `run`
a whole experiment, `split` tries whether a step may be divided, `method` finds the project, `__main__` is the
command. Beneath lie `checkpoint` (what training changes, and its file), `rounds`, `randomness`, `config`,
`runtime` (device, processes) and `errors`.

It never imports a method: a method describes itself in one `repro.method.Method` that the project's
pyproject.toml names. Nor does it import the tools (`repro_tools`), which know the specification and judge
what it records.
"""

INTERFACE = 2
"""Of what the tools import from here. It rises when something that they use changes its meaning or goes."""
