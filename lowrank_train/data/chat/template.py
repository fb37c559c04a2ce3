"""A tokenizer's chat template: conversations as text and ids, and which of their tokens the assistant says."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.data.files import did_you_mean, find_local
from lowrank_train.data.tokenizer import Tokenizer

Message = dict[str, Any]
Span = tuple[int, int]  # characters [begin, end) of a rendered conversation
NO_TEMPLATE = (
    "data.tokenizer: has no chat template, which rows of messages need; name one with data.chat_template=FILE (Jinja, "
    "as in a tokenizer_config.json or chat_template.jinja), or take the tokenizer of the model's chat version"
)


class BadRow(Exception):
    """A row that is no example; the message says why."""


def template_text(given: str) -> str:
    """The template that `data.chat_template` means: itself, or the content of the file that it names.

    Raises:
        UserError: there is no such file.
    """
    if "{{" in given or "{%" in given:
        return given
    found = find_local(given)
    if found is None or found.is_dir():
        raise UserError(f"data.chat_template={given}: there is no such file{did_you_mean(given)}")
    return found.read_text(encoding="utf-8")


class ChatTemplate:
    """Conversations in the words of one tokenizer; special tokens that the template writes become their ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """UserError where the tokenizer has no template, or cannot say where in a text its tokens stand."""
        if not tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        # A copy: in ours a text cannot spell a special token, and a template has to.
        self._tokenizer = copy.deepcopy(tokenizer.to_hugging_face())
        if not self._tokenizer.is_fast:
            raise UserError(
                "data.tokenizer: cannot say which characters a token covers, by which the assistant's part of a "
                "conversation is found; give one with a tokenizer.json, or rows of prompt and completion as texts"
            )
        self._tokenizer.chat_template = tokenizer.chat_template
        self._tokenizer.backend_tokenizer.encode_special_tokens = False
        self._marks_generation = re.search(r"\{%-?\s*generation\b", tokenizer.chat_template) is not None
        self._eos_id = tokenizer.eos_id

    def render(self, messages: Sequence[Message], *, reply: bool = False, tools: Any = None) -> str:
        """The conversation as text; with `reply` up to where the assistant would go on. BadRow where it fails."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=reply
                )
            )
        except Exception as error:  # whatever a template raises, Jinja's errors among it
            told = str(error).strip().splitlines()
            raise BadRow(f"the chat template fails: {told[0] if told else type(error).__name__}") from error

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the assistant's reply begins."""
        return self._encode(self.render(messages, reply=True))[0]

    def conversation(self, messages: Sequence[Message], tools: Any) -> tuple[list[int], list[bool], str | None]:
        """Ids of a conversation, which of them the assistant says, and a remark on how these were found.

        With `{% generation %}` in the template they are what it marks. Otherwise the conversation is rendered up to
        and through each of the assistant's turns, and a turn is what was added; where the template changes earlier
        turns later on, only the last turn is taken. An end mark right behind a turn is part of it. BadRow where no
        turn is found.
        """
        remark = None
        if self._marks_generation:
            ids, wanted = self._marked(messages, tools)
        else:
            text = self.render(messages, tools=tools)
            turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            found = [self._added(text, messages[:turn], messages[: turn + 1], tools) for turn in turns]
            if None in found:
                remark = "of whose conversations only the last turn, as the template changes earlier ones"
            last = [span for span in found[-1:] if span is not None]
            spans = last if remark else [span for span in found if span is not None]
            if turns and not last:
                raise BadRow(
                    "the chat template does not render a conversation as its beginning and a last turn, so that the "
                    "assistant's part cannot be told; mark it in the template with {% generation %}"
                )
            ids, wanted = self._within(text, spans)
        self._close(ids, wanted, ends_in_reply=messages[-1]["role"] == "assistant")
        return ids, wanted, remark

    def completion(
        self, prompt: Sequence[Message], reply: Sequence[Message], tools: Any
    ) -> tuple[list[int], list[bool]]:
        """Ids of a prompt and its completion, and which belong to the latter. BadRow as for `conversation`."""
        text = self.render([*prompt, *reply], tools=tools)
        span = self._added(text, prompt, [*prompt, *reply], tools)
        if span is None:
            raise BadRow("the chat template does not render prompt and completion as the prompt and what follows it")
        ids, wanted = self._within(text, [span])
        self._close(ids, wanted, ends_in_reply=True)
        return ids, wanted

    def _added(self, text: str, before: Sequence[Message], after: Sequence[Message], tools: Any) -> Span | None:
        """Where in `text` stands what `after` has more than `before`, the header of the reply left out."""
        through = self.render(after, tools=tools)
        if not before:
            return (0, len(through)) if text.startswith(through) else None
        plain, asked = self.render(before, tools=tools), self.render(before, reply=True, tools=tools)
        # Some templates ask with more than a reply is rendered with, such as the opening of a thought.
        begin = next((at for at, (a, b) in enumerate(zip(asked, through, strict=False)) if a != b), len(asked))
        return (begin, len(through)) if text.startswith(through) and through.startswith(plain) else None

    def _within(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Ids of `text`, and which of them cover a character of a span."""
        ids, offsets = self._encode(text)
        wanted = [any(max(end, begin + 1) > a and begin < b for a, b in spans) for begin, end in offsets]
        return ids, wanted

    def _encode(self, text: str) -> tuple[list[int], list[Span]]:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _marked(self, messages: Sequence[Message], tools: Any) -> tuple[list[int], list[bool]]:
        self.render(messages, tools=tools)  # for a failure in words
        found = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    def _close(self, ids: list[int], wanted: list[bool], *, ends_in_reply: bool) -> None:
        """Count an end mark right behind a turn to it; put one behind the last turn where the template has none."""
        for index in range(1, len(ids)):
            wanted[index] |= wanted[index - 1] and ids[index] == self._eos_id
        begin = len(wanted)
        while begin and not wanted[begin - 1]:
            begin -= 1
        while begin and wanted[begin - 1]:
            begin -= 1
        if ends_in_reply and any(wanted) and self._eos_id is not None and self._eos_id not in ids[begin:]:
            ids.append(self._eos_id)
            wanted.append(True)
