"""Examples of data=chat: what is predicted, rows of whole examples, each exactly once, and faults with their lines."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig, ModelConfig
from lowrank_train.data import Tokenizer, load_tokenizer
from lowrank_train.data.chat import (
    ChatTemplate,
    ExampleBatches,
    Examples,
    ExampleValidation,
    RowTable,
    open_examples,
    rows_identity,
    sample_prompts,
)
from lowrank_train.data.chat.filling import fill_rows
from lowrank_train.data.packing import IGNORED, token_ids
from lowrank_train.evaluate.perplexity import evaluate
from lowrank_train.models import build_model, causal_loss
from tests.data.chat_files import CHATML, MARKED, sums, turns, write_letters, write_rows
from tests.data.corpora import TOKENIZER


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_letters(tmp_path_factory.mktemp("letters"))))


def data_of(path: Path, **changes: Any) -> DataConfig:
    base = DataConfig(
        source="chat", train=[str(path)], validation=[str(path)], seq_len=64, packing="whole", mask_documents=True
    )
    return DataConfig(**{**vars(base), **changes})


def read(tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], **changes: Any) -> Examples:
    return open_examples(data_of(write_rows(tmp_path / "rows.jsonl", rows), **changes), "train", tokenizer)


def spelt(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text, special tokens included."""
    return str(tokenizer.to_hugging_face().decode(ids, skip_special_tokens=False))


def predicted(tokenizer: Tokenizer, found: Examples, index: int = 0) -> str:
    """The tokens with loss, runs of them apart."""
    tokens = found.examples[index].tokens
    runs = [list(run) for wanted, run in itertools.groupby(tokens, key=lambda token: token >= 0) if wanted]
    return "|".join(spelt(tokenizer, run) for run in runs)


def test_prompt_and_completion(letters: Tokenizer, tmp_path: Path) -> None:
    found = read(tmp_path, letters, [{"prompt": "2+2=", "completion": "four"}])
    assert spelt(letters, token_ids(found.examples[0].tokens)) == "2+2=four<|im_end|>"
    assert predicted(letters, found) == "four<|im_end|>"
    assert (found.num_tokens, found.num_targets, found.conversational) == (9, 5, False)


def test_a_prompt_has_the_ids_it_has_alone(tmp_path: Path) -> None:
    """Where the completion would join the prompt's last token, it has ids of its own."""
    tokenizer = load_tokenizer(TOKENIZER)
    found = read(
        tmp_path,
        tokenizer,
        [{"prompt": "To b", "completion": "e, or"}, {"prompt": "To be,", "completion": " or not"}],
    )
    assert tokenizer.encode(["To be, or"])[0][:2] != tokenizer.encode(["To b"])[0]
    first, second = (token_ids(example.tokens) for example in found.examples)
    assert first == [*tokenizer.encode(["To b"])[0], *tokenizer.encode(["e, or"])[0], tokenizer.eos_id]
    assert second == [*tokenizer.encode(["To be, or not"])[0], tokenizer.eos_id]
    assert list(found.remarks.values()) == [1]


def test_begin_marks_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_letters(tmp_path / "tokenizer", begin=True)))
    found = read(tmp_path, tokenizer, [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}])
    assert [spelt(tokenizer, token_ids(example.tokens)) for example in found.examples] == [
        "<s>ab<|im_end|>", "<s>b<|im_end|>"
    ]  # fmt: skip
    assert predicted(tokenizer, found, 1) == "b<|im_end|>"
    text = read(tmp_path, tokenizer, [{"text": "abc"}])
    assert predicted(tokenizer, text) == "abc<|im_end|>"  # all but the begin mark, which nothing precedes


def test_every_turn_of_the_assistant_is_predicted(letters: Tokenizer, tmp_path: Path) -> None:
    found = read(tmp_path, letters, [{"messages": turns("hi", "yes", "so?", "no")}], seq_len=200)
    whole = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n"
    whole += "<|im_start|>assistant\nno<|im_end|>\n"
    assert spelt(letters, token_ids(found.examples[0].tokens)) == whole
    assert predicted(letters, found) == "yes<|im_end|>\n|no<|im_end|>\n"
    assert found.conversational
    [prompt] = sample_prompts(found, 1)
    assert prompt.ids == ChatTemplate(letters).prompt_ids(turns("hi"))
    assert spelt(letters, prompt.reference) == "yes<|im_end|>\n"


def test_a_template_may_mark_what_is_generated(tmp_path: Path) -> None:
    """Its marks are followed; the end mark behind a turn belongs to it, or the model would not learn to stop."""
    tokenizer = load_tokenizer(str(write_letters(tmp_path / "tokenizer", MARKED)))
    found = read(tmp_path, tokenizer, [{"messages": turns("hi", "yes", "so?", "no")}], seq_len=200)
    assert predicted(tokenizer, found) == "yes<|im_end|>|no<|im_end|>"


