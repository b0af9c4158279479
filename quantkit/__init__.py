"""quantkit: post-training quantization of language models.

import quantkit registers the format with transformers, so that `AutoModelForCausalLM.from_pretrained`
loads packed checkpoints; `quantkit.load` does the same with checks.
"""

from quantkit.fuse import fuse
from quantkit.hf import load
from quantkit.kvcache.attention import compressed_kv
from quantkit.kvcache.cache import GearCache
from quantkit.kvcache.config import KVCacheConfig
from quantkit.pipeline import quantize, quantize_checkpoint
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.hadamard import Hadamard
from quantkit.quantizers.low_rank import LowRank
from quantkit.quantizers.pyramid import Pyramid
from quantkit.quantizers.rtn import RTN
from quantkit.quantizers.target_shift import TargetShift
from quantkit.quantizers.trellis import Trellis
from quantkit.quantizers.vptq import VPTQ
from quantkit.recipe import Calibration, Recipe
from quantkit.rotate import Rotation, rotate_model
from quantkit.tuning.adapters import finetune, finished, peft_config
from quantkit.tuning.block import BlockTuning
from quantkit.tuning.end_to_end import TuningSettings, tune
from quantkit.tuning.pv import PVSettings

__version__ = "0.1.0"
__all__ = [
    "GPTQ",
    "RTN",
    "VPTQ",
    "BlockTuning",
    "Calibration",
    "GearCache",
    "Hadamard",
    "KVCacheConfig",
    "LowRank",
    "PVSettings",
    "Pyramid",
    "Recipe",
    "Rotation",
    "TargetShift",
    "Trellis",
    "TuningSettings",
    "compressed_kv",
    "finetune",
    "finished",
    "fuse",
    "load",
    "peft_config",
    "quantize",
    "quantize_checkpoint",
    "rotate_model",
    "tune",
]
