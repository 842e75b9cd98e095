"""Train on the nodes of a Ray cluster, one process a node; python docs/scale/ray/train.py NODES WORDS-OF-JAXADV...

For example: python docs/scale/ray/train.py 4 train --recipe pgd_cifar10 --data-root /shared/data --out /shared/run
Needs `pip install ray` on the cluster; jaxadv does not depend on it. Ray places the processes and tells them where the
first one is; everything else is the ordinary command line with `--distributed ADDRESS,N,I`.
"""

import socket
import subprocess
import sys

PORT = 12355


def words_of(given: list[str], address: str, nodes: int, number: int) -> list[str]:
    """Return the command line of one process."""
    return [*given, "--distributed", f"{address}:{PORT},{nodes},{number}"]


def main(nodes: int, given: list[str], gpus: int = 8) -> int:
    """Run one process on each of so many nodes; returns the first exit code that is not 0."""
    import ray

    ray.init()

    @ray.remote(num_gpus=gpus, scheduling_strategy="SPREAD", max_retries=0)
    class Process:
        def address(self) -> str:
            return socket.gethostbyname(socket.gethostname())

        def run(self, words: list[str]) -> int:
            return subprocess.call([sys.executable, "-m", "jaxadv.cli", *words])  # a fresh process: no jax before it

    processes = [Process.remote() for _ in range(nodes)]
    address = ray.get(processes[0].address.remote())
    codes = ray.get([p.run.remote(words_of(given, address, nodes, i)) for i, p in enumerate(processes)])
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
