"""How threads wait for each other. Import this before torch, which reads the setting when it is loaded.

Between two parts of a computation, each thread of torch waits for the others in a loop that keeps its core
busy. Where other programs need the cores, the thread that is waited for then does not run. A passive wait
gives the core away.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
