"""The trained part of ECCL as an adapter of peft: LoRA matrices for both encoders, and the prompt learner, if any."""

import contextlib
import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_eccl import ECCLConfig
from ..modeling_eccl import (
    ECCLModel,
    ECCLPromptLearner,
    naming_checkpoint_errors,
    require_finite,
    require_tensors,
    share_weights,
)
from .bases import BASE_FOLDER_FILE, is_path, resolve_base
from .lora import LoraLinear

logger = logging.getLogger(__name__)

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# What may differ between the `adapter_config.json` of two adapters of this project.
_FREE_SETTINGS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}
# In the `config.json` of an adapter.
_DIGESTS_KEY = "base_weights_sha256"
# The prompts belong to the adapter. The image positions were resized, and interpolation rounds differently elsewhere.
_NOT_OF_THE_BASE = ("prompt_learner.", "vision_model.embeddings.position_embedding.")


def digest_weights(model: ECCLModel) -> dict[str, str] | None:
    """Computes SHA-256 digests of the weights that an adapter needs and does not hold.

    They cover names, shapes and values of all parameters but the prompts and the image positions. The values are
    rounded to half precision, because a base may be stored in it: `float16` and `bfloat16` have a digest each, and one
    that agrees is enough.

    Returns:
        The digests by the name of the type; `None` if weights are not in memory.
    """
    digests = {dtype: hashlib.sha256() for dtype in (torch.float16, torch.bfloat16)}
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(_NOT_OF_THE_BASE):
            continue
        if value.is_meta:
            return None
        for dtype, digest in digests.items():
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            # numpy has no bfloat16.
            digest.update(value.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in digests.items()}


