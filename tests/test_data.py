import random
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.data_eccl import (
    CaptionPairs,
    PairCollator,
    PairSampler,
    augment_image,
    drop_words,
    embed_captions,
    embed_images,
    random_erase,
)
from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor


@pytest.fixture
def processor():
    tokenizer = CLIPTokenizer().train_new_from_iterator(["a person in a coat"], vocab_size=50)
    return ECCLProcessor(ECCLImageProcessor(size={"height": 32, "width": 16}), tokenizer)


@pytest.fixture
def rows(make_raw):
    return datasets.load_dataset("cuhk_pedes", data_dir=str(make_raw()[0]), split="train")


def test_every_caption_pairs_with_its_image_once(rows, processor):
    pairs = CaptionPairs(rows, processor, augment=False)
    items = [pairs[index] for index in range(len(pairs))]
    found = [(item["file_path"], item["caption"]) for item in items]
    assert found == [(row["file_path"], caption) for row in rows for caption in row["captions"]]
    assert [item["person_label"] for item in items] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert pairs.num_persons == 3


def test_an_item_depends_on_seed_epoch_and_pair_alone(rows, processor):
    pairs, again = CaptionPairs(rows, processor, seed=3), CaptionPairs(rows, processor, seed=3)
    length = len(pairs)
    first = [pairs[index]["pixel_values"] for index in range(length)]
    for index in reversed(range(length)):
        assert torch.equal(again[index]["pixel_values"], first[index])
    assert any(not torch.equal(pairs[length + index]["pixel_values"], first[index]) for index in range(length))
    other = CaptionPairs(rows, processor, seed=4)
    assert any(not torch.equal(other[index]["pixel_values"], first[index]) for index in range(length))


def test_a_batch_is_padded_to_its_longest_caption(rows, processor):
    pairs = CaptionPairs(rows, processor, augment=False)
    batch = PairCollator(processor)([pairs[0], pairs[5]])
    longest = max(len(processor.tokenizer(pairs[index]["caption"])["input_ids"]) for index in (0, 5))
    assert batch["input_ids"].shape == (2, longest)
    assert batch["pixel_values"].shape == (2, 3, 32, 16)
    assert batch["rows"].tolist() == [0, 2] and batch["person_labels"].tolist() == [0, 1]


def test_the_sampler_draws_each_pair_once_an_epoch_by_seed_and_epoch():
    sampler = PairSampler(20, seed=5)
    first = list(sampler)
    assert sorted(first) == list(range(20)) == sorted(list(PairSampler(20, seed=5)))
    assert list(PairSampler(20, seed=5)) == first != list(PairSampler(20, seed=6))
    sampler.set_epoch(2)
    assert sorted(sampler) == list(range(40, 60))
    assert [index - 40 for index in sampler] != first
    assert len(sampler) == 20


def test_augmentation_flips_shifts_and_pads_with_black():
    # A gradient from left to right, no black in it.
    gradient = np.tile(np.linspace(50, 250, 128, dtype=np.uint8)[None, :, None], (384, 1, 3))
    image = Image.fromarray(gradient)
    results = [np.asarray(augment_image(image, 384, 128, random.Random(seed)))[..., 0] for seed in range(40)]
    flipped = sum(result[192, 20] > result[192, 100] for result in results)
    assert 10 < flipped < 30
    rows_of_black = [int((result[:, 64] == 0).sum()) for result in results]
    columns_of_black = [int((result[192] == 0).sum()) for result in results]
    assert max(rows_of_black) <= 10 and max(columns_of_black) <= 10
    assert len(set(rows_of_black)) > 3 and len(set(columns_of_black)) > 3
    assert all(result.shape == (384, 128) for result in results)


def test_random_erasing_covers_the_published_area_half_of_the_time():
    shares = []
    for seed in range(200):
        pixels = random_erase(torch.zeros(3, 96, 32), (1.0, 2.0, 3.0), random.Random(seed))
        erased = pixels[0] == 1
        assert torch.equal(pixels[1] == 2, erased) and torch.equal(pixels[2] == 3, erased)
        shares.append(erased.float().mean().item())
    hit = [share for share in shares if share]
    assert 70 < len(hit) < 130
    assert min(hit) > 0.015 and max(hit) < 0.42


def test_a_caption_loses_a_tenth_of_its_words_and_never_all():
    words = [f"w{index}" for index in range(50)]
    kept = Counter(word for seed in range(200) for word in drop_words(" ".join(words), random.Random(seed)).split())
    assert 0.87 < sum(kept.values()) / (200 * 50) < 0.93
    assert all(drop_words("person", random.Random(seed)) == "person" for seed in range(100))


def test_embedding_in_any_batch_size_keeps_the_order(rows, processor, tiny_model):
    # The tiny model knows fewer tokens than the tokenizer: keep to what it has.
    special = dict.fromkeys(("bos_token_id", "eos_token_id"), None)
    for name in special:
        assert getattr(processor.tokenizer, name) < 60
    tiny_model.text_model.config.eos_token_id = processor.tokenizer.eos_token_id
    processor.tokenizer.model_max_length = 20
    captions = ["a", "a person in a coat", "a coat", "person"]
    tiny_model.resize_token_embeddings(len(processor.tokenizer))
    tiny_model.train()
    one = embed_captions(tiny_model, processor, captions, batch_size=1, progress=False)
    many = embed_captions(tiny_model, processor, captions, batch_size=3, progress=False)
    torch.testing.assert_close(one, many)
    assert tiny_model.training
    images = embed_images(tiny_model, processor, rows, batch_size=2, progress=False)
    tiny_model.eval()
    for index, row in enumerate(rows):
        pixels = processor(images=row["image"], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(images[index], tiny_model.get_image_features(pixels)[0].detach())
