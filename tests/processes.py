"""Several processes that train together, forked from the tests, so that none has to import torch again."""

import contextlib
import os
import pickle
import signal
import socket
import sys
import time
import traceback


def run_together(work, folder, n=2, seconds=60):
    """Return what ``work(rank)`` gives in each of `n` processes that hold a group open; exceptions as texts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(n):
        if child := os.fork():
            children.append(child)
            continue
        with contextlib.suppress(BaseException):
            _work(work, rank, n, port, folder / f"rank{rank}.pickle")
        os._exit(0)
    last = time.monotonic() + seconds
    for child in children:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > last:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(n)]


def _work(work, rank, n, port, path):
    import torch
    from accelerate.state import AcceleratorState

    from braindecode_vis.base.devices import join_processes

    torch.set_num_threads(1)  # the threads of the parent do not live on here
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training that the parent did alone
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(n),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with join_processes("cpu", setting="encoder.device"):
            found = work(rank)
    except BaseException:
        found = traceback.format_exc()
    path.write_bytes(pickle.dumps(found))
