import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from eccl.hub.loading import load_model
from eccl.modeling_eccl import ECCLModel
from eccl.pipeline_eccl import TextToPersonRetrievalPipeline
from eccl.processing_eccl import ECCLProcessor
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"
SENTENCES = ["a person in a green coat", "a man in red", "someone with a blue bag"]


@pytest.fixture
def search():
    model, processor = load_model(str(BACKBONE))
    return TextToPersonRetrievalPipeline(model=model, processor=processor, device="cpu")


def test_images_are_ranked_by_cosine_similarity(search, make_raw):
    root, records = make_raw()
    assert search.index(root / "imgs", batch_size=4, progress=False) is search
    for sentence in SENTENCES:
        scores = {}
        for record in records:
            path = root / "imgs" / record["file_path"]
            inputs = search.processor(images=Image.open(path), text=[sentence], return_tensors="pt")
            with torch.no_grad():
                output = search.model(**inputs)
            scores[str(path)] = torch.cosine_similarity(output.text_embeds, output.image_embeds).item()
        found, expected = search(sentence, top_k=4), sorted(scores, key=scores.get, reverse=True)[:4]
        assert [entry["path"] for entry in found] == expected
        assert [entry["score"] for entry in found] == pytest.approx([scores[path] for path in expected], abs=1e-5)
        assert [search.paths[entry["index"]] for entry in found] == [entry["path"] for entry in found]


def test_sentences_in_a_batch_find_the_same_as_each_sentence_alone(search, make_raw):
    root, _ = make_raw()
    search.index(root / "imgs", progress=False)
    alone = [search(sentence, top_k=3) for sentence in SENTENCES]
    for batch_size in (1, 2, 8):
        together = search(SENTENCES, top_k=3, batch_size=batch_size)
        for found, expected in zip(together, alone, strict=True):
            assert [entry["index"] for entry in found] == [entry["index"] for entry in expected]
            scores = [entry["score"] for entry in expected]
            assert [entry["score"] for entry in found] == pytest.approx(scores, abs=1e-5)
    assert len(search(SENTENCES[0])) == 6 and len(search(SENTENCES[0], top_k=99)) == 6


def test_paths_images_and_a_data_set_give_the_same_index(search, make_raw):
    import eccl.dataset_scripts  # noqa: F401  (registers the builders)

    root, records = make_raw()
    files = [root / "imgs" / record["file_path"] for record in records[:4]]
    dataset = datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train")
    embeds = []
    for images in (files, [str(file) for file in files], [Image.open(file) for file in files], dataset):
        search.index(images, progress=False)
        embeds.append(search.image_embeds)
    assert all(torch.equal(embeds[0], other) for other in embeds[1:])
    assert search.paths == [record["file_path"] for record in records[:4]]
    search.index([Image.new("RGB", (9, 30))], progress=False)
    assert search("a man")[0]["path"] is None and search("a man")[0]["index"] == 0


def test_images_come_in_any_iterable_and_undecoded(search, make_raw):
    root, records = make_raw()
    files = [str(root / "imgs" / record["file_path"]) for record in records[:5]]
    decoded = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    raw = decoded.cast_column("image", datasets.Image(decode=False))
    inside = datasets.Dataset.from_list(
        [{"image": {"bytes": Path(file).read_bytes(), "path": None}, "file_path": file} for file in files]
    )
    search.index(files, batch_size=2, progress=False)
    expected = search.image_embeds
    for images in (
        tuple(files), (file for file in files), iter(map(Path, files)), decoded, decoded["image"], raw, raw["image"],
        inside, decoded.to_iterable_dataset(), {file: None for file in files}.keys(),
    ):  # fmt: skip
        search.index(images, batch_size=2, progress=False)
        torch.testing.assert_close(search.image_embeds, expected)
        assert search.paths == files
    broken = [{"bytes": b"no image", "path": "a/b.png"}]
    with pytest.raises(ValueError, match=r"a/b.png cannot be read as an image"):
        search.index(broken, progress=False)
    with pytest.raises(ValueError, match="there are no images to index"):
        search.index(iter(()), progress=False)
    # An index that failed leaves the one before.
    assert search.paths == files


