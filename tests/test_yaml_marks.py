"""What the YAML reader takes, what it refuses, and that it points at the right character."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moeplug.errors import CheckpointError, InputOutputError, SchemeError
from moeplug.yaml_marks import (
    MAX_BYTES,
    document_of,
    field_error,
    load_yaml,
    parse_yaml,
    validate,
)


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    colour: Literal["red", "green"] = "red"
    size: Annotated[int, Field(ge=1)] = 1
    pair: tuple[int, int] = (1, 1)


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(description="what it is called")
    on: bool = True
    either: int | str | None = None
    inner: Inner | None = None
    items: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = {}


def problems_of(text: str, model: type[BaseModel] = Outer) -> list[str]:
    with pytest.raises(SchemeError) as caught:
        validate(parse_yaml(text, "a.yaml"), model)
    return [str(problem).splitlines()[0] for problem in caught.value.problems]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("8", 8),
        ("-8", -8),
        ("+8", 8),
        ("0", 0),
        ("123456789012345678", 123456789012345678),
        ("1e-5", 1e-5),
        ("1e5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5E+3", -1500.0),
        ("0.0", 0.0),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("n", "n"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("0-3", "0-3"),
        ("0b11", "0b11"),
        ("'true'", "true"),
        ('"1e-5"', "1e-5"),
        ("'010'", "010"),
        ('"a\\tb\\n"', "a\tb\n"),
        ("=", "="),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text: str, value: object) -> None:
    data = parse_yaml(f"a: {text}", "a.yaml").data["a"]
    assert data == value
    assert type(data) is type(value)


@pytest.mark.parametrize("text", ["True", "NULL", "010", "-012", "0x1f", "0o17", ".nan", "-.inf", "1e999", "1" * 19])
def test_a_scalar_about_which_readers_disagree_is_refused(text: str) -> None:
    with pytest.raises(SchemeError, match=r"^a\.yaml:1:4: a: "):
        parse_yaml(f"a: {text}", "a.yaml")


def test_positions_of_keys_and_values_count_characters_from_one() -> None:
    document = parse_yaml("# first\nänder: {b: [10, {c: 20}]}\n", "a.yaml")
    assert document.position(("änder",)) == (2, 8)
    assert document.position(("änder", "b")) == (2, 12)
    assert document.position(("änder", "b", 1, "c")) == (2, 21)
    assert document.mark(("änder", "b", 1, "c"), key=True).column == 18


def test_the_position_of_what_is_missing_is_its_owners_key() -> None:
    document = parse_yaml("a:\n  b: 1\n", "a.yaml")
    assert document.position(("a", "missing", "deeper")) == (1, 1)


@pytest.mark.parametrize(
    "text", ["\ufeffname: a\r\nitems: []\r\n", "name: a\r\nitems: []", "---\nname: a\nitems: []\n...\n"]
)
def test_a_byte_order_mark_and_windows_line_ends_are_read(text: str) -> None:
    document = parse_yaml(text, "a.yaml")
    assert document.data == {"name": "a", "items": []}
    assert document.position(("name",))[1] == 7


def test_a_problem_shows_the_line_and_a_caret_under_the_column() -> None:
    with pytest.raises(SchemeError) as caught:
        validate(parse_yaml("name: a\ninner: {colour: gren}\n", "a.yaml"), Outer)
    assert str(caught.value) == (
        "a.yaml:2:17: inner.colour: found the text 'gren', expected 'red' or 'green'; did you mean 'green'?\n"
        "    inner: {colour: gren}\n"
        "                    ^"
    )


def test_the_caret_stands_under_the_column_after_wide_characters_and_in_long_lines() -> None:
    for text in ("{日本: 1, name: 5}", "{" + "".join(f"x-{i}: 1, " for i in range(60)) + "name: 5}"):
        with pytest.raises(SchemeError) as caught:
            validate(parse_yaml(text, "a.yaml"), Outer)
        _, source, caret = str(caught.value.problems[-1]).splitlines()  # type: ignore[attr-defined]
        wide = sum(character in "日本" for character in source)
        assert source[len(caret) - 1 - wide] == "5"
        assert len(source) < 130


def test_what_could_steer_a_terminal_is_shown_escaped() -> None:
    with pytest.raises(SchemeError) as caught:
        validate(parse_yaml('"a\u202eb": 1\nname: 5 # \u202e', "a.yaml"), Outer)
    shown = str(caught.value)
    assert "\u202e" not in shown
    assert "\\u202e" in shown


def test_all_problems_are_reported_at_once_in_file_order() -> None:
    text = (
        "inner: {colour: 1, size: 0, pair: [1]}\nitems:\n  - {sise: 1}\n  - 3\non: 'no'\neither: [1]\nby_name: {k: 1}\n"
    )
    assert problems_of(text) == [
        "a.yaml:1:1: name: 'name' is missing: what it is called",
        "a.yaml:1:17: inner.colour: found the number 1, expected 'red' or 'green'",
        "a.yaml:1:26: inner.size: found the number 0, expected at least 1",
        "a.yaml:1:35: inner.pair: item 2 is missing",
        "a.yaml:3:6: items[0].sise: unknown key 'sise'; did you mean 'size'? Allowed: colour, size, pair",
        "a.yaml:4:5: items[1]: found the number 3, expected a mapping (key: value)",
        "a.yaml:5:5: on: found the text 'no', expected true or false; YAML 1.2 reads no as a text",
        "a.yaml:6:9: either: found a list of 1, expected a whole number or a text",
        "a.yaml:7:14: by_name.k: found the number 1, expected a mapping (key: value)",
    ]


def test_all_problems_of_the_yaml_itself_are_reported_at_once() -> None:
    with pytest.raises(SchemeError) as caught:
        parse_yaml("a: &x 1\nb: 010\na: 2\nc: !!str d\n1: e\n", "a.yaml")
    assert [p.line for p in caught.value.problems] == [1, 2, 3, 4, 5]  # type: ignore[attr-defined]


def test_more_problems_than_anyone_reads_are_counted() -> None:
    with pytest.raises(SchemeError, match=r"and 30 more problems$"):
        parse_yaml("\n".join(["a: 1"] * 51), "a.yaml")


def test_the_caller_chooses_the_error_class() -> None:
    with pytest.raises(CheckpointError):
        parse_yaml("a: [", "a.yaml", CheckpointError)
    with pytest.raises(CheckpointError):
        validate(parse_yaml("a: 1", "a.yaml"), Outer, CheckpointError)


def test_keys_that_start_with_x_are_ignored_at_every_level() -> None:
    made = validate(parse_yaml("x-a: 1\nname: a\ninner: {x-b: [1], size: 2}\n", "a.yaml"), Outer)
    assert made.inner == Inner(size=2)


def test_a_validator_can_point_at_a_field() -> None:
    class Pointing(BaseModel):
        a: int
        b: int

        @model_validator(mode="after")
        def _b_is_wrong(self) -> Pointing:
            raise field_error("b", "b {is} wrong")

    assert problems_of("a: 1\nb: 2\n", Pointing) == ["a.yaml:2:4: b: b {is} wrong"]


@pytest.mark.parametrize("value", ["true", "1.0"])
def test_what_only_python_calls_equal_is_not_an_allowed_value(value: str) -> None:
    class One(BaseModel):
        one: Literal[1]

    (problem,) = problems_of(f"one: {value}", One)
    assert problem.endswith("expected 1")


def test_python_data_are_checked_like_a_file() -> None:
    assert document_of({"a": (1, 2)}).data == {"a": [1, 2]}
    with pytest.raises(SchemeError, match=r"^<data>: name: 'name' is missing"):
        validate(document_of({}), Outer)
    deep: list[Any] = []
    deep.append(deep)
    for bad in ({1: 2}, {"a": {1, 2}}, {"a": float("nan")}, {"a": 10**18}, {"a": "\ud800"}, {"a": deep}, {"a": b"x"}):
        with pytest.raises(SchemeError, match=r"^<data>: "):
            document_of(bad)


ATTACKS = {
    "nested_lists": "[" * MAX_BYTES,
    "nested_mappings": "{a: " * (MAX_BYTES // 4),
    "nested_blocks": "".join(" " * i + "a:\n" for i in range(1400)),
    "nested_dashes": "- " * (MAX_BYTES // 2),
    "nested_keys": "? " * (MAX_BYTES // 2),
    "billion_laughs": "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 10)),
    "doubling_merge_keys": "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 21)),
    "many_anchors": "[" + "&a x," * 60_000 + "]",
    "many_values": "[" + "a," * (MAX_BYTES // 2 - 2) + "]",
    "many_keys": "".join(f"k{i}: 1\n" for i in range(80_000)),
    "many_duplicates": "a: 1\n" * 100_000,
    "long_integer": "a: " + "1" * (MAX_BYTES - 3),
    "long_float": "a: 0." + "1" * (MAX_BYTES - 5),
    "long_hexadecimal": "a: 0x" + "f" * (MAX_BYTES - 5),
    "long_sexagesimal": "a: 1" + ":30" * 300_000 + "\nb: [",
    "long_alias": "a: *" + "b" * (MAX_BYTES - 4),
    "long_tag": "a: !" + "b" * (MAX_BYTES - 4),
    "long_directive": "%YAML 1." + "9" * 5000 + "\n---\na: 1",
    "long_line_of_colons": ":" * MAX_BYTES,
    "unclosed_text": '"' + "\\n" * (MAX_BYTES // 2 - 1),
    "only_newlines": "\n" * MAX_BYTES,
    "too_large": "a: " + "b" * MAX_BYTES,
    "object": "!!python/object/apply:os.system [id]",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_ends_soon_with_one_readable_error(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(SchemeError) as caught:
        parse_yaml(text, "a.yaml")
    assert time.perf_counter() - start < 10  # 1.2 s for the slowest alone on one core; builders are slow and shared
    assert len(str(caught.value)) < 10_000


def test_a_file_has_at_most_one_mebibyte(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"#" * MAX_BYTES)
    with pytest.raises(SchemeError, match="empty"):
        load_yaml(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(SchemeError, match="larger than"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "1:1: the file is empty"),
        ("a: 1".encode("utf-16"), "1:1: the file is UTF-16"),
        (b"a: 1\nb: \xff", "2:4: byte 0xff is not UTF-8"),
        (b"a: 1\x00", r"1:5: the character U\+0000"),
        ("ä: \ud800".encode("utf-8", "surrogatepass"), "1:4: byte 0xed is not UTF-8"),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(raw)
    with pytest.raises(SchemeError, match=rf"a\.yaml:{words}"):
        load_yaml(path)


def test_a_file_that_is_not_there_is_an_input_error_that_names_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "scheme.yaml").write_text("a: 1")
    with pytest.raises(InputOutputError, match=r"no such file; did you mean 'scheme\.yaml'\?"):
        load_yaml(tmp_path / "shceme.yaml")
    with pytest.raises(InputOutputError, match="there is no folder"):
        load_yaml(tmp_path / "nowhere" / "a.yaml")
    (tmp_path / "dangling.yaml").symlink_to("gone.yaml")
    with pytest.raises(InputOutputError, match=r"a symlink to gone\.yaml"):
        load_yaml(tmp_path / "dangling.yaml")


def test_a_folder_a_fifo_and_a_link_loop_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path in (tmp_path, tmp_path / "fifo.yaml", tmp_path / "loop.yaml", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(InputOutputError, match="cannot be read"):
            load_yaml(path)


def test_a_symlink_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    assert load_yaml(tmp_path / "b.yaml").data == {"a": 1}


YAML_LIKE = st.text(
    alphabet="ab:-{}[],&*!|>'\"#%@?~ \n\t\r0123456789.xe\\_<=U" + string.ascii_uppercase[:3], max_size=80
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(YAML_LIKE, st.text(max_size=60)))
def test_any_text_is_read_or_refused_with_a_position(text: str) -> None:
    try:
        document = parse_yaml(text, "a.yaml")
    except SchemeError as error:
        for problem in error.problems:  # type: ignore[attr-defined]
            assert 1 <= problem.line <= text.count("\n") + 2
            assert problem.column >= 1
    else:
        assert document.position(())[0] >= 1


def test_reading_yaml_imports_no_torch() -> None:
    code = "import sys, moeplug.yaml_marks; sys.exit(bool({'torch', 'triton'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
