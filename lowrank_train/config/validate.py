"""The composed tree against the schema: every unknown key and every wrong value, all at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from lowrank_train.config.library_names import library_faults
from lowrank_train.config.parts import TARGET, NoSuchPart, arguments_of, part_faults
from lowrank_train.config.peft_names import peft_faults
from lowrank_train.config.schema import Part, RunConfig
from lowrank_train.config.suggest import suggest_key
from lowrank_train.config.values import WrongValue, convert

UNKNOWN = "there is no such key"
hints_of = functools.cache(get_type_hints)  # of a dataclass of the schema; reading them off its texts takes a while


@dataclass(frozen=True)
class Fault:
    """One thing wrong: the dotted key, the rule with its way out, and `=value` where that helps."""

    key: str
    rule: str
    given: str = ""

    def sentence(self, origin: str) -> str:
        """One line for the user; `origin` says where he wrote it, or is empty."""
        return f"{self.key}{self.given}{f' ({origin})' if origin else ''}: {self.rule}"


def build(tree: dict[str, Any]) -> tuple[RunConfig | None, list[Fault]]:
    """The typed configuration and its faults; None when there are any."""
    tree = _copied(tree)  # values are put into their types in place
    faults = list(_faults(tree, RunConfig, ""))
    known = known_keys(tree) if faults else []
    named = [_with_suggestion(fault, tree, known) if fault.rule == UNKNOWN else fault for fault in faults]
    return (None, named) if named else (_construct(tree, RunConfig), [])


def _copied(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _copied(value) for key, value in node.items()}
    return [_copied(value) for value in node] if isinstance(node, list) else node


def _faults(node: dict[str, Any], schema: type, prefix: str) -> Iterator[Fault]:
    hints = hints_of(schema)
    for name, value in node.items():
        key = f"{prefix}{name}"
        expected = hints.get(name)
        if expected is None:
            yield from (Fault(leaf, UNKNOWN) for leaf in _leaves(key, value))
        elif dataclasses.is_dataclass(expected) and isinstance(expected, type):
            if isinstance(value, dict):
                yield from _faults(value, expected, f"{key}.")
            else:
                yield Fault(key, f"is a group: choose one with {name}=NAME, or set {key}.KEY=VALUE", _given(value))
        elif _is_part(expected) and isinstance(value, dict):
            for where, rule in _part_faults(key, value) if value else ():
                leaf = where.removeprefix(f"{key}.")
                yield Fault(where, rule or UNKNOWN, _given(value[leaf]) if rule and leaf in value else "")
        elif _is_part(expected) and isinstance(value, str):
            yield Fault(key, f"is a choice among parts: write {key.replace('.', '/')}={value}", _given(value))
        else:
            try:
                node[name] = convert(value, expected)
            except WrongValue as error:
                yield Fault(key, str(error), _given(value))


def _part_faults(key: str, part: Part) -> Iterator[tuple[str, str]]:
    yield from part_faults(key, part)
    yield from library_faults(key, part)
    yield from peft_faults(key, part)


def _is_part(expected: Any) -> bool:
    return expected == Part or Part in get_args(expected)


def _given(value: Any) -> str:
    """`=value` as it would be written on the command line."""
    return "=null" if value is None else f"={str(value).lower() if isinstance(value, bool) else value}"


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key


def known_keys(tree: Mapping[str, Any], schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, and those of the parts that the tree has chosen."""
    keys = []
    for name, expected in hints_of(schema).items():
        value = tree.get(name)
        keys.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(expected) and isinstance(expected, type):
            keys += known_keys(value if isinstance(value, Mapping) else {}, expected, f"{prefix}{name}.")
        elif _is_part(expected) and isinstance(value, Mapping) and TARGET in value:
            try:
                keys += [f"{prefix}{name}.{argument}" for argument in arguments_of(str(value[TARGET]))]
            except NoSuchPart:
                continue
    return keys


def _with_suggestion(fault: Fault, tree: Mapping[str, Any], known: list[str]) -> Fault:
    """Name the key that was meant: the first unknown word of the path is looked up, what follows it is kept."""
    words = fault.key.split(".")
    depth = next(i for i in range(len(words)) if ".".join(words[: i + 1]) not in known)
    parent = "".join(f"{word}." for word in words[:depth])
    siblings = [key.removeprefix(parent) for key in known if key.startswith(parent)]
    siblings = [key for key in siblings if "." not in key]
    found = suggest_key(".".join(words[: depth + 1]), siblings, known)
    rest = "".join(f".{word}" for word in words[depth + 1 :])
    if found is not None and rest and f"{found}{rest}" not in known:
        found = suggest_key(fault.key, [], known) or found
        rest = ""
    if found is None or f"{found}{rest}" == fault.key:
        return dataclasses.replace(fault, rule=f"{UNKNOWN}. All keys: python train.py --cfg job")
    return dataclasses.replace(fault, rule=f"{UNKNOWN}. Did you mean {found}{rest}?")


def _construct(tree: Mapping[str, Any], schema: type) -> Any:
    hints = hints_of(schema)
    return schema(
        **{
            name: _construct(value, hints[name]) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in tree.items()
        }
    )
