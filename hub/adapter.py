"""The trained part of ECCL as a peft adapter: low-rank updates of both encoders, and the prompt learner whole."""

from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from ..configuration_eccl import ECCLConfig
from ..modeling_eccl import ECCLModel

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def attach_lora(model: ECCLModel, rank: int = 4, alpha: int = 4) -> PeftModel:
    """Freezes a model and adds what ECCL trains: LoRA in every layer of both encoders, the prompts and their maps.

    Args:
        model: with prompts; it is changed in place.
        rank: of the update `B A`, A Kaiming-uniform, B zero (LoRA, ICLR 2022, section 4.1).
        alpha: the update is scaled by `alpha / rank`.

    Returns:
        The model as peft wraps it; `get_peft_model`, so that `Trainer` resumes and reloads it.

    Raises:
        ValueError: a model without prompts.
    """
    if model.prompt_learner is None:
        raise ValueError("the model has no prompts (num_prompt_tokens is 0): build it with ECCLModel.from_clip first")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGET_MODULES, modules_to_save=["prompt_learner"]
    )
    return get_peft_model(model, config)


def merge_lora(model: PeftModel) -> ECCLModel:
    """A plain [`ECCLModel`] with the updates folded into its weights; the wrapped model is used up."""
    return model.merge_and_unload()


def save_adapter(model: PeftModel, folder: str | Path, base: str | None) -> None:
    """Writes what was trained, a few MB, with the name of what it was trained on and the shape of the whole.

    Args:
        model: as [`attach_lora`] gives it.
        folder: gets `adapter_config.json`, `adapter_model.safetensors` and `config.json`.
        base: Hub id or folder of the CLIP that [`ECCLModel.from_clip`] was given; without one, loading asks for it.
    """
    model.peft_config[model.active_adapter].base_model_name_or_path = base
    model.save_pretrained(folder)
    model.config.to_json_file(Path(folder) / "config.json")


def load_adapter(name: str | Path, base: ECCLModel | str | None = None, adapter_name: str = "default") -> PeftModel:
    """Attaches a saved adapter to what it was trained on.

    Args:
        name: folder or Hub id of an adapter, as [`save_adapter`] writes it.
        base: a CLIP by Hub id or folder, or a model with (any) prompts of the adapter's shape; by default the one that
            the adapter names.
        adapter_name: what it is called within the model, where several take turns: `load_adapter` of what this returns
            adds another, `set_adapter` chooses.

    Raises:
        ValueError: the adapter names no base, and none is given.
    """
    name = str(name)
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if base is None else base
    if not base:
        raise ValueError(f"{name} does not say what it was trained on: give its base")
    if isinstance(base, str):
        config = ECCLConfig.from_pretrained(name)
        image_size = tuple(config.vision_config.image_size)
        base = ECCLModel.from_clip(base, image_size, config.num_prompt_tokens, config.prompt_depth)
    return PeftModel.from_pretrained(base, name, adapter_name=adapter_name)


def count_parameters(model: ECCLModel | PeftModel) -> tuple[int, int]:
    """How many parameters train, and how many there are while they do, LoRA included."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not isinstance(model, PeftModel):
        return trainable, sum(parameter.numel() for parameter in model.parameters())
    # peft keeps the first state of what it saves whole beside the trained one: count it once.
    return trainable, sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".original_module." not in name
    )
