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
import threading
import time
from collections.abc import Callable

ENDS_WITH = "ESPERBERTO_ENDS_WITH"  # in the environment: the id of the process with which a script is to end
LOOK_SECONDS = 1.0


def begin() -> None:
    """Refuse Windows at once, let Ctrl-C end the imports that follow without a traceback, and watch the parent."""
    if os.name == "nt":
        sys.exit("error: this runs on Linux and macOS; on Windows it runs inside WSL (wsl --install)")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # behind nohup or a shell's & it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.pop(ENDS_WITH, "") == str(os.getppid()):
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """Send this process SIGTERM when its parent has gone, which SIGKILL keeps from ending its children itself.

    A training then writes a checkpoint and ends, rather than going on unnoticed. Only runner.sh and train_runs.py ask
    for it: what a user starts behind nohup outlives its shell.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    print("The script that started this one is gone: stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def child_environment(**more: str) -> dict[str, str]:
    """The environment for a script that is to end with this process."""
    return {**os.environ, ENDS_WITH: str(os.getpid()), **more}


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


def silence_libraries() -> None:
    """Keep warnings and progress bars of transformers and huggingface_hub away from our one line about an error."""
    import huggingface_hub
    import transformers  # imported here, because not every script needs it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)


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
