import json
import os
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import safetensors
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextModel
from transformers.activations import QuickGELUActivation

from eccl.configuration_eccl import ECCLConfig, checkpoint_kind
from eccl.hub.adapter import attach_lora, count_parameters, save_adapter
from eccl.modeling_eccl import ECCLModel, resize_position_grid
from helpers import tiny_config


@pytest.fixture(scope="module")
def small_clip():
    torch.manual_seed(3)
    config = CLIPConfig(
        text_config={
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": 58,
            "eos_token_id": 59,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=24,
    )
    return CLIPModel(config).eval()


def test_without_prompts_and_with_square_images_the_model_is_clip(small_clip, tiny_batch):
    model = ECCLModel.from_clip(small_clip, image_size=(32, 32), num_prompt_tokens=0)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_image_features(pixels).pooler_output, small_clip.get_image_features(pixels).pooler_output
        )
        torch.testing.assert_close(
            model.get_text_features(tiny_batch["input_ids"]).pooler_output,
            small_clip.get_text_features(tiny_batch["input_ids"]).pooler_output,
        )


def test_from_clip_resizes_the_position_grid_bilinearly_and_copies_the_other_weights(small_clip):
    model = ECCLModel.from_clip(small_clip, image_size=(48, 16), num_prompt_tokens=2, prompt_depth=2)
    positions = small_clip.vision_model.embeddings.position_embedding.weight
    ours = model.vision_model.embeddings.position_embedding.weight
    torch.testing.assert_close(ours[0], positions[0])
    # From 4 columns to 2, bilinear interpolation with align_corners=False gives the mean of each pair.
    row = positions[1:].reshape(4, 4, -1).reshape(4, 2, 2, -1).mean(2)
    # From 4 rows to 6, it takes samples at (i + 0.5) * 4 / 6 - 0.5.
    for index in range(6):
        at = min(max((index + 0.5) * 4 / 6 - 0.5, 0), 3)
        low, weight = int(at), at - int(at)
        expected = row[low] * (1 - weight) + row[min(low + 1, 3)] * weight
        torch.testing.assert_close(ours[1:].reshape(6, 2, -1)[index], expected)
    assert model.prompt_learner.text_prompts.shape == (2, 2, 32)
    torch.testing.assert_close(model.text_projection.weight, small_clip.text_projection.weight)


def test_from_clip_corrects_the_legacy_end_token(small_clip):
    legacy = CLIPModel(small_clip.config)
    legacy.config.text_config.eos_token_id = 2
    try:
        model = ECCLModel.from_clip(legacy, image_size=(32, 32), num_prompt_tokens=0)
    finally:
        legacy.config.text_config.eos_token_id = 59
    assert model.config.text_config.eos_token_id == 59


def test_from_clip_accepts_an_eccl_model_without_prompts_and_refuses_one_with_prompts(tiny_model):
    plain = ECCLModel(tiny_config(num_prompt_tokens=0)).eval()
    model = ECCLModel.from_clip(plain, image_size=(32, 16), num_prompt_tokens=3, prompt_depth=1)
    pixels = torch.randn(2, 3, 32, 16)
    assert not torch.allclose(
        model.get_image_features(pixels).pooler_output, plain.get_image_features(pixels).pooler_output
    )
    with pytest.raises(ValueError, match="3 prompt tokens"):
        ECCLModel.from_clip(tiny_model, image_size=(32, 16))


def test_padding_attention_mask_and_batch_order_change_no_feature(tiny_model, tiny_batch):
    input_ids = tiny_batch["input_ids"]
    features = tiny_model.get_text_features(input_ids).pooler_output
    padded = torch.cat([input_ids, torch.zeros(3, 40, dtype=torch.long)], dim=1)
    torch.testing.assert_close(tiny_model.get_text_features(padded).pooler_output, features)
    torch.testing.assert_close(
        tiny_model.get_text_features(input_ids, torch.ones_like(input_ids)).pooler_output, features
    )
    torch.testing.assert_close(tiny_model.get_text_features(input_ids[[2, 0, 1]]).pooler_output, features[[2, 0, 1]])
    torch.testing.assert_close(tiny_model.get_text_features(input_ids[:1, :6]).pooler_output, features[:1])