def test_sentences_come_in_any_iterable(search, make_raw):
    root, _ = make_raw()
    search.index(root / "imgs", progress=False)
    expected = search(SENTENCES, top_k=2)
    column = datasets.Dataset.from_dict({"text": SENTENCES})["text"]
    for sentences in (tuple(SENTENCES), column, np.array(SENTENCES), dict.fromkeys(SENTENCES)):
        assert search(sentences, top_k=2) == expected
    # As with any pipeline, a generator is read when its results are wanted.
    lazy = search((sentence for sentence in SENTENCES), top_k=2)
    assert not isinstance(lazy, list) and list(lazy) == expected
    for nothing in ([], (), iter(())):
        assert list(search(nothing)) == []
    assert list(search(sentence for sentence in ())) == []
    with pytest.raises(ValueError, match="a query must be a sentence, not 3"):
        search(3)


def test_the_task_is_known_by_name_for_a_model_object(search):
    from transformers import pipeline

    import eccl

    model, processor = eccl.load_model(BACKBONE)
    by_name = pipeline("text-to-person-retrieval", model=model, processor=processor, device="cpu")
    assert type(by_name) is TextToPersonRetrievalPipeline and by_name.model is model


def test_a_saved_pipeline_keeps_its_whole_processor(search, make_raw, tmp_path):
    root, _ = make_raw()
    model = ECCLModel.from_clip(search.model, (96, 32), num_prompt_tokens=8, prompt_depth=1)
    processor = ECCLProcessor.for_model(model.config, search.processor.tokenizer)
    TextToPersonRetrievalPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "saved")
    loaded_model, loaded = load_model(tmp_path / "saved")
    assert loaded.max_text_length == processor.max_text_length == model.config.max_text_length
    assert loaded.to_dict() == processor.to_dict()
    again = TextToPersonRetrievalPipeline(model=loaded_model, processor=loaded, device="cpu")
    assert len(again.index(root / "imgs", progress=False)("a man " * 200)) == 6


