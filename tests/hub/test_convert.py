import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import layer_norm, multi_head_attention_forward
from transformers import AutoModel

from eccl.configuration_eccl import ECCLConfig
from eccl.hub import convert as convert_module
from eccl.hub.adapter import count_parameters
from eccl.hub.convert import convert_checkpoint
from eccl.hub.original_checkpoints import (
    _LAYER_NAMES,
    _NAMES,
    EncoderFacts,
    _Checkpoint,
    _clip_key,
    _read_encoder_sizes,
)
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor
from helpers import GOLDENS, clip_tokenizer, tiny_config

CLIP, IRRA, ECCL = (GOLDENS / name for name in ("clip_openai.pt", "irra_pretrained.pth", "eccl_original.pth"))
SIZE = (96, 32)

# The sizes of a random checkpoint. They differ from each other and from the sizes of the files in tests/goldens.
# Only the first layers of both encoders have prompts.
TEXT_WIDTH, VISION_WIDTH, TEXT_LAYERS, VISION_LAYERS = 128, 192, 4, 5
DEPTH, PROMPTS, PATCH, RANK, VOCAB = 2, 3, 8, 2, 90


def random_original(generator):
    """Makes an ECCL checkpoint with random numbers from the description of the format alone."""

    def random(*shape, scale=0.2):
        return scale * torch.randn(*shape, generator=generator)

    def layers(prefix, width, count):
        for index in range(count):
            layer = f"{prefix}.transformer.resblocks.{index}"
            sizes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
            sizes |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
            sizes |= {"mlp.c_fc.weight": (2 * width, width), "mlp.c_fc.bias": (2 * width,)}
            sizes |= {"mlp.c_proj.weight": (width, 2 * width), "mlp.c_proj.bias": (width,)}
            sizes |= {f"attn.lora_A_{name}": (RANK, width) for name in "qkvo"}
            sizes |= {f"attn.lora_B_{name}": (width, RANK) for name in "qkvo"}
            sizes |= {"mlp.c_fc.lora_A": (RANK, width), "mlp.c_fc.lora_B": (2 * width, RANK)}
            sizes |= {"mlp.c_proj.lora_A": (RANK, 2 * width), "mlp.c_proj.lora_B": (width, RANK)}
            sizes |= {f"ln_{which}.{part}": (width,) for which in (1, 2) for part in ("weight", "bias")}
            yield from ((f"{layer}.{name}", random(*size)) for name, size in sizes.items())

    state = dict(layers("image_encoder", VISION_WIDTH, VISION_LAYERS))
    state |= layers("text_encoder", TEXT_WIDTH, TEXT_LAYERS)
    state["image_encoder.class_embedding"] = random(VISION_WIDTH)
    state["image_encoder.positional_embedding"] = random(1 + 4 * 2, VISION_WIDTH)
    state["image_encoder.conv1.weight"] = random(VISION_WIDTH, 3, PATCH, PATCH)
    state["image_encoder.proj"] = random(VISION_WIDTH, 40)
    state["text_encoder.positional_embedding"] = random(30, TEXT_WIDTH)
    state["text_encoder.text_projection"] = random(TEXT_WIDTH, 40)
    state["clip_model.token_embedding.weight"] = random(VOCAB, TEXT_WIDTH)
    state["logit_scale"] = torch.tensor(1.5)
    for norm, width in (("image_encoder.ln_pre", VISION_WIDTH), ("image_encoder.ln_post", VISION_WIDTH),
                        ("text_encoder.ln_final", TEXT_WIDTH)):  # fmt: skip
        state |= {f"{norm}.weight": 1 + random(width), f"{norm}.bias": random(width)}
    state["prompt_learner.ctx"] = random(PROMPTS, TEXT_WIDTH)
    for index, name in enumerate(["proj"] + [f"compound_prompt_projections.{layer}" for layer in range(DEPTH - 1)]):
        state[f"prompt_learner.{name}.weight"] = random(VISION_WIDTH, TEXT_WIDTH)
        state[f"prompt_learner.{name}.bias"] = random(VISION_WIDTH)
        if index:
            state[f"prompt_learner.compound_prompts_text.{index - 1}"] = random(PROMPTS, TEXT_WIDTH)
    return state


