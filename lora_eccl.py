"""The trained part of ECCL as a peft adapter: low-rank updates of both encoders, and the prompt learner whole."""

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from .modeling_eccl import ECCLModel

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


def load_adapter(base: ECCLModel, folder: str | Path) -> PeftModel:
    """Attaches a saved adapter to the model it was trained on.

    Args:
        base: the backbone with (any) prompts, of the shape that the adapter was trained with.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    """
    return PeftModel.from_pretrained(base, str(folder))


def count_parameters(model: ECCLModel | PeftModel) -> tuple[int, int]:
    """How many parameters train, and how many there are while they do, LoRA included."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not isinstance(model, PeftModel):
        return trainable, sum(parameter.numel() for parameter in model.parameters())
    # peft keeps the first state of what it saves whole beside the trained one: count it once.
    return trainable, sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".original_module." not in name
    )
