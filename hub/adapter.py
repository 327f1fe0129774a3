"""The trained part of ECCL as an adapter of peft: LoRA matrices for both encoders, and the whole prompt learner."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from ..configuration_eccl import ECCLConfig
from ..modeling_eccl import ECCLModel, share_weights

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def attach_lora(model: ECCLModel, rank: int = 4, alpha: int = 4) -> PeftModel:
    """Freezes a model and adds the parameters that ECCL trains: LoRA in every layer of both encoders, and the prompts.

    LoRA adds the product `alpha / rank * B A` to a weight. `A` starts with Kaiming-uniform values and `B` with zeros
    (LoRA, ICLR 2022, section 4.1). The prompts are trained together with the projections that make image prompts from
    them.

    Args:
        model: a model with prompts; it is changed in place.
        rank: the rank of `B A`.
        alpha: the factor in `alpha / rank`.

    Returns:
        The wrapped model of `get_peft_model`, which `Trainer` can save, resume and load again.

    Raises:
        ValueError: the model has no prompts.
    """
    if model.prompt_learner is None:
        raise ValueError("the model has no prompts (num_prompt_tokens is 0): build it with ECCLModel.from_clip first")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGET_MODULES, modules_to_save=["prompt_learner"]
    )
    with _without_deprecations():
        return get_peft_model(model, config)


def merge_lora(model: PeftModel) -> ECCLModel:
    """Adds the LoRA products to the weights and returns a plain [`ECCLModel`]; `model` must not be used afterwards."""
    return model.merge_and_unload()


def save_adapter(model: PeftModel, folder: str | Path, base: str | None) -> None:
    """Writes the trained parameters (a few MB), the name of the base, and the shape of the whole model.

    Args:
        model: a model from [`attach_lora`].
        folder: the folder that gets `adapter_config.json`, `adapter_model.safetensors` and `config.json`.
        base: Hub id or folder of the CLIP that [`ECCLModel.from_clip`] got. With `None` the adapter names no base, and
            [`load_adapter`] must be told it.
    """
    model.peft_config[model.active_adapter].base_model_name_or_path = base
    model.save_pretrained(str(folder))
    share_weights(Path(folder))
    model.config.to_json_file(Path(folder) / "config.json")


def load_adapter(name: str | Path, base: ECCLModel | str | None = None, adapter_name: str = "default") -> PeftModel:
    """Loads a saved adapter and attaches it to its base.

    Several adapters can share one base. The result has a method `load_adapter` that adds another adapter, and a method
    `set_adapter` that chooses the active one.

    Args:
        name: folder or Hub id of an adapter that [`save_adapter`] wrote.
        base: folder or Hub id of a CLIP, or a model whose prompts have the adapter's shape (the adapter replaces their
            values); by default the base that the adapter names.
        adapter_name: the name of this adapter within the model.

    Raises:
        ValueError: the adapter does not name its base, and `base` is not given.
    """
    name = str(name)
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if base is None else base
    if not base:
        raise ValueError(f"the adapter {name} does not name the model that it was trained on: give it as base")
    if isinstance(base, str):
        config = ECCLConfig.from_pretrained(name)
        base = ECCLModel.from_clip(base, config.input_size, config.num_prompt_tokens, config.prompt_depth)
    with _without_deprecations():
        return PeftModel.from_pretrained(base, name, adapter_name=adapter_name)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Hides a warning that users cannot act on: peft reads `is_gradient_checkpointing`, which transformers renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield


def count_parameters(model: ECCLModel | PeftModel) -> tuple[int, int]:
    """Returns the number of trained parameters and the number of all parameters, LoRA included."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not isinstance(model, PeftModel):
        return trained, sum(parameter.numel() for parameter in model.parameters())
    # peft keeps a copy of the prompt learner's initial values. The prompt learner is counted once.
    return trained, sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".original_module." not in name
    )


__all__ = ["TARGET_MODULES", "attach_lora", "count_parameters", "load_adapter", "merge_lora", "save_adapter"]
