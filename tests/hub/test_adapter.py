import json

import pytest
import safetensors.torch
import torch
from peft import AutoPeftModel, PeftModel
from peft.utils.hotswap import hotswap_adapter

from eccl.hub.adapter import attach_lora, count_parameters, load_adapter, merge_lora, save_adapter, train_prompts
from eccl.hub.model_card import Facts, make_model_card
from eccl.hub.publish import kind_of
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


@pytest.fixture
def two_adapters(base, tmp_path):
    """Two saved adapters of one base."""
    for seed, name in enumerate(("cuhk", "rstp")):
        save_adapter(make_trained(base, seed), tmp_path / name, base)
    return tmp_path / "cuhk", tmp_path / "rstp"


def test_peft_loads_an_adapter_onto_a_model_with_prompts_and_not_onto_one_without(
    base, two_adapters, tiny_batch, tmp_path, monkeypatch
):
    expected = features(make_trained(base, 0), tiny_batch)
    model = PeftModel.from_pretrained(ECCLModel.from_clip(base, (32, 16), 3, 2), two_adapters[0]).eval()
    torch.testing.assert_close(features(model, tiny_batch), expected)
    message = "has prompts, but the model has none: load an adapter with eccl.load_adapter"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(ECCLModel.from_pretrained(base), two_adapters[0])
    # The adapter names its base `./base`. The class that it names is imported only if the user allows it.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"import_allowlist=\['eccl.modeling_eccl'\]"):
        AutoPeftModel.from_pretrained(two_adapters[0])
    with pytest.raises(ValueError, match=message):
        AutoPeftModel.from_pretrained(two_adapters[0], import_allowlist=["eccl.modeling_eccl"])


def test_what_peft_cannot_do_with_whole_prompts_is_refused(base, two_adapters, tiny_batch):
    model = load_adapter(two_adapters[0], adapter_name="cuhk").eval()
    model.load_adapter(str(two_adapters[1]), adapter_name="rstp")
    before = features(model, tiny_batch)
    with pytest.raises(ValueError, match="adapters with prompts cannot be added up by peft: load each with"):
        model.add_weighted_adapter(["cuhk", "rstp"], [0.5, 0.5], "mixed")
    with pytest.raises(ValueError, match=r"one batch cannot use several adapters, .*: call set_adapter"):
        model(**tiny_batch, adapter_names=["cuhk", "rstp", "cuhk"])
    torch.testing.assert_close(features(model, tiny_batch), before)


def test_an_adapter_is_replaced_in_place_under_its_name(base, two_adapters, tiny_batch):
    model = load_adapter(two_adapters[0]).eval()
    before, expected = features(model, tiny_batch), features(make_trained(base, 1), tiny_batch)
    assert not torch.allclose(before, expected)
    # The message of peft's function names a tensor of the prompts; nothing is replaced.
    with pytest.raises(KeyError, match="prompt_learner"):
        hotswap_adapter(model, str(two_adapters[1]), "default")
    torch.testing.assert_close(features(model, tiny_batch), before)
    model.load_adapter(str(two_adapters[1]), adapter_name="default")
    torch.testing.assert_close(features(model, tiny_batch), expected)
    assert list(model.peft_config) == ["default"]


def test_unload_returns_the_model_as_it_was(base, two_adapters, tiny_batch):
    plain = ECCLModel.from_clip(base, (32, 16), num_prompt_tokens=3, prompt_depth=2)
    expected = features(plain, tiny_batch)
    model = load_adapter(two_adapters[0], plain).unload()
    assert type(model) is ECCLModel and not [name for name in model.state_dict() if "lora" in name or "save" in name]
    torch.testing.assert_close(features(model, tiny_batch), expected)


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


# -- LoRA alone, and prompts alone