def norm(state, name, hidden):
    return layer_norm(hidden, hidden.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def layer_by_hand(state, name, hidden, mask):
    """Computes a residual block of CLIP on `(length, width)`, with the attention function of torch."""
    width = hidden.shape[-1]
    normed = norm(state, f"{name}.ln_1", hidden)[:, None]
    attended, _ = multi_head_attention_forward(
        normed, normed, normed, width, width // 64,
        state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"], None, None, False, 0.0,
        state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"], attn_mask=mask,
    )  # fmt: skip
    hidden = hidden + attended[:, 0]
    inner = norm(state, f"{name}.ln_2", hidden) @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"]
    inner = inner * torch.sigmoid(1.702 * inner)
    return hidden + inner @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def prompts_by_hand(state):
    """Computes the text prompts and the image prompts of all prompted layers."""
    texts = [state["prompt_learner.ctx"]]
    texts += [state[f"prompt_learner.compound_prompts_text.{layer}"] for layer in range(DEPTH - 1)]
    projections = ["proj"] + [f"compound_prompt_projections.{layer}" for layer in range(DEPTH - 1)]
    images = [
        text @ state[f"prompt_learner.{name}.weight"].T + state[f"prompt_learner.{name}.bias"]
        for text, name in zip(texts, projections, strict=True)
    ]
    return texts, images


def text_by_hand(state, ids):
    """Computes the features of one caption as section 2 of the design describes."""
    prompts, _ = prompts_by_hand(state)
    tokens = state["clip_model.token_embedding.weight"][ids]
    hidden = torch.cat([tokens[:1], prompts[0], tokens[1:]])[:30]
    hidden = hidden + state["text_encoder.positional_embedding"][: len(hidden)]
    mask = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)
    for layer in range(TEXT_LAYERS):
        if 1 <= layer < DEPTH:
            hidden = torch.cat([hidden[:1], prompts[layer], hidden[1 + PROMPTS :]])
        hidden = layer_by_hand(state, f"text_encoder.transformer.resblocks.{layer}", hidden, mask)
    end = ids.tolist().index(VOCAB - 1) + PROMPTS
    return norm(state, "text_encoder.ln_final", hidden)[end] @ state["text_encoder.text_projection"]


