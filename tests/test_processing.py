import html
import io
import json
import re

import ftfy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eccl.processing_eccl import (
    IMAGE_SUFFIXES,
    LONGEST_CAPTION,
    ECCLImageProcessor,
    ECCLProcessor,
    clean_caption,
    list_images,
    read_image,
)
from eccl.training.vocabulary import train_tokenizer
from helpers import clip_tokenizer, tiny_config

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@pytest.fixture(scope="module")
def tokenizer():
    sentences = ["a man in a red coat", "a woman with a blue bag and black shoes", "she wears a green skirt"]
    return CLIPTokenizer().train_new_from_iterator(sentences, vocab_size=400)


@pytest.fixture
def processor(tokenizer):
    return ECCLProcessor(ECCLImageProcessor(), tokenizer)


def test_captions_are_truncated_before_the_end_token_and_padded_to_the_longest(processor, tokenizer):
    end = tokenizer.eos_token_id
    ids = processor(text=["a man " * 100, "a man"], return_tensors="pt")["input_ids"]
    assert ids.shape == (2, 73) and ids[0, -1] == end and (ids[0, :-1] != end).all()
    short = processor(text=["a man", "a man in a coat"], return_tensors="pt")["input_ids"]
    assert short.shape[1] == len(tokenizer("a man in a coat")["input_ids"])


def test_a_saved_and_loaded_processor_gives_the_same_result(processor, tmp_path):
    processor.max_text_length = 9
    processor.image_processor.size = {"height": 96, "width": 32}
    processor.save_pretrained(tmp_path)
    loaded = ECCLProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor).__name__ == "ECCLImageProcessor"
    image = Image.new("RGB", (50, 70), (10, 200, 30))
    for arguments in ({"images": image}, {"text": ["a woman with a blue bag and black shoes in a coat"]}):
        before, after = (each(**arguments, return_tensors="pt") for each in (processor, loaded))
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name])
    assert after["input_ids"].shape == (1, 9)


def test_for_model_uses_the_sizes_of_the_model_and_refuses_another_vocabulary(tokenizer):
    special = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    text = tiny_config().text_config.to_dict()
    processor = ECCLProcessor.for_model(tiny_config(text_config=text | special), tokenizer)
    assert processor.max_text_length == 74
    assert processor(images=Image.new("RGB", (9, 9)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 16)
    with pytest.raises(ValueError, match=rf"{len(tokenizer)} tokens, the model embeds 60"):
        ECCLProcessor.for_model(tiny_config(), tokenizer)
    with pytest.raises(ValueError, match=r"ends a text with token \d+, the model expects token 59"):
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
def test_token_ids_equal_those_of_clips_published_tokenizer(caption):
    """CLIP's published tokenizer runs ftfy, resolves entities twice, collapses whitespace and makes lower case."""
    original = html.unescape(html.unescape(ftfy.fix_text(caption)))
    original = re.sub(r"\s+", " ", original).strip().lower()
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer())
    assert processor(text=caption)["input_ids"] == clip_tokenizer()(original)["input_ids"]
    ids = processor(text=[caption, "x"])["input_ids"][0]
    assert ids[: len(processor(text=caption)["input_ids"])] == processor(text=caption)["input_ids"]


def test_clean_text_does_not_change():
    for caption in (
        "a man's 3/4-length trousers",
        "une écharpe grise",
        "a naïve “x”".replace("“", '"').replace("”", '"'),
    ):
        assert clean_caption(caption) == caption


# -- The end token


def from_scratch():
    return train_tokenizer(["a man in a red coat"], 520)


def with_gaps():
    """As transformers makes one: it takes characters that it did not see for the end token."""
    return CLIPTokenizer().train_new_from_iterator(["a man in a red coat"], vocab_size=400)


@pytest.mark.parametrize("make_tokenizer", [clip_tokenizer, from_scratch, with_gaps])
def test_the_end_token_stands_only_at_the_end(make_tokenizer):
    tokenizer = make_tokenizer()
    processor = ECCLProcessor(ECCLImageProcessor(), tokenizer)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]

    @settings(deadline=None)
    @given(
        st.one_of(
            st.text(),
            st.binary().map(lambda data: data.decode("latin-1")),
            st.lists(st.sampled_from(["<|endoftext|>", "&lt;|endoftext|&gt;", "<|startoftext|>", "a", " ", "b7!"])).map(
                "".join
            ),
        )
    )
    def check(caption):
        ids = processor(text=caption)["input_ids"]
        assert ids[0] == special[0] and ids[-1] == special[1]
        assert not set(ids[1:-1]) & set(special)

    check()


