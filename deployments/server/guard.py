"""Ends a local server whose process was killed: a program of its own, which that process starts.

A process that gets SIGKILL can't stop what it has started, and PostgreSQL and the Prefect server would stay
for ever. This one waits at a pipe whose other end its parent holds; the kernel closes that when the parent
ends.
Unlike Linux's parent-death signal this reaches PostgreSQL, which is no child of ours, and it works on macOS.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before anything is imported: in almost every case it is only killed in the end.
    sys.stdin.buffer.read()
    sys.path[0] = str(Path(__file__).parents[2])
    from deployments.server.local import LocalServer

    if LocalServer(Path(sys.argv[1]), int(sys.argv[2])).end_left_over():
        sys.stderr.write("The process that had started this server was killed; the server was ended.\n")
