"""The house: floors, doors, and what no file of the core may name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moeplug
from moeplug import hookspecs

ROOT = Path(__file__).parent.parent
CORE = ROOT / "moeplug"
MODULES = sorted(CORE.rglob("*.py"))

# A module may import its own floor and those below it. The first prefix that matches decides.
FLOORS = [
    ("moeplug.errors", 0),
    ("moeplug.spec", 0),
    ("moeplug.problems", 0),
    ("moeplug.when_imported", 0),
    ("moeplug.scratch", 0),
    ("moeplug.writing", 0),
    ("moeplug.hookspecs", 0),
    ("moeplug.moe.experts", 2),
    ("moeplug.moe", 0),
    ("moeplug.formats", 1),
    ("moeplug.quantization", 1),
    ("moeplug.kernels", 1),
    ("moeplug.yaml_marks", 1),
    ("moeplug.validation", 0),
    ("moeplug.checkpoint", 3),
    ("moeplug.scheme", 3),
    ("moeplug.manifest", 3),
    ("moeplug.schema", 4),
    ("moeplug.registry", 4),
    ("moeplug.scaffold", 4),
    ("moeplug.checking", 5),
    ("moeplug.pipeline", 5),
    ("moeplug.integrations", 6),
    ("moeplug.evaluation", 6),
    ("moeplug.exporting", 7),
    ("moeplug.verifying", 7),
    ("moeplug.api", 7),
    ("moeplug.mixed", 7),
    ("moeplug.terminal", 7),
    ("moeplug.testing", 8),
    ("moeplug.cli", 8),
    ("moeplug.__main__", 9),
    ("moeplug", 0),
]
OFFICIAL_DOORS = {
    "moeplug", "moeplug.formats", "moeplug.quantization", "moeplug.moe", "moeplug.kernels", "moeplug.testing"
}  # fmt: skip


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(name):
    return next(floor for prefix, floor in FLOORS if name == prefix or name.startswith(prefix + "."))


def imports_that_run_on_import(tree):
    """Modules imported at module level, outside TYPE_CHECKING; imports in functions are how a floor waits."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for inner in ast.walk(node) if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []:
            if isinstance(inner, ast.ImportFrom) and inner.module:
                yield inner.module
            elif isinstance(inner, ast.Import):
                yield from (alias.name for alias in inner.names)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_go_down(path):
    name = module_name(path)
    for imported in imports_that_run_on_import(ast.parse(path.read_text())):
        if imported.split(".")[0] == "moeplug":
            assert floor_of(imported) <= floor_of(name), f"{name} imports {imported}, a floor above"


def test_a_stage_imports_no_other_stage():
    from moeplug.pipeline import STAGES

    for stage in STAGES:
        text = (CORE / "pipeline" / f"{stage}.py").read_text()
        others = [s for s in STAGES if s != stage and f"moeplug.pipeline.{s}" in text]
        assert not others, f"{stage} imports {others}"


@pytest.mark.parametrize("plugin", sorted((ROOT / "plugins").iterdir()), ids=lambda path: path.name)
def test_official_plugins_use_the_doors_of_strangers(plugin):
    for path in (plugin / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = []
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [node.module]
            elif isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            for name in named:
                if name.split(".")[0] == "moeplug":
                    door = name in OFFICIAL_DOORS or any(name.startswith(d + ".") for d in OFFICIAL_DOORS - {"moeplug"})
                    assert door, f"{path}: imports {name}"
                    assert "._" not in name, f"{path}: imports the private {name}"


NAMES = re.compile(r"\b(int8|int4|fp8|nf4|mxfp4|mxfp8|nvfp4|e4m3)\b", re.IGNORECASE)


@pytest.mark.parametrize("path", [p for p in MODULES if "kernels" not in p.parts], ids=module_name)
def test_the_core_names_no_number_format_in_code(path):
    """Docstrings and help texts may give examples; a comparison or a branch may not name one."""
    if "integrations" in path.parts:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Compare, ast.Match, ast.Subscript)):
            for inner in ast.walk(node):
                named = isinstance(inner, ast.Constant) and isinstance(inner.value, str) and NAMES.search(inner.value)
                assert not named, f"{path}:{inner.lineno}: {inner.value}"


# The conformance kit reads back what it saved itself.
@pytest.mark.parametrize("path", [p for p in MODULES if "testing" not in p.parts], ids=module_name)
def test_nothing_opens_a_pickle(path):
    assert not re.search(r"import pickle|torch\.load\b", path.read_text())


def test_importing_moeplug_is_light():
    code = (
        "import sys, moeplug\n"
        "heavy = {'torch', 'triton', 'numpy', 'pydantic', 'yaml', 'transformers', 'rich', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_pytest_loads_with_moeplug_imports_no_torch():
    """The entry point under pytest11 is imported by every run of pytest, of whatever project."""
    code = (
        "import sys, moeplug.testing.pytest_plugin\n"
        "heavy = {'torch', 'triton', 'numpy', 'pydantic', 'yaml', 'rich', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["load", "--help"], ["explain", "--help"], ["new-plugin", "--help"], ["plugins"],
     ["plugins", "--json"], ["schemes"], ["schemes", "show", "int8"], ["check", "schemes/int8.yaml"],
     ["schema", "scheme"], ["schema", "plugin"]],
    ids=" ".join,
)  # fmt: skip
def test_help_listing_and_checking_import_neither_torch_nor_triton(arguments):
    code = (
        "import sys\n"
        "from moeplug.cli import cli\n"
        f"cli.main({arguments!r}, standalone_mode=False)\n"
        "heavy = {m for m in sys.modules if m in ('torch', 'triton', 'transformers') or m.startswith('moeplug_')}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_every_public_name_exists_and_has_a_docstring():
    for name in moeplug.__all__:
        thing = getattr(moeplug, name)
        assert name == "__version__" or thing.__doc__, name


HOOKS = ("moeplug_register", *hookspecs.STAGE_HOOKS, "moeplug_event")


def test_the_hooks_are_the_stages_in_order():
    from moeplug.pipeline import STAGES

    assert tuple(f"moeplug_{stage}" for stage in STAGES) == hookspecs.STAGE_HOOKS
    declared = [name for name, thing in vars(hookspecs).items() if hasattr(thing, "moeplug_spec")]
    assert declared == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_when_what_it_is_given_what_to_return_and_shows_an_example(hook):
    text = getattr(hookspecs, hook).__doc__
    for part in ("When:", "Given:", "Return:", "@moeplug.hookimpl", f"def {hook}("):
        assert part in text, f"{hook} lacks {part}"
    assert "None:" in text or hook not in hookspecs.STAGE_HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_section_in_the_guide_and_a_test(hook):
    assert f"### {hook}\n" in (ROOT / "docs" / "plugin-guide.md").read_text()
    others = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    assert any(implements(ast.parse(path.read_text()), hook) for path in others)


def implements(tree, hook):
    """Whether a test module implements the hook: as a function, in a plugin's text, or in a mapping of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == hook:
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and f"def {hook}(" in node.value:
            return True
        if isinstance(node, ast.Dict):
            values = zip(node.keys, node.values, strict=True)
            if any(isinstance(k, ast.Constant) and k.value == hook and isinstance(v, ast.Lambda) for k, v in values):
                return True
    return False
