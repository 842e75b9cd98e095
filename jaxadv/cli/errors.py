"""What can go wrong at the command line, as exceptions that end in one paragraph and an exit code.

What lives here: the two exceptions and the exit codes. What does not: their display (`__init__.py`).
"""

OK, FLAGGED, USAGE, INTERNAL, LOST, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""Exit codes: fine; a red flag of severity error (the report is written); bad usage or input; a bug of ours; another
process of the run was lost; Ctrl-C."""


class UsageError(Exception):
    """An argument or an input that cannot be used; the message says what must hold, what was got, and the fix."""


class Stopped(Exception):
    """The user interrupted, or the scheduler did; the message says what was saved and how to go on."""

    def __init__(self, message: str, code: int = INTERRUPTED):
        super().__init__(message)
        self.code = code
