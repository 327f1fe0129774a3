import html
import re

import ftfy
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor, clean_caption
from helpers import clip_tokenizer, tiny_config


@pytest.fixture(scope="module")
def tokenizer():
    sentences = ["a man in a red coat", "a woman with a blue bag and black shoes", "she wears a green skirt"]
    return CLIPTokenizer().train_new_from_iterator(sentences, vocab_size=400)


@pytest.fixture
def processor(tokenizer):
    return ECCLProcessor(ECCLImageProcessor(), tokenizer)


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


@pytest.mark.parametrize(
    "caption",
    [
        "a man &amp; a woman",
        "a &quot;NY&quot; shirt &lt;red&gt;",
        "&amp;quot;NY&amp;quot; and &#39;it&#39;s&nbsp;hers",
        "she’s in “red” and ‘blue’",
        "A womanâ€™s bag",
        "â€œNikeâ€\x9d shoes, cafÃ© and naÃ¯ve",
        "â€œ red â€™ and “blue”",
        "Ｆｕｌｌ width　text",
        "ﬁne ﬂat oﬀ",
        "no\x00 controls\x07",
        "\ufeffa mark",
        "white\u00a0space\u2003of \t all\u2028kinds",
        "é É À portée, e\u0301",
        "dots… and—dashes, 3½ ™",
        "ΣΑΣ",
        "don`t, it'S, SHE'LL, 1st 22",
        "日本 の",
        "a_b ÷ ½ “",
        "a sign “CAFÉ”, the CAFÉ’S sign",
        "… IL Y MARQUÉ…",
        "SEÑOR Ñ“x”, ÀÉ”",
        "a\u206ab\ufffbc",
        "voilÃ\xa0 Ã©tÃ© â€” 3Â½ â€¦",
        "",
    ],
)
def test_token_ids_equal_those_of_clips_own_clean_up(caption):
    """CLIP's published tokenizer runs ftfy, resolves entities twice, collapses whitespace and lowers."""
    original = html.unescape(html.unescape(ftfy.fix_text(caption)))
    original = re.sub(r"\s+", " ", original).strip().lower()
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer())
    assert processor(text=caption)["input_ids"] == clip_tokenizer()(original)["input_ids"]
    ids = processor(text=[caption, "x"])["input_ids"][0]
    assert ids[: len(processor(text=caption)["input_ids"])] == processor(text=caption)["input_ids"]


def test_clean_text_stays_as_it_is():
    for caption in (
        "a man's 3/4-length trousers",
        "une écharpe grise",
        "a naïve “x”".replace("“", '"').replace("”", '"'),
    ):
        assert clean_caption(caption) == caption
