"""What `nitro-e demo --web` runs: a web server for the pages, the worker behind them, and their end.

The pages are served by voila from this very process; each visitor gets a kernel, which holds widgets and no torch. One
kernel is kept warm, its page already laid out, so that whoever comes alone is served at once. Kernels watch this
process and leave when it is gone; the worker does when the pipe to it closes. So nothing is left behind, however this
process ends.

A notebook uses the same pages with a worker of its own, which starts when the first drawing is asked for: `local`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nitro_e_lite.course import demo_html as html
from nitro_e_lite.course.demo_protocol import ENVIRONMENT, IDLE_MINUTES, MAX_MESSAGE, Lane, Wire
from nitro_e_lite.errors import InvalidValue, Unusable

DATA = Path(__file__).resolve().parent / "demo"
PORT = 8866
MAX_VISITORS = 60  # pages open at once
GRACE_SECONDS = 10  # for which a page may lose its connection before its kernel is ended
UNSEEN_SECONDS = 120  # for which a kernel may wait for a page that was asked for and never opened
SHORT_SECONDS, MAX_SHORT_LIVES = 30, 3  # a worker that ends so soon, so often, is not started again
START_SECONDS = 600  # for which a worker may load its models; official files are large


def worker_threads() -> int:
    """Threads of the worker: all cores but one, which serves the pages; `OMP_NUM_THREADS` decides when it is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores - 1))


class WorkerProcess:
    """The process that draws, started, asked after and ended from here.

    Args:
        lanes: what is compared.
        loading: arguments of `load_pipeline`.
    """

    def __init__(self, lanes: Sequence[Lane], loading: dict[str, Any] | None = None):
        self.address = ("127.0.0.1", _free_port("127.0.0.1"))
        self.key = secrets.token_bytes(32)
        self._settings = {
            "port": self.address[1],
            "key": self.key.hex(),
            "lanes": [dataclasses.asdict(lane) for lane in lanes],
            "loading": {name: str(value) for name, value in (loading or {}).items() if value is not None},
            "threads": worker_threads(),
        }
        self.process: subprocess.Popen | None = None
        self.short_lives = 0  # in a row
        self._started = -SHORT_SECONDS
        self._ready, self.error = threading.Event(), ""

    def environment(self) -> dict[str, str]:
        """The variable that tells a kernel where the worker is."""
        facts = {"address": self.address, "key": self.key.hex(), "lanes": self._settings["lanes"]}
        return {ENVIRONMENT: json.dumps(facts)}

    def start(self) -> None:
        """Starts the process; it loads its models meanwhile, see `wait`."""
        command = [sys.executable, "-m", "nitro_e_lite.course.demo_worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._ready.clear()
        self.error = ""
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)
        now = time.monotonic()
        self.short_lives = self.short_lives + 1 if now - self._started < SHORT_SECONDS else 0
        self._started = now
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(self._settings) + "\n")
            self.process.stdin.flush()
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen) -> None:
        line = process.stdout.readline()
        said = json.loads(line) if line.startswith("{") else {"error": "the process that draws ended while it loaded"}
        self.error = said.get("error", "")
        self._ready.set()

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Waits until the models are loaded.

        Raises:
            RuntimeError: they could not be.
        """
        if not self._ready.wait(seconds):
            raise Unusable(f"the models were not loaded within {seconds:.0f} s")
        if self.error:
            raise Unusable(self.error)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ends the process."""
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def local(lanes: Sequence[Lane], **loading: Any) -> Callable[[], Wire]:
    """A way to reach a worker that is started by the first call and ends with this process; for notebooks."""
    worker = WorkerProcess(lanes, loading)

    def connect() -> Wire:
        if not worker.alive:
            worker.start()
        worker.wait()
        return Wire.connect(worker.address, worker.key)

    return connect


