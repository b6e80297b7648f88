"""Print the names that others may rely on, a line each: `python tests/public_api.py > tests/public_api.txt`."""

from __future__ import annotations

import ast
import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

from moeplug import hookspecs

MODULES = (
    "moeplug",
    "moeplug.formats",
    "moeplug.quantization",
    "moeplug.kernels",
    "moeplug.moe.activations",
    "moeplug.moe.layout",
    "moeplug.moe.reference",
    "moeplug.moe.router",
    "moeplug.moe.routing",
    "moeplug.testing",
)
HOOKS = ("moeplug_register", *hookspecs.STAGE_HOOKS, "moeplug_event")


def public_api() -> list[str]:
    """Return a line for each hook, name, and member of a class: parameters and defaults, not types."""
    lines = [f"hook {name}{_parameters(getattr(hookspecs, name))}" for name in HOOKS]
    seen: set[type] = set()  # a class with two public names has its members under the first
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in _names(module):
            thing, path = getattr(module, name), f"{module_name}.{name}"
            lines.append(_head(path, thing))
            if isinstance(thing, type) and thing not in seen:
                seen.add(thing)
                lines.extend(_members(path, thing))
    return sorted(lines)


def _names(module: types.ModuleType) -> list[str]:
    """Return `__all__`, or what the module itself defines, without an underscore, at its top level."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return [name for name in names if not name.startswith("_")]


def _head(path: str, thing: Any) -> str:
    if isinstance(thing, type) and issubclass(thing, Exception):
        return f"class {path}({', '.join(base.__name__ for base in thing.__bases__)})"
    if isinstance(thing, type):
        return f"class {path}" if getattr(thing, "_is_protocol", False) else f"class {path}{_parameters(thing)}"
    return f"{path}{_parameters(thing)}" if inspect.isfunction(thing) else path


def _members(path: str, kind: type) -> Iterator[str]:
    """Yield the members that a class defines itself: methods, properties, fields, and plain constants with values."""
    own = vars(kind)
    fields = {*inspect.get_annotations(kind), *getattr(kind, "__dataclass_fields__", {})}
    for name in {*own, *fields}:
        if name != "__call__" and name.startswith(("_", "model_")):  # model_: pydantic's
            continue
        member = own.get(name)
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if inspect.isfunction(member):
            yield f"{path}.{name}{_parameters(member)}"
        elif name not in fields and isinstance(member, (str, int, float, tuple)):
            yield f"{path}.{name} = {member!r}"
        else:
            yield f"{path}.{name}"


def _parameters(thing: Any) -> str:
    signature = inspect.signature(thing)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


if __name__ == "__main__":
    print("\n".join(public_api()))
