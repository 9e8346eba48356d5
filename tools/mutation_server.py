"""Run tests in forks of a process that has imported what they all need; most of a short test's time is imports.

Requests come as JSON on a line each: the checkout, the tests, and the seconds of computing time that they may take. The
answer is a line with the exit status of pytest, None where the time was over, and what pytest printed.
"""

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HEAVY = ("torch", "torchmetrics", "lightning.pytorch", "matplotlib.pyplot", "hypothesis", "torch_pruning")
OPTIONS = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-rfE"]
WAIT = 10  # seconds on the clock for each one of computing: a test that sleeps computes nothing


def child(root: str, tests: list[str], seconds: int, output: int) -> None:
    """Become pytest; never returns."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    os.chdir(root)
    sys.path.insert(0, root)
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = root
    import pytest

    code = 99
    try:
        code = int(pytest.main([*OPTIONS, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(root: str, tests: list[str], seconds: int) -> tuple[int | None, str]:
    """Run tests in a fork.

    Returns:
        The exit status, None if the time was over, and what was printed.
    """
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            child(root, tests, seconds, output.fileno())
        over, status = time.monotonic() + WAIT * seconds, None
        while status is None:
            done, raw = os.waitpid(pid, os.WNOHANG)
            if done:
                status = raw
            elif time.monotonic() > over:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            else:
                time.sleep(0.05)
        output.seek(0)
        text = output.read().decode(errors="replace")
    timed_out = status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in {signal.SIGXCPU, signal.SIGKILL})
    return None if timed_out else os.waitstatus_to_exitcode(status), text


def main() -> None:
    for name in HEAVY if "--heavy" in sys.argv else ():
        with suppress(ImportError):  # an extra
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else gets into the answers
    for line in sys.stdin:
        request = json.loads(line)
        print(
            json.dumps(run(str(Path(request["root"])), request["tests"], request["seconds"])), file=answers, flush=True
        )


if __name__ == "__main__":
    main()
