"""Command lines of all programs: one parser class, one form of an error message, one exit status for bad input."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT = 2  # as argparse has it
_UNKNOWN = "unrecognized arguments: "


def program_name() -> str:
    """Name of the running program in messages: `llava-next-ar ask`, or `ask.py` for a script."""
    return Path(sys.argv[0]).name


def stop(error: object, status: int = BAD_INPUT) -> NoReturn:
    """Print one line, `program: message`, to stderr and exit with a status."""
    print(f"{program_name()}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


class CommandParser(argparse.ArgumentParser):
    """Options that are spelled with hyphens or underscores, without abbreviations; errors are one line.

    `--num-frames` is `--num_frames`, whichever of them is added. Help shows the one that is added.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog or program_name(), **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        options = {option.replace("_", "-"): option for option in self._option_string_actions}
        for number, word in enumerate(words[:end]):
            name, equals, value = word.partition("=")
            words[number] = f"{options.get(name.replace('_', '-'), name)}{equals}{value}"
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with one line that has the nearest option to an unknown one, in place of the usage of all options."""
        hint = "--help lists the options"
        if message.startswith(_UNKNOWN):
            unknown = message.removeprefix(_UNKNOWN).split()[0].partition("=")[0].replace("_", "-")
            known = [option for option in self._option_string_actions if option.startswith("--")]
            nearest = difflib.get_close_matches(unknown, known, n=1) if unknown.startswith("--") else []
            hint = f"did you mean {nearest[0]}? {hint}" if nearest else hint
        stop(f"{message}; {hint}")
