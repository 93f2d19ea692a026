"""Makes transformers' Auto classes resolve `model_type="deepseek_v3"` to this package.

transformers keeps, per Auto mapping, a table from model type to the module in which it looks the class names up
(`_LazyAutoMapping._modules`, filled with `transformers.models.<type>` on first use). This package offers the same
class names, so it is entered there: the Auto classes then find ours, and neither torch nor a model is imported before
someone asks for one. `Auto*.register` would need the classes themselves, that is torch, triton and accelerate.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

MODEL_TYPE = "deepseek_v3"
# module that holds the mappings -> {mapping: class name we resolve}
_MAPPINGS = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING": "DeepseekV3Config"},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING": "DeepseekV3Model",
        "MODEL_FOR_CAUSAL_LM_MAPPING": "DeepseekV3ForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "DeepseekV3ForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "DeepseekV3ForTokenClassification",
    },
    "transformers.models.auto.tokenization_auto": {"TOKENIZER_MAPPING": "DeepseekV3Tokenizer"},
}


def _enter(module: ModuleType) -> None:
    for mapping_name, class_name in _MAPPINGS[module.__name__].items():
        mapping = getattr(module, mapping_name)
        mapping._modules[MODEL_TYPE] = sys.modules[__package__]
        names = mapping._mapping if mapping_name == "CONFIG_MAPPING" else mapping._model_mapping
        names[MODEL_TYPE] = class_name
    if module.__name__.endswith("tokenization_auto"):
        # A folder's `tokenizer_class` wins over the model type, unless the type is known to carry wrong ones, and is
        # looked up by name in a registry of classes. By now importing ours loads nothing more than itself.
        from .tokenization import DeepseekV3Tokenizer

        module.REGISTERED_TOKENIZER_CLASSES["DeepseekV3Tokenizer"] = DeepseekV3Tokenizer
        module.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(MODEL_TYPE)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `_enter` right after one of the Auto modules has been imported."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _MAPPINGS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_enter(module: ModuleType) -> None:
            execute(module)
            _enter(module)

        spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Enter this package in the Auto mappings, now for those already imported, else when they are."""
    for name in _MAPPINGS:
        if name in sys.modules:
            _enter(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
