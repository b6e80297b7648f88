"""Put attacks in the place of every string of every file that moeplug reads, and watch what reading it does.

    python tests/payloads.py FOLDER own        # an empty folder; result.json is then there: counts and findings
    python tests/payloads.py FOLDER prove      # do each forbidden thing; result.json says what the guard saw of it

A process of its own, because an audit hook cannot be taken away again.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import pickle
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz
import helpers
import yaml
from guard import ROOT, Guard, time_limit
from mutate import Raw, each_string_replaced, parse, write

# CANARY is replaced by a file's name: whoever runs one of these makes it.
COMMANDS = (
    "__import__('os').system('touch CANARY')",
    '!!python/object/apply:os.system ["touch CANARY"]',
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "$(touch CANARY)",
    "canary_module",
    "canary_module:run",
    "canary_module--canary_module.Run",
    "this",
    "os:system",
)
PLACES = (
    "../../../../../../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "../outside",
    "http://127.0.0.1:9/x",
)
TEXTS = ("(a+)+$", "a" * 20_000, "a\0b", "\x1b]0;x\x07", "%s%n", "{layer}")
PAYLOADS = (*COMMANDS, *PLACES, *TEXTS)
FEW = (COMMANDS[0], COMMANDS[4], PLACES[0], PLACES[4], COMMANDS[6], TEXTS[2])  # where a read takes 10 ms and more
UNQUOTED = (COMMANDS[1], COMMANDS[2], "*canary", "&canary", "`touch CANARY`")  # in YAML too
SCHEME = """
api: 1
name: mine
extends: parent
description: "words"
plugin: int8
weights: {format: int8, strategy: group, group_size: 4, symmetric: true, scale_dtype: float32}
input_activations: {format: int8, strategy: token}
overrides:
  - {layers: "0", experts: "0-1", projections: [down], plugin: int8, weights: {format: int8}}
