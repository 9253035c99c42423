"""The program behind the commands of warm.py; a separate file, to import as little as possible."""

import os
import signal
import socket
import sys

SENT = (signal.SIGINT, signal.SIGTERM)


def call(folder: str, words: list[str]) -> None:
    """Run the words and this process's arguments as `python` would, and end as they do."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as program:
        program.connect(f"{folder}/socket")
        request = repr((words + sys.argv[1:], os.getcwd(), dict(os.environ)))  # noqa: PTH109 (pathlib takes as long as all else)
        socket.send_fds(program, [request.encode("utf-8", "surrogateescape")], (0, 1, 2))
        for each in SENT:
            signal.signal(each, lambda number, _: program.send(bytes([number])))
        code = int(program.recv(16) or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)
