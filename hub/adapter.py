"""The trained part of ECCL as an adapter of peft: LoRA matrices for both encoders, and the whole prompt learner."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from peft import LoraConfig, PeftConfig, PeftModel

from ..configuration_eccl import ECCLConfig
from ..modeling_eccl import ECCLModel, ECCLPromptLearner, share_weights

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class ECCLPeftModel(PeftModel):
    """An ECCL model with adapters. It refuses what peft cannot do with adapters that hold whole prompts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the active adapter.

        Raises:
            ValueError: `adapter_names` asks for a mixed batch. The prompts are the same for all items of a batch.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "one batch cannot use several adapters, because each has its own prompts: call set_adapter(name), and "
                "the model with the items of this adapter, for one adapter after the other"
            )
        return super().forward(*args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Is refused: an average of LoRA matrices alone would go with the prompts of neither adapter.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "adapters with prompts cannot be added up by peft: load each with eccl.load_model, which merges it, and "
            "average the weights of the merged models"
        )

    def unload(self) -> ECCLModel:
        """Takes the adapters off and returns the model as it was before, its prompts included.

        peft would leave the prompts of the active adapter.
        """
        model = cast(ECCLModel, self.get_base_model())
        prompts = model.get_submodule("prompt_learner.original_module")
        self.base_model.unload()  # type: ignore[operator]  # mypy takes it for a tensor of the module
        model.prompt_learner = cast(ECCLPromptLearner, prompts)
        return model


def attach_lora(model: ECCLModel, rank: int = 4, alpha: int = 4) -> ECCLPeftModel:
    """Freezes a model and adds the parameters that ECCL trains: LoRA in every layer of both encoders, and the prompts.

    LoRA adds the product `alpha / rank * B A` to a weight. `A` starts with Kaiming-uniform values and `B` with zeros
    (LoRA, ICLR 2022, section 4.1). The prompts are trained together with the projections that make image prompts from
    them.

    Args:
        model: a model with prompts; it is changed in place.
        rank: the rank of `B A`.
        alpha: the factor in `alpha / rank`.

    Returns:
        The model as a peft model, which `Trainer` can save, resume and load again.

    Raises:
        ValueError: the model has no prompts.
    """
    if model.prompt_learner is None:
        raise ValueError("the model has no prompts (num_prompt_tokens is 0): build it with ECCLModel.from_clip first")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGET_MODULES, modules_to_save=["prompt_learner"]
    )
    with _without_deprecations():
        return ECCLPeftModel(model, config)


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


def load_adapter(name: str | Path, base: ECCLModel | str | None = None, adapter_name: str = "default") -> ECCLPeftModel:
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
        return cast(ECCLPeftModel, ECCLPeftModel.from_pretrained(base, name, adapter_name=adapter_name))


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


__all__ = [
    "TARGET_MODULES",
    "ECCLPeftModel",
    "attach_lora",
    "count_parameters",
    "load_adapter",
    "merge_lora",
    "save_adapter",
]
