"""Does a value have the type that the schema asks for, and what is that type in words?"""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from lowrank_train.config.suggest import nearest

NONE_WORDS = ("None", "none", "NONE", "nil")
"""What people write for null; as plain text it would be taken for a name or a path."""


class WrongValue(ValueError):
    """The value does not fit; the message is the rule, to be put behind `key=value: `."""


def convert(value: Any, expected: Any) -> Any:
    """`value` as `expected` (a type, a Literal, a union, list[...], tuple[...] or dict[...]); raises WrongValue.

    Whole numbers do for floats, and floats without a fraction (1e4) for whole numbers; nothing else is cast.
    """
    if expected is Any:
        return value
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return _convert_union(value, expected)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise WrongValue(f"must be {describe(expected)}{did_you_mean(value, arguments)}")
    if origin is list and isinstance(value, list | tuple):
        return [convert(item, arguments[0]) for item in value]
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(convert(item, arguments[0]) for item in value)
        if len(value) == len(arguments):
            return tuple(convert(item, argument) for item, argument in zip(value, arguments, strict=True))
    if origin is dict and isinstance(value, dict):
        return value
    if expected in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if expected is float or float(value).is_integer():
            return expected(value)
    elif isinstance(expected, type) and isinstance(value, expected):
        return value
    raise WrongValue(f"must be {describe(expected)}")


def _convert_union(value: Any, expected: Any) -> Any:
    alternatives = get_args(expected)
    if value is None and types.NoneType in alternatives:
        return None
    if value in NONE_WORDS and types.NoneType in alternatives:
        raise WrongValue(f"must be {describe(expected)}; for no value write null")
    for alternative in alternatives:
        if alternative is not types.NoneType:
            try:
                return convert(value, alternative)
            except WrongValue:
                continue
    raise WrongValue(f"must be {describe(expected)}")


def describe(expected: Any) -> str:
    """The type in words: `a whole number or null`, `one of a | b`."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + " | ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"a list, [...], each {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, [...], each {describe(arguments[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return words.get(expected, "a node of keys")


def did_you_mean(value: Any, choices: Any) -> str:
    """`. Did you mean x?` for the nearest of the choices, or nothing."""
    found = nearest(str(value), [str(choice) for choice in choices])
    return f". Did you mean {found}?" if found else ""