def make_lora_alone(base, seed):
    """Returns a model with LoRA and without prompts, whose trained parameters all differ from their initial values."""
    torch.manual_seed(seed)
    model = attach_lora(ECCLModel.from_pretrained(base)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_of_a_model_without_prompts_lora_alone_is_trained(base, tiny_batch):
    plain = ECCLModel.from_pretrained(base)
    expected, total = features(plain, tiny_batch), sum(parameter.numel() for parameter in plain.parameters())
    model = attach_lora(plain)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    # Two encoders of two layers, each with six maps: A and B of each.
    assert len(trained) == 48 and all(".encoder.layers." in name and ".lora_" in name for name in trained)
    # Rank 4: four maps of width x width, and two of width x 2 width.
    count = sum(2 * (4 * 4 * 2 * width + 2 * 4 * 3 * width) for width in (32, 48))
    assert count_parameters(model) == (count, total + count)
    # B is zero at the start.
    torch.testing.assert_close(features(model, tiny_batch), expected)
    model(**tiny_batch).logits_per_text.sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == trained.keys()


def test_an_adapter_of_lora_alone_loads_merges_and_unloads(base, tiny_batch, tmp_path):
    plain = features(ECCLModel.from_pretrained(base), tiny_batch)
    model = make_lora_alone(base, 1)
    expected = features(model, tiny_batch)
    assert not torch.allclose(expected, plain, atol=1e-2)
    save_adapter(model, tmp_path / "adapter", base)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] is None
    assert json.loads((tmp_path / "adapter" / "config.json").read_text())["num_prompt_tokens"] == 0
    weights = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 48 and all(".lora_" in name for name in weights)
    loaded = load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(features(loaded, tiny_batch), expected)
    with loaded.disable_adapter():
        torch.testing.assert_close(features(loaded, tiny_batch), plain)
    unloaded = load_adapter(tmp_path / "adapter", ECCLModel.from_pretrained(base)).unload()
    assert type(unloaded) is ECCLModel and unloaded.prompt_learner is None
    assert unloaded.state_dict().keys() == ECCLModel.from_pretrained(base).state_dict().keys()
    torch.testing.assert_close(features(unloaded, tiny_batch), plain)
    merged = merge_lora(loaded)
    assert type(merged) is ECCLModel and merged.state_dict().keys() == unloaded.state_dict().keys()
    torch.testing.assert_close(features(merged, tiny_batch), expected, rtol=1e-5, atol=1e-5)


def test_two_adapters_of_lora_alone_take_turns(base, tiny_batch, tmp_path):
    expected = {}
    for seed, name in enumerate(("cuhk", "rstp")):
        model = make_lora_alone(base, seed)
        expected[name] = features(model, tiny_batch)
        save_adapter(model, tmp_path / name, base)
    model = load_adapter(tmp_path / "cuhk", adapter_name="cuhk")
    model.load_adapter(str(tmp_path / "rstp"), adapter_name="rstp")
    for name in ("rstp", "cuhk"):
        model.set_adapter(name)
        torch.testing.assert_close(features(model, tiny_batch), expected[name])


def test_adapters_with_and_without_prompts_do_not_mix(base, tmp_path):
    save_adapter(make_lora_alone(base, 1), tmp_path / "lora", base)
    save_adapter(make_trained(base, 1), tmp_path / "both", base)
    with pytest.raises(ValueError, match=r"modules_to_save is None .*, an adapter of ECCL has .*prompt_learner"):
        load_adapter(tmp_path / "both").load_adapter(tmp_path / "lora", "lora")
    with pytest.raises(ValueError, match=r"modules_to_save is .*prompt_learner.*, an adapter of ECCL has None"):
        load_adapter(tmp_path / "lora").load_adapter(tmp_path / "both", "both")
    with pytest.raises(ValueError, match=r"modules_to_save is .*prompt_learner.*, an adapter of ECCL has None"):
        load_adapter(tmp_path / "both", ECCLModel.from_pretrained(base))


