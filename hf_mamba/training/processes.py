"""What the launcher's environment says of this process."""

import os
import socket


def is_main_process() -> bool:
    """Whether this is rank 0; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def stand_alone() -> None:
    """Make a process without a launcher a world of one: DeepSpeed would ask for mpi4py otherwise."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
