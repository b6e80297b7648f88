"""What an export leaves behind when it is interrupted: the new one whole, or something to resume, or nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file

from moeplug import CheckpointError, InputOutputError, UsageError, api
from moeplug.checkpoint import writer
from moeplug.checkpoint.family import find_family
from moeplug.checkpoint.reader import Checkpoint
from moeplug.checkpoint.writer import FileLayer, OutputShard, OutputTensor, Staging, in_shards
from moeplug.exporting import export
from moeplug.pipeline.plan import SPAN_BYTES, activate_plugins, plan_model
from moeplug.registry import Registry
from moeplug.verifying import verify

SHARD_BYTES = 50_000  # several shards of a tiny model
CPU = torch.device("cpu")


@functools.cache
def planned(source, scheme):
    registry = Registry.discover()
    resolved = api.resolve_scheme(scheme, registry)
    activate_plugins(resolved, registry, CPU)
    checkpoint = Checkpoint.open(source)
    return plan_model(checkpoint, find_family(checkpoint.config), resolved, registry, CPU, with_dense=True), registry


class Unsynced(FileLayer):
    """Waits for no disk: what a dead process wrote is there, synced or not, and hundreds of syncs take a minute."""

    def fsync(self, descriptor):
        pass


def exported(source, target, form="moeplug", scheme="int8", **changes):
    return export(
        *planned(source, scheme), target, form, **{"shard_bytes": SHARD_BYTES, "files": Unsynced(), **changes}
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_by(folder):
    """Return the hidden folders that unfinished exports left, each with its finished files."""
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    for path in left:
        finished = json.loads((path / "moeplug.json").read_text())["files"]
        assert {p.name for p in path.iterdir()} == {"moeplug.json", *finished}
    return left


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return tiny_checkpoint("mixtral")


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """The bytes of an export that nothing disturbed, by form."""
    folder = tmp_path_factory.mktemp("reference")
    forms = ("moeplug", "compressed-tensors")
    return {form: contents(exported(source, folder / form, form).folder) for form in forms}


class Faulty(Unsynced):
    """Lets the k-th write, fsync, rename or read fail, once."""

    def __init__(self, k, fault):
        self.calls, self.k, self.fault = 0, k, fault
        self._counted = threading.Lock()

    def _is_kth(self):
        with self._counted:
            self.calls += 1
            kth = self.calls == self.k
        if kth and isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))
        return kth

    @contextlib.contextmanager
    def reads(self):
        """Every byte of a source, and of what was written, comes through os.preadv."""
        original = os.preadv

        def preadv(descriptor, views, offset):
            given = [views[0][: max(1, views[0].nbytes // 2)]] if self._is_kth() else views
            return original(descriptor, given, offset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            yield self

    def write(self, descriptor, data, offset):
        return super().write(descriptor, data[: max(1, data.nbytes // 2)] if self._is_kth() else data, offset)

    def fsync(self, descriptor):
        self._is_kth()

    def rename(self, source, target):
        self._is_kth()
        super().rename(source, target)


@pytest.mark.parametrize(
    ("form", "step", "fault"),
    [("moeplug", 1, errno.ENOSPC), ("moeplug", 3, errno.EIO), ("compressed-tensors", 13, errno.EIO)],
    ids=["moeplug-no_space", "moeplug-io_error", "compressed_tensors-io_error"],
)
def test_whichever_call_fails_the_export_is_whole_or_resumes(source, reference, tmp_path, form, step, fault):
    outcomes, k = [], 1
    while True:
        folder = tmp_path / str(k)
        folder.mkdir()
        with Faulty(k, fault).reads() as files, contextlib.suppress(InputOutputError):
            exported(source, folder / "export", form, files=files)
        if not (folder / "export").exists():
            finished = [len(json.loads((path / "moeplug.json").read_text())["files"]) for path in left_by(folder)]
            again = exported(source, folder / "export", form, resume=True)
            assert again.continued == sum(finished)
            outcomes.append(again.continued)
        assert contents(folder / "export") == reference[form]
        assert [path.name for path in folder.iterdir()] == ["export"]
        if files.calls < k:
            break
        k += step
    assert k > 40
    assert 0 in outcomes
    assert max(outcomes) >= len(reference[form]) - 2  # all, or all but config.json, beside moeplug.json


@pytest.mark.parametrize("fault", [errno.EINTR, "short"], ids=str)
def test_an_interrupted_or_short_write_or_read_is_done_again(source, reference, tmp_path, fault):
    k = 1
    while True:
        with Faulty(k, fault).reads() as files:
            exported(source, tmp_path / str(k), files=files)
        assert contents(tmp_path / str(k)) == reference["moeplug"]
        if files.calls < k:
            break
        k += 3
    assert k > 40


class Unreadable:
    """Stands in for os.preadv: the k-th read fails, or finds the end of the file."""

    def __init__(self, k, fault):
        self.calls, self.k, self.fault, self.read = 0, k, fault, os.preadv

    def __call__(self, descriptor, views, offset):
        self.calls += 1
        if self.calls == self.k and isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))
        return 0 if self.calls == self.k else self.read(descriptor, views, offset)


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [(errno.EIO, InputOutputError, "Input/output error"), ("cut", CheckpointError, "ends at byte .*cut")],
    ids=["EIO", "cut"],
)
@pytest.mark.parametrize("use", ["load", "export"])
def test_whichever_read_fails_the_error_says_so(source, tmp_path, monkeypatch, use, fault, error, said):
    """From config.json on, planning included."""

    def used(target, k):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", Unreadable(k, fault))
            if use == "load":
                api.load(source, "int8", device="cpu")
            else:
                api.export(source, "int8", target, "moeplug", device="cpu", resume=k == 0)
            return os.preadv.calls

    reads = used(tmp_path / "whole", 0)
    assert reads >= 5
    for k in range(1, reads + 1):
        with pytest.raises(error, match=said):
            used(tmp_path / "export", k)
        if use == "export":
            used(tmp_path / "export", 0)
            assert contents(tmp_path / "export") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "export")


def test_killed_at_30_random_moments_an_export_is_whole_or_resumes(source):
    script = Path(__file__).parent / "kill_exports.py"
    done = subprocess.run([sys.executable, script, "--count=30", f"--model={source}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture
def small_reads(monkeypatch):
    """Progress is called after each read: the source is small enough for a handful."""
    monkeypatch.setitem(SPAN_BYTES, "cpu", 1)


class InterruptedAt:
    """Progress that is interrupted at its k-th call."""

    def __init__(self, k):
        self.left = k

    def __call__(self, done, total):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupt_leaves_only_what_can_be_resumed(small_reads, source, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        exported(source, tmp_path / "export", "compressed-tensors", progress=InterruptedAt(2))
    assert list(tmp_path.iterdir()) == []
    for k in (12, 20):
        with pytest.raises(KeyboardInterrupt):
            exported(source, tmp_path / "export", "compressed-tensors", progress=InterruptedAt(k), resume=True)
        assert len(left_by(tmp_path)) == 1
    assert exported(source, tmp_path / "export", "compressed-tensors", resume=True).continued > 1
    assert contents(tmp_path / "export") == reference["compressed-tensors"]


@pytest.fixture
def unfinished(small_reads, source, tmp_path):
    """A folder beside which an export was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        exported(source, tmp_path / "export", progress=InterruptedAt(20))
    (left,) = left_by(tmp_path)
    return left


