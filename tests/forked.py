"""A rank as torchrun starts it, cheaply: a fork of the fork server that lives and dies with this process.

    torchrun --no-python python forked.py SOCKET ARGV...

Signals are passed on, the exit code is the fork's, and when this process is killed the server kills the fork.
"""

import json
import os
import signal
import socket
import sys


def main(address: str, argv: list[str]) -> int:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    output = f"/proc/{os.getpid()}/fd/1"
    request = {"argv": argv, "env": dict(os.environ), "output": output, "tied_to": os.getpid()}
    connection.sendall(json.dumps(request).encode() + b"\n")
    answers = connection.makefile()
    pid = json.loads(answers.readline())["pid"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(json.loads(answers.readline())["exit"])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
