"""Training processes for tests: forked from one process that has imported everything.

Importing the libraries costs seconds of processor time, a smoke run less than one. So one server process imports them
once and forks the processes of each run, which are then as real as those of torchrun: they find each other through the
same environment variables, and can be killed.
"""

import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


class Ranks:
    """Starts and ends the processes of one run after the other."""

    def __init__(self, folder: Path):
        self.log = folder / "ranks.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.server.stdout.readline() == "ready\n"

    def start(self, world: int, *words: str) -> list[int]:
        """Forks `world` processes of `nitro-e words`, or of the script `words[0]`; returns their ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._send({"world": world, "words": [str(word) for word in words], "port": port, "log": str(self.log)})
        self.pids = json.loads(self.server.stdout.readline())
        return self.pids

    def wait(self) -> list[int]:
        """Exit codes of the processes; the negative number of the signal that killed one."""
        self._send({"wait": self.pids})
        return json.loads(self.server.stdout.readline())

    def run(self, world: int, *words: str) -> str:
        """Runs to the end, which must be a good one; returns the output."""
        self.start(world, *words)
        codes = self.wait()
        assert codes == [0] * world, f"exit codes {codes}\n{self.log.read_text()}"
        return self.log.read_text()

    def kill(self) -> None:
        """SIGKILL to all processes at once, as when a machine goes down."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        assert set(self.wait()) == {-signal.SIGKILL}, "the run ended before it could be killed"

    def until(self, condition, seconds: float = 60, every: float = 0.01) -> None:
        """Waits for `condition()`, looking every so many seconds: looking takes processor time from the run."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and Path(f"/proc/{self.pids[0]}").exists(), self.log.read_text()
            time.sleep(every)

    def limit_files(self, size: int) -> None:
        """From now on no process can make a file larger than `size` bytes, as if the disk were full."""
        for pid in self.pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))

    def _send(self, request: dict) -> None:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, cache):
    """One server for a test module, which has a fixture `cache`."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def fork(rank: int, request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["world"] > 1:
        world = str(request["world"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    code = 1
    try:
        words = request["words"]
        if words[0].endswith(".py"):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        else:
            from nitro_e_lite.cli.app import app

            app(words)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pids: list[int], seconds: float = 120) -> list[int]:
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end or any(codes.values()):  # as torchrun does: one failed, all end
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def serve() -> None:
    import nitro_e_lite.cli.train  # noqa: F401
    import nitro_e_lite.experiments.worker  # noqa: F401  # all that a run needs: commands import it when they run

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"])
        else:
            Path(request["log"]).write_text("")
            answer = [fork(rank, request) for rank in range(request["world"])]
        print(json.dumps(answer), flush=True)
    os._exit(0)  # taking all that was imported apart takes seconds, too


if __name__ == "__main__":
    serve()
