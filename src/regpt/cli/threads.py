"""How threads of PyTorch wait for each other on a CPU."""

import os

# Rounds in which a thread of libgomp (PyTorch's on Linux) spins at the end of a parallel loop before it sleeps: about
# as long as a wake-up takes, 50 µs. libgomp's own 300,000 are 14 ms, longer than a time slice: on a busy machine each
# loop waits for a thread that has no core because the others spin.
SPIN_COUNT = "1000"


def spin_briefly() -> None:
    """Set it for this process, before torch is imported, and for those that it starts; what the user sets stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
