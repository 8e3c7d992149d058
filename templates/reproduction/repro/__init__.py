"""The reproduction kit: configuration, phases, pool, checkpoints, run records and verdicts.

It never imports a method. A method describes itself in one `repro.method.Method` object that the project's
`pyproject.toml` names, and the command `repro` finds it from there.
"""
