"""The observers on a real load, each in a process of its own, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

STAGES = ("allocate", "load", "quantize", "create_scales", "setup_kernel")


def load(folder, *arguments, device="cpu", **environment):
    command = [sys.executable, "-m", "moeplug", "load", "--scheme", "int8", "--runtime", "none", "--device", device]
    state = {"XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **state, **environment}
    return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_timings_prints_a_row_of_stages_for_each_layer(tmp_path):
    done = load(tmp_path, "--observe", "timings", "--json")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["ms"])
    assert tuple(lines[header].split()[1:]) == STAGES
    rows = [[float(cell) for cell in line.split()[-5:]] for line in lines[header + 1 : header + 7]]
    assert lines[header + 1].startswith("layer 0 ")
    assert lines[header + 6].startswith("all layers ")
    for stage, total in enumerate(rows[-1]):
        assert total == pytest.approx(sum(row[stage] for row in rows[:-1]), abs=0.03)  # five cells, rounded to 0.01
    assert all(row[2] > 0 for row in rows)  # the core's own quantize is inside the wrapper
    nbytes = json.loads(done.stdout)["bytes_read"]
    for (what, count), line in zip([("read", nbytes), ("copy", 0), ("all", nbytes)], lines[header + 7 :], strict=False):
        assert line.startswith(what)
        assert line.endswith(f", {count:,} bytes")  # a CPU copies nothing


def test_trace_writes_what_perfetto_opens(tmp_path):
    done = load(tmp_path, "--observe", "trace", MOEPLUG_TRACE="load.json")
    assert done.returncode == 0, done.stderr
    assert "trace: load.json: open it in https://ui.perfetto.dev" in done.stderr
    events = json.loads((tmp_path / "load.json").read_text())["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert set(tracks.values()) == {"read", *STAGES}  # a CPU takes bytes where they were read to, and copies none
    spans = [event for event in events if event["ph"] == "X"]
    assert all(tracks[span["tid"]] == span["cat"] and span["dur"] >= 0 for span in spans)
    weights = 5 * 8 * 3  # layers, experts, projections of the demo
    counts = {track: sum(span["cat"] == track for span in spans) for track in tracks.values()}
    for stage in ("load", "quantize"):  # small weights of a projection go through together: "layer 1 up of 0, 1, 2"
        assert sum(span["name"].count(",") + 1 for span in spans if span["cat"] == stage) == weights
    assert counts["allocate"] == counts["create_scales"] == counts["setup_kernel"] == 5
    assert counts["read"] > 0
    memory = [event["args"]["bytes"] for event in events if event["ph"] == "C"]
    assert len(memory) == 10
    assert min(memory) > 1 << 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_byte_that_was_read_is_copied(tmp_path):
    done = load(tmp_path, "--observe", "trace", device="cuda", MOEPLUG_TRACE="load.json")
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "load.json").read_text())["traceEvents"]
    read, copied = (sum(e["args"]["bytes"] for e in events if e.get("cat") == what) for what in ("read", "copy"))
    assert read == copied > 0
    assert any(event["name"] == "memory on the GPU" for event in events)


def test_a_trace_that_cannot_be_written_ends_the_load_at_once(tmp_path):
    done = load(tmp_path, "--observe", "trace", MOEPLUG_TRACE="no/such/folder/load.json")
    assert done.returncode == 5
    assert "no/such/folder/load.json: the trace cannot be written: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_both_observers_may_watch_one_load(tmp_path):
    done = load(tmp_path, "--observe", "timings", "--observe", "trace")
    assert done.returncode == 0, done.stderr
    assert "all layers" in done.stderr
    assert (tmp_path / "moeplug-trace.json").exists()


def test_a_trace_has_a_short_option(tmp_path):
    done = load(tmp_path, "--trace", "short.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "short.json").read_text())["traceEvents"]
    done = load(tmp_path, "--trace", "short.json/below/a/file")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
