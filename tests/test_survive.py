"""Signals, too little memory and disks that refuse end a load or an export with their exit code, and leave no ruin."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_writer import contents, exported, left_by

from moeplug import InputOutputError, api
from moeplug.checkpoint import streaming
from moeplug.checkpoint.files import read_into
from moeplug.pipeline import builder, memory, plan

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return tiny_checkpoint("mixtral")


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """The bytes of an export that nothing disturbed."""
    return contents(exported(source, tmp_path_factory.mktemp("reference") / "export").folder)


@pytest.fixture
def small_reads(monkeypatch):
    """The source is small enough for a handful of reads."""
    monkeypatch.setitem(plan.SPAN_BYTES, "cpu", 1)


def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moeplug-")]


# Signals

SIGNALLED = """
import os, signal, sys
from moeplug import api, cli, exporting
from moeplug.checkpoint import streaming
from moeplug.pipeline import plan
number, left, read = int(sys.argv[1]), [int(sys.argv[2])], streaming.read_into

def signalling(*arguments):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), number)  # a reading thread sends it, the main thread gets it
    read(*arguments)

streaming.read_into, plan.SPAN_BYTES["cpu"], plan.usable_cores = signalling, 1, lambda: 4
exporting.export.__kwdefaults__["shard_bytes"] = 50_000
sys.argv[1:] = sys.argv[3:]
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("command", ["load", "export"])
def test_a_signal_while_threads_read_ends_with_its_code_and_leaves_what_resumes(
    source, reference, tmp_path, command, number, code
):
    target = tmp_path / "exports/export"
    more = ["-o", target, "--format", "moeplug"] if command == "export" else ["--runtime", "none"]
    reads = 25 if command == "export" else 15  # of 33 and 24
    arguments = [int(number), reads, command, source, "--scheme", "int8", "--device", "cpu", *more]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *map(str, arguments)],
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("interrupted" if number == signal.SIGINT else "ended by SIGTERM")
    assert not (tmp_path / "state").exists()
    if command == "export":
        (left,) = left_by(target.parent)
        finished = len(contents(left)) - 1  # beside moeplug.json
        assert exported(source, target, resume=True).continued == finished > 0
        assert contents(target) == reference


# Memory

ERRORS = {
    "python": MemoryError(),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
}


def failing_at(k, call, error):
    lock, calls = threading.Lock(), [0]

    def failing(*arguments, **named):
        with lock:
            calls[0] += 1
            if calls[0] == k:
                raise error
        return call(*arguments, **named)

    return failing


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("thread", ["reading", "quantizing"])
@pytest.mark.parametrize("use", ["load", "export"])
@pytest.mark.parametrize("k", [1, 9])
def test_memory_that_runs_out_in_any_thread_is_one_error_and_every_thread_ends(
    small_reads,
    source,
    reference,
    tmp_path,
    monkeypatch,
    use,
    thread,
    error,
    k,
):
    monkeypatch.setattr(plan, "usable_cores", lambda: 4)
    target = tmp_path / "export"
    with monkeypatch.context() as patch:
        if thread == "reading":
            patch.setattr(streaming, "read_into", failing_at(k, read_into, error))
        else:
            patch.setattr(builder, "quantize", failing_at(k, builder.quantize, error))
        with pytest.raises(InputOutputError, match=r"out of memory: .*; .* on cpu were planned at the peak"):
            api.load(source, "int8", device="cpu") if use == "load" else exported(source, target)
    assert own_threads() == []
    if use == "load":
        api.load(source, "int8", device="cpu")
    else:
        exported(source, target, resume=True)
        assert contents(target) == reference


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_a_thread_that_cannot_be_started_is_said_and_the_others_end(source, monkeypatch, k):
    """Readers start first, then workers: 2 readers and 4 workers, one of which is the main thread."""
    monkeypatch.setattr(plan, "usable_cores", lambda: 4)
    with monkeypatch.context() as patch:
        error = RuntimeError("can't start new thread")
        patch.setattr(threading.Thread, "start", failing_at(k, threading.Thread.start, error))
        with pytest.raises(InputOutputError, match="out of memory: can't start new thread"):
            api.load(source, "int8", device="cpu")
    assert own_threads() == []


def test_a_reader_that_cannot_be_made_is_an_error_and_no_wait(source, monkeypatch):
    monkeypatch.setattr(streaming.FileReader, "__init__", failing_at(1, None, MemoryError()))
    with pytest.raises(InputOutputError, match="out of memory: no room for a Python object"):
        api.load(source, "int8", device="cpu")
    assert own_threads() == []


