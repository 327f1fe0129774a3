import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor
from helpers import tiny_config

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def tokenizer():
    sentences = ["a man in a red coat", "a woman with a blue bag and black shoes", "she wears a green skirt"]
    return CLIPTokenizer().train_new_from_iterator(sentences, vocab_size=400)


@pytest.fixture
def processor(tokenizer):
    return ECCLProcessor(ECCLImageProcessor(), tokenizer)


@pytest.mark.parametrize("size", [(128, 384), (37, 91), (500, 333)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pixels_are_a_pillow_bilinear_resize_normalised(processor, size, mode):
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    image = Image.fromarray(noise.squeeze(), mode)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    resized = np.asarray(image.convert("RGB").resize((128, 384), Image.Resampling.BILINEAR), dtype=np.float64)
    expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert pixels.shape == (1, 3, 384, 128)
    np.testing.assert_allclose(pixels[0].numpy(), expected, atol=1e-6)


def test_captions_are_cut_with_the_end_kept_and_padded_no_further_than_needed(processor, tokenizer):
    end = tokenizer.eos_token_id
    ids = processor(text=["a man " * 100, "a man"], return_tensors="pt")["input_ids"]
    assert ids.shape == (2, 73) and ids[0, -1] == end and (ids[0, :-1] != end).all()
    short = processor(text=["a man", "a man in a coat"], return_tensors="pt")["input_ids"]
    assert short.shape[1] == len(tokenizer("a man in a coat")["input_ids"])


def test_saved_and_loaded_it_does_the_same(processor, tmp_path):
    processor.max_text_length = 9
    processor.image_processor.size = {"height": 96, "width": 32}
    processor.save_pretrained(tmp_path)
    loaded = ECCLProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor).__name__ == "ECCLImageProcessor"
    image = Image.new("RGB", (50, 70), (10, 200, 30))
    for arguments in ({"images": image}, {"text": ["a woman with a blue bag and black shoes in a coat"]}):
        ours, theirs = (each(**arguments, return_tensors="pt") for each in (processor, loaded))
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name])
    assert theirs["input_ids"].shape == (1, 9)


def test_for_model_takes_the_models_sizes_and_refuses_another_vocabulary(tokenizer):
    special = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    text = tiny_config().text_config.to_dict()
    processor = ECCLProcessor.for_model(tiny_config(text_config=text | special), tokenizer)
    assert processor.max_text_length == 74
    assert processor(images=Image.new("RGB", (9, 9)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 16)
    with pytest.raises(ValueError, match=rf"{len(tokenizer)} tokens, the model embeds 60"):
        ECCLProcessor.for_model(tiny_config(), tokenizer)
    with pytest.raises(ValueError, match=r"ends a text with token \d+, the model looks for 59"):
        ECCLProcessor.for_model(tiny_config(text_config=text | {"vocab_size": len(tokenizer)}), tokenizer)
