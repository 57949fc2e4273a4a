"""`accelerate launch` as `hf-mamba launch` becomes it: it ends with the exit code of its ranks and without a traceback.

Its own end is 1, below the stack of the launcher; what a rank had said, and 85 (run again) or 86, would be lost.
"""

from __future__ import annotations

import subprocess
import sys

SIGNALLED = 128  # a shell's exit code of a process that a signal has ended, less the signal


def main() -> int:
    """Run accelerate's command line; the exit code of the rank that failed first."""
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

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
    else:
        return 0
    return code if code > 0 else SIGNALLED - code


if __name__ == "__main__":
    sys.exit(main())