def test_pooling_takes_the_end_token_and_patches_get_the_same_projection(tiny_model, tiny_batch):
    input_ids, pixels = tiny_batch["input_ids"], tiny_batch["pixel_values"]
    tokens, patches = tiny_model.get_token_features(input_ids), tiny_model.get_patch_features(pixels)
    assert tokens.shape == (3, 12, 24) and patches.shape == (3, 4, 2, 24)
    at_end = tokens[torch.arange(3), torch.tensor([5, 11, 8])]
    torch.testing.assert_close(at_end, tiny_model.get_text_features(input_ids).pooler_output)
    # The expected value: the patches of the last layer, with the layer norm and the projection of the class token.
    seen = []
    hook = tiny_model.vision_model.encoder.layers[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    tiny_model.get_image_features(pixels)
    hook.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    expected = tiny_model.visual_projection(tiny_model.vision_model.post_layernorm(hidden[:, 1:9]))
    torch.testing.assert_close(patches.flatten(1, 2), expected)


def test_logits_are_scaled_cosines_and_missing_inputs_give_none(tiny_model, tiny_batch):
    output = tiny_model(**tiny_batch)
    for text in range(3):
        for image in range(3):
            cosine = torch.cosine_similarity(output.text_embeds[text], output.image_embeds[image], dim=0)
            expected = cosine * torch.exp(torch.tensor(2.6592))
            torch.testing.assert_close(output.logits_per_text[text, image], expected)
    torch.testing.assert_close(output.logits_per_image, output.logits_per_text.T)
    only_text = tiny_model(input_ids=tiny_batch["input_ids"])
    assert only_text.image_embeds is None and only_text.logits_per_text is None
    with pytest.raises(ValueError, match="got neither"):
        tiny_model()


def test_a_caption_without_end_token_or_with_a_late_one_is_refused(tiny_model):
    input_ids = torch.full((2, 80), 5)
    input_ids[0, 3] = 59
    with pytest.raises(ValueError, match=r"row 1 .* first 74 tokens"):
        tiny_model.get_text_features(input_ids)
    input_ids[1, 74] = 59
    with pytest.raises(ValueError, match="row 1"):
        tiny_model.get_text_features(input_ids[:, :77])
    input_ids[1, 73] = 59
    assert tiny_model.get_text_features(input_ids[:, :77]).pooler_output.shape == (2, 24)


def test_another_image_size_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"16 x 32 .* takes 32 x 16"):
        tiny_model.get_image_features(torch.randn(1, 3, 16, 32))


def test_gradient_checkpointing_changes_no_gradient(tiny_model, tiny_batch):
    def gradients():
        tiny_model.zero_grad()
        tiny_model(**tiny_batch).logits_per_text.diagonal().sum().backward()
        return {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}

    tiny_model.train()
    plain = gradients()
    tiny_model.gradient_checkpointing_enable()
    assert tiny_model.is_gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


def test_a_saved_and_loaded_model_gives_the_same_logits(tiny_model, tiny_batch, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = ECCLModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**tiny_batch).logits_per_text, tiny_model(**tiny_batch).logits_per_text)


def test_the_initialisation_is_that_of_clip(small_clip):
    """With the general initialisation of transformers, the weights of CLIP's layers are 50 times too large to train."""
    torch.manual_seed(5)
    config = ECCLConfig(
        text_config=small_clip.config.text_config.to_dict(), vision_config=small_clip.config.vision_config.to_dict(),
        projection_dim=24, num_prompt_tokens=0,
    )  # fmt: skip
    ours = ECCLModel(config).state_dict()
    for name, reference in CLIPModel(small_clip.config).state_dict().items():
        if reference.numel() > 500:
            assert ours[name].std().item() == pytest.approx(reference.std().item(), rel=0.1), name


