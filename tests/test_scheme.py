"""What a scheme means, and that every mistake in one is reported at its line."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplug.errors import InputOutputError, SchemeError
from moeplug.manifest import Manifest, check_scheme
from moeplug.scheme import Override, Scheme, find_scheme, parse_ranges
from moeplug.spec import ActivationSpec, WeightSpec
from moeplug.yaml_marks import fail

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "plugins" / "moeplug-int8" / "src" / "moeplug_int8"
BAD = sorted(Path(__file__).parent.joinpath("bad_schemes").glob("*.yaml"))

HEAD = "api: 1\nname: a\nplugin: p\nweights: {format: f}\n"


def expectation(path: Path) -> str:
    first = path.read_bytes().split(b"\n")[0].decode("utf-8")
    assert first.startswith("# expect: ")
    return first.removeprefix("# expect: ")


def check_fully(path: Path, manifest: Manifest) -> None:
    if problems := check_scheme(Scheme.from_file(path), {manifest.name: manifest}):
        fail(problems, SchemeError)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_each_broken_scheme_is_refused_with_its_one_message(path: Path) -> None:
    manifest = Manifest.from_file(PACKAGE / "plugin.yaml")
    with pytest.raises(SchemeError) as caught:
        check_fully(path, manifest)
    assert f"{path}:{expectation(path)}" in str(caught.value)
    assert len(caught.value.problems) == 1  # type: ignore[attr-defined]


def test_there_are_broken_schemes_of_many_kinds() -> None:
    assert len(BAD) >= 100


def test_every_field_is_read() -> None:
    scheme = Scheme.from_text(
        """
api: 1
name: all-fields
description: everything at once
plugin: int8
weights: {format: int8, strategy: block, block_structure: [128, 64], symmetric: true, scale_dtype: bfloat16}
input_activations: {format: int8, strategy: group, group_size: 128, dynamic: true}
intermediate: null
overrides:
  - {layers: 0, projections: [down], experts: "0-3, 9", weights: null, plugin: other}
accept: {relative_rms: 3e-2}
options: {speed: 1, names: [a, "010", null]}
x-note: {any: thing}
"""
    )
    assert scheme.weights == WeightSpec(
        format="int8", strategy="block", block_structure=(128, 64), scale_dtype="bfloat16"
    )
    assert scheme.input_activations == ActivationSpec(format="int8", strategy="group", group_size=128)
    assert scheme.intermediate is None
    assert scheme.accept is not None
    assert scheme.accept.relative_rms == 0.03
    assert scheme.options == {"speed": 1, "names": ["a", "010", None]}
    assert scheme.plugins() == {"int8", "other"}
    assert scheme.source is None


def test_the_intermediate_is_quantized_as_the_input_unless_the_scheme_says_otherwise() -> None:
    activations = "input_activations: {format: f}\n"
    assert Scheme.from_text(HEAD + activations).intermediate == ActivationSpec(format="f")
    assert Scheme.from_text(HEAD + activations + "intermediate: null\n").intermediate is None
    assert Scheme.from_text(HEAD).intermediate is None


def test_a_scheme_that_quantizes_nothing_needs_no_plugin() -> None:
    scheme = Scheme.from_text("api: 1\nname: as-it-is\nweights: null\n")
    assert scheme.weights_for(0, 0, "down") == (None, None)
    assert scheme.plugins() == set()


OVERRIDES = """
overrides:
  - {layers: "0-1", weights: null}
  - {layers: 1, experts: "0,4-5", weights: {format: g}}
  - {projections: [down], experts: 7, weights: {format: h}, plugin: q}
  - {layers: 9, plugin: q}
