"""Run a command, and print its seconds, its peak memory and its exit status as JSON.

    python -S encode_peak.py SECONDS STDOUT STDERR COMMAND…

This is a small process of its own: on Linux, the peak of a new process begins with the memory of the process that started it,
and the benchmark's own process is as large as the ones that it measures. After SECONDS, the command is killed.
"""

import json
import os
import signal
import sys
import threading
import time

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def main() -> None:
    seconds, stdout, stderr, *command = sys.argv[1:]
    files = [
        (os.POSIX_SPAWN_OPEN, number, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number, path in ((1, stdout), (2, stderr))
    ]
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=files)
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        os.kill(child, signal.SIGKILL)

    timer = threading.Timer(float(seconds), end)
    timer.start()
    _, status, usage = os.wait4(child, 0)
    timer.cancel()
    took = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": usage.ru_maxrss * MAXRSS_UNIT,
        "status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out.is_set(),
    }
    sys.stdout.write(json.dumps(took) + "\n")


if __name__ == "__main__":
    main()
