"""Feed damaged files to moeplug, many thousands of them, and stop at the first wrong answer.

    python tests/fuzz.py headers --count 250000      # also: index, config, yaml; --seed N for other ones
    python tests/fuzz.py yaml --seed 7 --only 1234   # one of them again

A damaged file may be accepted, or refused with an error of moeplug's own. Wrong is any other exception, a header that
safetensors itself refuses or reads differently, more memory than the file's size justifies, 10 seconds without an
answer, and whatever else `guard.py` watches for. Mutant N of a seed is the same bytes every time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import tracemalloc
from abc import ABC, abstractmethod
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import yaml
from guard import ROOT, Guard, time_limit
from mutate import mutate_bytes, mutate_json, parse, write

COUNTS: Final = {"headers": 250_000, "index": 50_000, "config": 20_000, "yaml": 50_000}
TIME_LIMIT_S: Final = 10
MEMORY: Final = 1 << 30  # address space beyond what the process has; a length that lies asks for more
# A tenth of all mutants is measured, because tracemalloc makes everything slower. A JSON list of 2 bytes becomes an
# object of 56, and each value of a YAML file has a position of some 200 bytes.
MEASURED_EVERY: Final = 10
BYTES_PER_BYTE = 200
MEMORY_DISK: Final = Path("/dev/shm")


class Wrong(Exception):
    """What moeplug did with a mutant, and must not do."""


class Mutant(NamedTuple):
    """A damaged file, and the name that it has in its folder."""

    name: str
    content: bytes


class Target(ABC):
    """One kind of file. folder: empty, and the only one that moeplug may read from.

    imports: what reading imports sooner or later. bytes_at_least: of memory, however small a file is.
    """

    imports: tuple[str, ...] = ()
    bytes_at_least = 2 << 20

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def make(self, chance: Random) -> Mutant:
        """Return a mutant."""

    @abstractmethod
    def read(self, path: Path) -> None:
        """Have moeplug read a mutant; return if it accepts it, raise Wrong, or what moeplug raises."""


# Headers


def entry(begin: int, end: int, dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SMALL: Final = {
    "__metadata__": {"format": "pt", "é": 'quote " and \\'},
    "a.weight": entry(0, 16, "BF16", [2, 4]),
    "b": entry(16, 20, "F32", []),
    "empty": entry(20, 20, "I64", [0, 7]),
    "c": entry(20, 26, "F4", [3, 4]),
}
LARGE: Final = {f"model.layers.{i}.mlp.experts.{i}.w": entry(4 * i, 4 * i + 4, "BF16", [1, 2]) for i in range(60)}
LENGTHS: Final = (0, 1, 9_999, 99_999_999, 100_000_001, 2**31, 2**63, 2**64 - 1)
OTHER_FILES: Final = (b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>", b"PK\x03\x04", b"GGUF", b"")
HEADER_VALUES: Final = (
    *("BF16", "F32", "F4", "F6_E2M3", "F8_E8M0", "BOOL", "bf16", "F3", "", "__metadata__", "dtype", "shape"),
    *([0, 4], [4, 0], [0, 26], [16, 20], [20, 26], [0, 2**60], [2**40, 2**40, 0], [0.0, 4], [True], [], [26, 26]),
    *({}, {"format": "pt"}, {"a": 1}, entry(0, 4, "U8", [4]), entry(26, 30, "U8", [4]), entry(26, 26, "U8", [0])),
)


class Headers(Target):
    """A safetensors file: JSON or bytes of its header damaged, data cut, or a length that lies."""

    def make(self, chance: Random) -> Mutant:
        header: dict[str, Any] = chance.choice((SMALL, SMALL, SMALL, {}, LARGE))
        data = bytes(max((e["data_offsets"][1] for name, e in header.items() if name[0] != "_"), default=0))
        tree = parse(json.dumps(header))
        if chance.random() < 0.6:
            tree = mutate_json(tree, chance, HEADER_VALUES)
        text = write(tree).encode()
        if chance.random() < 0.4:
            text = mutate_bytes(text, chance)
        kind = chance.randrange(8)
        if kind == 0:
            text += b" " * chance.randint(1, 9)
        if kind == 1:
            data = data[: chance.randrange(len(data) + 1)] + bytes(chance.randrange(9))
        stated = chance.choice((*LENGTHS, len(text) + 1, len(text) - 1)) if kind == 2 else len(text)
        content = (stated % 2**64).to_bytes(8, "little") + text + data
        if chance.randrange(20) == 0:
            content = chance.choice(OTHER_FILES) + content[chance.randrange(9) :]
        if chance.randrange(20) == 0:
            content = content[: chance.randrange(len(content) + 1)]
        return Mutant("model.safetensors", content)

    def read(self, path: Path) -> None:
        from moeplug.checkpoint.safetensors_header import read_header

        descriptor = os.open(path, os.O_RDONLY)
        try:
            header = read_header(descriptor, path)
        finally:
            os.close(descriptor)
        self.compare(path, {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()})

    def compare(self, path: Path, ours: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """Raise Wrong unless safetensors reads the same in a file that moeplug accepts."""
        from safetensors import safe_open

        try:
            with safe_open(path, "np") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
                theirs = {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
        except Exception as error:
            raise Wrong(f"safetensors refuses what moeplug accepts: {type(error).__name__}: {error}") from error
        if ours != theirs:
            raise Wrong(f"safetensors reads {theirs}, moeplug reads {ours}")


# Indexes and configs


PARTS: Final = ("gate_proj", "up_proj", "down_proj")
NAMES: Final = [f"model.layers.{i}.mlp.experts.{e}.{part}.weight" for i in (0, 1) for e in (0, 1) for part in PARTS]
SHARDS: Final = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WEIGHT_MAP: Final = {name: SHARDS[i // 6] for i, name in enumerate(NAMES)}
CONFIG: Final = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "dtype": "bfloat16",
}
PACKED: Final = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
BLOCKS: Final = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [128, 128]}
QUANTIZED: Final = (
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": PACKED}}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": BLOCKS, "format": "float-quantized"}}},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "mxfp4"},
)
INDEX_VALUES: Final = (
    *("../x.safetensors", "C:\\x.safetensors", "a/b.safetensors", ".safetensors", "x.bin", "..", ".", *SHARDS, *NAMES),
    *("model-00001-of-00002.safetensors\0", "\x1b[2J.safetensors", "model-00003.safetensors", "/x.safetensors"),
    *("model.layers.0.mlp.experts.9.up_proj.weight", "weight_map", "metadata", {}, {"a": "b.safetensors"}),
)
CONFIG_VALUES: Final = (
    *("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba", "unknown", "relu2", "none", "float32", "moeplug"),
    *("num_local_experts", "moe_intermediate_size", "text_config", "quantization_config", "layer_types", *QUANTIZED),
    *([128, 128], [0, 0], ["1", "2"], [1], "128", "group", "block", "channel", "float-quantized", "num_bits"),
    *(5, 9_999, 10_000, 999_999, 10**6, 10**17),
)


class Folder(Target):
    """A folder of a tiny model: config.json, an index, and two shards."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
        for shard in SHARDS:
            names = [name for name, file in WEIGHT_MAP.items() if file == shard]
            shapes = [[8, 4] if "down" in name else [4, 8] for name in names]
            header = {n: entry(64 * i, 64 * i + 64, "BF16", shapes[i]) for i, n in enumerate(names)}
            text = json.dumps(header).encode()
            (folder / shard).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64 * len(names)))


