"""What transformers is told about packed checkpoints: the classes of quant_method "quantkit".

Imported as soon as `transformers.quantizers` is (`quantkit.core.post_import`), when the rest of transformers is still
being imported: so it imports of transformers what is there by then, and of quantkit what a load needs when one comes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.core.constants import GUARD, METHOD, SHIM, VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class QuantkitConfig(QuantizationConfigMixin):
    """config.json's quantization_config: metadata of every packed layer.

    Args:
        layers: metadata by layer name; see `QuantizedWeight.metadata`.
        version: format version.
    """

    def __init__(self, layers: dict[str, Any] | None = None, version: int = VERSION, **_unknown: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        self.layers = layers  # None, which no checkpoint has, is refused when a model is loaded


@register_quantizer(METHOD)
class QuantkitHfQuantizer(HfQuantizer):
    """Puts packed modules in place before transformers loads tensors into them."""

    requires_calibration = True
    is_qat_trainable = False
    """Whether transformers' Trainer may train the model without adapters of peft's; `quantkit.finetune` sets it."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the model's config before its files are looked for: from here on they are the usual ones."""
        return _unguarded(config)

    def update_tp_plan(self, config: Any) -> Any:
        """See above; older versions of transformers call this."""
        return _unguarded(config)

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        from torch import nn

        from quantkit.core.errors import CheckpointError
        from quantkit.core.weight import QuantizedWeight
        from quantkit.formats.tied import TiedWeight
        from quantkit.io.checkpoint import check_tensors, check_version
        from quantkit.models.embedding import put
        from quantkit.models.experts import put_together, take_apart
        from quantkit.models.linear import QuantizedLinear
        from quantkit.models.structure import is_linear, is_lookup, linear_weight, tied_names

        config = self.quantization_config
        assert isinstance(config, QuantkitConfig)
        layers = check_version({"version": config.version, "layers": config.layers})
        if checkpoint_files:
            check_tensors(layers, _specs(checkpoint_files))
        weights = {name: QuantizedWeight.empty(metadata) for name, metadata in layers.items()}
        take_apart(model)
        put_together(model, {*layers})
        for name, weight in sorted(weights.items(), key=lambda item: isinstance(item[1], TiedWeight)):
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                raise CheckpointError(
                    f"{type(model).__name__} has no layer {name!r} that the checkpoint declares"
                ) from None
            if not (is_linear(layer) or is_lookup(layer)):
                raise CheckpointError(
                    f"{name} is a {type(layer).__name__}, no linear layer or embedding; is this the right model class?"
                )
            if isinstance(weight, TiedWeight):
                head = dict(model.named_modules()).get(weight.layer)
                alike = is_lookup(layer) or weight.shape == tuple(linear_weight(layer).shape)
                if not (alike and isinstance(head, QuantizedLinear)):
                    raise CheckpointError(
                        f"{name} is no embedding or layer that {weight.layer} could serve; config.json is damaged"
                    )
                if not is_lookup(layer):  # transformers would miss its tensors
                    model.set_submodule(name, nn.Identity())
                    continue
            if is_lookup(layer) and weight.shape != linear_weight(layer).shape:
                raise CheckpointError(
                    f"{name} is {list(linear_weight(layer).shape)} in {type(model).__name__}, and the checkpoint's "
                    f"{list(weight.shape)}; it is damaged, or of another model"
                )
            put(model, name, weight)
        for tensor in [*tied_names(model)]:
            if tensor.rpartition(".")[0] in weights:  # which says itself where its tensors are
                del model.all_tied_weights_keys[tensor]

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_kwargs: Any) -> None:
        import torch

        from quantkit.core.errors import CheckpointError
        from quantkit.core.weight import QuantizedWeight
        from quantkit.formats.tied import TiedWeight
        from quantkit.models.embedding import put
        from quantkit.models.linear import Packed, QuantizedLinear
        from quantkit.models.unpacking import ASKED, choose_unpacked

        assert isinstance(self.quantization_config, QuantkitConfig)
        for name, metadata in (self.quantization_config.layers or {}).items():
            if metadata["format"] == TiedWeight.format and not isinstance(model.get_submodule(name), Packed):
                put(model, name, QuantizedWeight.empty(metadata))
        for name, module in model.named_modules():
            if isinstance(module, Packed):
                try:
                    module.packed.validate()
                    if isinstance(module, QuantizedLinear):
                        module.settle()
                except ValueError as error:
                    raise CheckpointError(f"{name}: {error}; the checkpoint is damaged") from error
        if not torch.cuda.is_available():  # else `load` knows better where the model will run
            choose_unpacked(model, ASKED.get())

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[None, dict[str, str]]:
        """Called before a model is saved: its config gets the metadata that its layers have by now.

        A layer that has become dense meanwhile, as a head does whose rows transformers adds to, is packed no more. All
        tensors keep the model's names, by which the metadata know the layers, whatever the model's own files have.

        Raises:
            QuantkitError: adapters sit on packed layers, whose tensors would be saved under names that nobody loads.
        """
        from torch import nn

        from quantkit.core.errors import QuantkitError
        from quantkit.models.linear import Packed

        config, modules = model.config.quantization_config, dict(model.named_modules())
        assert isinstance(config, QuantkitConfig) and config.layers is not None
        adapters = getattr(model, "_hf_peft_config_loaded", False)  # which transformers then saves alone
        if not adapters:
            for name in config.layers:
                if f"{name}.base_layer" in modules:
                    raise QuantkitError(
                        f"{name} has an adapter that is not merged; merge_and_unload() first, or save the adapter"
                    )
        for name in [*config.layers]:
            module = modules.get(name)
            if isinstance(module, Packed):
                config.layers[name] = module.metadata
            elif isinstance(module, nn.Linear | nn.Embedding):
                del config.layers[name]
        if not model.is_remote_code():
            _unnamed(model.config)  # it would name code that transformers does not write along
        config.layers |= _shared(model, config.layers)
        model._weight_conversions = []  # type: ignore[assignment]
        if not adapters:
            _leave_code(model)
        return None, {}

    def _dequantize(self, model: "PreTrainedModel", dtype: Any = None) -> "PreTrainedModel":
        """`model.dequantize()`: the dense model that the packed one stands for, of its plain class, in place.

        Raises:
            QuantkitError: tensors are offloaded, or adapters sit on packed layers.
        """
        import torch

        from quantkit.models.dense import make_dense

        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a name, once the model has been saved
        make_dense(model, kind or model.dtype)
        _plain(model)
        return model

    def is_serializable(self) -> bool:
        """Packed layers save as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True, with adapters: gradients pass through packed layers, and codes stay."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Kernels are torch.library operators."""
        return True


