"""A user's mistake is one message and exit code 2, without a stack trace."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hf_mamba.run.processes import tell_launcher

EXIT_USER_ERROR = 2


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors into a message on stderr, from one rank only, and exit code 2.

    HF_MAMBA_TRACEBACK=1 shows the stack trace, too.

    Args:
        kinds: by default ValueError and OSError, for the part of a program that reads what a user wrote. In training,
            where a ValueError would be a bug of ours and its stack trace is wanted, name what a user can mend.
    """
    caught = kinds or (ValueError, OSError)
    try:
        yield
    except caught as error:
        if os.environ.get("HF_MAMBA_TRACEBACK") == "1":
            raise
        # what went wrong on one rank only is told by that rank, see ranks.py
        if os.environ.get("RANK", "0") == str(getattr(error, "origin", 0)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        tell_launcher(str(error))
        sys.exit(EXIT_USER_ERROR)