"""


@pytest.mark.parametrize(
    ("layer", "expert", "projection", "plugin", "fmt"),
    [
        pytest.param(2, 0, "gate_up", "p", "f", id="none_matches"),
        pytest.param(0, 0, "gate_up", None, None, id="unquantized_has_no_plugin"),
        pytest.param(1, 0, "down", "p", "g", id="the_later_of_two"),
        pytest.param(1, 1, "down", None, None, id="expert_outside_the_later"),
        pytest.param(1, 5, "gate_up", "p", "g", id="last_of_a_range"),
        pytest.param(0, 7, "down", "q", "h", id="all_layers"),
        pytest.param(3, 7, "gate_up", "p", "f", id="other_projection"),
        pytest.param(3, 7, "gate", "p", "f", id="gate_is_gate_up"),
        pytest.param(9, 0, "down", "q", "f", id="plugin_alone_keeps_the_weights"),
        pytest.param(9, 7, "down", "q", "f", id="the_winner_is_alone"),
    ],
)
def test_the_last_override_that_matches_wins(
    layer: int, expert: int, projection: str, plugin: str | None, fmt: str | None
) -> None:
    found = Scheme.from_text(HEAD + OVERRIDES).weights_for(layer, expert, projection)
    assert found == (plugin, None if fmt is None else WeightSpec(format=fmt))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)).map(sorted), min_size=1, max_size=5))
def test_ranges_hold_exactly_the_numbers_between_their_ends(pairs: list[list[int]]) -> None:
    text = ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in pairs)
    held = {n for first, last in parse_ranges(text) for n in range(first, last + 1)}
    assert held == {n for a, b in pairs for n in range(a, b + 1)}
    override = Override.model_validate({"layers": text, "weights": None})
    assert held == {n for n in range(-1, 101) if override.selects(n, 0)}


def test_an_override_knows_what_it_selects() -> None:
    override = Scheme.from_text(HEAD + OVERRIDES).overrides[2]
    assert override.selects(5, 7)
    assert override.selects(5, 7, "down")
    assert not override.selects(5, 7, "gate_up")
    assert not override.selects(5, 8)


def test_later_checks_can_point_at_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("api: 1\nname: a\nplugin: p\nweights:\n  format: f\n  strategy: group\n  group_size: 128\n")
    scheme = Scheme.from_file(path)
    assert scheme.where(("weights", "group_size")) == f"{path}:7:15"
    assert scheme.where(("weights", "scale_dtype")) == f"{path}:4:1"
    assert str(scheme.problem(("weights", "group_size"), "too large")).splitlines()[1] == "      group_size: 128"
    assert scheme.source == path


def test_data_and_text_and_file_give_the_same_scheme(tmp_path: Path) -> None:
    data: dict[str, Any] = {"api": 1, "name": "a", "plugin": "p", "weights": {"format": "f"}}
    (tmp_path / "a.yaml").write_text(HEAD)
    from_file = Scheme.from_file(tmp_path / "a.yaml")
    assert Scheme.from_data(data).model_dump() == Scheme.from_text(HEAD).model_dump() == from_file.model_dump()
    with pytest.raises(SchemeError, match=r"^<data>: weights\.format: found the number 8, expected a text"):
        Scheme.from_data({**data, "weights": {"format": 8}})


def test_the_hash_covers_what_the_scheme_does_and_nothing_else() -> None:
    base = Scheme.from_text(HEAD).sha256
    same = [
        "# comment\nx-a: 1\nname: other\nplugin: p\napi: 1\ndescription: b\nweights: {strategy: channel, format: f}",
        HEAD + "intermediate: null\noverrides: []\noptions: {}\n",
    ]
    other = ["accept: {relative_rms: 1}", "options: {a: 1}", "overrides: [{layers: 0, weights: null}]"]
    assert {Scheme.from_text(text).sha256 for text in same} == {base}
    hashes = {base, *(Scheme.from_text(HEAD + text).sha256 for text in other)}
    hashes.add(Scheme.from_text(HEAD + "overrides: [{layers: 0, plugin: p}]").sha256)
    grouped = "api: 1\nname: t\nplugin: p\nweights: {format: f, strategy: group, group_size: 128"
    hashes |= {Scheme.from_text(grouped + end).sha256 for end in ("}", ", pad: false}", ", pad: true}")}
    assert len(hashes) == 7


def test_a_hash_does_not_change_between_releases() -> None:
    assert Scheme.from_text(HEAD).sha256 == "da0e16d4d34ff7df2b21290e1e68a69958b8247f61cad6d345702deca4cad391"


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff\ufffe\uffff"))
ODD = st.sampled_from(
    ["1e-5", "010", "0x1f", "0o7", "on", "~", "null", "True", "a: b", "# c", "- d", "1_0", ".inf", ""]
)
OPTIONS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**18) + 1, 10**18 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        TEXTS,
        ODD,
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | ODD, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXTS, OPTIONS, max_size=3), TEXTS)
def test_a_scheme_written_as_yaml_reads_back_the_same(options: dict[str, Any], description: str) -> None:
    data = {"api": 1, "name": "a", "plugin": "p", "weights": {"format": "f"}, "options": options}
    scheme = Scheme.from_data({**data, "description": description[:1000]})
    again = Scheme.from_text(scheme.to_yaml())
    assert again.model_dump() == scheme.model_dump()
    assert again.sha256 == scheme.sha256


def test_the_yaml_of_a_scheme_keeps_what_was_said() -> None:
    text = Scheme.from_text(HEAD + OVERRIDES).to_yaml()
    assert text.startswith("api: 1\nname: a\nplugin: p\nweights: {format: f}\n")
    assert "weights: null" in text
    assert "accept" not in text


FRAGMENTS = st.sampled_from(
    [
        *HEAD.splitlines(),
        *OVERRIDES.splitlines(),
        "weights: {format: f, strategy: group, group_size: 64}",
        "weights: {format: f, block_structure: [1, true]}",
        "weights: [1]",
        "extends: a",
        "options: {a: {b: [1, 2]}}",
        "accept: {relative_rms: 1e-3}",
        "accept: {relative_rms: yes}",
        "input_activations: {format: f}",
        "overrides: 3",
        "overrides: [{layers: [1]}, 3, null]",
        "  - layers: 3",
        "api: 1.0",
        "x-a: b",
        "? [a]",
        "a: &b c",
        "name: !!str x",
        "\tb",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(FRAGMENTS, max_size=10).map("\n".join), st.text(max_size=60)))
def test_any_text_is_a_scheme_or_a_scheme_error(text: str) -> None:
    with contextlib.suppress(SchemeError):
        Scheme.from_text(text)


class TestExtends:
    PARENT = """api: 1
