"""How the program ends: exit codes, the line on stderr that explains them, and text that any terminal can show."""

import io
import sys

import click

EXIT_PARTLY = 1
"""Some of what was asked for is done; a line on stderr names each part that is not."""

EXIT_MISTAKE = 2
"""Nothing is done, and the user can put it right; one line on stderr says how."""

EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells have it."""


def say(text: str) -> None:
    """One line on stderr, whatever ``text`` holds."""
    click.echo(f"gpt-serve: {' '.join(text.splitlines())}", err=True)


def escape_what_cannot_be_shown() -> None:
    """Let stdout show characters that its encoding lacks as escapes, as stderr does, instead of ending the program.

    Labels come from folders and may be in any script, while a terminal or a pipe may be in Latin-1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