class Index(Folder):
    """A damaged index."""

    def make(self, chance: Random) -> Mutant:
        tree = parse(json.dumps({"metadata": {"total_size": 768}, "weight_map": WEIGHT_MAP}))
        text = write(mutate_json(tree, chance, INDEX_VALUES)).encode()
        return Mutant("model.safetensors.index.json", mutate_bytes(text, chance) if chance.random() < 0.3 else text)

    def read(self, path: Path) -> None:
        from moeplug.checkpoint.reader import Checkpoint

        for name in Checkpoint.open(self.folder).tensors:
            if name not in NAMES:
                raise Wrong(f"{name!r} is in no shard")


class Config(Folder):
    """A damaged config.json, also of a quantized model: is it recognised, and are the experts found?"""

    imports = ("moeplug.checkpoint.guess", "moeplug.integrations.prequantized", "moeplug.moe.router")
    bytes_at_least = 64 << 20  # a config.json of 200 bytes may announce 16,384 experts, and their names are looked for

    def make(self, chance: Random) -> Mutant:
        config: dict[str, Any] = dict(CONFIG)
        if chance.random() < 0.5:
            config["quantization_config"] = chance.choice(QUANTIZED)
        text = write(mutate_json(parse(json.dumps(config)), chance, CONFIG_VALUES)).encode()
        return Mutant("config.json", mutate_bytes(text, chance) if chance.random() < 0.2 else text)

    def read(self, path: Path) -> None:
        from moeplug.checkpoint.family import find_family
        from moeplug.checkpoint.guess import draft
        from moeplug.checkpoint.reader import Checkpoint
        from moeplug.integrations.prequantized import encoding_of

        checkpoint = Checkpoint.open(self.folder)
        config, tensors = checkpoint.config, checkpoint.tensors
        draft(config, tensors)
        encoding = encoding_of(config, self.registry)
        family = find_family(config, self.registry.families())
        locate = functools.partial(family.locate_encoded, encoding=encoding) if encoding else family.locate
        claimed: set[str] = set()
        for layer in family.layers(config | {"quantization_config": None} if encoding else config):
            family.router(config, layer.index)
            claimed |= {source.tensor.name for source in locate(layer, tensors)}
        family.unclaimed(tensors, claimed, config)

    @functools.cached_property
    def registry(self) -> Any:
        """The installed plugins."""
        from moeplug.registry import Registry

        return Registry.discover()


