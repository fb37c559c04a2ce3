"""Models: sizes, initial numbers, the loss in chunks, document masks, Hugging Face folders, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import ModelConfig
from lowrank_train.models import build_model, causal_loss, meta_model

TINY = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def tiny(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    config = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    return build_model(config, vocab_size=61, dtype=torch.float32, device="cpu", seed=seed)


def tokens(rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(0))


def test_meta_model_has_no_memory_and_the_same_shapes() -> None:
    planned, built = meta_model(TINY, vocab_size=61), tiny()
    assert all(param.is_meta for param in planned.parameters())
    assert [(n, p.shape) for n, p in planned.named_parameters()] == [(n, p.shape) for n, p in built.named_parameters()]


def test_initial_numbers() -> None:
    """Normal with the configured deviation, norms at one, and the same from the same seed whatever came before."""
    first = tiny()
    torch.randn(100)
    same, other = tiny(), tiny(seed=1)
    for (name, param), again, different in zip(
        first.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(param, again)
        if param.ndim == 1:
            assert (param == 1).all()
        else:
            assert not torch.equal(param, different)
            assert param.std().item() == pytest.approx(0.02, rel=0.15), name


def test_rotary_tables_survive_materialisation() -> None:
    """The numbers of a model built on meta are those of transformers' own construction."""
    built = tiny()
    reference = LlamaForCausalLM(built.config)
    reference.load_state_dict(built.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(built.eval()(tokens()).logits, reference.eval()(tokens()).logits)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_loss_in_chunks_is_the_loss(chunk_tokens: int) -> None:
    labels = tokens()
    labels[1, 12:] = -100
    batch = {"input_ids": tokens(), "labels": labels}
    whole, chunked = tiny(), tiny()
    expected = whole(input_ids=tokens(), labels=labels).loss
    expected.backward()
    loss, targets = causal_loss(chunked, batch, chunk_tokens=chunk_tokens)
    (loss / targets).backward()
    assert targets == 2 * 19 + 11
    assert (loss / targets).item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, param), reference in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(param.grad, reference.grad, rtol=1e-4, atol=1e-7, msg=name)
    unchunked, _ = causal_loss(whole, batch, chunk_tokens=0)
    assert unchunked.item() == pytest.approx(loss.item(), rel=1e-6)


def test_documents_of_a_packed_row_do_not_see_each_other() -> None:
    """Changing one document leaves the loss of the next as it is, to the bit, and equals that document alone."""
    model = tiny().eval()
    ids = tokens(1, 20)
    document_ids = torch.tensor([[0] * 9 + [1] * 11])
    labels = ids.clone()
    labels[:, :10] = -100  # only the second document counts; nothing predicts its first token
    batch = {"input_ids": ids, "labels": labels, "document_ids": document_ids}
    loss, targets = causal_loss(model, batch, chunk_tokens=8)
    changed = ids.clone()
    changed[:, :9] = (changed[:, :9] + 1) % 61
    assert torch.equal(causal_loss(model, batch | {"input_ids": changed}, chunk_tokens=8)[0], loss)
    alone, _ = causal_loss(model, {"input_ids": ids[:, 9:], "labels": ids[:, 9:]}, chunk_tokens=8)
    assert targets == 10
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    leaking, _ = causal_loss(model, {"input_ids": changed, "labels": labels}, chunk_tokens=8)
    assert not torch.equal(leaking, loss)


def test_activation_checkpointing_changes_no_gradient() -> None:
    batch = {"input_ids": tokens(), "labels": tokens()}
    plain, checkpointed = tiny(), tiny(activation_checkpointing=True)
    for model in (plain, checkpointed):
        causal_loss(model, batch, chunk_tokens=8)[0].backward()
    for param, reference in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad, reference.grad)


@pytest.mark.slow
def test_compiled_model_has_the_same_loss() -> None:
    batch = {"input_ids": tokens(), "labels": tokens()}
    expected, _ = causal_loss(tiny(), batch, chunk_tokens=8)
    compiled, _ = causal_loss(tiny(compile=True), batch, chunk_tokens=8)
    assert compiled.item() == pytest.approx(expected.item(), rel=1e-5)


def test_other_architectures(tmp_path: Path) -> None:
    """GPT-NeoX, whose head has another name: the loss is transformers' own."""
    config = GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    hub = ModelConfig(name="hf", kind="hf", path=str(tmp_path))
    model = build_model(hub, vocab_size=61, dtype=torch.float32, device="cpu", seed=0)
    loss, targets = causal_loss(model, {"input_ids": tokens(), "labels": tokens()}, chunk_tokens=8)
    assert (loss / targets).item() == pytest.approx(model(tokens(), labels=tokens()).loss.item(), rel=1e-6)
    anew = build_model(
        dataclasses.replace(hub, pretrained=False), vocab_size=61, dtype=torch.float32, device="cpu", seed=0
    )
    assert not torch.equal(next(anew.parameters()), next(model.parameters()))


def test_a_real_pretrained_llama(real_data: Path) -> None:
    """It knows its stories: a loss far below the logarithm of its vocabulary."""
    import sentencepiece

    folder = real_data / "llama-checkpoint" / "stories260K-hf"
    model = build_model(
        ModelConfig(name="hf", kind="hf", path=str(folder)), vocab_size=512, dtype=torch.float32, device="cpu", seed=0
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = torch.tensor([[1, *processor.encode(text)]])
    loss, targets = causal_loss(model, {"input_ids": ids, "labels": ids}, chunk_tokens=16)
    assert loss.item() / targets < 1.5


def test_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"2048 pieces.* 100 rows"):
        meta_model(dataclasses.replace(TINY, vocab_size=100), vocab_size=2048)


def test_what_cannot_be_loaded_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 61}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path / "nowhere", tmp_path):  # nothing there; weights only as a pickle
        with pytest.raises(UserError, match=r"model\.path"):
            build_model(
                ModelConfig(name="hf", kind="hf", path=str(path)),
                vocab_size=61,
                dtype=torch.float32,
                device="cpu",
                seed=0,
            )