def test_a_tokenizer_from_scratch_reads_every_character():
    """The text comes back from the tokens: nothing is left out, and nothing is taken for another character."""
    tokenizer = from_scratch()

    @settings(deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def check(text):
        words = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        back = "".join(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"][1:-1]))
        data = bytes(BYTE_OF[character] for character in back.replace("</w>", ""))
        assert "".join(data.decode().split()) == "".join(words.split())

    check()


def test_characters_that_a_tokenizer_lacks_are_left_out_and_named(caplog):
    tokenizer = with_gaps()
    assert tokenizer("plastic")["input_ids"].count(tokenizer.eos_token_id) == 2
    processor = ECCLProcessor(ECCLImageProcessor(), tokenizer)
    assert re.search(r"the tokenizer lacks \d+ of the tokens for single bytes \(.*are read without these", caplog.text)
    ids = processor(text="plastic a man")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == ["p", "l", "a", "s", "t", "i", "a</w>", "man</w>"]


# -- Reading images


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 3, 3), dtype=np.uint8))


def as_array(image):
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_applies_the_exif_orientation(noise, tmp_path, orientation):
    """Pixel by pixel, by the definition of the EXIF tag: where row 0 and column 0 of the stored image belong."""
    exif = noise.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    noise.save(path, exif=exif)
    stored = np.asarray(noise)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    with path.open("rb") as file, Image.open(path) as image:
        for source in (path, str(path), file, image):
            np.testing.assert_array_equal(as_array(read_image(source)), upright)
    # The result has no orientation any more: a second reading does not turn it again.
    np.testing.assert_array_equal(as_array(read_image(read_image(path))), upright)


def test_read_image_converts_other_modes_to_rgb(noise, tmp_path):
    pixels = np.asarray(noise)
    alpha = np.random.default_rng(1).integers(0, 256, (5, 3, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "alpha.png")), pixels)

    palette = noise.quantize(4)
    palette.save(tmp_path / "palette.png")
    colours = np.asarray(palette.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "palette.png")), colours[np.asarray(palette)])
    palette.save(tmp_path / "transparent.png", transparency=0)
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "transparent.png")), colours[np.asarray(palette)])

    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "grey.png")), pixels[..., :1].repeat(3, axis=2))
    Image.fromarray(np.concatenate([pixels[..., :1], alpha], axis=2)).save(tmp_path / "grey_alpha.png")
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "grey_alpha.png")), pixels[..., :1].repeat(3, axis=2))


def test_read_image_does_not_change_the_image_given(noise):
    exif = noise.getexif()
    exif[0x0112] = 6
    before = (noise.mode, noise.size, noise.tobytes(), dict(noise.getexif()))
    result = read_image(noise)
    assert result.size == (5, 3)
    result.putpixel((0, 0), (1, 2, 3))
    assert (noise.mode, noise.size, noise.tobytes(), dict(noise.getexif())) == before
    plain = Image.new("RGB", (2, 2))
    read_image(plain).putpixel((0, 0), (1, 2, 3))
    assert plain.getpixel((0, 0)) == (0, 0, 0)


@pytest.fixture(params=["cut.jpg", "cut.png", "empty.jpg", "text.png", "folder.jpg", "absent.jpg"])
def unreadable(request, tmp_path, noise):
    path = tmp_path / request.param
    if path.stem == "cut":
        noise.resize((300, 300)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    elif path.stem == "empty":
        path.touch()
    elif path.stem == "text":
        path.write_text("This is a text.")
    elif path.stem == "folder":
        path.mkdir()
    return path


def test_read_image_names_a_file_that_it_cannot_read(unreadable):
    message = rf"{re.escape(str(unreadable))} cannot be read as an image: "
    for source in (unreadable, str(unreadable)):
        with pytest.raises(ValueError, match=message) as raised:
            read_image(source)
        assert "\n" not in str(raised.value)
    if unreadable.is_file():
        with unreadable.open("rb") as file, pytest.raises(ValueError, match=message):
            read_image(file)
    if unreadable.name == "cut.jpg":  # Pillow reads the head of the file first, and the pixels on demand.
        with Image.open(unreadable) as image, pytest.raises(ValueError, match=message):
            read_image(image)


def test_read_image_without_a_name(noise, tmp_path):
    noise.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(as_array(read_image(io.BytesIO(data))), np.asarray(noise))
    with pytest.raises(ValueError, match=r"^a file without a name cannot be read as an image: "):
        read_image(io.BytesIO(data[:40]))


def test_list_images_in_the_order_of_their_paths(tmp_path):
    names = ["b/2.jpg", "b/10.JPG", "a.PNG", "c/d/e.JpEg", *(f"b/x{suffix}" for suffix in IMAGE_SUFFIXES)]
    for name in [*names, "b/notes.txt", "jpg", "b/x.jpg.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = sorted(tmp_path / name for name in names)
    assert list_images(tmp_path) == list_images(str(tmp_path)) == expected
    assert [path.name for path in expected[:3]] == ["a.PNG", "10.JPG", "2.jpg"]


def test_list_images_refuses_a_folder_without_images_and_a_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"empty contains no images \(\.jpg, \.jpeg, "):
        list_images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"notes\.txt is not a folder"):
        list_images(tmp_path / "empty" / "notes.txt")
    with pytest.raises(ValueError, match="absent is not a folder"):
        list_images(tmp_path / "absent")


