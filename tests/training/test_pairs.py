import random
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler, DataLoader
from transformers import CLIPTokenizer

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.encoding_eccl import embed_captions, embed_images
from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor
from eccl.training.augmentation import augment_image, drop_words, random_erase
from eccl.training.fingerprint import digest_split
from eccl.training.pairs import CaptionPairs, PairCollator, PairDraw, PixelMaker
from eccl.training.samplers import IdentitySampler, PairSampler
from eccl.utils import shipped
from helpers import clip_tokenizer


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
        assert torch.equal(again[PairDraw(index)]["pixel_values"], first[index])
    second = [pairs[PairDraw(index, draw=1)]["pixel_values"] for index in range(length)]
    assert any(not torch.equal(second[index], first[index]) for index in range(length))
    other = CaptionPairs(rows, processor, seed=4)
    assert any(not torch.equal(other[index]["pixel_values"], first[index]) for index in range(length))


def straightforward_pixels(path, processor, rng):
    """The published augmentation step by step, and the image processor itself; `rng` gives what was drawn."""
    height, width = processor.image_processor.size["height"], processor.image_processor.size["width"]
    image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    padding = round(height * 10 / 384)
    left, top = rng.randint(0, 2 * padding), rng.randint(0, 2 * padding)
    image = ImageOps.expand(image, padding, fill=0).crop((left, top, left + width, top + height))
    pixels = processor.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
    return random_erase(pixels, processor.image_processor.image_mean, rng)


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.1, 0.5, 0.9], "image_std": [1.0, 0.3, 0.7]}])
def test_pixels_are_bit_for_bit_those_of_the_image_processor(tmp_path, settings):
    image_processor = ECCLImageProcessor(**settings)
    processor = ECCLProcessor(image_processor, clip_tokenizer())
    make_pixels, values = PixelMaker(processor, augment=True), np.random.default_rng(0)
    # The first has the size of the pixels. Greys, and all values in each channel.
    for number, shape in enumerate([(384, 128, 3), (300, 140, 3), (200, 90)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(values.integers(0, 256, shape, dtype=np.uint8)).save(path)
        for seed in range(4):
            made = make_pixels(path, random.Random(seed))
            assert torch.equal(made, straightforward_pixels(path, processor, random.Random(seed)))
            assert made.dtype == torch.float32 and made.is_contiguous()


def test_batches_from_workers_are_those_of_this_process(rows, processor):
    pairs, collator = CaptionPairs(rows, processor), PairCollator(processor)
    loaders = [DataLoader(pairs, 3, num_workers=workers, collate_fn=collator) for workers in (0, 2)]
    for alone, shared in zip(*loaders, strict=True):
        assert alone.keys() == shared.keys() and shared["pixel_values"].is_shared()
        assert all(torch.equal(alone[name], shared[name]) for name in alone if name != "file_paths")


def test_a_batch_is_padded_to_its_longest_caption(rows, processor):
    pairs = CaptionPairs(rows, processor, augment=False)
    batch = PairCollator(processor)([pairs[0], pairs[5]])
    longest = max(len(processor.tokenizer(pairs[index]["caption"])["input_ids"]) for index in (0, 5))
    assert batch["input_ids"].shape == (2, longest)
    assert batch["pixel_values"].shape == (2, 3, 32, 16)
    assert batch["image_indices"].tolist() == [0, 2] and batch["person_labels"].tolist() == [0, 1]


def test_the_sampler_draws_each_pair_once_an_epoch_by_seed_and_epoch():
    sampler = PairSampler(20, seed=5)
    first = list(sampler)
    assert sorted(first) == [PairDraw(pair, 0) for pair in range(20)]
    assert list(PairSampler(20, seed=5)) == first != list(PairSampler(20, seed=6))
    sampler.set_epoch(2)
    assert sorted(sampler) == [PairDraw(pair, 2) for pair in range(20)]
    assert [drawn.pair for drawn in sampler] != [drawn.pair for drawn in first]
    assert len(sampler) == 20
    padded = list(PairSampler(20, seed=5, multiple_of=8))
    assert padded[:20] == first and padded[20:] == [PairDraw(0, is_padding=True)] * 4


def batches_of(sampler):
    size = sampler.persons_per_batch * sampler.pairs_per_person
    drawn = list(sampler)
    assert len(drawn) == len(sampler) and len(drawn) % size == 0
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_identity_batches_hold_n_persons_with_k_pairs_each(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=12))
    persons, pairs = data.draw(st.integers(1, len(sizes))), data.draw(st.integers(1, 5))
    labels = torch.tensor([person for person, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    sampler = IdentitySampler(labels, persons, pairs, seed=data.draw(st.integers(0, 99)))
    sampler.set_epoch(data.draw(st.integers(0, 3)))
    assert len(sampler) >= len(labels) > len(sampler) - persons * pairs
    drawn_of_person = Counter()
    for batch in batches_of(sampler):
        per_person = Counter(int(labels[drawn.pair]) for drawn in batch)
        assert len(per_person) == persons and set(per_person.values()) == {pairs}
        # A pair is repeated within a batch only if its person has too few pairs ...
        drawn = Counter(drawn.pair for drawn in batch)
        for pair, times in drawn.items():
            size = sizes[int(labels[pair])]
            assert times <= -(-pairs // size) + 1 and (times == 1 or size < 2 * pairs)
        # ... and then it is augmented differently.
        assert len(set(batch)) == len(batch)
        drawn_of_person.update(per_person)
    # All persons are drawn before any person is drawn again.
    counts = [drawn_of_person[person] for person in range(len(sizes))]
    assert max(counts) - min(counts) <= pairs


def test_identity_batches_are_the_seeds_and_epochs():
    labels = torch.arange(10).repeat_interleave(4)
    sampler = IdentitySampler(labels, 4, 2, seed=1)
    first = list(sampler)
    assert first == list(sampler) == list(IdentitySampler(labels, 4, 2, seed=1))
    assert first != list(IdentitySampler(labels, 4, 2, seed=2))
    sampler.set_epoch(1)
    second = list(sampler)
    assert [drawn.pair for drawn in second] != [drawn.pair for drawn in first]
    assert not set(first) & set(second)
    # All persons have the same number of pairs: an epoch of 40 draws has each of the 40 pairs once.
    assert sorted(drawn.pair for drawn in first) == list(range(40))


def test_two_processes_share_an_identity_batch():
    labels = torch.arange(6).repeat_interleave(5)
    sampler = IdentitySampler(labels, persons_per_batch=4, pairs_per_person=2)
    alone = batches_of(sampler)
    shares = [
        list(BatchSamplerShard(BatchSampler(sampler, batch_size=4, drop_last=False), 2, rank)) for rank in range(2)
    ]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


def test_an_identity_batch_that_cannot_be_is_refused():
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="persons_per_batch is 3, it must be between 1 and the 2 persons"):
        IdentitySampler(labels, 3, 2)
    with pytest.raises(ValueError, match="pairs_per_person is 0"):
        IdentitySampler(labels, 1, 0)


def test_augmentation_flips_shifts_and_pads_with_black():
    # A gradient from left to right, without black.
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
    # The tiny model has fewer tokens than the tokenizer: the captions use only the first ones.
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
        torch.testing.assert_close(images[index], tiny_model.get_image_features(pixels).pooler_output[0].detach())


def test_the_shipped_tokenizer_is_the_published_vocabulary():
    tokenizer, published = shipped.clip_tokenizer(), clip_tokenizer()
    assert tokenizer.get_vocab() == published.get_vocab()
    for caption in ("a man's grey t-shirt", "porté naïve", "blue jeans and white sneakers 22"):
        assert tokenizer(caption)["input_ids"] == published(caption)["input_ids"]


def test_the_digest_of_a_split_covers_each_column_and_the_sizes_of_the_images():
    def digest(**changes) -> str:
        row = {"image": {"bytes": b"abc", "path": None}, "person_id": 1, "captions": ["a man"], "file_path": "a.png"}
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "person_id": datasets.Value("int32"),
                "captions": datasets.List(datasets.Value("string")),
                "file_path": datasets.Value("string"),
            }
        )
        return digest_split(datasets.Dataset.from_list([row | changes, row], features=features))

    digests = [
        digest(),
        digest(image={"bytes": b"abcd", "path": None}),
        digest(person_id=2),
        digest(captions=["a man", "a hat"]),
        digest(captions=["a woman"]),
        digest(file_path="b.png"),
    ]
    assert len(set(digests)) == len(digests) and digest() == digests[0]
