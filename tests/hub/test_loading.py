import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from eccl.hub.adapter import attach_lora, load_adapter, save_adapter
from eccl.hub.loading import load_model
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from helpers import clip_tokenizer

SIZE = (32, 16)
CAPTIONS = ["a man in a red coat", "a woman"]


@pytest.fixture
def clip(tmp_path):
    """Writes a tiny CLIP for images of 32 x 32 pixels, with the vocabulary of CLIP, and returns its folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=12
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    clip_tokenizer().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def adapter(clip, tmp_path):
    """Writes an adapter that names no base. All its parameters differ from their initial values."""
    torch.manual_seed(1)
    model = attach_lora(ECCLModel.from_clip(str(clip), SIZE, num_prompt_tokens=3, prompt_depth=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter", None)
    return tmp_path / "adapter"


def name_base(adapter, base):
    """Writes the name of the base into the configuration of an adapter."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


@torch.no_grad()
def features(model, processor):
    """Computes the features of two fixed captions and of two random images."""
    height, width = model.config.input_size
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    inputs = processor(text=CAPTIONS, return_tensors="pt")
    device = model.device
    texts = model.get_text_features(inputs["input_ids"].to(device)).pooler_output
    return torch.cat([texts, model.get_image_features(pixels.to(device)).pooler_output]).cpu()


def check_form(model, processor):
    """Checks the form of a loaded model, and that its processor fits it."""
    assert type(model) is ECCLModel and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    height, width = model.config.input_size
    assert type(processor) is ECCLProcessor and processor.image_processor.size == {"height": height, "width": width}
    assert processor.max_text_length == model.config.max_text_length
    assert processor(text="a man")["input_ids"] == [49406, 320, 786, 49407]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_equals_from_pretrained(clip, tmp_path, dtype):
    merged = ECCLModel.from_clip(str(clip), SIZE, num_prompt_tokens=3, prompt_depth=2)
    ECCLProcessor.for_model(merged.config, clip_tokenizer()).save_pretrained(tmp_path / "merged")
    merged.to(dtype).save_pretrained(tmp_path / "merged")
    model, processor = load_model(tmp_path / "merged")
    check_form(model, processor)
    direct = ECCLModel.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert model.config.num_prompt_tokens == 3 and model.config.input_size == SIZE
    torch.testing.assert_close(features(model, processor), features(direct, processor))


@pytest.mark.parametrize("given", [False, True])
def test_an_adapter_equals_its_base_with_unmerged_lora(clip, adapter, given):
    if not given:
        name_base(adapter, clip)
    base = str(clip) if given else None
    model, processor = load_model(adapter, base)
    check_form(model, processor)
    wrapped = load_adapter(adapter, base).eval()
    assert model.config.num_prompt_tokens == 3 and model.config.input_size == SIZE
    expected = features(wrapped, processor)
    torch.testing.assert_close(features(model, processor), expected, rtol=1e-5, atol=1e-5)
    plain = ECCLModel.from_clip(str(clip), SIZE, num_prompt_tokens=0)
    assert not torch.allclose(features(plain, processor), expected, atol=1e-3)


def test_a_given_base_replaces_the_one_that_the_adapter_names(clip, adapter, tmp_path):
    expected = features(*load_model(adapter, str(clip)))
    name_base(adapter, tmp_path / "absent")
    torch.testing.assert_close(features(*load_model(adapter, str(clip))), expected)
    with pytest.raises(OSError, match="absent"):
        load_model(adapter)


def test_a_plain_clip_gets_the_image_size_of_the_published_model(clip):
    model, processor = load_model(str(clip))
    check_form(model, processor)
    assert model.prompt_learner is None and model.config.input_size == (384, 128)
    direct = CLIPModel.from_pretrained(clip).eval()
    inputs = processor(text=CAPTIONS, return_tensors="pt")
    with torch.no_grad():
        texts = direct.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(features(model, processor)[: len(CAPTIONS)], texts)
    resized = ECCLModel.from_clip(direct, (384, 128), num_prompt_tokens=0)
    torch.testing.assert_close(features(model, processor), features(resized, processor))


def test_weights_stored_in_half_precision_come_back_in_float32(clip, adapter):
    CLIPModel.from_pretrained(clip).to(torch.bfloat16).save_pretrained(clip)
    assert CLIPModel.from_pretrained(clip).dtype == torch.bfloat16
    check_form(*load_model(clip))
    check_form(*load_model(adapter, str(clip)))


def test_an_adapter_that_names_no_base_is_refused(adapter):
    with pytest.raises(ValueError, match=rf"the adapter {adapter} does not name the model that it was trained on"):
        load_model(adapter)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=rf"{tmp_path} has model_type 'bert' .* it must be 'clip' or 'eccl'"):
        load_model(tmp_path)


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="absent"):
        load_model(tmp_path / "absent")
    with pytest.raises(OSError, match=rf"{tmp_path} is not a checkpoint"):
        load_model(tmp_path)
