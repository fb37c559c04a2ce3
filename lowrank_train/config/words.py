"""The words of a command line: choices of groups, values of keys and deletions, read without composing anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_train.config.schema import RunConfig
from lowrank_train.config.suggest import nearest, suggest_key
from lowrank_train.config.validate import hints_of, known_keys
from lowrank_train.config.values import did_you_mean

WORD = re.compile(r"(?P<mark>~|\+\+|\+)?(?P<key>[^=\s]+?)(=(?P<value>.*))?", re.DOTALL)


@dataclass
class Words:
    """A command line taken apart, with the faults found on the way."""

    choices: dict[str, str | None] = field(default_factory=dict)  # group -> choice; None: none of them
    values: list[tuple[str, Any]] = field(default_factory=list)  # dotted key -> value, in the order written
    deletions: list[str] = field(default_factory=list)  # dotted keys
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is no fault, but should be known

    def value(self, key: str) -> Any:
        """The last value given to a key, or None."""
        return next((value for name, value in reversed(self.values) if name == key), None)


def read_words(argv: Sequence[str], groups: Mapping[str, list[str]]) -> Words:
    """Take a command line apart; what cannot be read becomes a fault, and the rest is still read."""
    words = Words()
    after_flag = False
    for word in argv:
        if after_flag and "=" not in word and word[:1] not in "~-":
            after_flag = False  # the value of a flag that is refused already
            continue
        after_flag = word.startswith("-") and "=" not in word
        if word.startswith("-"):
            words.faults.append(_not_a_word(word))
            continue
        found = WORD.fullmatch(word)
        mark, key, value = found.group("mark", "key", "value") if found else (None, word, None)
        if not found or (value is None and mark != "~"):
            words.faults.append(_not_a_word(word))
        elif key in groups or "/" in key:
            _read_choice(words, key, value, mark, groups)
        elif mark == "~":
            words.deletions.append(key)
        else:
            assert value is not None
            _read_value(words, key, value)
    return words


def _not_a_word(word: str) -> str:
    name, _, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if word.startswith("-") and name:
        key = suggest_key(name, [], known_keys({})) or name
        return f"{word}: there is no such flag; settings are written KEY=VALUE: {key}={value or 'VALUE'}"
    return f"{word if word.strip() else repr(word)}: is not KEY=VALUE"


def _read_choice(words: Words, key: str, value: str | None, mark: str | None, groups: Mapping[str, list[str]]) -> None:
    close: str | None
    if key == "launcher" and value not in ("local", None):  # of the words of a sweep's job it is no part
        words.faults.append(f"launcher={value}: says where the jobs of a sweep run; add -m")
        return
    if key not in groups:
        if key.split("/")[0] == "hydra":
            words.faults.append(f"{key}={value}: hydra's own groups belong to sweeps; add -m")
            return
        close = nearest(key, groups) or nearest(key.partition("@")[0], groups)
        words.faults.append(f"{key}: there is no such group{f'. Did you mean {close}?' if close else ''}")
    elif mark == "~" or value == "null":
        words.choices[key] = None
    elif value in groups[key]:
        words.choices[key] = value
    else:
        assert value is not None
        several = [choice for choice in value.strip("[]").split(",") if choice in groups[key]]
        if "," in value and several:
            words.faults.append(f"{key}={value}: only a sweep takes several choices; add -m")
            close = several[0]
        else:
            words.faults.append(f"{key}={value}: {no_such_choice(value, groups[key])}")
            close = nearest(value, groups[key])
        if close is not None:
            words.choices[key] = close


def no_such_choice(value: str, choices: Sequence[str]) -> str:
    """The rule for a name that is none of the choices, with the nearest and all of them."""
    return f"there is no such choice{did_you_mean(value, choices) or '.'} There are: {', '.join(choices)}"


def _read_value(words: Words, key: str, value: str) -> None:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if text_key(key) and value != "null" and not quoted:
        words.values.append((key, value))  # a prompt, a path: commas, spaces and quotes are part of it
        return
    from hydra.core.override_parser.overrides_parser import OverridesParser  # a quarter of a second: not for `recipes`
    from hydra.errors import HydraException

    if key.split(".")[0] == "hydra":
        words.faults.append(f"{key}={value}: hydra's own keys belong to sweeps; add -m")
        return
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        if override.is_sweep_override():
            words.faults.append(f"{key}={value}: only a sweep takes several values; add -m")
            return
        words.values.append((key, override.value()))
    except HydraException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        words.faults.append(
            f"{key}={value}: not a value that can be read ({reason}); put text into quotes: {key}=\"'...'\""
        )


def text_key(key: str) -> bool:
    """Is this a key of the schema whose value is text?"""
    schema: Any = RunConfig
    for name in key.split("."):
        schema = hints_of(schema).get(name) if isinstance(schema, type) and schema not in (str, int) else None
    return schema is str or schema == (str | None)