name: parent
description: of the parent
plugin: p
weights: {format: f}
accept: {relative_rms: 0.1}
overrides:
  - {layers: 0, weights: null}
"""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "parent.yaml").write_text(self.PARENT)
        return tmp_path

    def child(self, folder: Path, text: str, name: str = "child") -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(f"api: 1\nname: {name}\n{text}")
        return path

    def test_keys_replace_those_of_the_parent_and_overrides_are_appended(self, folder: Path) -> None:
        path = self.child(folder, "extends: parent\naccept: null\noverrides: [{layers: 0, weights: {format: g}}]\n")
        scheme = Scheme.from_file(path)
        assert (scheme.name, scheme.description, scheme.plugin, scheme.accept) == ("child", None, "p", None)
        assert [o.weights for o in scheme.overrides] == [None, WeightSpec(format="g")]
        assert "extends" not in scheme.to_yaml()
        assert Scheme.from_text(scheme.to_yaml()).sha256 == scheme.sha256

    def test_every_value_knows_the_file_it_stands_in(self, folder: Path) -> None:
        path = self.child(folder, "extends: parent\noverrides: [{layers: 1, weights: null}]\n")
        scheme = Scheme.from_file(path)
        assert scheme.where(("weights", "format")) == f"{folder / 'parent.yaml'}:5:19"
        assert scheme.where(("overrides", 0, "layers")) == f"{folder / 'parent.yaml'}:8:14"
        assert scheme.where(("overrides", 1, "layers")) == f"{path}:4:22"

    def test_a_mistake_of_the_parent_is_shown_in_the_parent(self, folder: Path) -> None:
        (folder / "parent.yaml").write_text(self.PARENT.replace("{format: f}", "{fromat: f}"))
        with pytest.raises(SchemeError) as caught:
            Scheme.from_file(self.child(folder, "extends: parent\n"))
        message = str(caught.value)
        assert message.startswith(f"{folder / 'parent.yaml'}:5:11: weights.fromat: unknown key 'fromat'")
        assert "    weights: {fromat: f}\n              ^" in message

    def test_a_name_that_is_not_in_the_folder_is_looked_up_among_the_installed(self, folder: Path) -> None:
        installed = {"elsewhere": folder / "parent.yaml"}
        text = "api: 1\nname: child\nextends: elsewhere\n"
        assert Scheme.from_text(text, installed=installed).weights == WeightSpec(format="f")
        with pytest.raises(SchemeError, match=r"no scheme is called 'elsewher'; did you mean 'elsewhere'\?"):
            Scheme.from_text(text.replace("elsewhere", "elsewher"), installed=installed)

    def test_a_symlinked_scheme_finds_its_parent_beside_the_real_file(self, folder: Path, tmp_path: Path) -> None:
        window = tmp_path / "window"
        window.mkdir()
        (window / "child.yaml").symlink_to(self.child(folder, "extends: parent\n"))
        assert Scheme.from_file(window / "child.yaml").plugin == "p"

    def test_a_cycle_is_an_error_and_not_a_hang(self, folder: Path) -> None:
        self.child(folder, "extends: b\n", "a")
        path = self.child(folder, "extends: a\n", "b")
        with pytest.raises(SchemeError, match=r"a\.yaml:3:10: extends: extends itself"):
            Scheme.from_file(path)

    def test_a_long_chain_is_an_error(self, folder: Path) -> None:
        self.child(folder, "extends: parent\n", "c0")
        for i in range(1, 9):
            self.child(folder, f"extends: c{i - 1}\n", f"c{i}")
        assert Scheme.from_file(folder / "c7.yaml").plugin == "p"
        with pytest.raises(SchemeError, match="more than 8 schemes"):
            Scheme.from_file(folder / "c8.yaml")

    @pytest.mark.parametrize("name", ["../parent", "/etc/passwd", "parent.yaml/..", "Parent", "os:system"])
    def test_a_parent_is_a_name_and_never_a_path(self, folder: Path, name: str) -> None:
        with pytest.raises(SchemeError, match="expected the name of a scheme"):
            Scheme.from_file(self.child(folder, f'extends: "{name}"\n'))

    def test_a_parent_for_a_newer_api_is_one_error(self, folder: Path) -> None:
        (folder / "parent.yaml").write_text("api: 9\nname: parent\nnew: key\n")
        with pytest.raises(SchemeError, match=r"parent\.yaml:1:6: api: .*upgrade moeplug"):
            Scheme.from_file(self.child(folder, "extends: parent\n"))


class TestFindScheme:
    def test_a_separator_or_an_ending_makes_it_a_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a.yaml").write_text(HEAD)
        assert find_scheme("a.yaml", {}).source == Path("a.yaml")
        assert find_scheme("./a.yaml", {}).name == "a"
        with pytest.raises(InputOutputError, match="no such file"):
            find_scheme("b.yaml", {})

    def test_a_bare_name_is_an_installed_scheme_even_beside_a_file_of_that_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a.yaml").write_text(HEAD)
        with pytest.raises(SchemeError, match=r"There is a file; to use it, write \./a\.yaml"):
            find_scheme("a", {})
        assert find_scheme("a", {"a": tmp_path / "a.yaml"}).plugin == "p"

    def test_an_unknown_name_is_met_with_the_closest_and_the_known(self) -> None:
        with pytest.raises(SchemeError, match=r"'int9'; did you mean 'int8'\? Known: fp8, int8"):
            find_scheme("int9", {"int8": Path("x"), "fp8": Path("y")})

    def test_an_installed_scheme_is_called_as_its_file(self, tmp_path: Path) -> None:
        (tmp_path / "b.yaml").write_text(HEAD)
        with pytest.raises(SchemeError, match=r"b\.yaml:2:7: name: the scheme is installed as 'b'"):
            find_scheme("b", {"b": tmp_path / "b.yaml"})


SHIPPED = sorted(ROOT.glob("plugins/*/src/*/schemes/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_scheme_is_named_as_its_file_and_fits_its_plugin(path: Path) -> None:
    # Of all plugins: activations may be of a format that another one brings.
    manifests = {file.parent: Manifest.from_file(file) for file in ROOT.glob("plugins/*/src/*/plugin.yaml")}
    scheme = Scheme.from_file(path)
    assert scheme.name == path.stem
    assert scheme.description
    assert scheme.plugin == manifests[path.parents[1]].name
    assert check_scheme(scheme, {manifest.name: manifest for manifest in manifests.values()}) == []


def test_every_shipped_scheme_can_be_seen_in_the_schemes_folder() -> None:
    for path in SHIPPED:
        link = ROOT / "schemes" / path.name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == path.resolve()


def test_no_message_of_the_bad_schemes_ends_in_a_python_word() -> None:
    jargon = re.compile(r"\b(NoneType|ValidationError|dict|tuple|str|bool|pydantic|<class)\b")
    assert [
        path.name for path in BAD if jargon.search(expectation(path).replace("!!str", "").replace(":str'", ""))
    ] == []


def test_importing_schemes_and_manifests_imports_no_torch() -> None:
    code = "import sys, moeplug.manifest; sys.exit(bool({'torch', 'triton', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