def test_arguments_of_the_tokenizer_can_be_nested_or_flat(tokenizer):
    processor = ECCLProcessor(ECCLImageProcessor(), tokenizer, max_text_length=9)
    caption = "a man in a red coat with a blue bag and a hat"
    assert len(processor(text=caption)["input_ids"]) == 9
    assert len(processor(text=caption, max_length=5)["input_ids"]) == 5
    nested = processor(text=[caption, "a man"], text_kwargs={"max_length": 5, "padding": "max_length"})
    assert [len(row) for row in nested["input_ids"]] == [5, 5]
    assert len(processor(text=caption, text_kwargs={"padding": False})["input_ids"]) == 9
    with pytest.raises(ValueError, match="max_length was passed two times"):
        processor(text=caption, max_length=5, text_kwargs={"max_length": 5})
    # The length that a tokenizer has stored does not count.
    tokenizer.init_kwargs["max_length"] = 77
    assert len(processor(text=caption)["input_ids"]) == 9


def test_what_a_folder_holds_besides_images_is_said(tmp_path, caplog):
    (tmp_path / ".hidden").mkdir()
    for name in ("a.jpg", "._a.jpg", "notes.txt", "more.TXT", "README", ".hidden/b.jpg", "c.jfif"):
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "c.jfif"]
    left_out = "left out: .txt: 2, files without a suffix: 1, hidden files: 1, hidden folders: 1, linked folders: 1"
    assert f"{tmp_path} has 2 images; {left_out}" in caplog.text


@pytest.mark.parametrize("suffix", ["gif", "jfif", "avif", "jp2", "webp", "bmp", "tiff"])
def test_every_suffix_is_that_of_a_format_that_is_read(suffix, tmp_path, noise):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    noise.save(tmp_path / f"a.{suffix}", format="JPEG" if suffix == "jfif" else None)
    (path,) = list_images(tmp_path)
    assert read_image(path).size == noise.size


@pytest.mark.parametrize(
    "image, values",
    [
        (np.full((8, 6, 3), 300, np.uint16), "300 to 300"),
        (np.full((8, 6, 3), 0.5, np.float32), "0.5 to 0.5"),
        (np.full((8, 6, 3), -1, np.int64), "-1 to -1"),
        (np.full((8, 6, 3), np.nan, np.float32), "nan to nan"),
        (torch.full((3, 8, 6), 0.5), "0.5 to 0.5"),
    ],
)
def test_an_array_that_is_no_8_bit_image_is_refused(image, values):
    processor = ECCLImageProcessor(size={"height": 8, "width": 6})
    with pytest.raises(ValueError, match=f"has values from {values}, they must run from 0 to 255"):
        processor(image)
    twin = Image.fromarray(np.full((8, 6, 3), 51, np.uint8))
    scaled = processor(np.full((8, 6, 3), 0.2, np.float32), do_rescale=False)["pixel_values"][0]
    np.testing.assert_allclose(scaled, processor(twin)["pixel_values"][0], atol=1e-5)


# -- Texts that nobody writes


@pytest.mark.parametrize(
    "text", ["a" * 2**20, "a " * 2**19, "&#x" + "f" * 2**19 + ";", "&#" + "1" * 5000 + ";", "é" * 2**20]
)
def test_a_long_text_is_cut_before_it_is_read(text):
    clean = clean_caption(text)
    assert clean == clean_caption(text[:LONGEST_CAPTION]) and len(clean) <= LONGEST_CAPTION


def test_an_entity_with_too_many_digits_stays_as_it_is():
    text = "&amp; &#" + "1" * 5000 + ";"
    assert clean_caption(text) == text and clean_caption("&amp;amp; &#65;") == "& a"


def test_a_text_that_utf8_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"the text 'a \\ud800' is not valid: .*surrogates not allowed"):
        clean_caption("a \ud800")


def test_the_settings_of_a_tokenizer_are_not_arguments_of_its_calls(tmp_path):
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer())
    expected = processor(text=["a red coat"])["input_ids"]
    processor.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    hostile = {"stride": "x", "pad_to_multiple_of": -1, "is_split_into_words": True, "return_overflowing_tokens": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | hostile))
    assert ECCLProcessor.from_pretrained(tmp_path)(text=["a red coat"])["input_ids"] == expected


@pytest.mark.parametrize("words", [0, 1, 50, 71, 72, 73, 150, 400])
def test_tokens_are_counted_beyond_the_limit(words):
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer())
    text = "red " * words
    counted = processor.count_tokens(text)
    assert counted == len(clip_tokenizer()(text)["input_ids"]) == words + 2
    # The next call truncates as before.
    assert len(processor(text=text)["input_ids"]) == min(counted, 73)