def image_by_hand(state, pixels):
    """Computes the features of one image as section 2 of the design describes."""
    _, prompts = prompts_by_hand(state)
    patches = torch.conv2d(pixels[None], state["image_encoder.conv1.weight"], stride=PATCH)[0].flatten(1).T
    hidden = torch.cat([state["image_encoder.class_embedding"][None], patches])
    hidden = torch.cat([hidden + state["image_encoder.positional_embedding"], prompts[0]])
    hidden = norm(state, "image_encoder.ln_pre", hidden)
    for layer in range(VISION_LAYERS):
        if 1 <= layer < DEPTH:
            hidden = torch.cat([hidden[:-PROMPTS], prompts[layer]])
        hidden = layer_by_hand(state, f"image_encoder.transformer.resblocks.{layer}", hidden, None)
    return norm(state, "image_encoder.ln_post", hidden)[0] @ state["image_encoder.proj"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    state = random_original(torch.Generator().manual_seed(4))
    file = tmp_path_factory.mktemp("original") / "best.pth"
    torch.save({"model": state, "epoch": 3}, file)
    return file, state


@pytest.mark.parametrize("merge_lora", [True, False])
def test_a_checkpoint_of_other_sizes_gives_the_features_computed_by_hand(original, merge_lora):
    file, state = original
    generator = torch.Generator().manual_seed(5)
    model = convert_checkpoint(file, image_size=(32, 16), lora_alpha=16, merge_lora=merge_lora)
    pixels = torch.randn(3, 3, 32, 16, generator=generator)
    ids = torch.randint(0, VOCAB - 2, (3, 27), generator=generator)
    ids[:, 0] = VOCAB - 2
    for row, end in enumerate((26, 4, 11)):
        ids[row, end] = VOCAB - 1
    with torch.no_grad():
        images, texts = model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output
    for ours, by_hand in (
        (images, [image_by_hand(state, image) for image in pixels]),
        (texts, [text_by_hand(state, caption) for caption in ids]),
    ):
        by_hand = torch.stack(by_hand)
        assert (ours - by_hand).abs().max() / by_hand.abs().max() < 1e-5
    assert model.config.prompt_depth == DEPTH and model.config.num_prompt_tokens == PROMPTS


def test_lora_is_subtracted_with_the_scale_alpha_over_rank(original):
    file, state = original
    name, scale = "text_encoder.transformer.resblocks.1.mlp.c_fc", 16 / RANK
    product = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
    model = convert_checkpoint(file, image_size=(32, 16), lora_alpha=16, merge_lora=False)
    ours = model.get_base_model().text_model.encoder.layers[1].mlp.fc1
    torch.testing.assert_close(ours.base_layer.weight, state[f"{name}.weight"] - scale * product)
    trainable, _ = count_parameters(model)
    learner = sum(tensor.numel() for key, tensor in state.items() if key.startswith("prompt_learner."))
    assert trainable == learner + sum(tensor.numel() for key, tensor in state.items() if ".lora_" in key)


def test_task_heads_are_ignored_with_a_warning(tmp_path, caplog):
    content = torch.load(IRRA, weights_only=True)
    heads = ("classifier.weight", "mlm_head.fc.bias", "cross_attn.in_proj_weight", "ln_pre_t.weight", "ln_post.bias")
    content["model"] |= {head: torch.zeros(3) for head in heads}
    torch.save(content, tmp_path / "irra.pth")
    model = convert_checkpoint(tmp_path / "irra.pth", SIZE, num_prompt_tokens=0)
    assert "ignored 5 keys of task heads" in caplog.text and "mlm_head" in caplog.text
    plain = convert_checkpoint(IRRA, SIZE, num_prompt_tokens=0).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_the_three_numbers_in_files_of_clip_are_ignored(tmp_path):
    state = torch.load(CLIP, weights_only=True)
    names = ("input_resolution", "context_length", "vocab_size")
    torch.save(state | {name: torch.tensor(77) for name in names}, tmp_path / "clip.pt")
    assert convert_checkpoint(tmp_path / "clip.pt", SIZE, num_prompt_tokens=0).config.projection_dim == 48


LAYER = "image_encoder.transformer.resblocks.1"


def drop(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.__setitem__(key, value)


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (ECCL, drop(f"{LAYER}.ln_1.bias"), rf"the key {LAYER}.ln_1.bias is missing"),
        (ECCL, drop("image_encoder.proj"), "the key image_encoder.proj is missing"),
        (ECCL, drop("prompt_learner.compound_prompt_projections.1.bias"), "projections.1.bias is missing"),
        (ECCL, drop("prompt_learner.compound_prompts_text.0"), r"compound_prompts_text.0 is missing"),
        (ECCL, drop(f"{LAYER}.attn.lora_A_v"), rf"{LAYER}.attn.lora_A_v is missing"),
        (ECCL, drop("prompt_learner.ctx"), "prompt_learner.ctx is missing"),
        (ECCL, put("visual.extra", torch.ones(2)), "unknown keys visual.extra"),
        (ECCL, put("prompt_learner.extra", torch.ones(2)), "unknown keys prompt_learner.extra"),
        (ECCL, put(f"{LAYER}.attn.lora_A_x", torch.ones(4, 128)), "unknown keys .*lora_A_x"),
        (ECCL, put("prompt_learner.proj.weight", torch.ones(64, 128)), r"proj.*\(64, 128\).*\(128, 64\)"),
        (ECCL, put("prompt_learner.compound_prompts_text.1", torch.ones(3, 64)), r"text.1 .*\(3, 64\).*\(4, 64\)"),
        (ECCL, put(f"{LAYER}.mlp.c_fc.weight", torch.ones(500, 128)), r"c_fc.weight .*\(500, 128\).*\(512, 128\)"),
        (ECCL, put(f"{LAYER}.attn.in_proj_bias", torch.ones(128)), r"in_proj_bias .*\(128,\).*\(384,\)"),
        (ECCL, put(f"{LAYER}.attn.lora_B_q", torch.ones(128, 8)), r"lora_B_q .*\(128, 8\).*\(128, 4\)"),
        (ECCL, put("image_encoder.positional_embedding", torch.ones(15, 128)), r"14 patches.* 6 x 2 .*\[96, 32\]"),
        (ECCL, put("image_encoder.conv1.weight", torch.ones(128, 3)), r"conv1.weight .*\(128, 3\).*4 dimensions"),
        (ECCL, put("logit_scale", 3), "logit_scale is int, it must be a tensor"),
        (ECCL, put(f"{LAYER}.ln_1.bias", torch.ones(128, dtype=torch.int64)), "ln_1.bias is torch.int64"),
        (ECCL, put("logit_scale", torch.tensor(float("nan"))), "logit_scale holds NaN or infinity"),
        (ECCL, put("image_encoder.proj", torch.eye(128, 48).to_sparse()), "proj is not a plain tensor: .*sparse_coo"),
        (IRRA, drop("base_model.text_projection"), "base_model.text_projection is missing"),
        (IRRA, put("head.weight", torch.ones(2)), "unknown keys head.weight"),
        (IRRA, put("base_model.visual.attnpool", torch.ones(2)), "unknown keys base_model.visual.attnpool"),
        (CLIP, drop("visual.conv1.weight"), "the key visual.conv1.weight is missing"),
        (CLIP, put("visual.proj", torch.ones(128, 47)), r"text_projection .*\(64, 48\).*\(64, 47\)"),
        (CLIP, put("token_embedding.weight", torch.ones(300, 96)), "text encoder is 96 wide, .*multiple of 64"),
        (CLIP, lambda state: state.clear(), "neither a CLIP, an IRRA nor an ECCL checkpoint.*first keys are none"),
    ],
)  # fmt: skip
def test_a_key_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, capsys, source, change, message):
    content = torch.load(source, weights_only=True)
    change(content.get("model", content))
    file = tmp_path / "changed.pth"
    torch.save(content, file)
    with pytest.raises(ValueError, match=f"changed.pth.*{message}"):
        convert_checkpoint(file, SIZE, prompt_depth=3)
    assert re.search(message, refusal(capsys, file, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [file]


class Code:
    def __reduce__(self):
        return os.mkdir, ("must-not-be-there",)


def web_page(file):
    file.write_text("\n<!DOCTYPE html><html><title>Sign in</title></html>")


def truncated(file):
    file.write_bytes(ECCL.read_bytes()[:100_000])


def pickled_code(file):
    torch.save({"model": {"prompt_learner.ctx": Code()}}, file)


def plain_pickled_code(file):
    file.write_bytes(pickle.dumps({"model": Code()}))


def torchscript(file):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (web_page, "is a web page, not a checkpoint"),
        (truncated, "cannot be read as a file of plain tensors"),
        (pickled_code, "holds more than tensors, and code from a checkpoint is never run"),
        (plain_pickled_code, "cannot be read as a file of plain tensors"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: torch.save([torch.ones(2)], file), "holds a list, it must hold a state dict"),
        (lambda file: torch.save({"model": {3: torch.ones(2)}}, file), "holds a dict, it must hold a state dict"),
        (lambda file: torch.save({"weight": torch.ones(2)}, file), "its first keys are weight"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, monkeypatch, capsys, write, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "best.pth"
    write(file)
    with pytest.raises(ValueError, match=f"best.pth.*{message}"):
        convert_checkpoint(file)
    assert re.search(message, refusal(capsys, file, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [file]


def test_the_error_for_a_torchscript_archive_says_how_to_convert_it(tmp_path):
    file = tmp_path / "ViT-B-16.pt"
    torchscript(file)
    with pytest.raises(ValueError, match=r"TorchScript archive: load it .* and save its state_dict\(\)"):
        convert_checkpoint(file)


def test_a_checkpoint_without_lora_cannot_give_an_adapter():
    with pytest.raises(ValueError, match=r"clip_openai.pt holds no LoRA matrices"):
        convert_checkpoint(CLIP, SIZE, prompt_depth=3, merge_lora=False)


def test_more_prompted_layers_than_the_file_has_are_refused():
    with pytest.raises(ValueError, match=r"clip_openai.pt: prompt_depth is 12.*\(3\)"):
        convert_checkpoint(CLIP, SIZE)


# -- What a file does not say


def open_clip_like(hidden_act="gelu", heads=(4, 2)):
    """A CLIP of transformers, and its weights with OpenAI's names in float32, as open_clip saves them."""
    text, vision = CONFIG.text_config.to_dict(), CONFIG.vision_config.to_dict()
    text |= {"hidden_act": hidden_act, "num_attention_heads": heads[1]}
    vision |= {"hidden_act": hidden_act, "num_attention_heads": heads[0]}
    torch.manual_seed(0)
    model = ECCLModel(ECCLConfig(text_config=text, vision_config=vision, projection_dim=24, num_prompt_tokens=0)).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        layer = re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            state[_NAMES[name]] = tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor
            continue
        encoder, index, module, kind = layer.groups()
        prefix = f"{'visual.' if encoder == 'vision' else ''}transformer.resblocks.{index}."
        if module.startswith("self_attn.") and module != "self_attn.out_proj":
            state.setdefault(f"{prefix}attn.in_proj_{kind}", {})["qkv".index(module[10])] = tensor
        else:
            state[f"{prefix}{_LAYER_NAMES[module]}{kind}"] = tensor
    for key, value in state.items():
        if isinstance(value, dict):
            state[key] = torch.cat([value[part] for part in range(3)])
    return model, state


CONFIG = tiny_config(
    text_config=tiny_config().text_config.to_dict() | {"hidden_size": 64, "num_hidden_layers": 3},
    vision_config=tiny_config().vision_config.to_dict() | {"hidden_size": 80, "num_attention_heads": 4},
)


@torch.no_grad()
def both_features(model):
    torch.manual_seed(1)
    ids = torch.tensor([[58, 3, 7, 59], [58, 9, 59, 59]])
    images = model.get_image_features(torch.randn(2, 3, 32, 16)).pooler_output
    return torch.cat([images, model.get_text_features(ids).pooler_output])


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_a_file_that_does_not_say_its_activation_and_heads_is_converted_when_it_is_told(hidden_act, tmp_path, capsys):
    model, state = open_clip_like(hidden_act)
    file = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(state, file)
    for known, missing in (({}, "--hidden_act"), ({"hidden_act": "gelu"}, "--num_attention_heads")):
        with pytest.raises(ValueError, match=f"open_clip_pytorch_model.bin.*{missing}"):
            convert_checkpoint(file, (32, 16), 0, **known)
    assert "--hidden_act" in refusal(capsys, file, tmp_path / "out")
    told = convert_checkpoint(file, (32, 16), 0, hidden_act=hidden_act, num_attention_heads=(4, 2))
    torch.testing.assert_close(both_features(told), both_features(model))
    convert(
        *(file, tmp_path / "out", "--hidden_act", hidden_act, "--num_attention_heads", "4", "2"),
        *("--image_size", "32", "16"),
    )
    torch.testing.assert_close(both_features(ECCLModel.from_pretrained(tmp_path / "out")), both_features(model))
    other = convert_checkpoint(file, (32, 16), 0, hidden_act=hidden_act, num_attention_heads=(2, 2))
    assert not torch.allclose(both_features(other), both_features(model), atol=1e-4)
    with pytest.raises(ValueError, match=r"num_attention_heads is 3 for the vision encoder, it must divide .* 80"):
        convert_checkpoint(file, (32, 16), 0, hidden_act=hidden_act, num_attention_heads=(3, 2))


@pytest.mark.parametrize(
    "width, layers, patch, heads", [(768, 12, 16, 12), (1024, 24, 14, 16), (1280, 32, 14, 16), (1408, 40, 14, 16)]
)
def test_the_heads_of_the_published_vision_encoders_are_known(width, layers, patch, heads):
    """The sizes are those of open_clip's model cards: ViT-B/16, ViT-L/14, ViT-H/14, ViT-g/14."""
    state = {"visual.transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(8, width)}
    state |= {f"visual.transformer.resblocks.{index}.x": torch.zeros(1) for index in range(layers)}
    checkpoint = _Checkpoint("file", state, _clip_key)
    sizes = _read_encoder_sizes(checkpoint, "vision", width, patch, EncoderFacts())
    assert (sizes["num_attention_heads"], sizes["num_hidden_layers"]) == (heads, layers)


def test_a_depth_that_is_not_given_follows_the_file(tmp_path):
    convert(CLIP, tmp_path / "out", "--num_prompt_tokens", "2")
    assert ECCLModel.from_pretrained(tmp_path / "out").config.prompt_depth == 3


# -- The forms in which people save


@pytest.mark.parametrize("file", [CLIP, IRRA, ECCL], ids=lambda file: file.name)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {}},
        lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {"model": state}},
    ],
    ids=["module", "model_state_dict", "compiled", "nested"],
)
def test_a_state_dict_in_a_wrapper_is_found(file, wrap, tmp_path):
    content = torch.load(file, weights_only=True)
    torch.save(wrap(content.get("model", content)), tmp_path / "wrapped.pth")
    expected, found = (
        convert_checkpoint(path, SIZE, 2, None).state_dict() for path in (file, tmp_path / "wrapped.pth")
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # New prompts are random.
        assert torch.equal(tensor, found[name]) or (name.startswith("prompt_learner.") and file != ECCL)


def test_the_heads_of_rde_are_ignored_with_a_line(tmp_path, caplog):
    content = torch.load(IRRA, weights_only=True)
    content["model"] |= {"visul_emb_layer.linear.weight": torch.zeros(2), "texual_emb_layer.mlp.bias": torch.zeros(2)}
    torch.save(content, tmp_path / "rde.pth")
    convert_checkpoint(tmp_path / "rde.pth", SIZE, 0)
    assert "visul_emb_layer" in caplog.text and "texual_emb_layer" in caplog.text


def test_a_file_of_clip_reid_is_not_taken_for_one_of_eccl(tmp_path):
    state = {"prompt_learner.cls_ctx": torch.zeros(3, 4, 8), "prompt_learner.token_prefix": torch.zeros(1, 5, 8)}
    torch.save(state | {"image_encoder.conv1.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "clip_reid.pth")
    with pytest.raises(ValueError, match=r"clip_reid\.pth is a checkpoint of CLIP-ReID"):
        convert_checkpoint(tmp_path / "clip_reid.pth", SIZE)


def convert(file, output_dir, *more):
    convert_module.main(["--checkpoint", str(file), "--output_dir", str(output_dir), "--image_size", "96", "32", *more])


def refusal(capsys, *arguments):
    """Runs the command, which must fail with status 2, and returns its error, which must be one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        convert(*arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert raised.value.code == 2 and len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("file", [CLIP, IRRA, ECCL], ids=lambda file: file.name)
def test_auto_model_loads_the_folder_that_the_command_writes(tmp_path, file):
    convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Another process loads the written folder and does not import this package.
    program = (
        "import sys, torch; from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.manual_seed(0); pixels = torch.randn(2, 3, 96, 32)\n"
        "ids = torch.tensor([[298, 5, 6, 299]])\n"
        "with torch.no_grad(): outputs = [model.get_image_features(pixels), model.get_text_features(ids)]\n"
        "features = [output.pooler_output for output in outputs]\n"
        "torch.save(features, 'features.pt'); assert 'eccl' not in sys.modules\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [sys.executable, "-c", program, "out"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    torch.manual_seed(0)
    pixels, ids = torch.randn(2, 3, 96, 32), torch.tensor([[298, 5, 6, 299]])
    model = convert_checkpoint(file, SIZE, num_prompt_tokens=0)
    with torch.no_grad():
        features = [model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output]
    for ours, theirs in zip(features, torch.load(tmp_path / "features.pt", weights_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_command_adds_a_tokenizer_that_fits(tmp_path, capsys):
    clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    error = refusal(capsys, ECCL, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer"))
    assert "49408 tokens, the model embeds 300" in error
    assert not (tmp_path / "out").exists()
    state = torch.load(CLIP, weights_only=True)
    state["token_embedding.weight"] = torch.zeros(49408, 64)
    torch.save(state, tmp_path / "clip.pt")
    convert(ECCL, tmp_path / "without")
    assert "the folder has no tokenizer" in capsys.readouterr().out
    convert(tmp_path / "clip.pt", tmp_path / "default")
    assert "the folder has no tokenizer" not in capsys.readouterr().out
    assert ECCLProcessor.from_pretrained(tmp_path / "default")(text="a man")["input_ids"] == [49406, 320, 786, 49407]
    convert(tmp_path / "clip.pt", tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer"), "--num_prompt_tokens",
            "4", "--prompt_depth", "2")  # fmt: skip
    processor = ECCLProcessor.from_pretrained(tmp_path / "out")
    reference = json.loads((GOLDENS / "tokenizer.json").read_text())
    for caption, ids in zip(reference["captions"], reference["ids"], strict=True):
        assert processor(text=caption)["input_ids"] == ids
    assert processor.image_processor.size == {"height": 96, "width": 32}
    assert AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).config.num_prompt_tokens == 4


def test_a_mistake_is_found_before_the_checkpoint_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_module, "convert_checkpoint", lambda *_: pytest.fail("the checkpoint is read"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    new = tmp_path / "new"
    for arguments, message in (
        ((CLIP, tmp_path / "out"), "out exists and is not an empty folder: nothing is overwritten"),
        ((CLIP, tmp_path / "out" / "mine.txt" / "deeper"), "mine.txt is a file"),
        ((tmp_path / "missing.pth", new), "missing.pth does not exist"),
        ((tmp_path, new), f"{tmp_path} is not a file"),
        ((CLIP, new, "--image_size", "0", "32"), "--image_size: 0 is too small, it must be at least 1"),
        ((CLIP, new, "--num_prompt_tokens", "-1"), "--num_prompt_tokens: -1 is too small"),
        ((CLIP, new, "--push_to_hub", "me/my/model"), "'me/my/model'"),
        ((CLIP, new, "--tokenizer", str(tmp_path / "none")), f"{tmp_path / 'none'}"),
    ):
        assert message in refusal(capsys, *arguments)
    assert not new.exists() and (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"missing.pth does not exist"):
        convert(tmp_path / "missing.pth", new, "--debug")


def test_the_command_can_write_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(CLIP, ".")
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(ECCLImageProcessor, "save_pretrained", full)
    assert refusal(capsys, CLIP, tmp_path / "out") == "error: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_the_command_publishes_the_folder(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(convert_module, "require_publishable", lambda *words: calls.append(words))
    monkeypatch.setattr(convert_module, "publish", lambda *words: calls.append(words) or f"me/{words[1]}")
    convert(ECCL, tmp_path / "out", "--push_to_hub", "person-search")
    assert calls == [("person-search", "model", False), (tmp_path / "out", "person-search", False)]
    convert(ECCL, tmp_path / "public", "--push_to_hub", "person-search", "--public")
    assert calls[2:] == [("person-search", "model", True), (tmp_path / "public", "person-search", True)]
    assert "--public only applies to --push_to_hub" in refusal(capsys, ECCL, tmp_path / "none", "--public")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# person-search" in card and "were converted from `eccl_original.pth`" in card
    assert "an ECCL model with prompts, for images of 96 x 32 pixels" in card and "## Results" not in card

    def refuse(*_):
        raise ConnectionError("me/x could not be published: no rights")

    monkeypatch.setattr(convert_module, "publish", refuse)
    error = refusal(capsys, ECCL, tmp_path / "again", "--push_to_hub", "x")
    assert error == "error: me/x could not be published: no rights"
    assert (tmp_path / "again" / "model.safetensors").is_file()
