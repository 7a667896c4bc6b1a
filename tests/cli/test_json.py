"""`docs/json.md` beside what commands print: no key is missing there, and none is there that nobody prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import document
from typer.testing import Result

import microscale
from microscale import FormatError, conformance, machine
from microscale.bench import ceilings
from microscale.cli.explain import machine_document
from microscale.cli.timing import Timing
from microscale.conformance import Case
from microscale.invented import INVENTED
from microscale.machine import detect

Cli = Callable[..., Result]
Key = tuple[str, ...]
DOCS = Path(__file__).parents[2] / "docs" / "json.md"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
HELD = {"number": {"number", "integer"}}  # JSON has one kind of number
TABLE = re.compile(r"^\| (`.+?`) \| ([a-z, ]+) \| .*\|$", re.MULTILINE)
ANY = re.compile(r"[A-Z]+")  # a word for any name


def segments(path: str) -> Key:
    """ "layers[].name" -> ("layers", "[]", "name")."""
    return tuple(path.replace("[]", ".[]").split("."))


def documented(section: str) -> dict[Key, set[str]]:
    """Key -> its types. A key of any type holds what the section "machine" has."""
    found: dict[Key, set[str]] = {}
    text = DOCS.read_text(encoding="utf-8")
    body = re.split(rf"^##+ {section}$", text, flags=re.MULTILINE)[1]
    for names, types in TABLE.findall(re.split(r"^##+ ", body, flags=re.MULTILINE)[0]):
        for name in names.split(", "):
            path = segments(name.strip("`"))
            assert path not in found, f"{name} is documented twice"
            if types == "any":
                found |= {(*path[:-1], *below): kinds for below, kinds in documented("machine").items()}
            else:
                found[path] = set(re.split(r", | or ", types))
    assert found
    return found


def printed(value: Any, path: Key = ()) -> dict[Key, set[str]]:
    """Key -> the types of what was printed there."""
    found: dict[Key, set[str]] = {}
    if isinstance(value, dict):
        children = [((*path, key), child) for key, child in value.items()]
    elif isinstance(value, list):
        children = [((*path, "[]"), child) for child in value]
    else:
        return {path: {TYPES[type(value)]}}
    for place, child in children:
        for key, kinds in printed(child, place).items():
            found.setdefault(key, set()).update(kinds)
    return found


def matches(key: Key, pattern: Key) -> bool:
    return len(key) == len(pattern) and all(
        b == a or (ANY.fullmatch(b) is not None and a != "[]") for a, b in zip(key, pattern, strict=True)
    )


def compare(section: str, *documents: Any) -> None:
    """Hold what was printed against a section."""
    table, used = documented(section), set()
    for found in documents:
        for key, kinds in printed(found).items():
            fitting = [p for p in table if matches(key, p)]
            exact = [p for p in fitting if p == key] or fitting
            assert exact, f"{section}: {'.'.join(key)} is printed and not documented"
            allowed = set().union(*(HELD.get(k, {k}) for p in exact for k in table[p]))
            assert kinds <= allowed, f"{section}: {'.'.join(key)} is {kinds - allowed}, not {allowed}"
            used.update(exact)
    silent = [".".join(key) for key in table if key not in used]
    assert not silent, f"{section}: documented and never printed: {silent}"


def test_the_comparison_finds_what_is_amiss() -> None:
    good = {"error": {"type": "A", "message": "b"}}
    compare("error", good)
    for bad, why in (
        ({"error": {"type": "A", "message": "b", "hint": "c"}}, "error.hint is printed and not documented"),
        ({"error": {"type": "A"}}, r"never printed: \['error.message'\]"),
        ({"error": {"type": "A", "message": 3}}, "error.message is {'integer'}"),
        ({"error": [{"type": "A", "message": "b"}]}, "is printed and not documented"),
    ):
        with pytest.raises(AssertionError, match=why):
            compare("error", bad)


def test_every_command_with_json_has_a_section(cli: Cli) -> None:
    """And a command that gets one later needs one, too."""
    listed = re.findall(r"^│ ([a-z]+) ", cli("--help").stdout, re.MULTILINE)
    commands = [*(word for word in listed if word != "bench"), "bench kernels", "bench tune"]
    assert {"run", "explain", "inspect", "eval", "selftest", "doctor"} <= set(commands)
    for command in commands:
        if "--json" in cli(*command.split(), "--help").stdout:
            documented(command)


def test_error(cli: Cli) -> None:
    compare("error", document(cli("inspect", "/nowhere", "--json")))


@pytest.mark.skipif(
    not detect().core, reason=f"the C++ core is not in this installation: {detect().core_missing}"
)
def test_run(cli: Cli, tiny: Path) -> None:
    words = ("run", tiny, "abc", "--max-new-tokens", "6", "--json")
    on_gpu = Timing(1.0, {"experts": 0.5}, 10, 20.0, others=0.1).document()
    found = [document(cli(*words, "--device", "cpu", *more)) for more in (("--timing",), ("--no-graph",))]
    refusing = document(cli(*words, "--device", "cpu", "--backend", "emulation"))
    compare("run", *found, refusing, found[1] | {"timing": on_gpu})


def test_explain(cli: Cli) -> None:
    layer = ("--op", "linear", "--format", "mxfp4", "--n", "64", "--k", "64")
    nobody = ("--machine", "zen5", "--backend", "humming", "--with", "humming")
    compare(
        "explain",
        document(cli("explain", "gpt-oss-20b", "--machine", "h200", "--machine", "zen5", "--json")),
        document(cli("explain", *layer, *nobody, "--json")),
    )


def test_machines(cli: Cli) -> None:
    listed = document(cli("explain", "--machine", "list", "--json"))
    (assumed,) = document(cli("explain", "--machine", "h200", "--with", "humming", "--json"))["machines"]
    compare("machine", *listed.values(), assumed["machine"])


def test_inspect(cli: Cli, bare: Path, nan: Path) -> None:
    compare(
        "inspect", document(cli("inspect", bare, "--json")), document(cli("inspect", nan, "--scan", "--json"))
    )


def test_eval(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, fmt: str, **options: Any) -> Any:
        if fmt != "mxfp4":
            raise FormatError("mlp: K = 80 is no multiple")
        return real(model, fmt, **options)

    real = microscale.requantize
    monkeypatch.setattr(microscale, "requantize", refuse)
    (tmp_path / "some.txt").write_text("for name in sorted(items): print(name)\n" * 3)
    words = ("eval", tiny, "--text", tmp_path / "some.txt", "--max-tokens", "60", "--json")
    compare("eval", document(cli(*words)), document(cli(*words, "--formats", "none", "--master", tiny)))


@pytest.mark.skipif(
    not detect().core, reason=f"the C++ core is not in this installation: {detect().core_missing}"
)
def test_bench_kernels(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_LEAST", 8 << 20)
    monkeypatch.setattr(ceilings, "_WINDOW", 2 << 20)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 20)
    few = ("--format", "mxfp4", "--m", "1", "--repeat", "2", "--threads", "1")
    found = document(cli("bench", "kernels", "--shape", "64x96,4x2x64x32", *few, "--json"))
    assumed = machine_document(INVENTED["h200"].with_packages(["humming-kernels"]))
    compare("bench kernels", found, found | {"machine": found["machine"] | assumed})


def test_selftest(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "cases", lambda large: iter([Case("linear", "mxfp4", 2, 16, 32)]))
    words = ("--backend", "emulation", "--backend", "humming", "--device", "cpu", "--json")
    compare("selftest", document(cli("selftest", *words)))


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    here = document(cli("doctor", "--json"))
    monkeypatch.setenv("MICROSCALE_EMULATION_TILE", "much")
    bare = replace(
        INVENTED["h200"], packages=(("humming-kernels", "0.0.1"),), assumed=frozenset({"humming-kernels"})
    )
    monkeypatch.setattr(machine, "detect", lambda: bare)
    compare("doctor", here, document(cli("doctor", "--json")))
