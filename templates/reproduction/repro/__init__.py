"""The engine: configurations, phases, pools, checkpoints, runs and their records.

It never imports a method. A method describes itself in one `repro.method.Method` object that the project's
`pyproject.toml` names, and `python -m repro` finds it from there. Nor does it import the tools
(`repro_tools`), which know the specification and judge what it records.
"""

INTERFACE = 2
"""Of what the tools import from here. It rises when something that they use changes its meaning or goes."""
