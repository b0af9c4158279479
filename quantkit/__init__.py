"""quantkit: post-training quantization of language models.

import quantkit registers the format with transformers, so that `AutoModelForCausalLM.from_pretrained`
loads packed checkpoints; `quantkit.load` does the same with checks. Neither torch nor transformers is imported for
it: the names below come on first use, and the registration when transformers does (`quantkit.core.post_import`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantkit.core.constants import RELEASE
from quantkit.core.post_import import after_import

if TYPE_CHECKING:
    from quantkit.advice.advise import advise
    from quantkit.api import export, import_model, quantize, search, tune
    from quantkit.core.errors import QuantkitError
    from quantkit.core.remote import trust_remote_code
    from quantkit.evals.evaluate import CacheTest, evaluate
    from quantkit.io.hf import load
    from quantkit.io.hub import push_to_hub
    from quantkit.kvcache.attention import compressed_kv
    from quantkit.kvcache.cache import GearCache
    from quantkit.kvcache.config import KVCacheConfig
    from quantkit.models.fusion import fuse
    from quantkit.models.rotation import Rotation, rotate_model
    from quantkit.quantizers.gptq import GPTQ
    from quantkit.quantizers.hadamard import Hadamard
    from quantkit.quantizers.low_rank import LowRank
    from quantkit.quantizers.pyramid import Pyramid
    from quantkit.quantizers.rtn import RTN
    from quantkit.quantizers.target_shift import TargetShift
    from quantkit.quantizers.trellis import Trellis
    from quantkit.quantizers.vptq import VPTQ
    from quantkit.run.pipeline import quantize_checkpoint, report
    from quantkit.run.recipe import Calibration, Recipe
    from quantkit.tuning.adapters import finetune, finished
    from quantkit.tuning.block import BlockTuning
    from quantkit.tuning.settings import PVSettings, TuningSettings

__version__ = RELEASE
__all__ = [
    "GPTQ",
    "RTN",
    "VPTQ",
    "BlockTuning",
    "CacheTest",
    "Calibration",
    "GearCache",
    "Hadamard",
    "KVCacheConfig",
    "LowRank",
    "PVSettings",
    "Pyramid",
    "QuantkitError",
    "Recipe",
    "Rotation",
    "TargetShift",
    "Trellis",
    "TuningSettings",
    "advise",
    "compressed_kv",
    "evaluate",
    "export",
    "finetune",
    "finished",
    "fuse",
    "import_model",
    "load",
    "push_to_hub",
    "quantize",
    "quantize_checkpoint",
    "report",
    "rotate_model",
    "search",
    "trust_remote_code",
    "tune",
]
_PLACES = {
    "core.errors": ("QuantkitError",),
    "core.remote": ("trust_remote_code",),
    "models.fusion": ("fuse",),
    "io.hf": ("load",),
    "io.hub": ("push_to_hub",),
    "kvcache.attention": ("compressed_kv",),
    "kvcache.cache": ("GearCache",),
    "kvcache.config": ("KVCacheConfig",),
    "advice.advise": ("advise",),
    "api": ("export", "import_model", "quantize", "search", "tune"),
    "evals.evaluate": ("CacheTest", "evaluate"),
    "run.pipeline": ("quantize_checkpoint", "report"),
    "quantizers.gptq": ("GPTQ",),
    "quantizers.hadamard": ("Hadamard",),
    "quantizers.low_rank": ("LowRank",),
    "quantizers.pyramid": ("Pyramid",),
    "quantizers.rtn": ("RTN",),
    "quantizers.target_shift": ("TargetShift",),
    "quantizers.trellis": ("Trellis",),
    "quantizers.vptq": ("VPTQ",),
    "run.recipe": ("Calibration", "Recipe"),
    "models.rotation": ("Rotation", "rotate_model"),
    "tuning.adapters": ("finetune", "finished"),
    "tuning.block": ("BlockTuning",),
    "tuning.settings": ("PVSettings", "TuningSettings"),
}
_PLACE = {name: f"quantkit.{module}" for module, found in _PLACES.items() for name in found}

after_import("transformers.quantizers", "quantkit.io.registration")
after_import("peft.tuners.lora.model", "quantkit.models.lora")


if not TYPE_CHECKING:  # a type checker knows all names, and is to see those that are none

    def __getattr__(name: str) -> Any:
        if name not in _PLACE:
            raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_PLACE[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
