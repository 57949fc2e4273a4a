"""`accelerate launch` as `hf-mamba launch` becomes it: it ends with the exit code of its ranks and without a traceback.

Its own end is 1, below the stack of the launcher; what a rank had said, and 85 (run again) or 86, would be lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

SIGNALLED = 128  # a shell's exit code of a process that a signal has ended, less the signal


def wait_for_the_rank(number: int, frame: FrameType | None) -> None:
    """At Ctrl-C the terminal tells every process in its foreground: a rank that runs saves and ends by itself."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if os.tcgetpgrp(0) == os.getpgrp():
            return
    except OSError:  # no rank runs yet, or there is no terminal
        pass
    raise KeyboardInterrupt


def main() -> int:
    """Run accelerate's command line; the exit code of the rank that failed first."""
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    signal.signal(signal.SIGINT, wait_for_the_rank)  # with several ranks, torch's launcher has its own
    try:
        accelerate()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        print(f"rank {rank} ended with exit code {code}", file=sys.stderr, flush=True)
    except subprocess.CalledProcessError as error:  # one process without a rendezvous
        code = error.returncode
    except SignalException as error:
        code = -error.sigval
    except KeyboardInterrupt:
        code = -signal.SIGINT
    else:
        return 0
    return code if code > 0 else SIGNALLED - code


if __name__ == "__main__":
    sys.exit(main())
