"""How threads wait for each other. Import this before torch, which reads the setting when it is loaded.

Between two parts of a computation, each thread of torch waits for the others in a loop that keeps its core
busy, up to several milliseconds long, and then it sleeps. Where other programs need the cores, the thread
that is waited for does not run meanwhile, and a step takes many times as long. The loop is a tenth as long
here, which is enough for all waits on an idle machine, and much shorter on a machine that is busy when the
program starts. docs/speed.md has the measurement.
"""

import os

TURNS_IDLE = 30_000  # of the loop, where GNU's OpenMP takes 300,000
TURNS_BUSY = 1_000


def turns() -> int:
    """How many turns of the loop a thread waits."""
    if not hasattr(os, "getloadavg"):  # on Windows
        return TURNS_IDLE
    programs, _, _ = os.getloadavg()  # that ran or wanted to run, in the last minute
    return TURNS_BUSY if programs >= (os.cpu_count() or 1) else TURNS_IDLE


if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(turns()))
