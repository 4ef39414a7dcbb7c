"""LoRA adapters on a model: several at once, chosen token by token.

peft wraps the adapted layers and takes `adapter_names`, one per batch entry, in each layer's forward. `PeftModel` would
put hooks on every layer before each call and remove them afterwards; here the hooks are put on once, when an adapter is
loaded, and read the names of the step at hand.
"""

from __future__ import annotations

from typing import Any, Final

from peft import LoraConfig, LoraModel
from peft.functional import set_adapter, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from experts.adapters import LoadedAdapter

BASE: Final = "__base__"
"""peft's name for no adapter."""


class AdapterSwitch:
    """Puts adapters on a model, takes them off, and says which tokens of a step use which.

    Not safe for several threads: only the one that runs the model may call it, and only between steps.

    Args:
        model: The base model, in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tuner: LoraModel | None = None
        self._names: list[str] | None = None
        self._hooked: set[LoraLayer] = set()

    def add(self, name: str, adapter: LoadedAdapter) -> None:
        """Puts a checked adapter on the model, under a name without dots."""
        settings = adapter.settings
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            use_rslora=settings.rslora,
            rank_pattern=dict(settings.rank_pattern),
            alpha_pattern=dict(settings.alpha_pattern),
            fan_in_fan_out=settings.fan_in_fan_out,
            target_modules=list(adapter.info.modules),
            inference_mode=True,
        )
        try:
            if self._tuner is None:
                self._tuner = LoraModel(self._model, config, name, low_cpu_mem_usage=True)
            else:
                self._tuner.peft_config[name] = config
                self._tuner.inject_adapter(self._model, name, low_cpu_mem_usage=True)
            set_peft_model_state_dict(self._model, dict(adapter.tensors), name, low_cpu_mem_usage=True)
        except Exception:
            self.remove(name)
            raise
        # No adapter is active by itself: without names, a step is the base model's.
        set_adapter(self._model, [])
        for module in self._model.modules():
            if isinstance(module, LoraLayer) and module not in self._hooked:
                module.register_forward_pre_hook(self._hand_over, with_kwargs=True)
                self._hooked.add(module)

    def remove(self, name: str) -> None:
        """Takes an adapter off the model."""
        if self._tuner is not None and name in self._tuner.peft_config:
            # Not active, or peft would make another adapter active in its place.
            set_adapter(self._model, [])
            self._tuner.delete_adapter(name)

    def select(self, names: list[str | None]) -> None:
        """Says which adapter each token of the next step uses; None for the base model."""
        self._names = [n or BASE for n in names] if any(names) else None

    def _hand_over(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._names is None:
            return None
        return args, {**kwargs, "adapter_names": self._names}