def test_the_exif_orientation_of_a_file_is_applied(search, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 32, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    search.index([tmp_path / "turned.png", tmp_path / "upright.png"], progress=False)
    torch.testing.assert_close(search.image_embeds[0], search.image_embeds[1])


def test_errors_name_the_reason(search, make_raw, tmp_path):
    root, _ = make_raw()
    with pytest.raises(ValueError, match="nothing is indexed yet"):
        search("a man")
    for images, message in (
        ([], "there are no images"),
        (tmp_path / "nowhere", "nowhere is not a folder"),
        ([root / "reid_raw.json"], "reid_raw.json cannot be read as an image"),
        ([3], "image 0 is of type int, it must be a path or a PIL image"),
        (datasets.Dataset.from_dict({"a": [1]}), "record 0 has no field .image., it has only a"),
    ):
        with pytest.raises(ValueError, match=message):
            search.index(images, progress=False)
    search.index(root / "imgs", progress=False)
    with pytest.raises(ValueError, match="a query must be a sentence, not ' '"):
        search(" ")
    with pytest.raises(ValueError, match="top_k is 0"):
        search("a man", top_k=0)


LOADER = """
import json, sys
for name in ("eccl", "peft", "torchvision"):
    sys.modules[name] = None
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
folder, images = sys.argv[1:]
trust = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(folder, **trust).model_type == "eccl"
processor = AutoProcessor.from_pretrained(folder, **trust)
inputs = processor(text=["a man in red", "a woman"], return_tensors="pt")
features = {}
for name, arguments in {
    "plain": {}, "eager": {"attn_implementation": "eager"}, "sdpa": {"attn_implementation": "sdpa"},
    "mapped": {"device_map": "cpu"}, "half": {"dtype": torch.bfloat16},
}.items():
    model = AutoModel.from_pretrained(folder, **trust, **arguments)
    with torch.no_grad():
        features[name] = model.get_text_features(inputs["input_ids"]).pooler_output
    if name in ("eager", "sdpa"):
        assert model.config._attn_implementation == name
        assert all(layer.self_attn.config._attn_implementation == name for layer in model.text_model.encoder.layers)
assert features["half"].dtype == torch.bfloat16
torch.save(features, "features.pt")
search = pipeline("text-to-person-retrieval", model=folder, trust_remote_code=True, device="cpu")
search.model.save_pretrained("again")
processor.save_pretrained("again")
found = search.index(images, progress=False)("a man in red", top_k=3)
again = pipeline("text-to-person-retrieval", model="again", trust_remote_code=True, dtype=torch.bfloat16, device="cpu")
assert again.dtype == torch.bfloat16
again.index(images, progress=False)("a man in red")
print(json.dumps(found))
"""


def test_a_checkpoint_needs_no_other_code_than_its_files(make_raw, tmp_path):
    """Model, processor and pipeline load, and are saved and loaded again, without this package, peft or torchvision."""
    root, _ = make_raw()
    model, processor = ECCLModel.from_pretrained(BACKBONE), ECCLProcessor.from_pretrained(BACKBONE)
    model = ECCLModel.from_clip(model.eval(), (192, 64), num_prompt_tokens=2, prompt_depth=2)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {f"{name}_eccl.py" for name in ("configuration", "modeling", "processing", "pipeline")} <= files
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, "model", str(root / "imgs")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    inputs = processor(text=["a man in red", "a woman"], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(inputs["input_ids"]).pooler_output
    features = torch.load(tmp_path / "features.pt", weights_only=True)
    for name in ("plain", "sdpa", "mapped", "eager"):
        assert (features[name] - expected).abs().max() / expected.abs().max() < 1e-6
    assert (features["half"].float() - expected).abs().max() / expected.abs().max() < 0.05
    search = TextToPersonRetrievalPipeline(model=model, processor=processor, device="cpu")
    found_here = search.index(root / "imgs", progress=False)("a man in red", top_k=3)
    found_there = json.loads(done.stdout.splitlines()[-1])
    assert [entry["path"] for entry in found_here] == [entry["path"] for entry in found_there]
    # `pipeline` puts classes into the configuration. They are not saved.
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]
    assert saved == json.loads((tmp_path / "model" / "config.json").read_text())["custom_pipelines"]
    assert saved["text-to-person-retrieval"]["pt"] == ["AutoModel"]


@pytest.fixture
def files(tmp_path):
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (8, 16), (80 * index, 9, 9)).save(paths[-1])
    return paths


@pytest.mark.parametrize("top_k", [0, -1, 2.0, 1.5, "3", None])
def test_top_k_is_a_whole_number(search, files, top_k):
    search.index(files)
    if top_k is None:
        assert len(search("a man", top_k=top_k)) == min(10, len(files))
        return
    with pytest.raises(ValueError, match=r"top_k is .*, it must be a whole number, at least 1"):
        search("a man", top_k=top_k)


def test_a_query_that_is_cut_gives_a_warning(search, files, caplog):
    search.index(files)
    limit = search.processor.max_text_length
    search("a " * (limit - 2))
    assert not caplog.records
    search("a " * (limit - 1))
    assert f"the query has {limit + 1} tokens, only the first {limit} are read" in caplog.text


@pytest.mark.parametrize("query", ["", "  ", "&nbsp;", "\x00", "\ufeff \n"])
def test_a_query_without_a_word_is_refused(search, files, query):
    search.index(files)
    with pytest.raises(ValueError, match="a query must be a sentence"):
        search(query)


def test_images_that_cannot_be_read_are_skipped_only_if_that_is_asked_for(search, files, tmp_path, caplog):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.png"):
        search.index([bad, *files])
    search.index([bad, *files], on_bad_image="skip")
    assert search.positions == list(range(1, len(files) + 1)) and len(search.skipped) == 1
    assert "1 unreadable images are left out, the first: image 0:" in caplog.text
    with pytest.raises(ValueError, match="there are no images to index: 1 cannot be read"):
        search.index([bad], on_bad_image="skip")
    assert search.positions == list(range(1, len(files) + 1)), "a failed call leaves the index as it was"
    with pytest.raises(ValueError, match="on_bad_image is 'ignore', it must be error or skip"):
        search.index(files, on_bad_image="ignore")
