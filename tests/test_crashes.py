"""Saving survives: a kill at any moment, an error of any call to the system, a full disk. What was there before loads, or
what is new; never a mixture; and what a killed save left behind goes with the next one.
"""

import builtins
import contextlib
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit
from peftkit import errors, reading, writing


def model(value, width=8):
    """An adapter all of whose values are one number: a mixture of two would show."""
    torch.manual_seed(0)
    net = peftkit.wrap(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)), "lora", targets="**", rank=4)
    with torch.no_grad():
        for tensor in peftkit.state_dict(net).values():
            tensor.fill_(value)
    return net


def value_in(path):
    """The number that a file's tensors are full of; it is read with every digest."""
    (value,) = {float(v) for t in reading.read(Path(path)).tensors.values() for v in t.unique()}
    return value


# ------------------------------------------------------------------------------------------------- kill -9

KILLS = 240
SCRIPT = """
    import json, os, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_crashes import model, value_in
    import peftkit

    path, folder = {path!r}, os.path.dirname({path!r})
    net = model(0.0, width=400)
    peftkit.save(net, path)
    chance, found, leftovers = random.Random(0), [], 0
    for kill in range({kills}):
        child = os.fork()
        if child == 0:
            try:
                for step in range(10_000):
                    with torch.no_grad():
                        for tensor in peftkit.state_dict(net).values():
                            tensor.fill_(kill * 10_000 + step)
                    peftkit.save(net, path)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        leftovers += len(os.listdir(folder)) - 1
        found.append(value_in(path))
    peftkit.save(net, path)
    print(json.dumps({{"found": found, "leftovers": leftovers, "at the end": os.listdir(folder)}}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children that it forks")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """Processes that save without end are killed, 240 times: the file is always one of those saved, whole."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "a.safetensors"
    code = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), path=str(path), kills=KILLS)
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)

    assert len(told["found"]) == KILLS
    assert len(set(told["found"])) > KILLS / 4  # they did save, and were killed in between
    assert told["leftovers"] > KILLS / 20  # in the midst of it
    assert told["at the end"] == [path.name]


def test_a_save_that_is_still_going_on_keeps_its_file(tmp_path, monkeypatch):
    """Two saves to one path at once: neither takes the other's temporary file for a leftover."""
    path = tmp_path / "a.safetensors"
    inner = []

    def both(descriptor):
        monkeypatch.undo()
        inner.append([p.name for p in tmp_path.iterdir()])
        peftkit.save(model(2.0), path)
        inner.append(value_in(path))
        os.fsync(descriptor)

    monkeypatch.setattr(writing.os, "fsync", both)
    peftkit.save(model(1.0), path)
    assert inner[1] == 2.0
    assert value_in(path) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_leftovers_of_this_file_are_removed(tmp_path):
    """Not those of another file, and nothing that is merely called alike."""
    path = tmp_path / "a.safetensors"
    kept = [
        ".b.safetensors.0123456789abcdef.tmp",
        ".a.safetensors.note.tmp",
        "a.safetensors.0123456789abcdef.tmp",
        ".aXsafetensors.0123456789abcdef.tmp",
    ]
    for name in [*kept, ".a.safetensors.0123456789abcdef.tmp"]:
        (tmp_path / name).write_text("")
    peftkit.save(model(1.0), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, *kept])


# ------------------------------------------------------------------------------------- errors of the system


class Faulty:
    """Lets the n-th call to the system fail, among those that a save makes, in the order in which it makes them."""

    def __init__(self, monkeypatch, number, code):
        self.number, self.code, self.calls = number, code, []
        for name in ("fsync", "replace", "open", "close", "listdir"):
            self._wrap(monkeypatch, writing.os, name)
        if writing.fcntl is not None:
            self._wrap(monkeypatch, writing.fcntl, "flock")
        monkeypatch.setattr(writing, "open", self._open, raising=False)
        self.on = False

    def _wrap(self, monkeypatch, module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            self.count(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    def _open(self, *args, **kwargs):
        self.count("open a file")
        return File(builtins.open(*args, **kwargs), self)  # noqa: PTH123

    def count(self, name):
        if not self.on:
            return
        self.calls.append(name)
        if len(self.calls) == self.number:
            raise OSError(self.code, os.strerror(self.code))


class File:
    """A file whose writes, flushes and closing are counted too; a write that fails may have written half of it."""

    def __init__(self, file, faulty):
        self.file, self.faulty = file, faulty

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.faulty.count("close a file")

    def fileno(self):
        return self.file.fileno()

    def writelines(self, parts):
        for part in parts:
            raw = bytes(part)
            self.file.write(raw[: len(raw) // 2])
            self.faulty.count("write")
            self.file.write(raw[len(raw) // 2 :])

    def flush(self):
        self.faulty.count("flush")
        self.file.flush()


def saved(path, net, faulty):
    """Save with a fault; whether it said that it could not."""
    faulty.on = True
    try:
        peftkit.save(net, path)
    except errors.FileError as error:
        if str(path) not in str(error):
            raise
        return False
    finally:
        faulty.on = False
    return True


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EINTR, errno.EACCES], ids=errno.errorcode.get)
def test_an_error_of_any_call_leaves_the_old_file_or_the_new_one(tmp_path, code):
    """Each call that a save makes fails once: an error that names the file, and a file that is whole; the next save works."""
    path = tmp_path / "a.safetensors"
    old, new = model(1.0), model(2.0)
    with pytest.MonkeyPatch.context() as patch:
        whole = Faulty(patch, 0, code)
        assert saved(path, new, whole)
    assert {"open a file", "write", "flush", "fsync", "replace", "close a file", "open", "close"} <= set(whole.calls)
    said = []
    for number, call in enumerate(whole.calls, start=1):
        peftkit.save(old, path)
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, number, code)
            said.append(saved(path, new, faulty))
        assert faulty.calls[:number] == whole.calls[:number]
        assert value_in(path) in ((2.0,) if said[-1] else (1.0, 2.0)), call
        peftkit.save(new, path)
        assert value_in(path) == 2.0
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for name in ("open a file", "write", "flush", "fsync", "replace"):
        assert said[whole.calls.index(name)] is False, name


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_a_full_disk(tmp_path):
    """A process that may write no more bytes than half a file gets an error that says why, and the old file stays."""
    path = tmp_path / "a.safetensors"
    peftkit.save(model(1.0, width=200), path)
    size = path.stat().st_size
    code = textwrap.dedent(f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_crashes import model
        import peftkit
        net = model(2.0, width=200)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))
        try:
            peftkit.save(net, {str(path)!r})
        except peftkit.errors.FileError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert value_in(path) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_is_really_full(tmp_path):
    """On a file system of 256 KB, saves until it is full, and beyond: the last one that succeeded is there."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    ) if sys.platform == "linux" else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path, full = mount / "a.safetensors", 0
        peftkit.save(model(1.0, width=100), path)
        for filler in range(8):
            before = value_in(path)
            with contextlib.suppress(OSError):
                (mount / f"filler{filler}").write_bytes(b"x" * 40_000)
            try:
                peftkit.save(model(float(2 + filler), width=100), path)
            except errors.FileError as error:
                full += "No space left on device" in str(error) and value_in(path) == before
                assert not list(mount.glob(".*.tmp"))
            else:
                assert value_in(path) == 2 + filler
        assert full
        for each in mount.glob("filler*"):
            each.unlink()
        peftkit.save(model(99.0, width=100), path)
        assert value_in(path) == 99.0
    finally:
        subprocess.run(["umount", str(mount)], check=True)
