"""The maps that show why a picture matches: on drawn persons, the true place of each garment is known."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from eccl.dataset_scripts.synthetic.appearance import sample_appearance
from eccl.dataset_scripts.synthetic.drawing import draw_person
from eccl.dataset_scripts.synthetic.people import COLOURS, sample_person
from eccl.hub.loading import load_model
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from eccl.search.explanation import Explanation, draw_explanation, explain
from helpers import ROOT, clip_tokenizer, tiny_config

BACKBONE = ROOT / "assets" / "synthetic-backbone"
ROWS, COLUMNS = 12, 4
SENTENCE = "a man in a red coat and blue trousers"


@pytest.fixture(scope="module")
def loaded():
    model, processor = load_model(BACKBONE)
    return model.cpu(), processor


@pytest.fixture(scope="module")
def picture():
    return draw(0)[0]


def draw(number):
    """Draws a person; returns the image, the person, and the places of the upper and of the lower garment.

    A place has the patches of which the garment covers at least a tenth. It is where the picture changes when the
    garment alone gets another colour.
    """
    rng = random.Random(number)
    person = sample_person(rng)
    look = sample_appearance(person, "source", rng)
    state = rng.getstate()

    def photograph(**colours):
        rng.setstate(state)
        return draw_person(person, replace(look, **colours), "source", rng)

    places = {}
    for part in ("upper", "lower"):
        dark, light = (
            np.asarray(photograph(**{part: 3 * (value,), f"{part}_accent": 3 * (value,)}), dtype=float)
            for value in (0, 255)
        )
        changed = (light - dark).max(axis=-1) > 60
        places[part] = changed.reshape(ROWS, 384 // ROWS, COLUMNS, 128 // COLUMNS).mean(axis=(1, 3)) >= 0.1
    return photograph(), person, places


def test_the_maps_of_garments_point_at_the_garments(loaded):
    hits, favours, chance = [], [], []
    for number in range(24):
        image, person, places = draw(number)
        upper, lower = (f"{person[f'{part}_colour']} {person[part]}".split() for part in ("upper", "lower"))
        explanation = explain(*loaded, image, " ".join(["a", "person", "in", *upper, "and", *lower]))
        spans = {"upper": range(3, 3 + len(upper)), "lower": range(4 + len(upper), 4 + len(upper) + len(lower))}
        for part, span in spans.items():
            place = places[part].flatten()
            hits.append(place[explanation.of(span).argmax()])
            chance.append(place.mean())
        # The garment speaks more for the word of its colour than for that of another.
        other = next(colour for colour in COLOURS if colour not in (person["upper_colour"], person["lower_colour"]))
        wrong = explain(*loaded, image, " ".join(["a", "person", "in", other, *upper[1:], "and", *lower]))
        place = places["upper"]
        favours.append(explanation.scores[3][place].mean() > wrong.scores[3][place].mean())
    assert np.mean(chance) < 0.35
    assert np.mean(hits) > 0.85 and np.mean(favours) > 0.85


def test_words_without_content_are_pale(loaded):
    strengths = {"content": [], "function": []}
    for number in range(8):
        image, person, _ = draw(number)
        sentence = f"a {person['gender']} in a {person['upper_colour']} {person['upper']} and a pair of white boots"
        explanation = explain(*loaded, image, sentence)
        for word, scores in zip(explanation.words, explanation.scores, strict=True):
            kind = "function" if word in ("a", "in", "and", "of") else "content"
            strengths[kind].append(np.abs(scores).max())
    assert np.mean(strengths["function"]) < 0.35 * np.mean(strengths["content"])


def test_words_shapes_and_scale(loaded, picture):
    explanation = explain(*loaded, picture, "  A man,\nin a RED coat &amp; hat. ")
    assert explanation.words == ["a", "man,", "in", "a", "red", "coat", "&", "hat."]
    assert explanation.scores.shape == (8, ROWS, COLUMNS) and explanation.overall.shape == (ROWS, COLUMNS)
    for scores in (explanation.scores, explanation.overall):
        assert scores.dtype == np.float32 and np.abs(scores).max() == 1
    assert explain(*loaded, picture, "coat").scores.shape == (1, ROWS, COLUMNS)


def parts_of_the_feature(model, pixels):
    """Computes what each patch adds to the unit feature, token by token and head by head, in double precision.

    Also returns the unit feature and the same sum over everything: tokens, biases, MLPs and the embedding.
    """
    model = model.double()
    inputs = {}
    layers = model.vision_model.encoder.layers
    hooks = [
        module.register_forward_hook(lambda _, args, output, key=(index, name): inputs.update({key: output}))
        for index, layer in enumerate(layers)
        for name, module in (
            ("q", layer.self_attn.q_proj),
            ("k", layer.self_attn.k_proj),
            ("v", layer.self_attn.v_proj),
            ("mlp", layer.mlp),
        )
    ]
    hooks.append(model.vision_model.pre_layrnorm.register_forward_hook(lambda _, args, out: inputs.update(start=out)))
    output = model.get_image_features(pixels.double())
    for hook in hooks:
        hook.remove()
    patches = model.config.grid_size[0] * model.config.grid_size[1]
    parts, rest = torch.zeros(patches, 48).double(), inputs["start"][0, 0].clone()
    for index, layer in enumerate(layers):
        q, k, v = (inputs[index, name][0] for name in "qkv")
        rest += layer.self_attn.out_proj.bias + inputs[index, "mlp"][0, 0]
        for head in range(3):
            span = slice(16 * head, 16 * head + 16)
            weights = (k[:, span] @ q[0, span] / 4).softmax(dim=0)
            for token in range(len(k)):
                part = layer.self_attn.out_proj.weight[:, span] @ (weights[token] * v[token, span])
                if 1 <= token <= patches:
                    parts[token - 1] += part
                else:
                    rest += part
    final = rest + parts.sum(dim=0)
    norm, length = model.vision_model.post_layernorm, output.pooler_output.norm()

    def project(part):
        return model.visual_projection(
            norm.weight * (part - part.mean(-1, keepdim=True)) / (final.var(correction=0) + norm.eps).sqrt()
        )

    total = project(final) + model.visual_projection(norm.bias)
    return project(parts) / length, output.pooler_output[0] / length, total / length


@pytest.mark.parametrize("prompts", [0, 3])
def test_the_maps_are_parts_of_the_similarity(prompts):
    torch.manual_seed(0)
    config = tiny_config(num_prompt_tokens=prompts)
    config.text_config.vocab_size = len(clip_tokenizer())
    config.text_config.bos_token_id, config.text_config.eos_token_id = 49406, 49407
    model = ECCLModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    processor = ECCLProcessor.for_model(config, clip_tokenizer())
    image = Image.effect_noise((40, 90), 80)
    explanation = explain(model, processor, image, "a red coat")
    with torch.no_grad():
        texts = processor(text=["a red coat", "red coat", "a coat", "a red"], return_tensors="pt")
        features = torch.nn.functional.normalize(model.get_text_features(**texts).pooler_output).double()
        parts, feature, total = parts_of_the_feature(
            model, processor(images=image, return_tensors="pt")["pixel_values"]
        )
    # The sum over everything is the model's feature, so the parts are those of the feature and of nothing else.
    assert torch.allclose(total, feature, atol=1e-9)
    overall, words = parts @ features[0], parts @ (features[0] - features[1:]).T
    for found, expected in ((explanation.overall, overall), (explanation.scores, words.T)):
        expected = (expected / expected.abs().max()).numpy()
        assert found.flatten() == pytest.approx(expected.flatten(), abs=1e-4)


def test_nothing_changes_and_threads_agree(loaded, picture):
    model, processor = loaded
    first = explain(model, processor, picture, SENTENCE)
    with ThreadPoolExecutor(4) as pool:
        # A sentence that is too long must not disturb the others.
        long = [pool.submit(explain, model, processor, picture, "red " * 90) for _ in range(8)]
        others = list(pool.map(lambda _: explain(model, processor, picture, SENTENCE), range(8)))
    assert all("92 tokens" in str(future.exception()) for future in long)
    assert not model.training
    model.train()
    others.append(explain(model, processor, picture, SENTENCE))
    assert model.training
    model.eval()
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for other in others:
        assert np.array_equal(first.scores, other.scores) and np.array_equal(first.overall, other.overall)


def test_words_are_added():
    explanation = Explanation(["red", "coat"], np.array([[[1.0, 0.25]], [[-0.5, 0.5]]], np.float32), np.ones((1, 2)))
    assert explanation.of([1, 0]).tolist() == [[0.5, 0.75]] and explanation.of([1, 1]).tolist() == [[-0.5, 0.5]]
    for indices in ([], [2], [-1]):
        with pytest.raises(ValueError, match="it must be one or more numbers from 0 to 1"):
            explanation.of(indices)


def test_mistakes_are_named(loaded, picture, tmp_path):
    for sentence in ("", " \n "):
        with pytest.raises(ValueError, match="it must have at least one word"):
            explain(*loaded, picture, sentence)
    with pytest.raises(ValueError, match=r"the sentence has 92 tokens, start and end included, but the model reads 77"):
        explain(*loaded, picture, " ".join(["red"] * 90))
    assert len(explain(*loaded, picture, " ".join(["red"] * 75)).words) == 75
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.jpg cannot be read as an image"):
        explain(*loaded, tmp_path / "broken.jpg", SENTENCE)
    for scores in (np.zeros(4), np.zeros((0, 4)), np.full((12, 4), np.nan)):
        with pytest.raises(ValueError, match="it must be \\(rows, columns\\) of finite numbers"):
            draw_explanation(picture, scores)
    for height in (0, 5_000):
        with pytest.raises(ValueError, match=f"height is {height}, it must be between 1 and 4,096"):
            draw_explanation(picture, np.zeros((12, 4)), height)


def test_the_drawing_is_warm_where_the_word_fits_and_cool_where_it_does_not():
    grey = Image.new("RGB", (40, 120), (128, 128, 128))
    scores = np.zeros((ROWS, COLUMNS), np.float32)
    scores[:3], scores[-3:] = 1, -7
    drawn = draw_explanation(grey, scores, 240)
    assert drawn.size == (80, 240) and drawn.mode == "RGB"
    pixels = np.asarray(drawn, dtype=int)
    red, _, blue = pixels[10, 40]
    assert red > blue + 100
    red, _, blue = pixels[-10, 40]
    assert blue > red + 100
    # Elsewhere the picture stays as it is.
    assert np.abs(pixels[100:140] - 128).max() <= 1
    assert np.asarray(draw_explanation(grey, scores / 4, 240))[10, 40, 0] < pixels[10, 40, 0]
    # The picture can still be told apart under the strongest colour.
    black = np.asarray(draw_explanation(Image.new("RGB", (40, 120)), scores, 240), dtype=int)
    assert (pixels[10, 40] - black[10, 40]).min() > 20