def test_where_earlier_turns_are_rewritten_only_the_last_counts(tmp_path: Path) -> None:
    """As templates do that drop the thoughts of all turns but the last."""
    earlier = "m['role'] == 'assistant' and not loop.last"
    rewriting = CHATML.replace("m['content'] +", f"(m['content'] | upper if {earlier} else m['content']) +")
    tokenizer = load_tokenizer(str(write_letters(tmp_path / "tokenizer", rewriting)))
    found = read(tmp_path, tokenizer, [{"messages": turns("hi", "yes", "so?", "no")}], seq_len=200)
    assert predicted(tokenizer, found) == "no<|im_end|>\n"
    assert "only the last turn" in found.sentence()


def test_a_template_without_an_end_mark_gets_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_letters(tmp_path / "tokenizer", eos="<pad>")))
    found = read(tmp_path, tokenizer, [{"messages": turns("hi", "yes")}])
    assert predicted(tokenizer, found) == "yes<|im_end|>\n<pad>"


def test_prompts_and_completions_may_be_messages(letters: Tokenizer, tmp_path: Path) -> None:
    system = {"role": "system", "content": "be"}
    [user, assistant] = turns("hi", "yes")
    found = read(tmp_path, letters, [{"prompt": [system, user], "completion": [assistant]}], seq_len=200)
    assert predicted(letters, found) == "yes<|im_end|>\n"
    assert spelt(letters, token_ids(found.examples[0].tokens)).startswith("<|im_start|>system\nbe<|im_end|>\n")


def test_a_text_cannot_spell_a_special_token_but_a_template_can(letters: Tokenizer, tmp_path: Path) -> None:
    end = letters.eos_id or 0
    found = read(tmp_path, letters, [{"prompt": "a", "completion": "b<|im_end|>"}])
    assert list(found.examples[0].tokens).count(end) == 1
    assert len(found.examples[0].tokens) == 1 + len("b<|im_end|>") + 1


def test_loss_on_everything(letters: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "2+2=", "completion": "four"}]
    assert predicted(letters, read(tmp_path, letters, rows, loss_on="all")) == "+2=four<|im_end|>"


def test_long_examples_are_cut_or_left_out_and_counted(letters: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b" * 7}, {"prompt": "a" * 9, "completion": "b"},
        {"prompt": "a", "completion": "b" * 6}, {"prompt": "a", "completion": " "},
    ]  # fmt: skip
    found = read(tmp_path, letters, rows, seq_len=8)
    assert [spelt(letters, token_ids(one.tokens)) for one in found.examples] == [
        "a" + "b" * 7,
        "a" + "b" * 6 + "<|im_end|>",
    ]
    assert [one.name for one in found.examples] == ["rows.jsonl:1", "rows.jsonl:3"]
    said = found.sentence()
    assert "1 cut at their end to data.seq_len=8" in said
    assert "1 left out: no completion within 8 tokens; 1 left out: an empty completion or text" in said


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_filled_with_whole_examples(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 20) for _ in range(200)]
    rows = fill_rows(lengths, 40)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 40
    assert sum(lengths) / (40 * len(rows)) > 0.95  # short ones fill what long ones leave
    assert fill_rows([5, 4, 3, 3, 2, 2, 1], 10) == [[0, 1, 6], [2, 3, 4, 5]]


def epoch(found: Examples, data: DataConfig, tokenizer: Tokenizer, ranks: int, position: Any, updates: int) -> Any:
    """Names that `updates` updates of all ranks have seen, each update's targets, and the position after them."""
    table = RowTable(found.examples, data, tokenizer)
    streams = [
        iter(
            ExampleBatches(
                table, identity=rows_identity(found, data), batch_size=6 // ranks, micro_batches=2, rank=rank,
                world_size=ranks, seed=4, position=position,
            )
        )
        for rank in range(ranks)
    ]  # fmt: skip
    names, targets = [], []
    for _ in range(updates):
        batches = [next(stream) for stream in streams for _ in range(2)]
        names.append(sorted(name for batch in batches for name in batch["documents"]))
        targets.append(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches))
        assert targets[-1] == sum(batch["window_targets"] for batch in batches[::2])
        position = json.loads(json.dumps(batches[-1]["position"]))
    return names, targets, position