def _unguarded(config: Any) -> Any:
    if getattr(config, "transformers_weights", None) == GUARD:
        del config.transformers_weights
    return config


def _unnamed(config: Any) -> None:
    """A config that names quantkit's code no more."""
    named = getattr(config, "auto_map", None) or {}
    if any(str(place).rpartition("--")[2].startswith(f"{SHIM}.") for place in named.values()):
        del config.auto_map


def _leave_code(model: Any) -> None:
    """Has the next save of a model's config, which takes away what guards the weights, add it again, with the code."""
    config, kind = model.config, type(model.config)

    class Saved(kind):  # type: ignore[valid-type, misc]
        """The config's own class, once its file is written."""

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            from quantkit.io import shim

            self.__class__ = kind
            self.save_pretrained(save_directory, *args, **kwargs)
            shim.leave(model, Path(save_directory))

    Saved.__name__, Saved.__qualname__, Saved.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    config.__class__ = Saved


def _plain(model: Any) -> None:
    """Takes quantkit's code off a model that came by it (`quantkit.io.shim`)."""
    _unnamed(model.config)
    for one in (model, model.config):
        cls = type(one)
        if cls.__module__.rpartition(".")[2] == SHIM:
            one.__class__ = cls.__mro__[1]
            one._auto_class = None


def _shared(model: "PreTrainedModel", layers: Iterable[str]) -> dict[str, Any]:
    """Metadata of layers that are one at several places, by the name under which transformers saves their tensors."""
    from quantkit.formats.tied import TiedWeight

    places: dict[Any, list[str]] = {}
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        module = modules.get(name)
        if hasattr(module, "metadata") and hasattr(module, "in_features"):  # a packed layer, also one in training
            places.setdefault(module, []).append(name)
    found: dict[str, Any] = {}
    for module, names in places.items():
        if len(names) > 1:
            ties, (tensor, _) = model.get_expanded_tied_weights_keys(all_submodels=True), next(module.named_buffers())
            saved = next(name for name in names if f"{name}.{tensor}" not in ties)
            found |= {name: TiedWeight(saved, *module.packed.shape).metadata() for name in names}
            found[saved] = module.metadata
    return found


def _specs(files: list[str]) -> dict[str, tuple[str, list[int]]]:
    from quantkit.io.shards import open_shard

    specs = {}
    for file in files:
        with open_shard(Path(file)) as shard:
            for name in shard.keys():
                view = shard.get_slice(name)
                specs[name] = (view.get_dtype(), view.get_shape())
    return specs
