"""Drive the compiled manager beside its model for a while: `python3 dev.py fuzz` does it on a build with sanitizers."""

import sys

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from manager_compiled import COMPILED
from manager_machine import machine_for

if __name__ == "__main__":
    examples = int(sys.argv[1])
    run_state_machine_as_test(
        machine_for(COMPILED),
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{examples} random runs of up to 60 calls: nothing found")