# YAML


ATTACKS: Final = (
    '!!python/object/apply:os.system ["touch x"]', "!!python/name:os.system", "!!binary aGk=", "!a b", "!<tag:x> 1",
    "&a [*a, *a]", "*a", "{<<: {a: 1}}", "&a 1", "[" * 900, "[" * 900 + "]" * 900, "{a: " * 900, "- " * 900,
    "0x1f", "0o17", "010", "1_000", "1:30", "190:20:30.15", "2026-01-01", "on", "off", "yes", "True", "~", ".nan",
    "-.inf", "1e999", "1e-999", "1e-12", "9" * 5000, "0." + "9" * 5000, "-0", "+1", '"\\U99999999"', '"\\ud800"',
    '"\\0"', "'", '"', "|", ">", "|9", "%", "@", "`", "---", "...", "%YAML 1.9999999999", "%TAG ! x", "# x", "\u2028",
    "\ufeff", "\x85", "\r", "\t", "a" * 3000, "../../etc/passwd", "/etc/passwd", "os:system", "{{7*7}}", "(a+)+$",
    "0-3,9", "9-3", "0-999999", "0," * 300 + "0", "\U0001f600",
)  # fmt: skip
YAML_VALUES: Final = (
    "int8", "int4", "fp8", "channel", "group", "block", "tensor", "token", "bfloat16", "float8_e8m0fnu", "0-1", "0,9",
    "api", "name", "weights", "plugin", "overrides", "layers", "experts", "projections", "strategy", "x-mine",
    "options", "extends", "format", "group_size", "hooks", "schemes", "properties", "type", "default", "enum",
    "required", "items", "{layer}", "{expert}", "model.layers.{layer}.mlp.experts.{expert}.w1.weight", "key", "from",
    {"format": "int8"}, {"type": "integer", "default": 1}, {"key": "num_experts"}, ["gate_up"], [128, 128], 128,
    {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [1, "a", True]}}}}, 0, 10**6, 10**17,
)  # fmt: skip