def test_what_is_left_is_not_begun_anew_without_being_asked(source, unfinished, tmp_path):
    before = contents(unfinished)
    with pytest.raises(UsageError, match="an unfinished export of it is there, with . finished files; continue it"):
        exported(source, tmp_path / "export")
    assert contents(unfinished) == before


@pytest.mark.parametrize(
    ("change", "named"), [({"scheme": "int8-g32"}, "scheme"), ({"form": "compressed-tensors"}, "format")]
)
def test_only_an_export_of_the_same_is_continued(source, unfinished, tmp_path, change, named):
    before = contents(unfinished)
    with pytest.raises(UsageError, match=rf"the unfinished export is another one: .*{named}"):
        exported(source, tmp_path / "export", resume=True, **change)
    assert contents(unfinished) == before


def test_another_model_is_no_continuation(tiny_checkpoint, unfinished, tmp_path):
    with pytest.raises(UsageError, match=r"another one: .*source differ"):
        exported(tiny_checkpoint("olmoe"), tmp_path / "export", resume=True)


CHANGES = {
    "weights": lambda model: helpers.edit_tensors(model / "model.safetensors", lambda t: t["lm_head.weight"].neg_()),
    "touched": lambda model: os.utime(model / "model.safetensors", ns=(0, 0)),
    "tokenizer": lambda model: (model / "tokenizer.json").write_text("{ }"),
    "no_tokenizer": lambda model: (model / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_an_export_is_never_a_mix_of_a_model_before_and_after_it_changed(small_reads, source, tmp_path, changed):
    """Headers are the same, so the weights would be taken for those that the finished files were made from."""
    model = helpers.copy_of(source, tmp_path)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        exported(model, tmp_path / "export", progress=InterruptedAt(20))
    (left,) = left_by(tmp_path)
    before = contents(left)
    CHANGES[changed](model)
    planned.cache_clear()
    file = "tokenizer.json" if "tokenizer" in changed else "model.safetensors"
    with pytest.raises(UsageError, match=rf"these were changed: {file}; an export is never a mix of two models"):
        exported(model, tmp_path / "export", resume=True)
    assert contents(left) == before
    shutil.rmtree(left)
    exported(model, tmp_path / "export")
    verify(tmp_path / "export", model)


@pytest.mark.parametrize("form", ["moeplug", "compressed-tensors"])
@pytest.mark.parametrize("how", ["overwritten", "touched", "cut", "replaced", "tokenizer"])
def test_a_model_that_changes_while_it_is_exported_ends_the_export(small_reads, source, tmp_path, form, how):
    model = helpers.copy_of(source, tmp_path)
    (model / "tokenizer.json").write_text("{}")
    weights = model / "model.safetensors"

    def change(done, total):
        if change.left == 0:
            if how == "overwritten":
                with weights.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"x")
            elif how == "replaced":
                shutil.copy(weights, model / "new")
                (model / "new").rename(weights)
            elif how == "tokenizer":
                (model / "tokenizer.json").write_text("{ }")
            else:
                os.utime(weights) if how == "touched" else os.truncate(weights, 5000)
        change.left -= 1

    change.left = 5
    with pytest.raises(CheckpointError, match="was changed"):
        exported(model, tmp_path / "export", form, progress=change)
    assert not (tmp_path / "export").exists()
    with pytest.raises((UsageError, CheckpointError)):
        exported(model, tmp_path / "export", form, resume=True)


def test_a_finished_file_that_was_damaged_is_written_again(source, reference, unfinished, tmp_path):
    damaged = helpers.shard_files(unfinished)[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (unfinished / "moeplug.json.partial").write_text("{")
    finished = len(json.loads((unfinished / "moeplug.json").read_text())["files"])
    assert exported(source, tmp_path / "export", resume=True).continued == finished - 1
    assert contents(tmp_path / "export") == reference["moeplug"]


def test_files_and_folders_are_synced_before_they_are_named(source, tmp_path):
    class Watched(FileLayer):
        done = []  # noqa: RUF012

        def fsync(self, descriptor):
            self.done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            super().fsync(descriptor)

        def rename(self, old, new):
            self.done.append(("named", new.name))
            super().rename(old, new)

    exported(source, tmp_path / "export", files=Watched())
    hidden = next(name for name in Watched.done if str(name).startswith(".export"))
    shard = Watched.done.index(("named", "config.json"))
    assert Watched.done[shard - 1 :] == [
        "config.json.partial", ("named", "config.json"), hidden, "moeplug.json.partial", ("named", "moeplug.json"),
        "moeplug.json.partial", ("named", "moeplug.json"), hidden, ("named", "export"), tmp_path.name,
    ]  # fmt: skip


def test_resume_with_nothing_to_resume_begins(source, reference, tmp_path):
    assert exported(source, tmp_path / "export", resume=True).continued == 0
    assert contents(tmp_path / "export") == reference["moeplug"]


def test_a_full_disk_is_found_before_anything_is_written(source, tmp_path):
    class Full(Unsynced):
        def free_bytes(self, folder):
            return 100_000

    with pytest.raises(InputOutputError, match="bytes are still to be written, and the disk has 100,000 left"):
        exported(source, tmp_path / "export", files=Full())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, found in (("file", "is a file"), ("full", "exists and is not empty"), ("link", "a symlink to nothing")):
        with pytest.raises(UsageError, match=found):
            exported(source, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full", "link"}
    assert (tmp_path / "full/precious").read_text() == "x"
    with pytest.raises(UsageError, match="exists and is not empty"):
        exported(source, source)


def test_an_empty_folder_becomes_the_export(source, reference, tmp_path):
    (tmp_path / "export").mkdir()
    exported(source, tmp_path / "export")
    assert contents(tmp_path / "export") == reference["moeplug"]


def test_a_symlink_to_an_empty_folder_stays_and_modes_follow_the_umask(source, reference, tmp_path):
    (tmp_path / "disk/empty").mkdir(parents=True)
    (tmp_path / "export").symlink_to("disk/empty")
    before = os.umask(0o027)
    try:
        exported(source, tmp_path / "export")
    finally:
        os.umask(before)
    assert (tmp_path / "export").readlink() == Path("disk/empty")
    assert contents(tmp_path / "disk/empty") == reference["moeplug"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["empty"]
    assert (tmp_path / "disk/empty").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "disk/empty").iterdir()} == {0o640}
    (tmp_path / "model").symlink_to(source)
    with pytest.raises(UsageError, match="exists and is not empty"):
        exported(source, tmp_path / "model")


def test_a_disk_that_takes_no_more_in_the_middle_costs_what_is_not_finished(source, reference, tmp_path):
    """The limit on a file's size is a quota that needs no mount; Python ignores its signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(map(len, reference["moeplug"].values()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        with pytest.raises(InputOutputError, match="File too large; finished files are kept for --resume"):
            exported(source, tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "export").exists()
    assert exported(source, tmp_path / "export", resume=bool(left_by(tmp_path))).folder.is_dir()
    assert contents(tmp_path / "export") == reference["moeplug"]


def test_a_large_file_is_synced_while_it_grows(source, reference, tmp_path, monkeypatch):
    """A sync cannot be interrupted, so that none may have much to do."""

    class Growing(FileLayer):
        unsynced, most = {}, 0

        def write(self, descriptor, data, offset):
            count = super().write(descriptor, data, offset)
            self.unsynced[descriptor] = self.unsynced.get(descriptor, 0) + count
            Growing.most = max(Growing.most, self.unsynced[descriptor])
            return count

        def fsync(self, descriptor):
            self.unsynced[descriptor] = 0

    monkeypatch.setattr(writer, "SYNC_BYTES", 10_000)
    exported(source, tmp_path / "export", "compressed-tensors", files=Growing())
    largest = max(t.nbytes for t in Checkpoint.open(tmp_path / "export").tensors.values())
    assert Growing.most <= 10_000 + largest
    assert contents(tmp_path / "export") == reference["compressed-tensors"]


def test_a_target_that_appears_meanwhile_is_left_alone_and_the_export_can_be_resumed(source, reference, tmp_path):
    class Late(Unsynced):
        def rename(self, old, new):
            if old.is_dir():
                (tmp_path / "export").mkdir()
                (tmp_path / "export/precious").write_text("x")
            super().rename(old, new)

    with pytest.raises(InputOutputError, match="cannot be written"):
        exported(source, tmp_path / "export", files=Late())
    assert contents(tmp_path / "export") == {"precious": b"x"}
    (tmp_path / "export").rename(tmp_path / "other")
    assert exported(source, tmp_path / "export", resume=True).continued == len(reference["moeplug"]) - 1
    assert contents(tmp_path / "export") == reference["moeplug"]


def refuses(target, message, resume=True):
    with pytest.raises(UsageError, match=message), Staging.open(target, {}, resume=resume):
        raise AssertionError


HOLDS = """
import sys
from pathlib import Path
from moeplug.checkpoint.writer import Staging
with Staging.open(Path(sys.argv[1]), {}) as staging:
    staging.add("a", [b"x"])
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_a_target_that_another_process_writes_is_refused_until_it_is_dead(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "export")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"begun\n"
        for resume in (False, True):
            refuses(tmp_path / "export", "is being written by another export", resume)
        child.send_signal(signal.SIGKILL)
    with Staging.open(tmp_path / "export", {}, resume=True) as staging:
        assert staging.has("a")
        staging.publish()
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"a", "moeplug.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_target_that_this_process_writes_is_refused(tmp_path):
    with Staging.open(tmp_path / "export", {}):
        refuses(tmp_path / "export", "is being written by another export")
        with Staging.open(tmp_path / "other", {}):
            pass


def test_of_many_that_begin_at_once_at_most_one_writes(tmp_path):
    writing, most, refused, barrier = [], [], [], threading.Barrier(8)

    def begin():
        barrier.wait()
        try:
            with Staging.open(tmp_path / "export", {}):
                writing.append(1)
                most.append(len(writing))
                barrier.wait(20)
                writing.pop()
        except UsageError:
            refused.append(1)
            barrier.wait(20)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), len(refused)) == (1, 7)


