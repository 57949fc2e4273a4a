"""A user's mistake is one message and exit code 2, without a stack trace."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .processes import is_main_process

EXIT_USER_ERROR = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ValueError and OSError into a message on stderr, from rank 0 only, and exit code 2.

    For the part of a program that reads what a user wrote; not for training, where a ValueError would be a bug of ours
    and its stack trace is wanted. HF_MAMBA_TRACEBACK=1 shows the stack trace here, too.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HF_MAMBA_TRACEBACK") == "1":
            raise
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