options: {}
x-mine: text
"""
MANIFEST = """
api: 1
name: mine
kind: scheme
hooks: mine_plugin.hooks
schemes: schemes
families: families
formats: []
kernels: []
capabilities: [per_channel]
options: {properties: {level: {type: string, enum: [low, high], default: low, description: words}}, required: [level]}
needs: {cuda: {compute_capability: "8.0"}}
"""
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False}],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "a"},
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "auto_map": {"AutoTokenizer": ["canary_module.Slow", "canary_module.Fast"]},
    "chat_template": "{{ messages }}",
}


@dataclass
class Case:
    """One file. put: write its data, some string replaced; read: have moeplug read it, which takes it as it is if good.

    yaml: it is YAML: some payloads come without quotes too. expected: what it may raise beside moeplug's own errors.
    """

    name: str
    data: Any
    put: Callable[[Any], None]
    read: Callable[[], object]
    payloads: tuple[str, ...] = PAYLOADS
    yaml: bool = False
    good: bool = True
    expected: tuple[type[Exception], ...] = ()


def own_cases(folder: Path) -> Iterator[Case]:
    """Yield a case for each kind of file that moeplug reads by itself."""
    yield from model_cases(folder / "model")
    yield from yaml_cases(folder / "yaml")
    yield table_case(folder / "tables")


def model_and_export_cases(folder: Path) -> Iterator[Case]:
    """Yield a case for each file that transformers reads for moeplug, and for those of an export."""
    yield from transformers_cases(folder / "tiny")
    yield from export_cases(folder / "tiny", folder / "export")


def as_json(path: Path) -> Callable[[Any], None]:
    return lambda data: put_text(path, write(data))


def put_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def model_cases(folder: Path) -> Iterator[Case]:
    """Yield config.json, an index and a header, read as `moeplug plan` reads them."""
    from moeplug import api

    folder.mkdir()
    target = fuzz.Config(folder)
    registry = target.registry
    config, index = folder / "config.json", folder / "model.safetensors.index.json"

    def plan() -> None:
        target.read(config)
        api.plan(folder, "int8", device="cpu", registry=registry)

    with restored(config):
        named = fuzz.CONFIG | {"auto_map": {"AutoConfig": "canary_module.Config"}, "_name_or_path": "a/b"}
        yield Case("config.json", named, as_json(config), plan)
        for number, quantization in enumerate(fuzz.QUANTIZED):
            name = f"config.json, quantization_config {number}"
            quantized = {**fuzz.CONFIG, "quantization_config": quantization}
            yield Case(name, quantized, as_json(config), plan, FEW, good=False)
    with restored(index):
        yield Case("model.safetensors.index.json", json.loads(index.read_text()), as_json(index), plan)
    shard = folder / fuzz.SHARDS[0]
    with restored(shard):
        header, content = helpers.read_header(shard)
        header = {"__metadata__": {"format": "pt", "more": "words"}, **header}

        def put(data: Any) -> None:
            helpers.write_raw(shard, write(data).encode("utf-8", "surrogatepass"), content)

        yield Case("a header", header, put, lambda: api.load(folder, "int8", device="cpu", registry=registry))


def yaml_cases(folder: Path) -> Iterator[Case]:
    """Yield a scheme, a family descriptor and a plugin.yaml, each read, checked and used."""
    from moeplug import api
    from moeplug.checking import check_file
    from moeplug.registry import Registry, _read_plugin

    model = folder / "model"
    model.mkdir(parents=True)
    registry = fuzz.Config(model).registry
    (folder / "parent.yaml").write_text("api: 1\nname: parent\nplugin: int8\nweights: {format: int8}\n")
    scheme, family = folder / "mine.yaml", folder / "family.yaml"

    def read_scheme() -> None:
        check_file(scheme, None, registry)
        api.plan(model, scheme, device="cpu", registry=registry)

    yield Case("a scheme", yaml.safe_load(SCHEME), as_json(scheme), read_scheme, yaml=True)

    def read_family() -> None:
        check_file(family, None, registry)
        api.plan(model, "int8", device="cpu", family=family, registry=registry)

    described = yaml.safe_load((ROOT / "moeplug/checkpoint/families/olmoe.yaml").read_text())
    yield Case("a family", described | {"ignore": ["model.x"]}, as_json(family), read_family, yaml=True)

    site = folder / "site"
    package = site / "mine_plugin"
    for made in (package / "schemes", package / "families"):
        made.mkdir(parents=True)
    (package / "hooks.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "schemes" / "theirs.yaml").write_text("api: 1\nname: theirs\nweights: null\n")
    sys.path.insert(0, str(site))

    def read_manifest() -> None:
        point = importlib.metadata.EntryPoint("mine", "mine_plugin:plugin.yaml", "moeplug")
        found = Registry([_read_plugin(point)])
        found.families()
        found.scheme("theirs")
        found.activate("mine", "a test")

    yield Case("plugin.yaml", yaml.safe_load(MANIFEST), as_json(package / "plugin.yaml"), read_manifest, yaml=True)
    sys.path.remove(str(site))


def transformers_cases(folder: Path) -> Iterator[Case]:
    """Yield what transformers reads for us: config.json, generation_config.json, and the tokenizer's files."""
    from moeplug import api
    from moeplug.evaluation import load_tokenizer

    helpers.save_tiny("olmoe", folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))

    def plan() -> None:
        api.plan(folder, "int8", device="cpu", runtime="transformers")

    def read_tokenizer() -> None:
        load_tokenizer(folder)

    for name, read, payloads in (
        ("config.json", plan, (COMMANDS[0], COMMANDS[6], PLACES[4])),
        ("generation_config.json", plan, FEW),
        ("tokenizer_config.json", read_tokenizer, FEW),
        ("tokenizer.json", read_tokenizer, FEW),
    ):
        with restored(folder / name):
            data = json.loads((folder / name).read_text())
            yield Case(f"{name} by transformers", data, as_json(folder / name), read, payloads)


def export_cases(model: Path, folder: Path) -> Iterator[Case]:
    """Yield the files of an export in moeplug's own form: moeplug.json, config.json, and what a layer says."""
    from moeplug import api
    from moeplug.registry import Registry
    from moeplug.verifying import verify

    api.export(model, "int8", folder, "moeplug", device="cpu")
    registry = Registry.discover()

    def load() -> None:
        api.load(folder, device="cpu", registry=registry)

    def load_and_verify() -> None:
        load()
        verify(folder, model, registry=registry)

    for name, read in {"moeplug.json": load_and_verify, "config.json": load}.items():
        with restored(folder / name):
            data = json.loads((folder / name).read_text())
            yield Case(f"{name} of an export", data, as_json(folder / name), read, FEW[:4])
    shard = helpers.shard_files(folder)[0]
    with restored(shard):
        header, content = helpers.read_header(shard)
        name = next(name for name in header if name.endswith("_extra_state"))
        begin, end = header[name]["data_offsets"]

        def put(data: Any) -> None:
            text = write(data).encode("utf-8", "surrogatepass").ljust(end - begin)
            more = len(text) - (end - begin)
            changed = {
                tensor: entry | {"data_offsets": [offset + more * (offset >= end) for offset in entry["data_offsets"]]}
                for tensor, entry in header.items()
                if tensor != "__metadata__"
            }
            changed[name] = {"dtype": "U8", "shape": [len(text)], "data_offsets": [begin, begin + len(text)]}
            helpers.write_raw(shard, changed, content[:begin] + text + content[end:])

        yield Case("_extra_state of an export", json.loads(content[begin:end]), put, load, FEW)