class ECCLPeftModel(PeftModel):
    """An ECCL model with adapters. It refuses what peft cannot do with adapters that hold whole prompts.

    Attributes:
        base_digests: the [`digest_weights`] of the base; saved adapters carry them. `None` if they are unknown.
        checks_base: whether [`load_adapter`] compares the base of an adapter with this model, unless told otherwise.
    """

    checks_base = True

    def __init__(self, model: ECCLModel, peft_config: PeftConfig, *args: Any, **kwargs: Any):
        _require_own_settings(peft_config, model)
        base_digests = digest_weights(model)
        super().__init__(model, peft_config, *args, **kwargs)
        self.base_digests = base_digests

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, as peft does, but refuses other settings than those of [`attach_lora`].

        Raises:
            ValueError: a setting differs; the message names it.
        """
        _require_own_settings(peft_config, cast(ECCLModel, self.get_base_model()))
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Writes the adapters, each with a `config.json`: the shape of the model, and the digests of the base.

        The first adapter (`default`) is written to the folder itself, the others to subfolders with their names.
        """
        # By default peft looks for the base, to learn whether its vocabulary has been changed.
        kwargs.setdefault("save_embedding_layers", False)
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        content = cast(ECCLModel, self.get_base_model()).config.to_dict() | {_DIGESTS_KEY: self.base_digests}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        for name in kwargs.get("selected_adapters") or list(self.peft_config):
            folder = Path(save_directory) if name == "default" else Path(save_directory, name)
            (folder / "config.json").write_text(text, encoding="utf-8")
            share_weights(folder)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *args: Any,
        check_base: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads an adapter, as peft does, but refuses one that is not whole, or that was trained on another base.

        Args:
            model_id: local folder or Hub id of the adapter.
            adapter_name: the name of the adapter within the model.
            *args, **kwargs: as for `PeftModel.load_adapter`.
            check_base: `False` accepts another base; by default the attribute `checks_base` decides.

        Raises:
            ValueError: the adapter was trained on another base; its file is damaged; or a tensor is missing, is not the
                adapter's, has another shape, or has NaN or infinite values. The message names the tensors.
        """
        model_id = str(model_id)
        hub_arguments, _ = self._split_kwargs(kwargs)
        if self.checks_base if check_base is None else check_base:
            self._check_base(model_id, hub_arguments)
        with naming_checkpoint_errors(f"the adapter {model_id}"):
            stored = load_peft_weights(model_id, device="cpu", **hub_arguments)
        require_finite(f"the adapter {model_id}", stored)
        is_new = adapter_name not in self.peft_config
        try:
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
            expected = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
            require_tensors(f"the adapter {model_id}", stored, expected)
        except (ValueError, RuntimeError) as error:
            # With the only adapter gone there would be no model left; its caller has none yet.
            if is_new and adapter_name in self.peft_config and len(self.peft_config) > 1:
                self.delete_adapter(adapter_name)
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"the adapter {model_id} does not fit the model: {error}") from error
        return result

    def _check_base(self, model_id: str, hub_arguments: dict[str, Any]) -> None:
        try:
            digests = PreTrainedConfig.get_config_dict(model_id, **hub_arguments)[0].get(_DIGESTS_KEY)
        except OSError:
            digests = None
        if not digests or not self.base_digests:
            logger.warning(
                f"the adapter {model_id} cannot be compared with its base: the digest of the base's weights is unknown"
            )
        elif not digests.items() & self.base_digests.items():
            raise ValueError(
                f"the adapter {model_id} was trained on a base with other weights (the SHA-256 in its config.json is "
                f"another one): give the base that it was trained on, or check_base=False"
            )

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
        has_prompts = model.prompt_learner is not None
        prompts = model.get_submodule("prompt_learner.original_module") if has_prompts else None
        for layer in _lora_layers(self):
            layer.restore_base()
        self.base_model.unload()  # type: ignore[operator]  # mypy takes it for a tensor of the module
        model.prompt_learner = cast(ECCLPromptLearner | None, prompts)
        return model


def attach_lora(
    model: ECCLModel, rank: int = 4, alpha: int = 4, base_dtype: torch.dtype | None = None
) -> ECCLPeftModel:
    """Freezes a model and adds the parameters that ECCL trains: LoRA in every layer of both encoders, and the prompts.

    LoRA adds the product `alpha / rank * B A` to a weight. `A` starts with Kaiming-uniform values and `B` with zeros
    (LoRA, ICLR 2022, section 4.1). The prompts are trained together with the projections that make image prompts from
    them.

    Args:
        model: is changed in place. If it has no prompts, LoRA alone is trained.
        rank: the rank of `B A`.
        alpha: the factor in `alpha / rank`.
        base_dtype: the dtype of the frozen weights in the layers with LoRA, in memory and in matrix products, for
            example `torch.bfloat16`, which needs half the memory. LoRA itself, the prompts, and all other weights stay
            as they are. By default, no weight is converted. Merging and unloading convert back; the values stay
            rounded.

    Returns:
        The model as a peft model, which `Trainer` can save, resume and load again.

    Raises:
        ValueError: the rank is larger than the widths of the model.
    """
    with _without_deprecations():
        trained = ECCLPeftModel(model, _make_settings(rank, alpha, model))
    if base_dtype is not None:
        for layer in _lora_layers(trained):
            layer.lower_base(base_dtype)
    return trained


def _lora_layers(model: PeftModel) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def train_prompts(model: ECCLModel) -> ECCLModel:
    """Freezes everything but the prompts and the projections that make image prompts from them.

    Args:
        model: is changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no prompts.
    """
    if model.prompt_learner is None:
        raise ValueError("the model has no prompts (num_prompt_tokens is 0), so there is nothing to train")
    model.requires_grad_(False)
    model.prompt_learner.requires_grad_(True)
    return model


def _make_settings(rank: int, alpha: int, model: ECCLModel) -> LoraConfig:
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=TARGET_MODULES,
        modules_to_save=["prompt_learner"] if model.prompt_learner is not None else None,
    )
    settings._register_custom_module({nn.Linear: LoraLinear})
    return settings


def _require_own_settings(settings: PeftConfig, model: ECCLModel) -> None:
    """Refuses an adapter with other settings than those of this project, before peft acts on them.

    Some settings of peft are patterns that it evaluates, names of modules that it imports, or layers that it copies.

    Raises:
        ValueError: a setting differs; or the rank is larger than the widths of the model. The message names it.
    """
    if not isinstance(settings, LoraConfig):
        raise ValueError(f"an adapter of ECCL has peft_type LORA, this one has {settings.peft_type}")
    largest = max(encoder.hidden_size for encoder in model.config.encoder_configs)
    if not (isinstance(settings.r, int) and 1 <= settings.r <= largest):
        raise ValueError(
            f"the rank of LoRA is {settings.r}, it must be between 1 and the width of the model, {largest}"
        )
    if not (isinstance(settings.lora_alpha, (int, float)) and math.isfinite(settings.lora_alpha)):
        raise ValueError(f"lora_alpha is {settings.lora_alpha!r}, it must be a number")
    own = _make_settings(settings.r, 1, model).to_dict()
    for name, value in settings.to_dict().items():
        if name not in _FREE_SETTINGS and value != own[name]:
            raise ValueError(
                f"{name} is {value!r} in the settings of the adapter, an adapter of ECCL has {own[name]!r}: other "
                "settings are refused, because some make peft run patterns or code"
            )


def merge_lora(model: PeftModel) -> ECCLModel:
    """Adds the LoRA products to the weights and returns a plain [`ECCLModel`]; `model` must not be used afterwards."""
    return model.merge_and_unload()


def save_adapter(model: PeftModel, folder: str | Path, base: str | None) -> None:
    """Writes the trained parameters (a few MB), the name and the digests of the base, and the shape of the whole model.

    Args:
        model: a model from [`attach_lora`].
        folder: the folder that gets `adapter_config.json`, `adapter_model.safetensors` and `config.json`.
        base: Hub id or folder of the CLIP that [`ECCLModel.from_clip`] got. Of a folder, `adapter_config.json` gets
            the name (`./NAME`), and the file `base_folder.txt`, which is never published, the absolute path. With
            `None` the adapter names no base, and [`load_adapter`] must be told it.
    """
    path = Path(base).resolve() if base is not None and Path(base).is_dir() else None
    model.peft_config[model.active_adapter].base_model_name_or_path = f"./{path.name}" if path else base
    model.save_pretrained(str(folder))
    if path:
        Path(folder, BASE_FOLDER_FILE).write_text(f"{path}\n", "utf-8", "surrogateescape")


def find_base(name: str | Path, base: str | None = None) -> str:
    """Returns the Hub id or the folder of the base of an adapter.

    Args:
        name: folder or Hub id of the adapter.
        base: replaces the base that the adapter names.

    Raises:
        ValueError: the adapter does not name its base, and `base` is not given.
        FileNotFoundError: the base is a folder that does not exist.
    """
    if not base:
        base = resolve_base(name, PeftConfig.from_pretrained(str(name)).base_model_name_or_path)
    if not base:
        raise ValueError(f"the adapter {name} does not name the model that it was trained on: give it as base")
    # The Hub would be asked for a name that is no folder.
    if is_path(base) and not Path(base).is_dir():
        raise FileNotFoundError(f"the base of the adapter {name} is not there: {base}; give its place as base")
    return base


def load_adapter(
    name: str | Path,
    base: ECCLModel | str | None = None,
    adapter_name: str = "default",
    check_base: bool = True,
) -> ECCLPeftModel:
    """Loads a saved adapter and attaches it to its base.

    Several adapters can share one base. The result has a method `load_adapter` that adds another adapter, and a method
    `set_adapter` that chooses the active one.

    Args:
        name: folder or Hub id of an adapter that [`save_adapter`] wrote.
        base: folder or Hub id of a CLIP, or a model whose prompts have the adapter's shape (the adapter replaces their
            values); by default the base that the adapter names.
        adapter_name: the name of this adapter within the model.
        check_base: `False` accepts a base with other weights than the one that the adapter was trained on.

    Raises:
        ValueError: the adapter does not name its base, and `base` is not given; or the base has other weights than the
            one that the adapter was trained on; or the adapter has other settings than those of this project, or is not
            whole, see [`ECCLPeftModel.load_adapter`].
        OSError: there is no such folder or Hub repository.
    """
    name = str(name)
    with naming_checkpoint_errors(f"the adapter {name}"):
        settings = PeftConfig.from_pretrained(name)
        # peft would make a model of another class, which checks nothing.
        if settings.task_type is not None:
            raise ValueError(f"the adapter {name} has task_type {settings.task_type!r}, an adapter of ECCL has none")
        if base is None or isinstance(base, str):
            config = ECCLConfig.from_pretrained(name)
            place = find_base(name, base)
            base = ECCLModel.from_clip(place, config.input_size, config.num_prompt_tokens, config.prompt_depth)
        with _without_deprecations():
            loaded = ECCLPeftModel.from_pretrained(
                base, name, adapter_name=adapter_name, config=settings, check_base=check_base
            )
    return cast(ECCLPeftModel, loaded)


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
    "digest_weights",
    "find_base",
    "load_adapter",
    "merge_lora",
    "save_adapter",
    "train_prompts",
]
