import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from eccl import encoding_eccl
from eccl.encoding_eccl import embed_captions, embed_images, embed_split
from eccl.hub.loading import load_model
from eccl.utils.shipped import BACKBONE

CAPTIONS = [
    "a woman in a long red coat with a black bag",
    "a man",
    "someone with blue shoes",
    "a person",
    "a man in grey",
]


@pytest.fixture(scope="module")
def model_and_processor():
    model, processor = load_model(BACKBONE)
    return model.cpu(), processor


@pytest.fixture(scope="module")
def split():
    """Five images of four persons, with 2, 1, 3, 0 and 1 captions."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (60, 20 + 5 * n, 3), dtype=np.uint8)) for n in range(5)]
    captions = [CAPTIONS[:2], CAPTIONS[2:3], CAPTIONS[2:5], [], CAPTIONS[:1]]
    features = datasets.Features(
        {"image": datasets.Image(), "captions": [datasets.Value("string")], "person_id": datasets.Value("int64")}
    )
    columns = {"image": images, "captions": captions, "person_id": [7, 3, 7, 11, 2]}
    return datasets.Dataset.from_dict(columns, features=features)


@torch.no_grad()
def encode_image(model_and_processor, image):
    model, processor = model_and_processor
    return model.get_image_features(processor(images=image, return_tensors="pt")["pixel_values"]).pooler_output[0]


@torch.no_grad()
def encode_caption(model_and_processor, caption):
    model, processor = model_and_processor
    return model.get_text_features(processor(text=[caption], return_tensors="pt")["input_ids"]).pooler_output[0]


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 0), (64, 0), (2, 2)])
def test_image_features_equal_those_of_each_image_alone(model_and_processor, split, batch_size, num_workers):
    embeds = embed_images(*model_and_processor, split, batch_size, num_workers, progress=False)
    expected = torch.stack([encode_image(model_and_processor, image) for image in split["image"]])
    assert embeds.dtype == torch.float32 and not embeds.requires_grad
    torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 256, None])
def test_caption_features_keep_the_order_of_the_captions(model_and_processor, batch_size):
    """The function sorts captions by length before it encodes them."""
    assert sorted(CAPTIONS, key=len) not in (CAPTIONS, CAPTIONS[::-1])
    embeds = embed_captions(*model_and_processor, CAPTIONS, batch_size, progress=False)
    expected = torch.stack([encode_caption(model_and_processor, caption) for caption in CAPTIONS])
    assert embeds.dtype == torch.float32 and not embeds.requires_grad
    torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_captions_is_padded_only_to_its_most_tokens(model_and_processor, monkeypatch):
    model, processor = model_and_processor
    # By characters, the first two would share a batch. By tokens, "grey trousers" is as short as "a man".
    captions = ["photographed", "grey trousers", "a man", "a b c d"]
    lengths = [len(processor.tokenizer(caption)["input_ids"]) for caption in captions]
    monkeypatch.setattr(encoding_eccl, "_TOKENISED_AT_A_TIME", 3)
    shapes, encode = [], model.get_text_features

    def recorded(input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return encode(input_ids, **kwargs)

    monkeypatch.setattr(model, "get_text_features", recorded)
    embed_captions(model, processor, captions, batch_size=2, progress=False)
    assert shapes == [(2, sorted(lengths)[1]), (2, max(lengths))] == [(2, 4), (2, 10)]


def test_a_list_of_dicts_is_a_data_set(model_and_processor, split):
    records = [{"image": image} for image in split["image"]]
    embeds = embed_images(*model_and_processor, records, progress=False)
    assert torch.equal(embeds, embed_images(*model_and_processor, split, progress=False))


def test_a_split_has_every_caption_as_query_and_every_image_as_gallery(model_and_processor, split):
    embeddings = embed_split(*model_and_processor, split, batch_size=2, progress=False)
    captions = [caption for captions_of_image in split["captions"] for caption in captions_of_image]
    assert embeddings.query_person_ids.tolist() == [7, 7, 3, 7, 7, 7, 2]
    assert embeddings.gallery_person_ids.tolist() == [7, 3, 7, 11, 2]
    expected = torch.stack([encode_caption(model_and_processor, caption) for caption in captions])
    torch.testing.assert_close(embeddings.text_embeds, expected, rtol=1e-4, atol=1e-5)
    expected = torch.stack([encode_image(model_and_processor, image) for image in split["image"]])
    torch.testing.assert_close(embeddings.image_embeds, expected, rtol=1e-4, atol=1e-5)


class BrokenImages:
    """A data set whose second image cannot be read; notes the mode of the model when it is asked."""

    def __init__(self, model, image):
        self.model, self.image, self.modes = model, image, []

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.modes.append(self.model.training)
        if index:
            raise OSError("broken.jpg is broken")
        return {"image": self.image}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_returns_to_its_mode(model_and_processor, split, training):
    model, processor = model_and_processor
    broken = BrokenImages(model, split[0]["image"])
    model.train(training)
    try:
        embed_captions(model, processor, CAPTIONS, progress=False)
        assert model.training == training
        with pytest.raises(OSError, match=r"broken\.jpg is broken"):
            embed_images(model, processor, broken, batch_size=1, progress=False)
        assert broken.modes == [False, False]
        assert all(module.training == training for module in model.modules())
        with pytest.raises(TypeError):
            embed_captions(model, processor, [["no text"]], progress=False)
        assert model.training == training
    finally:
        model.eval()


def test_nothing_to_encode_is_an_error(model_and_processor, split):
    with pytest.raises(ValueError, match="there are no images to encode: the data set is empty"):
        embed_images(*model_and_processor, split.select([]), progress=False)
    with pytest.raises(ValueError, match="there are no captions to encode: the list is empty"):
        embed_captions(*model_and_processor, [], progress=False)
    with pytest.raises(ValueError, match="there are no captions to encode"):
        embed_split(*model_and_processor, split.select([3]), progress=False)


@pytest.mark.parametrize("num_batches", [1, 2, 3, 7])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_divide_the_batches_and_gather_them_in_order(monkeypatch, num_batches, world_size):
    batches = [[index] for index in range(num_batches)]
    batches_of_ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(encoding_eccl, "_rank_and_world_size", lambda _, rank=rank: (rank, world_size))
        batches_of_ranks.append(encoding_eccl._batches_of_this_process(batches, across_processes=True))
    # A sharded model needs all processes in each batch.
    assert {len(local) for local in batches_of_ranks} == {-(-num_batches // world_size)}
    features = [[torch.tensor(batch) for batch in local] for local in batches_of_ranks]

    def all_gather_object(gathered, _):
        gathered[:] = features

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    gathered = encoding_eccl._gather_batches(features[-1], num_batches, across_processes=True)
    assert torch.cat(gathered).tolist() == list(range(num_batches))
