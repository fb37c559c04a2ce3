"""Rows of JSON lines as examples: three forms, recognised by their keys, each as ids and what is to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lowrank_train.config.errors import UserError
from lowrank_train.data.chat.template import BadRow, ChatTemplate
from lowrank_train.data.tokenizer import Tokenizer

Form = Literal["text", "prompt_completion", "messages"]
KEYS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Of each form, in the order in which they are looked for."""

OTHER_FORMS = {
    "conversations": "rename conversations, from and value to messages, role and content",
    "instruction": "join instruction and input to prompt, and rename output to completion",
    "question": "rename question to prompt and answer to completion",
}
"""What to do with the keys of other collections."""


class EncodedRow(NamedTuple):
    """The whole of a row, not cut."""

    ids: list[int]
    completion: list[bool]  # the tokens of the completion; of a text all but the first
    remark: str | None = None  # on how they were found


def recognised(row: Mapping[str, Any], text_key: str) -> Form:
    """The form of a file by its first row. BadRow where it has the keys of none."""
    for form in KEYS:
        if all(key in row for key in keys_of(form, text_key)):
            return form
    hint = next((f"; {advice}" for key, advice in OTHER_FORMS.items() if key in row), "")
    raise BadRow(
        f"has the keys {', '.join(row) or 'none'}, and an example has messages, or prompt and completion, or "
        f"{text_key}{hint}"
    )


def keys_of(form: Form, text_key: str) -> tuple[str, ...]:
    """The keys that a row of this form has; `data.text_key` names the one of texts."""
    return (text_key,) if form == "text" else KEYS[form]


class RowEncoder:
    """Rows to examples under one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, text_key: str) -> None:
        """UserError where the tokenizer has no end mark, by which a model knows that it is done."""
        if tokenizer.eos_id is None:
            raise UserError(
                "data.tokenizer: has no end-of-sequence token, and a completion must end in one; name it in the "
                "tokenizer's tokenizer_config.json as eos_token"
            )
        self._tokenizer, self._text_key, self._eos_id = tokenizer, text_key, tokenizer.eos_id
        self._begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
        self._template: ChatTemplate | None = None

    @property
    def uses_template(self) -> bool:
        """Whether some row was a conversation."""
        return self._template is not None

    def encode(self, row: Mapping[str, Any], form: Form, *, needs_reply: bool) -> EncodedRow:
        """The whole example, not cut; BadRow for what is missing or of a wrong type.

        `needs_reply`: messages must hold a turn of the assistant. An empty completion or text gives an empty example.
        """
        for key in keys_of(form, self._text_key):
            if key not in row:
                raise BadRow(f"has no {key}, as the first row of its file has (keys: {', '.join(row) or 'none'})")
        if form == "messages":
            return self._messages(row, needs_reply=needs_reply)
        if form == "text":
            return self._text(row[self._text_key])
        return self._prompt_and_completion(row)

    def _text(self, text: Any) -> EncodedRow:
        if not isinstance(text, str):
            raise BadRow(f"{self._text_key} is {kind_of(text)}, not text")
        ids = self._tokenizer.encode([text])[0] if text.strip() else []
        if not ids:
            return EncodedRow([], [])
        ids = [*self._begin, *ids, self._eos_id]
        return EncodedRow(ids, [False] + [True] * (len(ids) - 1))

    def _prompt_and_completion(self, row: Mapping[str, Any]) -> EncodedRow:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            for key in ("prompt", "completion"):
                check_messages(row[key], key)
            ids, wanted = self._chat().completion(prompt, completion, row.get("tools"))
            return EncodedRow(ids, wanted)
        for key, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, str):
                raise BadRow(
                    f"{key} is {kind_of(value)}; prompt and completion are both texts or both lists of messages"
                )
        if not completion.strip():
            return EncodedRow([], [])
        # The prompt has the ids it will have when the model is asked. Where the completion's first letters would join
        # its last token, the completion has ids of its own.
        asked, joint = self._tokenizer.encode([prompt, prompt + completion])
        said, remark = joint[len(asked) :], None
        if joint[: len(asked)] != asked:
            said = self._tokenizer.encode([completion])[0]
            remark = "whose completions have ids apart from their prompts', which would else share a token"
        ids = [*self._begin, *asked, *said, self._eos_id]
        wanted = [False] * (len(self._begin) + len(asked)) + [True] * (len(said) + 1)
        return EncodedRow(ids, wanted, remark)

    def _messages(self, row: Mapping[str, Any], *, needs_reply: bool) -> EncodedRow:
        messages = row["messages"]
        check_messages(messages, "messages")
        if needs_reply and not any(message["role"] == "assistant" for message in messages):
            raise BadRow(
                f"messages have no turn of the assistant (roles: {', '.join(message['role'] for message in messages)})"
            )
        return EncodedRow(*self._chat().conversation(messages, row.get("tools")))

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)
        return self._template


def check_messages(messages: Any, key: str) -> None:
    """BadRow unless it is a list of turns with role and content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadRow(f"{key} is {kind_of(messages)}, not a list of messages")
    if not messages:
        raise BadRow(f"{key} is an empty list")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"turn {number} of {key} is not an object with role and content")
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise BadRow(f"turn {number} of {key} has {kind_of(content)} for content, not text")


def kind_of(value: Any) -> str:
    """The type of a JSON value in its own words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]
