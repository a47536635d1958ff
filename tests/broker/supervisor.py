"""Run the command of the arguments, and end it with whoever holds the other end of standard input.

A byte on standard input asks the command to end; the end of the input, which comes with the holder's death however it died,
kills it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading


def obey(command: subprocess.Popen[bytes]) -> None:
    """Do to the command what standard input tells."""
    # `sys.stdin` has a lock that would break the interpreter's own end while this thread waits.
    if os.read(0, 1):
        command.terminate()
        os.read(0, 1)
    command.kill()


if __name__ == "__main__":
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=obey, args=[process], daemon=True).start()
    sys.exit(process.wait())
