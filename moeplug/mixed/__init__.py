"""Choose how each expert is stored, so that a model fits a budget with the least error: what `moeplug tune` does.

    task = Task.open(model, find_candidates(["int8", "int8-g32", "none"], registry), registry=registry)
    samples = capture(loaded, ids)            # runs the model on a text's tokens
    errors = measure(task, samples)           # streams the weights, expert by expert
    choice = choose(task, errors, budget)     # a knapsack, solved by HiGHS
    choice.write(Path("my.yaml"), text)       # a scheme as one writes it by hand

Not to be confused with `moeplug tune-kernels`, which measures how fast tilings of the GPU kernel are.
"""

from moeplug.mixed.candidates import NONE, Candidate, default_candidates, find_candidates, unquantized
from moeplug.mixed.capture import Sample, capture
from moeplug.mixed.choose import Choice, choose
from moeplug.mixed.measure import Errors, ExpertErrors, measure
from moeplug.mixed.solve import require_solver
from moeplug.mixed.task import Option, Per, Task

__all__ = [
    "NONE",
    "Candidate",
    "Choice",
    "Errors",
    "ExpertErrors",
    "Option",
    "Per",
    "Sample",
    "Task",
    "capture",
    "choose",
    "default_candidates",
    "find_candidates",
    "measure",
    "require_solver",
    "unquantized",
]