def test_prompts_alone_are_trained_with_their_projections(base, tiny_batch):
    model = ECCLModel.from_clip(base, (32, 16), num_prompt_tokens=3, prompt_depth=2)
    assert train_prompts(model) is model
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {name for name in model.state_dict() if name.startswith("prompt_learner.")}
    # Two layers: three tokens of width 32 each, and a map from width 32 to 48.
    assert count_parameters(model)[0] == 2 * (3 * 32 + 32 * 48 + 48)
    model(**tiny_batch).logits_per_text.sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == trained
    with pytest.raises(ValueError, match=r"has no prompts \(num_prompt_tokens is 0\), so there is nothing to train"):
        train_prompts(ECCLModel.from_pretrained(base))


# -- An adapter knows its base


@pytest.fixture
def adapter(base, tmp_path):
    save_adapter(make_trained(base, 1), tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.fixture
def other_base(tmp_path):
    """Another model of the same shape."""
    torch.manual_seed(7)
    ECCLModel(tiny_config(num_prompt_tokens=0)).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_an_adapter_is_refused_by_another_base_of_the_same_shape(adapter, base, other_base, tiny_batch, caplog):
    with pytest.raises(ValueError, match=rf"the adapter {adapter} was trained on a base with other weights"):
        load_adapter(adapter, other_base)
    model = load_adapter(adapter)
    other = load_adapter(adapter, other_base, check_base=False)
    assert not torch.allclose(features(other, tiny_batch), features(model, tiny_batch), atol=1e-2)
    # A second adapter, too.
    save_adapter(make_trained(other_base, 2), adapter.parent / "second", other_base)
    with pytest.raises(ValueError, match="second was trained on a base with other weights"):
        model.load_adapter(adapter.parent / "second", "second")
    assert list(model.peft_config) == ["default"] and not caplog.records


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_in_half_precision_is_the_same_base(adapter, base, dtype, caplog):
    ECCLModel.from_pretrained(base).to(dtype).save_pretrained(base)
    load_adapter(adapter)
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["text_model.encoder.layers.1.mlp.fc1.bias", "logit_scale", "visual_projection.weight"]
)
def test_every_weight_of_the_base_counts(adapter, base, name):
    model = ECCLModel.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter(name).reshape(-1)[0].add_(0.1)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(adapter)


def test_an_adapter_without_a_digest_gives_a_warning(adapter, caplog):
    config = json.loads((adapter / "config.json").read_text())
    del config["base_weights_sha256"]
    (adapter / "config.json").write_text(json.dumps(config))
    load_adapter(adapter)
    assert "cannot be compared with its base" in caplog.text


def test_the_base_in_a_folder_is_stored_by_name_and_its_path_in_a_file_that_is_not_published(
    base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_adapter(make_trained("base", 1), "adapter", "base")
    folder = tmp_path / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base"
    with_path = [file.name for file in folder.iterdir() if str(tmp_path) in file.read_text(errors="replace")]
    assert with_path == ["base_folder.txt"]
    monkeypatch.chdir("/")
    load_adapter(folder)
    # Without that file, the name means a folder beside the process.
    (folder / "base_folder.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not there: \./base; give its place as base"):
        load_adapter(folder)
    load_adapter(folder, base)


def test_a_base_that_is_not_there_is_named_and_the_hub_is_not_asked(adapter, base, monkeypatch):
    (adapter.parent / "base").rename(adapter.parent / "moved")
    monkeypatch.setattr(ECCLModel, "from_clip", None)
    with pytest.raises(FileNotFoundError, match=rf"the base of the adapter {adapter} is not there: {base}"):
        load_adapter(adapter)


def test_an_adapter_on_a_local_base_is_not_published(adapter, base):
    with pytest.raises(ValueError, match=rf"names the folder {base} as its base.*publish the base first"):
        kind_of(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/backbone"}))
    assert kind_of(adapter) == "model"


def test_the_card_of_an_adapter_says_how_it_is_loaded():
    card = make_model_card(Facts("me/adapter", "me/base", "A method.", is_adapter=True))
    assert 'load_model("me/adapter")' in card and "`me/base`" in card and "library_name: peft" in card
    assert "pipeline(" not in card
