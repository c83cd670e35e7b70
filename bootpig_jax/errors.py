"""Errors that a user can mend, and how the command lines report them.

Anything a user can cause (a wrong field, a damaged file, a full disk) is raised as `UserError` with
one line that names the field or the file and says what to do. `run_cli` turns it into that line on
standard error and exit status 2. Every other exception is a defect of this project and keeps its
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells report it


class UserError(Exception):
    """A mistake the user can mend; its message is one line: the field or file, and the remedy."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command line's `main` and exits the process with its status.

    Args:
      main: takes no arguments (it parses `sys.argv` itself); returns an exit status, or None for
        success.

    Raises:
      SystemExit: always. 2 after a `UserError`, 130 after Ctrl-C, otherwise what `main` returned.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)
    sys.exit(status or 0)
