"""How threads wait for each other. Import this before torch, which reads the setting when it is loaded.

Between two parts of a computation, each thread of torch waits for the others in a loop that keeps its core
busy, up to several milliseconds long. Where other programs need the cores, the thread that is waited for
does not run meanwhile, and a step takes many times as long. Here the loop is a tenth as long, and then the
thread sleeps: long enough for all waits on an idle machine. docs/speed.md has the measurement.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # turns of the loop, where GNU's OpenMP takes 300,000
