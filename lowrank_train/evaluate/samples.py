"""What a model answers to a few prompts of the validation data: greedy, the same whenever it is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowrank_train.data import Tokenizer
from lowrank_train.data.chat import SamplePrompt
from lowrank_train.evaluate.generate import new_tokens

SAMPLES_FILE = "samples.jsonl"
SHOWN_CHARACTERS = 60  # of a prompt's end and of an answer on the console; the file has all of both


@dataclass(frozen=True)
class Sampler:
    """The same prompts at every evaluation."""

    prompts: Sequence[SamplePrompt]
    tokenizer: Tokenizer
    max_new_tokens: int

    def answers(self, model: PreTrainedModel, step: int) -> list[dict[str, Any]]:
        """A row of samples.jsonl for each prompt; the model's training mode is restored."""
        rows, decode = [], self.tokenizer.decode
        for prompt in self.prompts:
            room = getattr(model.config, "max_position_embeddings", None)
            limit = self.max_new_tokens if room is None else min(self.max_new_tokens, room - len(prompt.ids))
            new = new_tokens(model, self.tokenizer, [prompt.ids], limit=limit)[0] if limit > 0 else []
            row = {"step": step, "example": prompt.example, "prompt": decode(prompt.ids), "completion": decode(new)}
            rows.append(row | {"reference": decode(prompt.reference), "ended": self.tokenizer.eos_id in new})
        return rows


class Samples:
    """samples.jsonl of a run. All ranks answer, as a model may be spread over them; the first one writes."""

    def __init__(self, sampler: Sampler, path: Path, step: int) -> None:
        """Answers of an earlier attempt after `step` are dropped."""
        self._sampler, self._path, self._step = sampler, path, step
        self._begun = False

    def take(self, model: PreTrainedModel, step: int, *, write: bool) -> list[str]:
        """Answer all prompts; each answer on a line."""
        rows = self._sampler.answers(model, step)
        if write:
            self._begin()
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return [sentence(row) for row in rows]

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.exists() else []
        aside = self._path.with_name(f"{self._path.name}.partial")
        aside.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self._step), "utf-8")
        aside.replace(self._path)


def sentence(row: dict[str, Any]) -> str:
    """A sample on one line of the console."""
    asked, answered = (" ".join(str(row[key]).split()) for key in ("prompt", "completion"))
    asked = f"...{asked[-SHOWN_CHARACTERS:]}" if len(asked) > SHOWN_CHARACTERS else asked
    answered = f"{answered[:SHOWN_CHARACTERS]}..." if len(answered) > SHOWN_CHARACTERS else answered
    return f"  {row['example']}: {asked} -> {answered}{'' if row['ended'] else ' [no end mark]'}"