def test_what_another_machine_left_waits_for_a_person(tmp_path):
    elsewhere = tmp_path / ".export.moeplug-0000abcd-0000abcd-1-1"
    elsewhere.mkdir()
    refuses(tmp_path / "export", r"runs on another machine and has ended, rename that folder to \.export\.moeplug-left")
    elsewhere.rename(tmp_path / ".export.moeplug-left")
    with Staging.open(tmp_path / "export", {}, resume=True):
        assert not elsewhere.exists()


def test_what_dead_processes_left_is_swept_where_nothing_of_it_can_be_resumed(tmp_path):
    with Staging.open(tmp_path / "export", {}) as staging:
        machine, boot, *_ = staging.folder.name.rpartition(".moeplug-")[2].split("-")
        dead = f"{machine}-{boot}-999999999-1"
        for name, files in {
            f".begun.moeplug-{dead}": ["model.safetensors", "model-2.safetensors.partial"],
            f".empty.moeplug-{dead}": [],
            f".journal.moeplug-{dead}": ["moeplug.json", "model.safetensors"],
            f".elsewhere.moeplug-{'0' * 8}-{boot}-999999999-1": ["model.safetensors"],
            ".export.moeplug-notes": ["model.safetensors"],
        }.items():
            (tmp_path / name).mkdir()
            for file in files:
                (tmp_path / name / file).write_text("x")
        with Staging.open(tmp_path / "other", {}):
            found = {path.name.rpartition(".moeplug-")[0] for path in tmp_path.iterdir()}
    assert found == {".journal", ".elsewhere", ".export", ".other"}


