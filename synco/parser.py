"""The parser of command lines: errors in one line, what becomes of a flag when a run goes on, and --help in groups."""

import argparse
import contextlib
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from synco.errors import UserError

# the titles in --help, in its order, after the flags that have none
GROUPS = (
    "data and network",
    "method",
    "synthetic negatives",
    "optimisation",
    "evaluation while training",
    "saving and resuming",
    "speed",
    "processes",
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and of each flag the range and the default where there are some."""

    def _get_help_string(self, action):
        default, known = action.default, [getattr(action.type, "range", "")]
        if default is not None and default is not False and default not in ("", argparse.SUPPRESS):
            known.append("default: " + (" ".join(map(str, default)) if isinstance(default, list) else "%(default)s"))
        known = "; ".join(filter(None, known))
        return f"{action.help} ({known})" if known else action.help

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", super()._get_default_metavar_for_optional(action))

    def _format_action_invocation(self, action):
        """As Python 3.13's: the value once, after all the names."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._get_default_metavar_for_optional(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, metavar)}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised as `UserError`, and that takes no abbreviated flags.

    A flag is declared by what becomes of it when a run goes on: `identity` must stay as it was; `schedule`, how fast
    and how long the run learns, may change with --force-resume; `free` may change. `kinds` has the word for each.

    normal: flags of a normal run, by the first of their names: --help has them first, in this order, whatever their
    group.
    """

    def __init__(self, docstring: str, normal: str = "") -> None:
        self.kinds: dict[str, str] = {}
        self._normal = normal.split()
        self._first = "a normal run" if normal else "options"
        self._title = self._first
        self._titles: dict[argparse.Action, str] = {}
        width = functools.partial(_Help, max_help_position=34, width=120)  # a docstring's width
        super().__init__(description=docstring, formatter_class=width, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(
        self, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's, but a last word that is no number is none of a flag's several numbers: `--lr 1 3 DATA`."""
        words = list(sys.argv[1:] if args is None else args)
        numeric = [action for action in self._actions if action.nargs in ("+", "*") and action.type]
        several = {name for action in numeric for name in action.option_strings}
        flags = [word for word in words if word.startswith("-") and not _is_number(word)]
        if flags and flags[-1] in several - {*words[-2:]} and not _is_number(words[-1]):
            words.insert(-1, "--")
        return super().parse_args(words, namespace)

    @contextlib.contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Flags that are declared within stand under this title in --help, one of `GROUPS`."""
        if title not in GROUPS:
            raise ValueError(f"{title!r} is none of {', '.join(GROUPS)}")
        before, self._title = self._title, title
        yield
        self._title = before

    def _add_action(self, action):
        """Argparse's, which every flag comes through: note its group."""
        self._titles[action] = self._first if _name(action) in self._normal else self._title
        return super()._add_action(action)

    def format_help(self) -> str:
        """One line of usage, the description, the flags of a normal run, then the groups."""
        formatter = self.formatter_class(prog=f"{self.prog} [flags]")
        needed = [action for action in self._actions if action.required or not action.option_strings]
        formatter.add_usage(None, needed, [])
        command = self.prog if self.prog.startswith("synco-") else r"\g<0>"  # the script's, where it is installed
        formatter.add_text(re.sub(r"python main_\w+\.py", command, self.description or ""))
        for title in (self._first, *GROUPS):
            formatter.start_section(title)
            actions = [action for action, its_title in self._titles.items() if its_title == title]
            if title == self._first:
                actions.sort(key=lambda action: [*self._normal, _name(action)].index(_name(action)))
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def identity(self, *names: str, **settings: Any) -> None:
        """Declare a flag that says what a run is, as `add_argument` does."""
        self._declare("identity", self, names, settings)

    def schedule(self, *names: str, group: argparse._MutuallyExclusiveGroup | None = None, **settings: Any) -> None:
        """Declare a flag of the learning rate or of the length. group: a mutually exclusive one that it belongs to."""
        self._declare("schedule", group or self, names, settings)

    def free(self, *names: str, **settings: Any) -> None:
        """Declare a flag that may differ whenever a run goes on; what follows from it may be compared."""
        self._declare("free", self, names, settings)

    def _declare(self, kind, group, names, settings):
        self.kinds[group.add_argument(*names, **settings).dest] = kind


def _name(action):
    return (action.option_strings or [action.dest])[0]


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
