"""A task of the lm-evaluation-harness runs on the demo model, offline, unquantized and in int8."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'moeplug[lm_eval]'"
)
TASK = """
task: which_follows
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def task(tmp_path):
    """A task of twelve questions about the demo's own text: which of two runs of words comes next."""
    from moeplug.api import demo_checkpoint

    words = (demo_checkpoint().parent / "heldout.txt").read_text().split()
    rows = []
    for start in range(0, 12 * 40, 40):
        right, wrong = (" " + " ".join(words[i : i + 6]) for i in (start + 20, start + 1000))
        rows.append({"before": " ".join(words[start : start + 20]), "choices": [right, wrong], "right": 0})
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "which_follows.yaml").write_text(TASK.format(data=data))
    return tmp_path / "which_follows.yaml"


def run(*arguments, cwd: Path):
    """Run the command in a process of its own: the harness sets environment variables and warns a lot."""
    command = [sys.executable, "-m", "moeplug", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=600)


def test_scores_are_printed_beside_each_other_with_their_difference(capsys):
    from moeplug import terminal

    terminal.print_task_scores("int8", {"reference_scores": {"t": {"acc": 0.5}}, "scheme_scores": {"t": {"acc": 0.25}}})
    assert capsys.readouterr().out.split("\n")[1].split() == ["t", "acc", "0.5000", "0.2500", "-0.2500"]


@needs_harness
def test_a_local_task_scores_int8_beside_bf16(task, tmp_path):
    done = run("eval", "-s", "int8", "--device", "cpu", "--lm-eval", task, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    unquantized, int8 = (result[key]["which_follows"]["acc"] for key in ("reference_scores", "scheme_scores"))
    # The demo model has learned such text: chance is 0.5. Of 12 questions int8 may decide one otherwise.
    assert unquantized > 0.6
    assert abs(unquantized - int8) <= 1 / 12 + 1e-9


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--lm-eval", "nothing.yaml"), 5, "nothing.yaml: cannot be read"),
        (("--lm-eval", "notask.yaml"), 2, "has no `task:` with a name"),
        (("--limit", "3"), 2, "--limit is for the tasks of --lm-eval"),
        (("--lm-eval", "a.yaml", "--max-tokens", "5"), 2, "give one or the other"),
    ],
    ids=["no_file", "no_task", "limit_alone", "text_too"],
)
def test_what_cannot_be_run_is_refused_before_a_load(tmp_path, arguments, code, expected):
    (tmp_path / "notask.yaml").write_text("dataset_path: json\n")
    done = run("eval", "-s", "int8", *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_the_extra_is_named(tmp_path):
    done = run("eval", "-s", "int8", "--lm-eval", "a.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'moeplug[lm_eval]'" in done.stderr