def test_what_began_before_a_restart_is_dead(tmp_path):
    with Staging.open(tmp_path / "export", {}) as staging:
        machine, _, number, started = staging.folder.name.rpartition(".moeplug-")[2].split("-")
    (tmp_path / f".export.moeplug-{machine}-00000000-{number}-{started}").mkdir()
    with Staging.open(tmp_path / "export", {}):
        assert len(list(tmp_path.iterdir())) == 1


def test_shards_hold_every_tensor_once_in_order_and_stay_within_their_size():
    tensors = [(OutputTensor(f"t{i}", "U8", (i % 7 + 1,)), OutputTensor(f"s{i}", "F32", (1,))) for i in range(50)]
    shards = in_shards(tensors, 40)
    assert [t.name for shard in shards for t in shard.tensors] == [t.name for pair in tensors for t in pair]
    assert all(sum(t.nbytes for t in shard.tensors) <= 40 for shard in shards)
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert [shard.name for shard in in_shards(tensors, 10**6)] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["__metadata__", "t0"])
def test_a_name_that_a_header_cannot_hold_is_refused(name):
    with pytest.raises(CheckpointError, match=f"two tensors of the export would be called '{name}'"):
        in_shards([[OutputTensor("t0", "U8", (1,))], [OutputTensor(name, "U8", (1,))]], 10)


def test_a_shard_is_a_file_that_safetensors_reads_whatever_the_dtypes_and_sizes(tmp_path):
    values = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5), "c": torch.randn(3, 1).bfloat16(),
              "d": torch.tensor([7, 8]), "e": torch.zeros(0, 4)}  # fmt: skip
    names = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    shard = OutputShard(
        "x.safetensors", tuple(OutputTensor(n, names[t.dtype], tuple(t.shape)) for n, t in values.items())
    )
    with Staging.open(tmp_path / "export", {}) as staging:
        with staging.shard(shard, dict) as file:
            for name, tensor in reversed(values.items()):
                file.write(name, 0, tensor.view(-1).view(torch.uint8).numpy().tobytes())
        staging.publish()
    read = load_file(tmp_path / "export/x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in values.items())
    assert (tmp_path / "export/x.safetensors").stat().st_size == shard.nbytes
