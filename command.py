"""What all scripts share: how they start and end, and how they read and refuse a flag.

A script imports this module before the libraries that take seconds to import:

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
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

ENDS_WITH = "ESPERBERTO_ENDS_WITH"  # environment variable: the id of the parent process with which a script must end
LOOK_SECONDS = 1.0  # between two checks whether the parent process still exists


def begin() -> None:
    """Refuse Windows, let Ctrl-C end the following imports without a traceback, and watch the parent process."""
    if os.name == "nt":
        sys.exit("error: this runs on Linux and macOS; on Windows it runs inside WSL (wsl --install)")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's & in a script ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.pop(ENDS_WITH, "") == str(os.getppid()):
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """Send this process SIGTERM when its parent process has ended: a parent killed by SIGKILL cannot do it.

    A training then writes a checkpoint and ends, instead of running on unnoticed. Only runner.sh and train_runs.py ask
    for this, so a script that a user starts with nohup still outlives its shell.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    print("The script that started this one is gone: stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def child_environment(**more: str) -> dict[str, str]:
    """The environment for a script that must end when this process ends, with the variables `more`."""
    return {**os.environ, ENDS_WITH: str(os.getpid()), **more}


def run(main: Callable[[], None]) -> None:
    """Run a script's main(). An OSError, for example a full disk, becomes one line; Ctrl-C ends with status 130."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


def silence_libraries() -> None:
    """Silence the warnings and progress bars of transformers and huggingface_hub, so that an error is one line."""
    import huggingface_hub
    import transformers  # not every script needs them

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)


def whole_number(lowest: int, highest: int = 1 << 31) -> Callable[[str], int]:
    """The `type` of a flag that takes a whole number from `lowest` to `highest`."""

    def read(text: str) -> int:
        if not text.replace("_", "0").isdecimal() or len(text) > 20 or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"needs a whole number from {lowest:,} to {highest:,}, got {text[:24]!r}")
        return int(text)

    return read


positive = whole_number(1)


def without_secrets(text: str) -> str:
    """The text with every token of the Hub replaced, because logs keep what a script prints."""
    return re.sub(r"hf_\w{4,}", "<secret>", text)


class Parser(argparse.ArgumentParser):
    """Accepts only complete flag names, shows the script's docstring unchanged, and reports an error in one line."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings})

    def error(self, message: str):
        message = without_secrets(message)
        self.exit(2, f"error: {message} (all flags: python {self.prog} --help)\n")