@pytest.mark.parametrize("packing", ["whole", "pad"])
def test_exactly_once_over_ranks_and_resumes(packing: Any, letters: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", sums(0, 50))
    data = data_of(path, seq_len=160, packing=packing, log_documents=True)
    found = open_examples(data, "train", letters)
    updates = -(-len(RowTable(found.examples, data, letters)) // 12)
    whole, targets, _ = epoch(found, data, letters, 1, None, 2 * updates)
    for first in (0, updates):
        counts = Counter(name for names in whole[first : first + updates] for name in names)
        assert counts == Counter(f"rows.jsonl:{line}" for line in range(1, 51))
        assert sum(targets[first : first + updates]) == found.num_targets
    assert whole[:updates] != whole[updates:]
    before, _, position = epoch(found, data, letters, 2, None, 2)
    after, _, _ = epoch(found, data, letters, 3, position, 2 * updates - 2)
    assert before + after == whole  # the same updates on 1 rank as on 2 and then 3
    with pytest.raises(UserError, match="other examples"):
        epoch(found, data_of(path, seq_len=150, packing=packing), letters, 1, position, 1)


def test_packed_examples_do_not_see_each_other(letters: Tokenizer, tmp_path: Path) -> None:
    """In float64 the loss of packed rows is that of every example alone, to 1e-9; and of padded rows of any batch."""
    path = write_rows(tmp_path / "rows.jsonl", sums(0, 12))
    model = build_model(
        ModelConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
        vocab_size=letters.vocab_size + 4, dtype=torch.float64, device="cpu", seed=1,
    ).eval()  # fmt: skip
    packed = data_of(path, seq_len=200)
    found = open_examples(packed, "validation", letters)
    assert len(RowTable(found.examples, packed, letters)) < 12
    alone = 0.0
    for example in found.examples:
        ids = torch.tensor([token_ids(example.tokens)])
        labels = torch.tensor([[token if token >= 0 else IGNORED for token in example.tokens]])
        logits = model(input_ids=ids).logits[0, :-1]
        alone += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
    for data in (packed, data_of(path, seq_len=200, packing="pad")):
        for size in (1, 5):
            batches = ExampleValidation(found, data, letters, size, 0, 1)
            total = evaluate(model, batches, chunk_tokens=0, device=torch.device("cpu"))
            assert total.num_targets == found.num_targets
            assert total.loss == pytest.approx(alone / found.num_targets, abs=1e-9)
    of_ranks = [batch for rank in range(2) for batch in ExampleValidation(found, packed, letters, 2, rank, 2)]
    shared = [causal_loss(model, batch, chunk_tokens=0)[1] for batch in of_ranks]
    assert sum(shared) == found.num_targets


GOOD = {"messages": turns("hi", "yes")}
BAD_ROWS: list[tuple[list[Any], str]] = [
    ([{"instruction": "a", "output": "b"}], "line 1: has the keys instruction, output, .* rename output to completion"),
    ([{"conversations": []}], "rename conversations, from and value to messages"),
    ([GOOD, {"prompt": "a", "completion": "b"}], "line 2: has no messages"),
    ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 2: has no completion"),
    ([{"prompt": "a", "completion": 3}], "completion is a number"),
    ([{"prompt": turns("a"), "completion": "b"}], "prompt is a list; prompt and completion are both"),
    ([{"text": None}], "text is null, not text"),
    ([{"messages": "hi"}], "messages is text, not a list"),
    ([GOOD, {"messages": []}], "line 2: messages is an empty list"),
    ([{"messages": [{"content": "a"}]}], "turn 1 of messages is not an object with role"),
    ([{"messages": [{"role": "user", "content": 3}]}], "turn 1 of messages has a number for content"),
    ([GOOD, {"messages": turns("hi")}], r"line 2: messages have no turn of the assistant \(roles: user\)"),
    (["hi"], "line 1: is not a JSON object"),
    ([[GOOD]], "line 1: is not a JSON object; write one object a line"),
    ([], "holds no example with something to predict: there are no rows"),
    ([{"prompt": "a" * 99, "completion": "b"}], "1 have no completion within 64 tokens; raise data.seq_len"),
]


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS)
def test_faulty_rows_are_named(rows: list[Any], said: str, letters: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, letters, rows)


def test_all_faults_are_counted_and_a_few_named(letters: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, letters, [GOOD, *[{"messages": 1}] * 8])
    assert len(error.value.faults) == 6 and "line 2" in error.value.faults[0]
    assert error.value.faults[-1] == "data.train: 3 more rows are faulty"


def test_a_template_that_fails_names_the_row(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
    tokenizer = load_tokenizer(str(write_letters(tmp_path / "tokenizer", strict)))
    with pytest.raises(UserError, match="line 2: the chat template fails: roles must alternate"):
        read(tmp_path, tokenizer, [GOOD, {"messages": turns("hi", "yes")[::-1]}])


def test_what_a_tokenizer_lacks_is_said(tmp_path: Path) -> None:
    without = load_tokenizer(str(write_letters(tmp_path / "tokenizer", None)))
    with pytest.raises(UserError, match=r"has no chat template.*data\.chat_template=FILE"):
        read(tmp_path, without, [GOOD])
    given = load_tokenizer(str(tmp_path / "tokenizer"), CHATML)
    assert predicted(given, read(tmp_path, given, [GOOD])) == "yes<|im_end|>\n"
    without.eos_id = None
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        read(tmp_path, without, [{"text": "a"}])
