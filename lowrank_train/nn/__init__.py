"""Linear layers whose matrix is stored in some cheaper form than a dense one; each is built by `from_linear`."""

from lowrank_train.nn.allora import ALLoRALinear
from lowrank_train.nn.between import MoSLoRALinear, SoRALinear
from lowrank_train.nn.cuttlefish import CuttlefishLinear
from lowrank_train.nn.dlrt import DLRTLinear
from lowrank_train.nn.dora import DoRALinear
from lowrank_train.nn.dylora import DyLoRALinear
from lowrank_train.nn.factorised import LowRankLinear
from lowrank_train.nn.lamda import LaMDALinear
from lowrank_train.nn.loha import FedParaLinear, LoHaLinear
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.nn.lora_ggpo import LoRAGGPOLinear
from lowrank_train.nn.lora_pro import LoRAProLinear
from lowrank_train.nn.lora_sb import LoRASBLinear
from lowrank_train.nn.maestro import MaestroLinear
from lowrank_train.nn.mora import MoRALinear
from lowrank_train.nn.nola import NOLALinear
from lowrank_train.nn.parallel_heads import ParallelHeadsLinear
from lowrank_train.nn.patterned_lora import CapaBoostLinear, MELoRALinear
from lowrank_train.nn.peft import PeftLinear
from lowrank_train.nn.reparam import ReparamLinear
from lowrank_train.nn.slope import SLoPeLinear
from lowrank_train.nn.sltrain import SLTrainLinear
from lowrank_train.nn.sst import SSTLinear
from lowrank_train.nn.structured import BlockDenseLinear, BlockShuffleLinear
from lowrank_train.nn.three_factors import ThreeFactorsLinear
from lowrank_train.nn.trp import TRPLinear

__all__ = [
    "ALLoRALinear",
    "BlockDenseLinear",
    "BlockShuffleLinear",
    "CapaBoostLinear",
    "CuttlefishLinear",
    "DLRTLinear",
    "DoRALinear",
    "DyLoRALinear",
    "FedParaLinear",
    "LaMDALinear",
    "LoHaLinear",
    "LoRAGGPOLinear",
    "LoRALinear",
    "LoRAProLinear",
    "LoRASBLinear",
    "LowRankLinear",
    "MELoRALinear",
    "MaestroLinear",
    "MoRALinear",
    "MoSLoRALinear",
    "NOLALinear",
    "ParallelHeadsLinear",
    "PeftLinear",
    "ReparamLinear",
    "SLTrainLinear",
    "SLoPeLinear",
    "SSTLinear",
    "SoRALinear",
    "TRPLinear",
    "ThreeFactorsLinear",
]
