"""Linear layers whose matrix is stored in some cheaper form than a dense one; each is built by `from_linear`."""

from lowrank_train.nn.cuttlefish import CuttlefishLinear
from lowrank_train.nn.dlrt import DLRTLinear
from lowrank_train.nn.dora import DoRALinear
from lowrank_train.nn.factorised import LowRankLinear
from lowrank_train.nn.loha import FedParaLinear, LoHaLinear
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.nn.maestro import MaestroLinear
from lowrank_train.nn.mora import MoRALinear
from lowrank_train.nn.parallel_heads import ParallelHeadsLinear
from lowrank_train.nn.reparam import ReparamLinear
from lowrank_train.nn.slope import SLoPeLinear
from lowrank_train.nn.sltrain import SLTrainLinear
from lowrank_train.nn.sst import SSTLinear
from lowrank_train.nn.structured import BlockDenseLinear, BlockShuffleLinear
from lowrank_train.nn.trp import TRPLinear

__all__ = [
    "BlockDenseLinear",
    "BlockShuffleLinear",
    "CuttlefishLinear",
    "DLRTLinear",
    "DoRALinear",
    "FedParaLinear",
    "LoHaLinear",
    "LoRALinear",
    "LowRankLinear",
    "MaestroLinear",
    "MoRALinear",
    "ParallelHeadsLinear",
    "ReparamLinear",
    "SLTrainLinear",
    "SLoPeLinear",
    "SSTLinear",
    "TRPLinear",
]
