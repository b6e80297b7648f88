"""Kill exports with SIGKILL at random moments; each time the export is whole, or resumes to the same bytes.

python tests/kill_exports.py --count 300
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import helpers
import torch
from test_writer import contents, exported

FORMS = ("moeplug", "compressed-tensors")


def begun(source: Path, target: Path, form: str) -> int:
    """Start an export in a process of its own, which takes over what is there."""
    child = os.fork()
    if child == 0:
        exported(source, target, form, resume=True)
        os._exit(0)
    return child


def outcomes(source: Path, folder: Path, count: int, seed: int) -> Counter[str]:
    """Kill that many exports; return what they left. Half of the unfinished ones are resumed, half killed once more."""
    reference = {form: contents(exported(source, folder / form, form).folder) for form in FORMS}
    moment, target, found = random.Random(seed), folder / "export", Counter[str]()
    seconds, form, again = {}, FORMS[0], False
    for form in FORMS:
        started = time.perf_counter()
        assert os.waitpid(begun(source, target, form), 0)[1] == 0
        seconds[form] = time.perf_counter() - started
        shutil.rmtree(target)
    for _ in range(count):
        form = form if again else moment.choice(FORMS)
        child = begun(source, target, form)
        time.sleep(moment.random() * seconds[form])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found["killed while resuming"] += again
        again = False
        if target.exists():
            found["new"] += 1
        elif moment.random() < 0.5:
            again = True
            continue
        else:
            found["resumed" if exported(source, target, form, resume=True).continued else "begun anew"] += 1
        assert contents(target) == reference[form]
        assert {path.name for path in folder.iterdir()} == {*FORMS, target.name}, "something was left"
        shutil.rmtree(target)
    assert all(contents(folder / form) == reference[form] for form in FORMS), "an export beside it was changed"
    return found


def main() -> None:
    """Print how many exports were found new, resumed, begun anew, and killed while they resumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="Default: a tiny random Mixtral.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of the others
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or helpers.save_tiny("mixtral", Path(folder) / "source")
        (Path(folder) / "exports").mkdir()
        found = outcomes(source, Path(folder) / "exports", arguments.count, arguments.seed)
    print(f"{arguments.count} exports killed: " + ", ".join(f"{number} {what}" for what, number in found.items()))
    assert found["resumed"], found


if __name__ == "__main__":
    main()
