"""What ends a run other than a bug: a mistake of the user's, a failure of the machine, a request to stop."""

import re

PREEMPTED = 75  # the exit status of a run that saved and stopped when it was told to; sysexits.h: try again later
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended

# control characters, line and paragraph separators, and the stand-ins for bytes that are no UTF-8
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """The text with \\n, \\x1b and their kind spelt out: a file may have any name, and a message has one line."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(ValueError):
    """A mistake of the user's: the launcher prints its one line on stderr and exits with status 2."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class Failure(Exception):
    """What ends a run through no mistake of the user's, a full disk for instance: one line on stderr, status 1."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class Preempted(Exception):
    """Raised in every process when a run was told to stop and its checkpoint is safe."""
