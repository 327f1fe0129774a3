"""ECCL: text-to-image person retrieval in the Hugging Face ecosystem.

`import eccl` is fast: it loads neither torch nor transformers. Each public name is imported on first use. The first use
also registers `eccl` with the Auto classes of transformers, so that `AutoModel.from_pretrained` loads an ECCL
checkpoint with the code of this package and needs no `trust_remote_code`, and the task "text-to-person-retrieval" with
`transformers.pipeline`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_eccl import ECCLConfig
    from .hub.adapter import load_adapter
    from .hub.convert import convert_checkpoint
    from .hub.loading import load_model
    from .modeling_eccl import ECCLModel
    from .processing_eccl import ECCLProcessor
    from .search.gallery import Gallery
    from .training.arguments import ECCLTrainingArguments
    from .training.trainer import ECCLTrainer

    __version__: str

# The module of each public name.
_MODULES = {
    "ECCLConfig": "configuration_eccl",
    "ECCLModel": "modeling_eccl",
    "ECCLProcessor": "processing_eccl",
    "ECCLTrainer": "training.trainer",
    "ECCLTrainingArguments": "training.arguments",
    "Gallery": "search.gallery",
    "convert_checkpoint": "hub.convert",
    "load_adapter": "hub.adapter",
    "load_model": "hub.loading",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562)."""
    if name == "__version__":
        value = _read_version()
    elif name in _MODULES:
        _register()
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The next use finds the name without this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _read_version() -> str:
    """Returns the version in `setup.cfg`, which is its only source; an installation has a copy in its metadata."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("eccl")
    except PackageNotFoundError:
        # A checkout that is on the path but not installed.
        from configparser import ConfigParser
        from pathlib import Path

        settings = ConfigParser()
        settings.read(Path(__file__).with_name("setup.cfg"), encoding="utf-8")
        return settings["metadata"]["version"]


def _register() -> None:
    """Registers ECCL with the Auto classes and the pipelines of transformers; a second call changes nothing."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_eccl import PIPELINE_TASK, ECCLConfig
    from .modeling_eccl import ECCLModel
    from .pipeline_eccl import TextToPersonRetrievalPipeline
    from .processing_eccl import ECCLImageProcessor, ECCLProcessor

    AutoConfig.register(ECCLConfig.model_type, ECCLConfig, exist_ok=True)
    AutoModel.register(ECCLConfig, ECCLModel, exist_ok=True)
    AutoProcessor.register(ECCLConfig, ECCLProcessor, exist_ok=True)
    AutoImageProcessor.register(ECCLConfig, image_processor_classes={"pil": ECCLImageProcessor}, exist_ok=True)
    if PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(PIPELINE_TASK, TextToPersonRetrievalPipeline, pt_model=AutoModel)


__all__ = [
    "ECCLConfig",
    "ECCLModel",
    "ECCLProcessor",
    "ECCLTrainer",
    "ECCLTrainingArguments",
    "Gallery",
    "__version__",
    "convert_checkpoint",
    "load_adapter",
    "load_model",
]
