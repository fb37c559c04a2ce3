"""The rules of a strategy, put together from the parts that its configuration names."""

from __future__ import annotations

from lowrank_train.config.parts import instantiate
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.optim.blocks import Blocks, BlockSchedule
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Lift
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Transform


def rule_for_selected(config: StrategyConfig, seed: int) -> Transform | None:
    """The composition of the parts; None for a strategy that treats all parameters alike. ValueError for a misfit."""
    rule = _rule_of_a_tensor(config)
    if config.blocks is None:
        return rule
    if rule is None:
        raise ValueError(f"strategy {config.name} has blocks but no inner rule for them; choose strategy/inner=NAME")
    schedule = instantiate(config.blocks)
    assert isinstance(schedule, BlockSchedule)
    return Blocks(rule, schedule, seed)


def _rule_of_a_tensor(config: StrategyConfig) -> Transform | None:
    if config.inner is None:
        if config.subspace is not None:
            raise ValueError(f"strategy {config.name} has a subspace but no inner rule; choose strategy/inner=NAME")
        return None
    inner = stored(instantiate(config.inner), config)
    if config.subspace is None:
        return inner
    if config.lift is None:
        raise ValueError(f"strategy {config.name} has a subspace but no lift; choose strategy/lift=NAME")
    subspace, lift = instantiate(config.subspace), instantiate(config.lift)
    feedback = None if config.feedback is None else instantiate(config.feedback)
    assert isinstance(subspace, Subspace) and isinstance(lift, Lift)
    storage = _storage_of(config)
    if storage is not None and storage.basis is not None:
        subspace.store_basis_as(storage.basis)
    if config.refresh is not None:
        subspace.be_lazy(instantiate(config.refresh))
    return InSubspace(subspace, inner, lift, config.on_refresh, feedback)


def stored(rule: Transform, config: StrategyConfig, of_rest: bool = False) -> Transform:
    """The rule with its state in the strategy's storage, where that is chosen and meant for it."""
    assert isinstance(rule, Transform)
    storage = _storage_of(config)
    if storage is None or (of_rest and not storage.rest):
        return rule
    return Stored(rule, storage)


def _storage_of(config: StrategyConfig) -> Storage | None:
    if config.storage is None:
        return None
    storage = instantiate(config.storage)
    assert isinstance(storage, Storage)
    if storage.basis is not None and config.subspace is None:
        raise ValueError(
            f"strategy.storage.basis={storage.basis}: strategy {config.name} has no subspace, whose basis it could be; "
            "use strategy.storage.basis=null, or a strategy with a subspace"
        )
    return storage