def test_all_prompt_maps_but_the_first_start_equal():
    layers = {"num_hidden_layers": 4}
    shallow = tiny_config().to_dict()
    config = tiny_config(
        text_config=shallow["text_config"] | layers, vision_config=shallow["vision_config"] | layers, prompt_depth=4
    )
    learner = ECCLModel(config).prompt_learner
    first, second, third, fourth = (projection.weight for projection in learner.projections)
    assert torch.equal(second, third) and torch.equal(third, fourth) and not torch.equal(first, second)
    assert learner.text_prompts.std().item() == pytest.approx(0.02, rel=0.2)


def test_the_number_of_trained_parameters_is_the_published_one():
    with torch.device("meta"):
        model = attach_lora(ECCLModel(ECCLConfig()), rank=4, alpha=4)
    trainable, total = count_parameters(model)
    # Prompts: 12 * 4 * 512. Maps: 12 * (512 * 768 + 768). LoRA: 4 * (in + out) for six matrices in each of 24 layers.
    prompts = 12 * 4 * 512 + 12 * (512 * 768 + 768)
    lora = sum(12 * 4 * (4 * 2 * width + 2 * 5 * width) for width in (512, 768))
    assert trainable == prompts + lora == 5_858_304  # 5.86 M
    assert 154e6 < total < 156e6
    assert all("lora_" in name or "prompt_learner" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_depth": 3}, r"prompt_depth is 3.*\(2\)"),
        ({"num_prompt_tokens": 75}, r"num_prompt_tokens is 75.*\(77\)"),
        ({"num_prompt_tokens": -1}, "num_prompt_tokens is -1"),
        ({"vision_config": {"image_size": [30, 16], "patch_size": 8}}, r"\[30, 16\].*\(8\)"),
        ({"vision_config": {"image_size": [32, 16, 8], "patch_size": 8}}, r"\[32, 16, 8\].*\[height, width\]"),
        ({"vision_config": {"image_size": None, "patch_size": 8}}, r"image_size is None.*\[height, width\]"),
        ({"vision_config": {"image_size": [32, 16], "patch_size": [8, 8]}}, r"patch_size is \[8, 8\].*one number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


def test_position_grid_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"there are 10 .* 2 x 4 patches has 9"):
        resize_position_grid(torch.zeros(10, 3), (2, 4), (4, 4))


# -- Functions that every model of transformers offers


@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_and_attentions_are_given_on_request(tiny_model, tiny_batch, return_dict):
    tiny_model.set_attn_implementation("eager")
    output = tiny_model(**tiny_batch, output_hidden_states=True, output_attentions=True, return_dict=return_dict)
    plain = tiny_model(**tiny_batch)
    if not return_dict:
        # Six fields without the loss. The last two are outputs with four fields; the first two of them are tensors.
        assert len(output) == 6
        text, vision = output[4:]
        assert [len(part) for part in text[2:]] == [3, 2] and [len(part) for part in vision[2:]] == [3, 2]
        return
    assert plain.text_model_output.hidden_states is None and plain.vision_model_output.attentions is None
    torch.testing.assert_close(output.logits_per_text, plain.logits_per_text)
    # Text: 12 tokens and 3 prompts. Image: 1 class token, 8 patches and 3 prompts.
    for record, tokens, width, heads in (
        (output.text_model_output, 15, 32, 2),
        (output.vision_model_output, 12, 48, 3),
    ):
        assert [state.shape for state in record.hidden_states] == [(3, tokens, width)] * 3
        assert [weights.shape for weights in record.attentions] == [(3, heads, tokens, tokens)] * 2
        # The last hidden state has the tokens of the input only.
        assert record.last_hidden_state.shape == (3, tokens - 3, width)
        for weights in record.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    last = output.vision_model_output.hidden_states[-1][:, 0]
    expected = tiny_model.visual_projection(tiny_model.vision_model.post_layernorm(last))
    torch.testing.assert_close(expected, output.image_embeds)
    # In a text, no token attends to a later one.
    assert not output.text_model_output.attentions[0].triu(1).any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_prompt_tokens", [0, 3])
def test_the_pooled_token_alone_has_the_same_feature_and_gradients_for_less_work(
    tiny_batch, attention, num_prompt_tokens
):
    torch.manual_seed(0)
    model = ECCLModel(tiny_config(num_prompt_tokens=num_prompt_tokens))
    model.set_attn_implementation(attention)
    results = []
    for pooled_only in (False, True):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            output = model(**tiny_batch, pooled_only=pooled_only)
            (output.text_embeds.sin() + output.image_embeds.sin()).sum().backward()
        # The gradient of a key's bias is zero in exact arithmetic: it moves all scores of a query alike.
        used = [(name, parameter) for name, parameter in model.named_parameters() if name != "logit_scale"]
        gradients = {name: parameter.grad for name, parameter in used if "k_proj.bias" not in name}
        results.append((output.text_embeds, output.image_embeds, gradients, counter.get_total_flops()))
        for record in (output.text_model_output, output.vision_model_output):
            assert (record.last_hidden_state is None) == pooled_only
    (texts, images, gradients, operations), (own_texts, own_images, own_gradients, own_operations) = results
    torch.testing.assert_close(own_texts, texts)
    torch.testing.assert_close(own_images, images)
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    # Of two layers, the second is nearly left out.
    assert own_operations < 0.75 * operations


def test_the_pooled_token_alone_has_no_hidden_states(tiny_model, tiny_batch):
    tiny_model.set_attn_implementation("eager")
    for requested in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match="pooled_only computes neither hidden states nor attentions"):
            tiny_model(**tiny_batch, pooled_only=True, **{requested: True})


