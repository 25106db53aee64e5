"""The kernel of the notebooks while the site is built: a copy of one process that has imported what all of them need.

The imports take five seconds of processor time, and there is a kernel for each of a dozen notebooks. `conf.py` calls
`offer_kernel`. The first kernel starts the process that is copied, which ends when its socket is deleted after the
build. It knows nothing of the notebooks. Where processes cannot be copied safely, usual kernels do the same.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAME = "kernel.socket"


def offer_kernel() -> None:
    """Let Jupyter find this file under the name of the usual kernel, until this process ends."""
    if sys.platform == "linux":
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        argv = [sys.executable, __file__, str(folder / NAME), "-f", "{connection_file}"]
        (folder / "kernels" / "python3").mkdir(parents=True)
        content = json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"})
        (folder / "kernels" / "python3" / "kernel.json").write_text(content)
        os.environ["JUPYTER_PATH"] = str(folder)


def ask_for_copy(address: Path, arguments: list[str]) -> None:
    """Ask for a kernel, and wait until it has ended."""
    if not address.exists():
        subprocess.Popen([sys.executable, __file__, str(address)], start_new_session=True)
        while not address.exists():
            time.sleep(0.05)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # comes before a kernel is asked to end
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(address))
        request = {"arguments": arguments, "folder": str(Path.cwd()), "variables": dict(os.environ)}
        link.sendall(json.dumps(request).encode() + b"\n")
        link.recv(1)  # nothing ever comes: the kernel holds the other end


def serve_copies(address: Path) -> None:
    """Become a kernel in a copy of this process for each that asks, for as long as the socket is there."""
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # a kernel ends if this process does
    os.environ["MPLBACKEND"] = (
        "module://matplotlib_inline.backend_inline"  # matplotlib asks when it is imported
    )
    sys.path.remove(str(Path(__file__).parent))

    import matplotlib.pyplot  # noqa: F401
    import mne  # noqa: F401
    import pandas  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch._dynamo  # noqa: F401  # which optimisers import at their first step
    from ipykernel.kernelapp import IPKernelApp

    import braindecode_vis.parts.phantom.simulate
    import braindecode_vis.parts.studies.demo
    import braindecode_vis.report.figures  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a kernel here
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address.with_suffix(".new")))
        listener.listen()
        listener.settimeout(1)
        address.with_suffix(".new").rename(address)  # who sees it can connect
        while address.exists():
            try:
                link, _ = listener.accept()
            except TimeoutError:
                continue
            request = json.loads(link.makefile().readline())
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.chdir(request["folder"])
                os.environ.update(request["variables"], JPY_PARENT_PID=str(os.getppid()))
                IPKernelApp.launch_instance([*request["arguments"], "--log-level=ERROR"])
                sys.exit()
            link.close()


if __name__ == "__main__":
    if sys.argv[2:]:
        ask_for_copy(Path(sys.argv[1]), sys.argv[2:])
    else:
        serve_copies(Path(sys.argv[1]))