LIMITED = """
import resource, sys
from pathlib import Path
import torch
import moeplug
from moeplug import api, cli
torch.set_num_threads(1)
api.load(sys.argv[1], "int8", device="cpu")  # what is imported late is imported
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), -1))
sys.argv[1:] = sys.argv[3:]
cli.main()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("more", [2**24, 2**26], ids=["16MiB", "64MiB"])
def test_under_a_real_limit_a_load_ends_with_exit_code_5(source, wide_experts, more):
    """It would need 76 MB for what stays, beside buffers."""
    arguments = [source, more, "load", wide_experts, "--runtime", "none", "--scheme", "int8", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error: out of memory: " in done.stderr


def test_what_memory_cannot_hold_is_refused_before_it_is_read(source, monkeypatch, tmp_path):
    needed = api.plan(source, "int8", device="cpu").peak_bytes
    monkeypatch.setattr(os, "preadv", failing_at(10**9, os.preadv, None))
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    api.load(source, "int8", device="cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(InputOutputError, match=r"out of memory: .* are needed at the peak, .* left.*Nothing was read"):
        api.load(source, "int8", device="cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    for form in ("moeplug", "compressed-tensors"):
        with pytest.raises(InputOutputError, match="needed at the peak"):
            api.export(source, "int8", tmp_path / "export", form, device="cpu")
    assert list(tmp_path.iterdir()) == []


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder, version, limit, used):
    files, prefix = (
        (("memory.max", "memory.current"), "") if version == 2
        else (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_")
    )  # fmt: skip
    write(folder / files[0], f"{limit}\n")
    write(folder / files[1], f"{used}\n")
    write(folder / "memory.stat", f"anon 5\n{prefix}active_file 30\n{prefix}inactive_file 20\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_that_is_left_is_the_least_of_the_machine_and_its_groups(tmp_path, version):
    top = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    write(tmp_path / "proc/meminfo", "MemTotal: 64 kB\nMemAvailable:   32 kB\nSwapFree:  1 kB\nHugePages_Free: 0\n")
    write(tmp_path / "proc/self/cgroup", "3:cpu:/a\n0::/a/b\n" if version == 2 else "4:cpu,memory:/a/b\n0::/\n")
    assert memory.available_bytes(tmp_path) == 33 * 1024
    unlimited = "max" if version == 2 else 2**63 - 4096
    group(top / "a/b", version, unlimited, 9000)
    assert memory.available_bytes(tmp_path) == 33 * 1024
    group(top / "a", version, 20_000, 9000)
    assert memory.available_bytes(tmp_path) == 20_000 - 9000 + 50 + 1024
    group(top, version, 10_000, 9000)  # what a container sees of its own group
    assert memory.available_bytes(tmp_path) == 10_000 - 9000 + 50 + 1024


def test_where_the_system_says_nothing_of_memory_nothing_is_refused(tmp_path, source, monkeypatch):
    assert memory.available_bytes(tmp_path) is None
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    api.load(source, "int8", device="cpu")
    monkeypatch.undo()
    assert (memory.available_bytes() or 0) > 0


# Disks

IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
PROBE = [*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
mounts = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(PROBE, capture_output=True).returncode != 0,
    reason="this system lets no user mount a tmpfs in a namespace of its own",
)

ON_A_SMALL_DISK = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_writer import Unsynced, contents, exported, left_by
from moeplug import InputOutputError, UsageError
source, disk = Path(sys.argv[2]), Path(sys.argv[3])

def mounted(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

def refused(said, target, **changes):
    try:
        exported(source, target, **changes)
    except InputOutputError as error:
        assert said in str(error), error
    else:
        raise AssertionError("it was written")

class Promised(Unsynced):
    def free_bytes(self, folder):
        return 1 << 40  # someone else takes it in the meantime

reference = contents(exported(source, disk / "reference").folder)
mounted("size=160k")
refused("bytes are still to be written, and the disk has", disk / "export")
assert list(disk.iterdir()) == []
refused("No space left on device", disk / "export", files=Promised())
(left,) = left_by(disk)
mounted("remount,ro,size=160k")
refused("Read-only file system", disk / "export", resume=True, files=Promised())
mounted("remount,rw,size=1m")
assert exported(source, disk / "export", resume=True).continued > 0
assert contents(disk / "export") == reference
mounted("remount,ro,size=1m")
refused("Read-only file system", disk / "other", files=Promised())
assert [path.name for path in disk.iterdir()] == ["export"]
"""


@mounts
def test_a_disk_that_is_full_or_read_only_refuses_and_the_export_resumes_when_it_is_not(source, tmp_path):
    command = [*IN_A_NAMESPACE, sys.executable, "-c", ON_A_SMALL_DISK, str(TESTS), str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
