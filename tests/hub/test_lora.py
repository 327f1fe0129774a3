"""The LoRA layer that ECCL trains with, compared with the layer of peft and with finite differences."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from eccl.hub.adapter import attach_lora, merge_lora
from eccl.hub.lora import LoraLinear
from eccl.modeling_eccl import ECCLModel
from helpers import tiny_config


def make_layers(dtype=torch.float32, **settings):
    """Returns a linear layer with LoRA of this project, and the same of peft, with equal weights."""
    layers = []
    for custom in (True, False):
        torch.manual_seed(0)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], **settings)
        if custom:
            config._register_custom_module({nn.Linear: LoraLinear})
        model = get_peft_model(nn.Sequential(nn.Linear(7, 5)), config).to(dtype)
        (layer,) = [module for module in model.modules() if isinstance(module, Linear)]
        nn.init.normal_(layer.lora_B["default"].weight)
        assert type(layer) is (LoraLinear if custom else Linear)
        layers.append(layer)
    return layers


def run_layer(layer, shape, dtype=torch.float32):
    """Returns the output for a seeded input, and the gradients of the input, of A and of B."""
    torch.manual_seed(1)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    output = layer(x)
    output.float().square().sum().backward()
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [output.detach(), x.grad, *(weight.grad for weight in weights)]


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (2, 1, 3, 7)], ids=str)
def test_it_computes_what_the_layer_of_peft_computes(shape):
    for ours, theirs in zip(*(run_layer(layer, shape) for layer in make_layers()), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_its_gradients_are_those_of_finite_differences():
    layer, _ = make_layers(torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *weights))


def test_under_autocast_it_computes_in_half_precision_like_peft():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (run_layer(layer, (2, 3, 7)) for layer in make_layers())
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("change", ["disabled", "merged", "two adapters", "dropout", "trained base"])
def test_in_other_cases_it_is_the_layer_of_peft(change):
    results = []
    for layer in make_layers(lora_dropout=0.5 if change == "dropout" else 0.0):
        if change == "disabled":
            layer.enable_adapters(False)
        elif change == "merged":
            layer.merge()
        elif change == "two adapters":
            torch.manual_seed(2)
            layer.update_layer("other", 2, lora_alpha=2, config=LoraConfig(r=2))
            layer.set_adapter(["default", "other"])
        elif change == "trained base":
            layer.get_base_layer().requires_grad_(True)
        torch.manual_seed(3)
        x = torch.randn(2, 3, 7)
        output = layer(x)
        output.sum().backward() if output.requires_grad else None
        results.append((output, layer.get_base_layer().weight.grad))
    (ours, our_gradient), (theirs, their_gradient) = results
    torch.testing.assert_close(ours, theirs)
    assert (our_gradient is None) == (their_gradient is None) == (change != "trained base")
    if our_gradient is not None:
        torch.testing.assert_close(our_gradient, their_gradient)


def test_a_base_in_half_precision_is_trained_on_as_it_is_stored(tiny_batch):
    torch.manual_seed(0)
    model = attach_lora(ECCLModel(tiny_config()), base_dtype=torch.bfloat16)
    dtypes = {}
    for name, parameter in model.named_parameters():
        dtypes.setdefault(parameter.dtype, set()).add(name)
    assert {name.split(".")[-3] for name in dtypes[torch.bfloat16]} == {
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    }
    assert all("base_layer" in name for name in dtypes[torch.bfloat16])
    model.train()(**tiny_batch).text_embeds.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)

    # A product that is too small for bfloat16 is in the merged weights.
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLinear)}
    expected = {}
    for name, layer in layers.items():
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        nn.init.constant_(up, 1e-6)
        expected[name] = layer.get_base_layer().weight.float() + (up @ down).detach()
    with torch.no_grad():
        evaluated = model.eval()(**tiny_batch)
        with model.disable_adapter():
            without = model(**tiny_batch)
    torch.manual_seed(0)
    rounded = ECCLModel(tiny_config()).eval()
    for name in layers:
        rounded.get_submodule(name).to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(without.image_embeds, rounded(**tiny_batch).image_embeds)
    merged = merge_lora(model)
    torch.testing.assert_close(merged(**tiny_batch).image_embeds, evaluated.image_embeds)
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)
        assert not torch.equal(weight, weight.bfloat16().float())


def test_a_base_in_half_precision_is_unloaded_in_its_own(tiny_batch):
    model = attach_lora(ECCLModel(tiny_config()), base_dtype=torch.bfloat16)
    plain = model.unload()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert plain(**tiny_batch).image_embeds.isfinite().all()


def test_a_model_that_is_all_in_half_precision_stays_so_when_it_is_merged(tiny_batch):
    merged = merge_lora(attach_lora(ECCLModel(tiny_config()).bfloat16()))
    names = {name for name, parameter in merged.named_parameters() if parameter.dtype != torch.bfloat16}
    # peft keeps what is trained in float32.
    assert all(name.startswith("prompt_learner.") for name in names)


def test_it_has_shapes_without_values():
    model = attach_lora(ECCLModel(tiny_config())).to("meta")
    assert model.get_image_features(torch.empty(2, 3, 32, 16, device="meta")).pooler_output.shape == (2, 24)
