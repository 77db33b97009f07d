"""What the scripts share as commands: how they begin and end, and how they read and refuse a flag.

A script imports this before what takes seconds to import:

    import command

    if __name__ == "__main__":
        command.begin()

    import torch
    ...
    if __name__ == "__main__":
        command.run(main)
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable


def begin() -> None:
    """Refuse Windows at once, and let Ctrl-C end the imports that follow without a traceback."""
    if os.name == "nt":
        sys.exit("error: this runs on Linux and macOS; on Windows it runs inside WSL (wsl --install)")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # behind nohup or a shell's & it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(main: Callable[[], None]) -> None:
    """Run a script's main(). An error of the system, a full disk for example, is one line; Ctrl-C ends with 130."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


def positive(text: str) -> int:
    """A flag's whole number above 0, as `type` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number above 0, got {text!r}")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Takes whole flag names alone, shows the script's docstring as it is written, and refuses in one line."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings})

    def error(self, message: str):
        self.exit(2, f"error: {message} (all flags: python {self.prog} --help)\n")
