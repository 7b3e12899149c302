"""Runs one job of the bench in a process of its own, and reads what came of it, whatever became of the process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

GRACE = 5.0
"""Seconds that a process has to end by itself."""

VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "99"}
"""Set for every job, unless they are set already: threads that spin while they wait make a busy machine crawl, and
torch's profiler is not to write its start and stop."""


class Run:
    """A job that runs until the block ends; leaving the block early, by an interrupt say, kills it."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job

    def __enter__(self) -> Self:
        """Start the process."""
        self.folder = tempfile.TemporaryDirectory(prefix="peftkit-bench-")
        folder = Path(self.folder.name)
        (folder / "job.json").write_text(json.dumps(self.job), encoding="utf-8")
        self.found, self.log = folder / "result.json", folder / "log.txt"
        command = [sys.executable, "-m", "peftkit.bench.worker", str(folder / "job.json"), str(self.found)]
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this very Python, without a shell
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=_environment(),
                start_new_session=True,  # Ctrl-C is for the parent, which ends it
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process, with all that it has started, and remove its files."""
        if self.process.poll() is None:
            self._kill()
        self.folder.cleanup()

    def result(self, timeout: float) -> dict[str, Any]:
        """Wait, and return what the worker has noted, with `status`, `error` and `seconds`."""
        try:
            code = self.process.wait(timeout)
            ending = _ending(code)
        except subprocess.TimeoutExpired:
            self._kill()
            ending = "Timeout", f"given up after {timeout:g} seconds"
        found = self._noted()
        found["seconds"] = time.monotonic() - self.started
        if found.get("status") is None:  # it did not come to its end
            kind, message = ending
            error = {"phase": found.get("phase") or "start", "type": kind, "message": message + self._last_words()}
            found.update(status="failed", error=error)
        return found

    def _kill(self) -> None:
        """Ask it to end, so that it can put away temporary files; then end it, with all that it has started."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()

    def _noted(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.found.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _last_words(self) -> str:
        """The last line of what it has printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"; its last line was: {lines[-1].strip()[:300]}" if lines else ""


def _ending(code: int) -> tuple[str, str]:
    """A type and a message for a process that has ended without a result.

    >>> _ending(3)
    ('Exit', 'the process ended with exit code 3')
    """
    if code >= 0:
        return "Exit", f"the process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return name, f"the process was ended by {name}{hint}"


def _environment() -> dict[str, str]:
    """This process's own, with its module search path: what can be imported here can be imported there."""
    path = [entry for entry in sys.path if entry]
    return {**VARIABLES, **os.environ, "PYTHONPATH": os.pathsep.join(path)}


def without_folders(text: str) -> str:
    """A message without the paths of this machine: documents are shown to others."""
    for folder, sign in ((Path.cwd(), "."), (Path(tempfile.gettempdir()), "(temporary)"), (Path.home(), "~")):
        if folder != folder.parent:
            text = text.replace(str(folder), sign)
    return text