def table_case(folder: Path) -> Case:
    """Return a table of measured schedules."""
    from moeplug.kernels import tuned

    folder.mkdir()
    table = json.loads((tuned.SHIPPED / "h100.json").read_text())
    table["cells"] = table["cells"][:2]
    path = folder / "table.json"
    return Case("a tuning table", table, as_json(path), lambda: tuned.read_table(path), expected=(ValueError,))


@contextlib.contextmanager
def restored(path: Path) -> Iterator[None]:
    """Put a file back as it was."""
    content = path.read_bytes()
    yield
    path.write_bytes(content)


def guarded(folder: Path, canary: Path) -> tuple[Guard, Path]:
    """Return a guard, and the folder that may be read; a module that makes the canary can be imported."""
    modules, work = folder / "modules", folder / "work"
    modules.mkdir()
    work.mkdir()
    (modules / "canary_module.py").write_text(f"open({str(canary)!r}, 'w').close()\nrun = Run = Config = print\n")
    os.chdir(work)
    guard = Guard(work)
    sys.path.append(str(modules))
    guard.readable += (str(modules),)  # finding a module lists the folders of sys.path
    return guard, work


def run(folder: Path, cases: Callable[[Path], Iterator[Case]]) -> dict[str, Any]:
    """Read every case with every payload; return counts by case, and findings."""
    from moeplug.errors import MoeplugError

    canary = folder / "canary"
    guard, work = guarded(folder, canary)
    counts: dict[str, int] = {}
    findings: list[str] = []
    with guard.paused():
        for case in cases(work):
            case.put(case.data)
            with contextlib.suppress(*(() if case.good else (MoeplugError,))):
                case.read()  # imports what reading imports
            counts[case.name] = 0
            for label in attacks(case, str(canary)):
                try:
                    with time_limit(10), guard.watching():
                        case.read()
                except (MoeplugError, *case.expected):
                    pass
                except Exception as error:
                    findings.append(f"{label}: raises {type(error).__name__}: {str(error)[:200]}")
                counts[case.name] += 1
                findings += [f"{label}: {what}" for what in guard.found]
                guard.found.clear()
                if canary.exists():
                    findings.append(f"{label}: it ran")
                    canary.unlink()
            case.put(case.data)
    return {"counts": counts, "findings": findings}


def attacks(case: Case, canary: str) -> Iterator[str]:
    """Write each attack, and yield what it is."""
    tree = parse(json.dumps(case.data))
    texts = [payload.replace("CANARY", canary) for payload in case.payloads]
    texts += [Raw(payload.replace("CANARY", canary)) for payload in UNQUOTED if case.yaml]
    for text in texts:
        for which, changed in each_string_replaced(tree, text):
            case.put(changed)
            yield f"{case.name}, {which} is {text[:60]!r}"


def prove(folder: Path) -> dict[str, list[str]]:
    """Do what must never happen, harmlessly, and return the events that the guard wrote down of each."""
    guard, work = guarded(folder, folder / "canary")
    inside = work / "inside"

    def tried(what: Callable[[], object]) -> list[str]:
        guard.found.clear()
        with guard.watching(), contextlib.suppress(OSError):
            what()
        return [event for event, _ in guard.found]

    with guard.paused():
        inside.write_text("1")
        (work / "link").symlink_to("/etc/passwd")
    return {
        "nothing": tried(lambda: (inside.read_bytes(), list(work.iterdir()), Path(fuzz.__file__).read_text())),
        "import": tried(lambda: importlib.import_module("this")),
        "import elsewhere": tried(lambda: importlib.import_module("canary_module")),
        "exec": tried(lambda: eval("1 + 1")),
        "compile": tried(lambda: compile("1", "<payload>", "eval")),
        "os.system": tried(lambda: os.system("true")),
        "subprocess.Popen": tried(lambda: subprocess.run(["true"])),
        "os.exec": tried(lambda: os.execv("/nowhere/true", ["true"])),
        "os.posix_spawn": tried(lambda: os.posix_spawn("/nowhere/true", ["true"], {})),
        "socket.": tried(lambda: socket.create_connection(("127.0.0.1", 9), 1)),
        "urllib.": tried(lambda: urllib.request.urlopen("http://127.0.0.1:9/")),
        "open": tried(Path("/etc/passwd").read_bytes),
        "os.listdir": tried(lambda: os.listdir("/etc")),  # noqa: PTH208
        "os.scandir": tried(lambda: os.scandir(folder).close()),
        "open a link": tried((work / "link").read_bytes),
        "open to write": tried(lambda: inside.write_text("2")),
        "os.remove": tried(lambda: inside.unlink()),
        "pickle.": tried(lambda: pickle.loads(b"cbuiltins\nlen\n.")),
        "ctypes.dlopen": tried(lambda: ctypes.CDLL(None)),
    }


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    parts = {"own": own_cases, "model": model_and_export_cases}
    result = run(place, parts[sys.argv[2]]) if sys.argv[2] in parts else prove(place)
    (place / "result.json").write_text(json.dumps(result, indent=1))
