"""A script in several processes that share its work, all forks of this one: ranks.py SCRIPT PROCESSES ARGUMENTS...

They find what `torch.distributed.run` would tell them, without its imports and theirs.
"""

import os
import runpy
import signal
import socket
import sys

from quantkit.evals.benchmarks.forks import leave


def main(script, processes, *arguments):
    """Ends with 1 as soon as one of the processes fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    children = {_started(script, rank, arguments) for rank in range(int(processes))}
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def _started(script, rank, arguments):
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return leave(lambda: runpy.run_path(script)["main"](*arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
