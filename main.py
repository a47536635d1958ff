"""The start of the program: this Python is checked, then the command line is read.

Python 3.6 has to be able to read this file and `latent_encoder/interpreter.py`, so that an old Python gets a message.
"""

import signal
import sys

__all__ = ["main"]

if __name__ == "__main__":
    # While the modules below are imported, Ctrl-C just ends the process: there is nothing to clean up or to report.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from latent_encoder import interpreter

if __name__ == "__main__":
    interpreter.refuse_unfit_python(sys.argv[1:])

try:
    from latent_encoder.command import main
except Exception as exc:
    if __name__ != "__main__":
        raise
    interpreter.end(interpreter.unimportable(exc, " ".join(str(exc).split())), sys.argv[1:])

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
