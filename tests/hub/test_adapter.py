import json

import pytest
import torch

from eccl.hub.adapter import attach_lora, load_adapter, merge_lora, save_adapter
from eccl.modeling_eccl import ECCLModel
from helpers import tiny_config


@pytest.fixture
def base(tmp_path):
    """Writes a model without prompts, and returns the name of its folder."""
    torch.manual_seed(0)
    ECCLModel(tiny_config(num_prompt_tokens=0)).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def make_trained(base, seed):
    """Returns a model with LoRA and prompts whose trained parameters all differ from their initial values."""
    torch.manual_seed(seed)
    model = attach_lora(ECCLModel.from_clip(base, (32, 16), num_prompt_tokens=3, prompt_depth=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def features(model, batch):
    return torch.cat(
        [
            model.get_image_features(batch["pixel_values"]).pooler_output,
            model.get_text_features(batch["input_ids"]).pooler_output,
        ]
    )


def test_an_adapter_loads_its_base_and_equals_the_merged_model(base, tiny_batch, tmp_path):
    model = make_trained(base, 1)
    expected = features(model, tiny_batch)
    save_adapter(model, tmp_path / "adapter", base)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= names
    assert "model.safetensors" not in names
    loaded = load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(features(loaded, tiny_batch), expected)
    merged = merge_lora(loaded)
    assert type(merged) is ECCLModel
    torch.testing.assert_close(features(merged, tiny_batch), expected, rtol=1e-5, atol=1e-5)


def test_two_adapters_on_one_base_take_turns(base, tiny_batch, tmp_path):
    expected = {}
    for seed, name in enumerate(("cuhk", "rstp")):
        model = make_trained(base, seed)
        expected[name] = features(model, tiny_batch)
        save_adapter(model, tmp_path / name, base)
    model = load_adapter(tmp_path / "cuhk", adapter_name="cuhk")
    model.load_adapter(str(tmp_path / "rstp"), adapter_name="rstp")
    for name in ("cuhk", "rstp", "cuhk"):
        model.set_adapter(name)
        torch.testing.assert_close(features(model, tiny_batch), expected[name])
    # The adapter is merged into the weights for a short time, and then subtracted again.
    model.set_adapter("rstp")
    model.merge_adapter()
    torch.testing.assert_close(features(model, tiny_batch), expected["rstp"], rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("cuhk")
    torch.testing.assert_close(features(model, tiny_batch), expected["cuhk"], rtol=1e-4, atol=1e-5)
    model.delete_adapter("rstp")
    assert list(model.peft_config) == ["cuhk"]


def test_a_disabled_adapter_gives_the_base_with_its_earlier_prompts(base, tiny_batch, tmp_path):
    model = make_trained(base, 3)
    save_adapter(model, tmp_path / "adapter", base)
    torch.manual_seed(9)
    plain = ECCLModel.from_clip(base, (32, 16), num_prompt_tokens=3, prompt_depth=2)
    expected = features(plain, tiny_batch)
    loaded = load_adapter(tmp_path / "adapter", plain)
    assert not torch.allclose(features(loaded, tiny_batch), expected)
    with loaded.disable_adapter():
        torch.testing.assert_close(features(loaded, tiny_batch), expected)


def test_an_adapter_that_names_no_base_needs_one(base, tiny_batch, tmp_path):
    model = make_trained(base, 1)
    save_adapter(model, tmp_path / "adapter", None)
    with pytest.raises(ValueError, match="does not name the model that it was trained on: give it as base"):
        load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(
        features(load_adapter(tmp_path / "adapter", base), tiny_batch), features(model, tiny_batch)
    )
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert config["num_prompt_tokens"] == 3 and config["vision_config"]["image_size"] == [32, 16]


def test_lora_needs_a_model_with_prompts(base):
    with pytest.raises(ValueError, match="has no prompts"):
        attach_lora(ECCLModel.from_pretrained(base))
