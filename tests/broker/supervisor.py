"""Run the command of the arguments, and end it together with the process that holds the other end of standard input.

A byte on standard input asks the command to end. The end of the input kills it, and it comes with the end of the holder,
however that ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading


def obey(command: subprocess.Popen[bytes]) -> None:
    """Terminate the command after a byte on standard input, and kill it at the end of the input."""
    # `sys.stdin` has a lock that would crash the interpreter at its end while this thread waits.
    if os.read(0, 1):
        command.terminate()
        os.read(0, 1)
    command.kill()


if __name__ == "__main__":
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=obey, args=[process], daemon=True).start()
    sys.exit(process.wait())
