"""Several processes of one run: joining them, and what they tell each other between steps.

What lives here: what is asked on the host. What does not: sums inside a compiled step (`axes.py`).
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxadv.core import PyTree


def distributed(spec: str) -> bool:
    """Join the processes of a run, once. Called by the command line before any array is made, by nothing else.

    Args:
      spec: `'off'`; `'auto'` where the cluster tells (Cloud TPU, Slurm, Open MPI, Kubernetes); or `'address:port,n,i'`:
        the coordinator, the number of processes and the number of this one.

    Returns:
      Whether there is more than this process to talk to.

    Raises:
      ValueError: on any other text.
    """
    if spec == "off":
        return False
    joined = jax.distributed.is_initialized()
    if spec == "auto":
        if not joined:
            jax.distributed.initialize()
        return True
    parts = [part.strip() for part in spec.split(",")]
    whole = len(parts) == 3 and ":" in parts[0] and parts[1].isdigit() and parts[2].isdigit()
    if not whole or int(parts[2]) >= int(parts[1]):
        raise ValueError(
            f"distributed must be 'auto', 'off' or 'address:port,n,i' with process i in [0, n); got {spec!r}. "
            "For example '127.0.0.1:1234,2,0' and '127.0.0.1:1234,2,1'."
        )
    if not joined:
        jax.distributed.initialize(parts[0], int(parts[1]), int(parts[2]))
    return True


def whole(tree: PyTree) -> PyTree:
    """Fetch a tree, also where no process holds all of it. Every process must call it.

    Args:
      tree: arrays, no typed keys.

    Returns:
      The values as numpy arrays, the same in every process.
    """

    def leaf(a):
        split = isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated)
        return np.asarray(multihost_utils.process_allgather(a, tiled=True) if split else a)

    return jax.tree.map(leaf, tree)


def _meet() -> None:
    """Wait until every process has come here: collectives on CPU give up on one that is half a minute late."""
    every = jax.devices()
    try:
        with multihost_utils.live_devices(every) as live:  # whoever leaves waits for the others
            lost = len(live) < len(every)
    except multihost_utils.ProcessFailureError:
        lost = True
    if lost:
        raise RuntimeError("jax's coordination service no longer hears from every process of this run")


def exchange(payload: bytes) -> list[bytes]:
    """Give every process the bytes of all processes. Every process must call it.

    Args:
      payload: of this process, of any length below 2 GiB.

    Returns:
      The payloads in the order of processes.
    """
    if jax.process_count() == 1:
        return [payload]
    _meet()
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray([len(payload)], np.int32)))
    mine = np.zeros(max(int(sizes.max()), 1), np.uint8)
    mine[: len(payload)] = np.frombuffer(payload, np.uint8)
    every = multihost_utils.process_allgather(mine)
    return [row[:size].tobytes() for row, size in zip(every, sizes)]


def agree(mine: bool) -> bool:
    """Tell whether something holds in every process. Every process must call it.

    Args:
      mine: whether it holds in this one.

    Returns:
      Whether it holds in all.
    """
    return b"" not in exchange(b"1" if mine else b"")


def preempted(step: int) -> bool:
    """Tell, the same to every process at the same step, that one of them was asked to end (SIGTERM).

    Args:
      step: number of the step that was just done; every process asks after every step.

    Returns:
      True at the step at which all processes should save; always False where there is only one.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
