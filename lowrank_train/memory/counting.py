"""What can be counted of a model before it runs: bytes of its weights by kind, and the arithmetic of one position."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from lowrank_train.checkpoint_shards import own_part
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.activity import is_trainable


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters as they are stored, and of what else reparametrised layers keep, such as indices."""
    return bytes_of([*model.parameters(), *_kept_buffers(model)])


def weights_by_kind(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of trained weights, of frozen ones with what else reparametrised layers keep, and of all other buffers.

    The first two are `weights_bytes`; the last, such as rotary frequencies, belongs to no weight.
    """
    kept = _kept_buffers(model)
    trained = [param for param in model.parameters() if is_trainable(param)]
    frozen = [param for param in model.parameters() if not is_trainable(param)]
    others = [buffer for buffer in model.buffers() if not any(buffer is one for one in kept)]
    return {"trained_weights": bytes_of(trained), "frozen_weights": bytes_of([*frozen, *kept])} | {
        "buffers": bytes_of(others)
    }


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all of them together, each as it is kept."""
    parts = (part for tensor in tensors for part in parts_of(tensor))
    return sum(part.numel() * part.element_size() for part in parts)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that one is kept as: itself, the rows that lie on this device, or codes and scales."""
    tensor = own_part(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]


def _kept_buffers(model: PreTrainedModel) -> list[Tensor]:
    found = {id(buffer): buffer for layer in layers_of(model).values() for buffer in layer.buffers()}
    return list(found.values())  # one that several layers share is there once


def flops_per_position(model: PreTrainedModel, seq_len: int) -> float:
    """6 N + 12 L h T, the PaLM paper's count (arXiv 2204.02311, appendix B), forward and backward.

    N counts every parameter that is multiplied with: all but the input embedding, which is looked up (a tied one is
    the head's matrix and counts). L layers of width h attend over T positions. Recomputed activations are not counted.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        parameters -= embedding.numel()
    config = model.config.get_text_config()
    return 6.0 * parameters + 12.0 * config.num_hidden_layers * config.hidden_size * seq_len
