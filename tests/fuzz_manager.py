"""Drive the compiled manager beside its model for a while: `python3 dev.py fuzz` does it on a build with sanitizers.

    fuzz_manager.py RUNS
    fuzz_manager.py --seconds SECONDS

Where CI is set, runs are the same every time, as far as the seconds go.
"""

import os
import random
import sys
import time

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from manager_compiled import COMPILED
from manager_machine import machine_for

ROUND = 20  # runs between two looks at the clock


def fuzz(runs: int, number: int) -> None:
    """So many runs; the same for the same number."""
    run_state_machine_as_test(
        seed(number)(machine_for(COMPILED)),
        settings=settings(
            max_examples=runs,
            stateful_step_count=60,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def main(*options: str) -> None:
    first = 0 if os.environ.get("CI") else random.randrange(2**32)
    amount, started, done = int(options[-1]), time.monotonic(), 0
    while (time.monotonic() - started if options[:-1] else done) < amount:
        runs = ROUND if options[:-1] else min(ROUND, amount - done)
        try:
            fuzz(runs, first + done)
        except BaseException:
            print(f"these runs are the first of seed {first + done}", file=sys.stderr)
            raise
        done += runs
    print(f"{done} random runs of up to 60 calls in {time.monotonic() - started:.0f} s: nothing found")


if __name__ == "__main__":
    main(*sys.argv[1:])