class Yaml(Target):
    """A scheme, a plugin.yaml or a family descriptor of this repository, damaged as data, as lines or as bytes."""

    imports = ("moeplug.moe.router",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        kinds = {
            "scheme.yaml": [*(ROOT / "schemes").glob("*.yaml"), *(ROOT / "tests/data").glob("*.yaml")],
            "plugin.yaml": (ROOT / "plugins").glob("*/src/*/plugin.yaml"),
            "family.yaml": (ROOT / "moeplug/checkpoint/families").glob("*.yaml"),
        }
        self.texts = [(kind, path.read_text()) for kind, paths in kinds.items() for path in sorted(paths)]
        (folder / "parent.yaml").write_text("api: 1\nname: parent\nplugin: int8\nweights: {format: int8}\n")

    def make(self, chance: Random) -> Mutant:
        kind = chance.choice(("scheme.yaml", "scheme.yaml", "plugin.yaml", "family.yaml"))
        text = chance.choice([text for name, text in self.texts if name == kind])
        if kind == "scheme.yaml" and chance.random() < 0.2:
            text += f"extends: {chance.choice(('parent', 'int8', 'scheme', 'nothing', '../parent', '/etc/passwd'))}\n"
        way = chance.randrange(4)
        if way == 0:
            return Mutant(kind, mutate_bytes(text.encode(), chance))
        if way == 1:  # JSON is YAML in flow style
            tree = parse(json.dumps(yaml.safe_load(text)))
            return Mutant(kind, write(mutate_json(tree, chance, YAML_VALUES)).encode("utf-8"))
        return Mutant(kind, self.mutate_lines(text, chance).encode())

    def mutate_lines(self, text: str, chance: Random) -> str:
        """Return the text with one to three lines moved, doubled, indented, taken from another file, or attacked."""
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        for _ in range(chance.choice((1, 1, 2, 3))):
            at = chance.randrange(len(lines))
            line, kind = lines[at], chance.randrange(7)
            other = chance.choice(chance.choice(self.texts)[1].splitlines() or [""])
            if kind == 0:
                lines[at] = chance.choice((" ", "  ", "    ", "\t", "- ")) + line
            elif kind == 1:
                lines.insert(chance.randrange(len(lines) + 1), chance.choice((line, other)))
            elif kind == 2:
                lines[at] = line.lstrip() if chance.random() < 0.5 else chance.choice(("", other))
            elif ":" in line:
                key, _, value = line.partition(":")
                attack = chance.choice((*ATTACKS, *(str(v) for v in YAML_VALUES)))
                lines[at] = chance.choice((f"{key}: {attack}", f"{attack}: {value}", f"{key}: {attack} {value}"))
            else:
                lines[at] = chance.choice(ATTACKS)
        return "\n".join(lines) + "\n"

    def read(self, path: Path) -> None:
        reading = {"scheme.yaml": self.read_scheme, "plugin.yaml": self.read_manifest, "family.yaml": self.read_family}
        reading[path.name](path)

    def read_scheme(self, path: Path) -> None:
        from moeplug.manifest import check_scheme
        from moeplug.scheme import Scheme

        scheme = Scheme.from_file(path, self.installed)
        check_scheme(scheme, self.manifests)
        scheme.weights_for(1, 1, "gate")
        if Scheme.from_text(scheme.to_yaml()).sha256 != scheme.sha256:
            raise Wrong(f"written and read again it means something else:\n{scheme.to_yaml()}")

    def read_manifest(self, path: Path) -> None:
        from moeplug.manifest import Manifest

        manifest = Manifest.from_file(path)
        manifest.options_model()
        manifest.with_defaults({})

    def read_family(self, path: Path) -> None:
        from moeplug.checkpoint.family import Family
        from moeplug.checkpoint.safetensors_header import TensorInfo

        family = Family.load(path)
        tensors = {name: TensorInfo(name, "BF16", (8, 4), path, 0, 64) for name in NAMES}
        family.unclaimed(tensors, (), CONFIG)
        family.joined(NAMES)
        family.memory_name(NAMES[0])
        for layer in family.layers(CONFIG):
            family.router(CONFIG, layer.index)
            family.dummy_tensors(layer)
            family.locate(layer, tensors)

    @functools.cached_property
    def installed(self) -> Any:
        """The installed schemes, for `extends:`."""
        return self.registry.scheme_files()

    @functools.cached_property
    def manifests(self) -> Any:
        """The plugin.yaml of each installed plugin."""
        return self.registry.manifests()

    @functools.cached_property
    def registry(self) -> Any:
        """The installed plugins."""
        from moeplug.registry import Registry

        return Registry.discover()


TARGETS: Final[dict[str, type[Target]]] = {"headers": Headers, "index": Index, "config": Config, "yaml": Yaml}


# The run


def mutant_of(target: Target, seed: int, number: int) -> Mutant:
    """Return mutant `number` of a seed."""
    return target.make(Random(f"{seed} {number}"))


def put(target: Target, seed: int, number: int) -> Path:
    """Write a mutant into its folder."""
    mutant = mutant_of(target, seed, number)
    path = target.folder / mutant.name
    path.write_bytes(mutant.content)
    return path


def measured(target: Target, path: Path) -> bool:
    """Return what `accepts` does; raise Wrong where it takes more memory than the file's size justifies."""
    tracemalloc.start()
    try:
        accepted = accepts(target, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    if peak > target.bytes_at_least + BYTES_PER_BYTE * size:
        raise Wrong(f"{peak:,} bytes of memory for a file of {size:,}")
    return accepted


def accepts(target: Target, path: Path) -> bool:
    """Return whether moeplug accepts a file, and False where it says why not."""
    from moeplug.errors import MoeplugError

    try:
        with time_limit(TIME_LIMIT_S):
            target.read(path)
    except MoeplugError as error:
        if not str(error).strip():
            raise Wrong(f"{type(error).__name__} says nothing") from error
        return False
    return True


def run(kind: str, seed: int, numbers: range, place: Any) -> None:
    """Check mutants in a process that is for that alone. place: shared; the number of the one that is being read."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as name:
        target = TARGETS[kind](Path(name).resolve())
        counts = [0, 0]
        started = time.perf_counter()
        for module in target.imports:
            importlib.import_module(module)
        for number in range(-50, 0):  # fills caches; nothing is watched yet
            place.value = number
            accepts(target, put(target, seed, number))
        limit_memory()
        guard = Guard(target.folder)
        for number in numbers:
            place.value = number
            with guard.paused():
                path = put(target, seed, number)
            counts[(accepts if number % MEASURED_EVERY else measured)(target, path)] += 1
            if guard.found:
                raise Wrong(f"reading data caused {guard.found}")
        guard.on = False
    seconds = time.perf_counter() - started
    print(
        f"{kind}: {len(numbers):,} mutants of seed {seed} in {seconds:.0f} s: {counts[1]:,} accepted, "
        f"{counts[0]:,} refused; nothing wrong"
    )


def limit_memory() -> None:
    """Let this process have little more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(kind: str, count: int, seed: int, only: int | None, save: Path) -> int:
    """Run in a process of its own, so that one that hangs or dies is reported too; return the exit code."""
    place = multiprocessing.Value("q", -1, lock=False)
    numbers = range(count) if only is None else range(only, only + 1)
    process = multiprocessing.get_context("fork").Process(target=run, args=(kind, seed, numbers, place))
    process.start()
    process.join()
    if process.exitcode == 0:
        return 0
    with tempfile.TemporaryDirectory() as name:
        mutant = mutant_of(TARGETS[kind](Path(name)), seed, place.value)
    kept = save / f"fuzz-{seed}-{place.value}-{mutant.name}"
    kept.write_bytes(mutant.content)
    died = f"its process died by signal {-process.exitcode}" if process.exitcode < 0 else "see above"
    print(f"{kind}: mutant {place.value} of seed {seed} is wrong: {died}. It is {kept}; again:", file=sys.stderr)
    print(f"  python tests/fuzz.py {kind} --seed {seed} --only {place.value}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TARGETS)
    parser.add_argument("--count", type=int, help="how many mutants; left out: many, some minutes")
    parser.add_argument("--seed", type=int, default=1, help="of the mutants")
    parser.add_argument("--only", type=int, metavar="N", help="mutant N alone")
    parser.add_argument("--save", type=Path, default=Path(), metavar="DIR", help="where a wrong one is kept")
    given = parser.parse_args()
    sys.exit(main(given.kind, given.count or COUNTS[given.kind], given.seed, given.only, given.save))