def check_address(host: str, port: int) -> None:
    """Whether this address can be served.

    Raises:
        ValueError: the port is taken, or is not ours to take, or the host is none of this machine's.
    """
    if not 0 <= port < 65536:
        raise InvalidValue(f"port: {port} is outside of 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        try:
            trial.bind((host, port))
            trial.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                rule = f"taken by another program; --port {port + 1 if port < 65535 else PORT} picks another"
            elif error.errno == errno.EACCES:
                rule = "not open to this user; pick one above 1024"
            else:
                raise InvalidValue(f"host: {host!r} is no address of this machine ({error})") from None
            raise InvalidValue(f"port: {port} is {rule}") from None


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        return free.getsockname()[1]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def serve(
    lanes: Sequence[Lane],
    *,
    port: int = PORT,
    host: str = "127.0.0.1",
    browser: bool = True,
    say: Callable[[str], None] = print,
    **loading: Any,
) -> None:
    """Serves the demo until Ctrl-C or SIGTERM.

    Args:
        lanes: what is compared.
        port, host: where; port 0 takes a free one.
        browser: opens one.
        say: gets lines for the person at the terminal.
        **loading: arguments of `load_pipeline`.

    Raises:
        ValueError: the address cannot be served.
        RuntimeError: the models cannot be loaded.
    """
    check_address(host, port)
    port = port or _free_port(host)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    say("Loading the models ...")
    worker = WorkerProcess(lanes, loading)
    try:
        worker.start()
        worker.wait()
        os.environ.update(worker.environment())
        _run_voila(worker, len(lanes), host, port, browser, say)
    except KeyboardInterrupt:
        pass
    finally:
        worker.stop()
    say("The demo has ended.")


def _run_voila(
    worker: WorkerProcess, lanes: int, host: str, port: int, browser: bool, say: Callable[[str], None]
) -> None:
    """Runs voila's event loop in this thread."""
    from tornado.ioloop import IOLoop, PeriodicCallback
    from traitlets.config import Config
    from voila.app import Voila

    class Page(Voila):
        """Voila without what a person's own Jupyter configuration would change, with the demo's template."""

        def load_config_file(self, *names: Any, **options: Any) -> None:
            pass

        def setup_template_dirs(self) -> None:
            super().setup_template_dirs()
            self.template_paths[:0] = [str(DATA / "template"), str(DATA)]

        def launch_browser(self) -> None:
            """Voila calls this once it listens."""
            loop = IOLoop.current()
            PeriodicCallback(lambda: _watch(worker, say, loop.stop), 500).start()
            named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # every address is none to open
            address = f"http://{f'[{named}]' if ':' in named else named}:{port}/"
            say(f"The demo is at {address} (Ctrl-C ends it)")
            if browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    logging.getLogger("tornado.general").setLevel(logging.ERROR)
    Page.clear_instance()
    app = Page.instance(config=Config(_settings(lanes, host, port)))
    app.initialize([str(DATA / "page.ipynb")])
    app.start()


def _settings(lanes: int, host: str, port: int) -> dict[str, Any]:
    """What voila and Jupyter's server are told."""
    return {
        "Voila": {
            "ip": host,
            "port": port,
            "port_retries": 0,
            "open_browser": True,
            "log_level": logging.ERROR,
            "tornado_settings": {
                "allow_remote_access": not is_loopback(host),
                "log_function": lambda handler: None,
                "websocket_max_message_size": MAX_MESSAGE,
                # A page that closes says so without a cookie, which a page laid out in advance does not have. Who
                # would end a stranger's kernel has to guess its random name.
                "disable_check_xsrf": True,
            },
        },
        "VoilaConfiguration": {
            "preheat_kernel": True,
            "default_pool_size": 1,
            "allow_template_override": "NO",
            "allow_theme_override": "NO",
            "extension_allowlist": ["@voila-dashboards/widgets-manager8", "@jupyter-widgets/jupyterlab-manager"],
            "multi_kernel_manager_class": _kernels(),
            "resources": {"header": html.header(), "lanes": lanes},  # of the page until its widgets are there
            "show_tracebacks": False,
        },
        # Its own 4 s end while many pages open at once, and a page whose outputs came later stayed empty for ever.
        "VoilaExecutor": {"iopub_timeout": START_SECONDS, "startup_timeout": START_SECONDS},
        "KernelSpecManager": {"kernel_dirs": []},
        "MappingKernelManager": {
            "cull_idle_timeout": IDLE_MINUTES * 60,
            "cull_interval": 20,
            "cull_connected": True,
        },
    }


def _watch(worker: WorkerProcess, say: Callable[[str], None], give_up: Callable[[], None]) -> None:
    """Starts a worker that died again, unless it does nothing but die; pages notice by themselves."""
    if worker.alive:
        return
    code = worker.process.returncode
    worker.stop()
    if worker.short_lives >= MAX_SHORT_LIVES:
        say(f"The process that draws keeps ending (code {code}); this is the end of the demo.")
        give_up()
        return
    say(f"The process that draws ended (code {code}); starting it again.")
    worker.start()


def _drop_failed(pool: list[asyncio.Task], page: asyncio.Task) -> None:
    """Takes a page that could not be laid out in advance from voila's pool; there it would fail every kernel's end."""
    if not page.cancelled() and page.exception() and page in pool:
        pool.remove(page)


def _kernels() -> type:
    """Voila's keeper of kernels, with a bound on how many there are and an end for those whose page is gone."""
    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
    from tornado.ioloop import IOLoop
    from tornado.web import HTTPError

    class Kernels(AsyncMappingKernelManager):
        async def start_kernel(self, *arguments: Any, **options: Any) -> str:
            if len(self) >= MAX_VISITORS:
                for pool in self._pools.values():
                    for page in pool:
                        if not page.done():  # perhaps what this kernel was for
                            page.add_done_callback(partial(_drop_failed, pool))
                raise HTTPError(503, "The demo is full; try again in a few minutes.")
            if not os.environ.get("NITRO_E_DEBUG"):
                options["stderr"] = subprocess.DEVNULL
            return await super().start_kernel(*arguments, **options)

        async def shutdown_kernel(self, *arguments: Any, **options: Any) -> None:
            """Makes room, also for the page that is laid out in advance."""
            await super().shutdown_kernel(*arguments, **options)
            for notebook in self._pools:
                self.fill_if_needed(None, notebook)

        async def cull_kernel_if_idle(self, kernel_id: str) -> None:
            """Also ends a kernel whose page nobody opened; voila does not ask about the one it keeps warm.

            That one may be old when a page gets it, so what counts is how long the page has had it.
            """
            kernel, now = self._kernels[kernel_id], time.monotonic()
            if self._kernel_connections.get(kernel_id, 0):
                vars(kernel).pop("unseen_since", None)  # a page that loses its line for a moment has its grace again
                await super().cull_kernel_if_idle(kernel_id)
            elif now - vars(kernel).setdefault("unseen_since", now) > UNSEEN_SECONDS:
                await self.shutdown_kernel(kernel_id, now=True)

        def notify_disconnect(self, kernel_id: str) -> None:
            super().notify_disconnect(kernel_id)
            IOLoop.current().call_later(GRACE_SECONDS, self._end_if_left, kernel_id)

        async def _end_if_left(self, kernel_id: str) -> None:
            if kernel_id in self and not self._kernel_connections.get(kernel_id, 0):
                await self.shutdown_kernel(kernel_id, now=True)

    return Kernels