def test_the_pooled_token_alone_ignores_what_the_configuration_records(tiny_model, tiny_batch):
    expected = tiny_model(**tiny_batch).text_embeds
    tiny_model.config.output_hidden_states = tiny_model.config.text_config.output_hidden_states = True
    output = tiny_model(**tiny_batch, pooled_only=True)
    torch.testing.assert_close(output.text_embeds, expected)
    assert output.text_model_output.hidden_states is None


def test_no_layer_is_split_between_devices(tiny_model):
    layers = [*tiny_model.text_model.encoder.layers, *tiny_model.vision_model.encoder.layers]
    assert {type(layer).__name__ for layer in layers} <= set(tiny_model._no_split_modules)


def test_the_parts_of_the_encoders_compute_what_those_of_clip_compute(tiny_model):
    layer = tiny_model.vision_model.encoder.layers[0]
    inputs = torch.randn(5, 48) * 4
    expected = QuickGELUActivation()(inputs)
    torch.testing.assert_close(layer.mlp.activation_fn(inputs), expected)
    expected = torch.nn.functional.layer_norm(inputs, (48,), layer.layer_norm1.weight, layer.layer_norm1.bias, 1e-5)
    torch.testing.assert_close(layer.layer_norm1(inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.layer_norm1(inputs), expected.bfloat16())
    # Another activation stays.
    other = ECCLModel(tiny_config(vision_config={**tiny_config().vision_config.to_dict(), "hidden_act": "gelu"}))
    torch.testing.assert_close(
        other.vision_model.encoder.layers[0].mlp.activation_fn(inputs), torch.nn.functional.gelu(inputs)
    )


def test_hidden_states_can_be_chosen_by_number_and_by_the_configuration(tiny_model, tiny_batch):
    every = tiny_model(**tiny_batch, output_hidden_states=True)
    one = tiny_model(**tiny_batch, output_hidden_states=[1])
    tiny_model.config.output_hidden_states = True
    for name in ("text_model_output", "vision_model_output"):
        first, second, third = one[name].hidden_states
        assert first is None and third is None
        assert second.equal(every[name].hidden_states[1])
        assert len(tiny_model(**tiny_batch)[name].hidden_states) == 3
    assert tiny_model.get_image_features(tiny_batch["pixel_values"], output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("threads", [2, 4])
def test_calls_in_several_threads_record_what_calls_one_after_the_other_record(tiny_model, tiny_batch, threads):
    tiny_model.set_attn_implementation("eager")
    batches = [
        {"input_ids": tiny_batch["input_ids"][rows], "pixel_values": tiny_batch["pixel_values"][rows] + index}
        for index, rows in enumerate([[0], [1, 2], [2, 0, 1], [1]] * 5)
    ]

    @torch.no_grad()
    def record(batch):
        output = tiny_model(**batch, output_hidden_states=True, output_attentions=True)
        return [
            tensor
            for part in (output.text_model_output, output.vision_model_output)
            for tensor in (*part.hidden_states, *part.attentions)
        ]

    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(record, batches))
    for tensors, batch in zip(together, batches, strict=True):
        expected = record(batch)
        assert len(tensors) == len(expected) == 10
        for ours, theirs in zip(tensors, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_attentions_are_refused_if_the_implementation_does_not_compute_them(tiny_model, tiny_batch):
    tiny_model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    message = r"needs attn_implementation 'eager', the vision encoder has 'sdpa'"
    with pytest.raises(ValueError, match=message):
        tiny_model(**tiny_batch, output_attentions=True)
    with pytest.raises(ValueError, match=message):
        tiny_model.get_image_features(tiny_batch["pixel_values"], output_attentions=True)
    only_text = tiny_model(input_ids=tiny_batch["input_ids"], output_attentions=True)
    assert len(only_text.text_model_output.attentions) == 2 and only_text.vision_model_output is None


@pytest.mark.parametrize("way", ["loaded", "built"])
def test_each_encoder_can_have_its_own_attention(tiny_model, tiny_batch, tmp_path, way):
    choice = {"text_config": "eager", "vision_config": "sdpa"}
    if way == "loaded":
        tiny_model.save_pretrained(tmp_path)
        model = ECCLModel.from_pretrained(tmp_path, attn_implementation=choice)
    else:
        config = tiny_config()
        config._attn_implementation = choice
        model = ECCLModel(config).eval()
        model.load_state_dict(tiny_model.state_dict())
    for encoder, name in ((model.text_model, "eager"), (model.vision_model, "sdpa")):
        assert {layer.self_attn.config._attn_implementation for layer in encoder.encoder.layers} == {name}
    torch.testing.assert_close(model(**tiny_batch).logits_per_text, tiny_model(**tiny_batch).logits_per_text)


def test_the_loss_and_the_tuple_are_those_of_clip(small_clip, tiny_batch):
    model = ECCLModel.from_clip(small_clip, image_size=(32, 32), num_prompt_tokens=0)
    batch = {"input_ids": tiny_batch["input_ids"], "pixel_values": torch.randn(3, 3, 32, 32), "return_loss": True}
    ours, theirs = (net(**batch, output_hidden_states=True) for net in (model, small_clip))
    assert list(ours) == list(theirs)
    for name in ("loss", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(ours[name], theirs[name])
    for name in ("text_model_output", "vision_model_output"):
        assert list(ours[name]) == list(theirs[name])
        for field in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(ours[name][field], theirs[name][field])
        for one, other in zip(ours[name].hidden_states, theirs[name].hidden_states, strict=True):
            torch.testing.assert_close(one, other)
    # Features are not normalised, unlike CLIP's.
    torch.testing.assert_close(torch.nn.functional.normalize(ours.text_embeds), theirs.text_embeds)
    assert [type(field) for field in model(**batch, return_dict=False)] == [torch.Tensor] * 5 + [tuple] * 2


def test_a_loss_needs_as_many_captions_as_images(tiny_model, tiny_batch):
    with pytest.raises(ValueError, match=r"return_loss needs one image for each caption, got 3 captions and 2 images"):
        tiny_model(tiny_batch["input_ids"], tiny_batch["pixel_values"][:2], return_loss=True)
    with pytest.raises(ValueError, match="got 3 captions and 0 images"):
        tiny_model(tiny_batch["input_ids"], return_loss=True)


def test_positions_of_the_tokens_are_counted_without_the_prompts(tiny_model, small_clip, tiny_batch):
    input_ids = tiny_batch["input_ids"]
    positions = torch.arange(12).expand(3, -1)
    torch.testing.assert_close(
        tiny_model.get_text_features(input_ids, position_ids=positions).pooler_output,
        tiny_model.get_text_features(input_ids).pooler_output,
    )
    other = torch.tensor([0, *range(5, 16)]).expand(3, -1)
    plain = ECCLModel.from_clip(small_clip, image_size=(32, 32), num_prompt_tokens=0)
    torch.testing.assert_close(
        plain.get_text_features(input_ids, position_ids=other).pooler_output,
        small_clip.get_text_features(input_ids, position_ids=other).pooler_output,
    )
    # A gap of 4 in the positions is a gap of 4 in the rows of the position embedding, behind the 3 prompts.
    with torch.no_grad():
        expected = tiny_model.get_text_features(input_ids, position_ids=other).pooler_output
        table = tiny_model.text_model.embeddings.position_embedding.weight
        table[4:15] = table[8:19].clone()
        torch.testing.assert_close(tiny_model.get_text_features(input_ids).pooler_output, expected)


@pytest.mark.parametrize("way", ["device_map", "cpu_offload", "disk_offload"])
def test_offloaded_weights_give_the_same_output(tiny_model, tiny_batch, tmp_path, way):
    expected = tiny_model(**tiny_batch).logits_per_text
    if way == "device_map":
        tiny_model.save_pretrained(tmp_path / "model")
        parts = [name for name, _ in tiny_model.named_children()]
        places = dict.fromkeys([*parts, "logit_scale"], "cpu") | {"vision_model": "disk"}
        model = ECCLModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
        assert model.vision_model.embeddings.class_embedding.device.type == "meta"
    elif way == "cpu_offload":
        model = accelerate.cpu_offload(tiny_model, execution_device="cpu")
    else:
        model = accelerate.disk_offload(tiny_model, tmp_path / "offload", execution_device="cpu")
    torch.testing.assert_close(model(**tiny_batch).logits_per_text, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_encoders_compile_without_a_graph_break(tiny_model, tiny_batch, attention):
    tiny_model.set_attn_implementation(attention)
    with torch.no_grad():
        for encode, name in (
            (tiny_model.get_text_features, "input_ids"),
            (tiny_model.get_image_features, "pixel_values"),
        ):
            compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
            for inputs in (tiny_batch[name], tiny_batch[name][:2]):
                torch.testing.assert_close(
                    compiled(inputs).pooler_output, encode(inputs).pooler_output, rtol=1e-5, atol=1e-5
                )


class Encoder(torch.nn.Module):
    """One encoder of a model as a module, for `torch.export`."""

    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs):
        return getattr(self.model, self.method)(inputs).pooler_output


@pytest.mark.parametrize(
    ("method", "name"), [("get_text_features", "input_ids"), ("get_image_features", "pixel_values")]
)
def test_each_encoder_exports_for_any_batch(tiny_model, tiny_batch, method, name):
    program = torch.export.export(
        Encoder(tiny_model, method), (tiny_batch[name],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    for inputs in (tiny_batch[name], tiny_batch[name][[0, 2, 1, 1, 0]]):
        expected = getattr(tiny_model, method)(inputs).pooler_output
        torch.testing.assert_close(program(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_full_precision(tiny_model, tiny_batch, dtype):
    full = tiny_model(**tiny_batch)
    half = tiny_model.to(dtype)(**tiny_batch)
    assert half.text_embeds.dtype == half.logits_per_text.dtype == dtype
    for name in ("text_embeds", "image_embeds"):
        reference = full[name].detach()
        assert (half[name].float() - reference).abs().max() / reference.abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_compute_in_float32_unless_asked_otherwise(tiny_model, tmp_path, dtype):
    tiny_model.to(dtype).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("logit_scale").dtype == dtype
    for given, expected in (({}, torch.float32), ({"dtype": "auto"}, torch.float32), ({"dtype": dtype}, dtype)):
        model = ECCLModel.from_pretrained(tmp_path, **given)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_of_a_saved_model_have_the_permissions_of_new_files(tiny_model, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        tiny_model.save_pretrained(tmp_path / "model")
        save_adapter(attach_lora(tiny_model), tmp_path / "adapter", None)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "adapter_model.safetensors", "config.json"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}


def test_a_model_saved_in_shards_gives_the_same_logits(tiny_model, tiny_batch, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = ECCLModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**tiny_batch).logits_per_text, tiny_model(**tiny_batch).logits_per_text)


def test_gradients_reach_every_parameter(tiny_model, tiny_batch):
    tiny_model.train()
    tiny_model(**tiny_batch).logits_per_text.diagonal().sum().backward()
    assert [name for name, parameter in tiny_model.named_parameters() if parameter.grad is None] == []


def test_the_configuration_survives_a_round_trip(tmp_path):
    config = tiny_config(prompt_depth=1, logit_scale_init_value=1.25)
    config.save_pretrained(tmp_path)
    loaded = ECCLConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and loaded.grid_size == (4, 2) and loaded.max_text_length == 74


def test_one_number_is_a_square_image_size():
    config = tiny_config(vision_config=tiny_config().vision_config.to_dict() | {"image_size": 32})
    assert config.vision_config.image_size == [32, 32] and config.input_size == (32, 32)
    assert config.patch_side == 8 and config.grid_size == (4, 4)
    assert config.encoder_configs == (config.text_config, config.vision_config)
    assert not {"input_size", "patch_side", "encoder_configs"} & config.to_dict().keys()


def test_hidden_states_and_attentions_are_refused_in_chunks(tiny_model, tiny_batch):
    with pytest.raises(ValueError, match=r"embed_chunk_size is 2, .*: leave embed_chunk_size out"):
        tiny_model(**tiny_batch, output_hidden_states=True, embed_chunk_size=2)


# -- Kinds of checkpoints


def test_the_kind_of_a_checkpoint(small_clip, tiny_model, tmp_path):
    small_clip.save_pretrained(tmp_path / "clip")
    tiny_model.save_pretrained(tmp_path / "eccl")
    attach_lora(ECCLModel(tiny_config()), rank=2, alpha=2).save_pretrained(tmp_path / "adapter")
    for kind in ("clip", "eccl", "adapter"):
        assert checkpoint_kind(tmp_path / kind) == checkpoint_kind(str(tmp_path / kind)) == kind


@pytest.mark.parametrize("config", [{"model_type": "bert"}, {"hidden_size": 8}])
def test_another_kind_of_checkpoint_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = rf"{tmp_path} has model_type {config.get('model_type')!r} .* must be 'clip' or 'eccl'"
    with pytest.raises(ValueError, match=message):
        checkpoint_kind(tmp_path)
    with pytest.raises(ValueError, match=message):
        ECCLModel.from_clip(str(tmp_path))


def test_a_missing_checkpoint_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=rf"{tmp_path} is not a checkpoint: .* config.json is missing or empty"):
        checkpoint_kind(tmp_path)
    with pytest.raises(OSError, match="absent"):
        checkpoint_kind(tmp_path / "absent")


def test_from_clip_refuses_an_adapter_and_another_model(tiny_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"from_clip takes .*, {tmp_path} is an adapter"):
        ECCLModel.from_clip(str(tmp_path))
    with pytest.raises(ValueError, match=r"from_clip takes .*, this model has model_type 'clip_text_model'"):
        ECCLModel.from_clip(CLIPTextModel(tiny_model.config.text_config))


@pytest.mark.parametrize("call", ["get_text_features", "__call__"])
def test_captions_that_are_padded_at_their_start_are_refused(tiny_model, call):
    ids = torch.tensor([[58, 4, 5, 59, 59], [59, 59, 58, 4, 59]])
    with pytest.raises(ValueError, match=r"row 1 of input_ids starts with the end-of-text token \(59\)"):
        getattr(tiny_model, call)(input_ids=ids)
    getattr(tiny_model, call)(input_ids=ids[:1])
