"""Processes that are stopped for a while, as by a debugger or a machine that swaps."""

import os
import signal
import subprocess
from typing import Any


def stop_process(process: subprocess.Popen[Any]) -> None:
    """Send SIGSTOP to a child, and wait until it does nothing any more. SIGCONT lets it go on."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
