"""Errors that a user can act on, and the exit codes of the command line."""

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141
EXIT_TERMINATED = 143


class BadInput(Exception):
    """What was given cannot be used. Each line names the file, the key, what was found and what was expected."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunFailed(Exception):
    """A run started and could not go on, for instance because a loss stopped being finite."""


class Terminated(BaseException):
    """The process was asked to end (SIGTERM). Like KeyboardInterrupt no Exception, so that nothing swallows it."""
