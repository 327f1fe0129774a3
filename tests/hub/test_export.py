"""The ONNX export: the same features as torch, for any batch and any length, and nothing wrong passes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer

from eccl.encoding_eccl import embed_captions, embed_images
from eccl.hub import export as export_module
from eccl.hub.adapter import attach_lora, merge_lora, save_adapter
from eccl.hub.digests import digest_encoder, digest_model
from eccl.hub.export import export_onnx
from eccl.hub.loading import load_model
from eccl.hub.onnx_encoder import ONNX_FILES, ONNX_INDEX, OnnxEncoder, digest_file, find_export, load_onnx
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"
SENTENCES = ["a woman in a red coat", "a man", "somebody with a blue bag and grey trousers " * 20]


@pytest.fixture(scope="module")
def loaded(exported):
    return load_model(exported)


@pytest.fixture(scope="module")
def encoder(exported):
    return OnnxEncoder(exported)


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the export alone, for tests that damage it."""
    shutil.copytree(exported / "onnx", tmp_path / "copy")
    return tmp_path / "copy"


def captions_of(model, batch, length, generator):
    end = model.text_model.end_token
    ids = torch.randint(end - 1, (batch, length), generator=generator)
    ids[:, -1] = end
    return ids


def pixels_of(model, batch, generator):
    return torch.randn(batch, 3, *model.config.input_size, generator=generator)


def relative(found, expected):
    """The largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def compare(model, encoder):
    """The largest relative difference of the features over several batch sizes and lengths, the longest too."""
    generator = torch.Generator().manual_seed(7)
    differences = []
    for batch in (1, 2, 7):
        pixels = pixels_of(model, batch, generator)
        found, expected = (each.get_image_features(pixels).pooler_output for each in (encoder, model))
        differences.append(relative(found, expected))
        for length in (3, 11, model.config.max_text_length):
            ids = captions_of(model, batch, length, generator)
            found, expected = (each.get_text_features(ids).pooler_output for each in (encoder, model))
            differences.append(relative(found, expected))
    return max(differences)


def test_features_equal_those_of_torch_for_any_batch_and_any_length(loaded, encoder):
    assert compare(loaded[0], encoder) < 1e-5


def test_padding_and_captions_of_several_lengths_change_nothing(loaded, encoder):
    model, processor = loaded
    with torch.no_grad():
        alone = torch.cat(
            [model.get_text_features(**processor(text=[text], return_tensors="pt")).pooler_output for text in SENTENCES]
        )
    ids = processor(text=SENTENCES, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == model.config.max_text_length
    assert relative(encoder.get_text_features(ids).pooler_output, alone) < 1e-5
    # As long as the position embeddings of CLIP.
    padded = torch.cat([ids, ids[:, -1:].expand(-1, 3)], dim=1)
    assert relative(encoder.get_text_features(padded, return_dict=False)[0], alone) < 1e-5


def test_the_functions_that_encode_data_sets_take_the_export(loaded, exported):
    model, processor = load_model(exported)
    images = [{"image": Image.effect_noise((20 + size, 50), 80).convert("RGB")} for size in range(3)]
    encoder, its_processor = load_onnx(exported / "onnx")
    for embed, data in ((embed_captions, SENTENCES), (embed_images, images)):
        expected = embed(model, processor, data, progress=False)
        assert relative(embed(encoder, its_processor, data, progress=False), expected) < 1e-5


def test_prompts_are_constants_of_the_graph(exported):
    """The export holds the prompts of each layer, and not the maps that compute those of images."""
    for part, modality in (("image", "vision"), ("text", "text")):
        graph = onnx.load(exported / "onnx" / ONNX_FILES["float32"][part]).graph
        names = {tensor.name for tensor in graph.initializer if "prompt" in tensor.name}
        assert names == {f"model.prompt_learner.{modality}_{layer}" for layer in range(2)}
        shape = [dimension.dim_param for dimension in graph.input[0].type.tensor_type.shape.dim]
        assert shape == (["batch", "", "", ""] if part == "image" else ["batch", "length"])


def test_the_index_says_what_the_files_are(exported, loaded):
    index = json.loads((exported / "onnx" / ONNX_INDEX).read_text())
    assert index["weights"] == digest_model(loaded[0]) and index["encoder"] == digest_encoder(*loaded)
    for precision, files in ONNX_FILES.items():
        for part, name in files.items():
            entry = index["files"][precision][part]
            assert entry["file"] == name and entry["sha256"] == digest_file(exported / "onnx" / name)
            if precision == "float32":
                assert entry["difference"] < 1e-5
            assert 0.9 < entry["min_cosine"] <= entry["mean_cosine"] < 1.000001
    assert not list(exported.glob(".*"))


def test_int8_is_close(exported, loaded, encoder):
    small = OnnxEncoder(exported, "int8")
    generator = torch.Generator().manual_seed(3)
    pixels, ids = pixels_of(loaded[0], 5, generator), captions_of(loaded[0], 5, 9, generator)
    for part, inputs in (("image", pixels), ("text", ids)):
        features = [getattr(each, f"get_{part}_features")(inputs).pooler_output for each in (encoder, small)]
        assert nn.functional.cosine_similarity(*features).min() > 0.97


def test_an_int8_feature_does_not_depend_on_the_batch(exported, loaded):
    encoder, processor = load_onnx(exported, "int8")
    ids = processor(text=SENTENCES, return_tensors="pt")["input_ids"]
    together = encoder.get_text_features(ids).pooler_output
    for row, text in zip(together, SENTENCES, strict=True):
        alone = encoder.get_text_features(processor(text=[text], return_tensors="pt")["input_ids"]).pooler_output
        assert torch.equal(alone[0], row)
    pixels = pixels_of(loaded[0], 3, torch.Generator().manual_seed(3))
    together = encoder.get_image_features(pixels).pooler_output
    assert torch.equal(encoder.get_image_features(pixels[1:2]).pooler_output[0], together[1])


@pytest.mark.parametrize("precision", ONNX_FILES)
def test_no_inputs_give_no_features(exported, precision):
    encoder = OnnxEncoder(exported, precision)
    assert encoder.get_text_features(torch.zeros(0, 5, dtype=torch.long)).pooler_output.shape == (0, 16)
    assert encoder.get_image_features(torch.zeros(0, 3, 32, 16)).pooler_output.shape == (0, 16)


def test_inputs_that_make_no_sense_are_refused(encoder, loaded):
    end = loaded[0].text_model.end_token
    limit = loaded[0].config.max_text_length
    late = torch.cat([torch.ones(1, limit, dtype=torch.long), torch.tensor([[end]])], dim=1)
    for ids, message in (
        (torch.tensor([[1, 2, end], [1, 2, 3]]), "row 1 of input_ids must have its first end-of-text token"),
        (torch.tensor([[end, 1, end]]), "row 0 of input_ids"),
        (torch.zeros(2, 0, dtype=torch.long), "row 0 of input_ids"),
        (late, f"among its first {limit} tokens"),
        (torch.tensor([[1, -1, end]]), "input_ids runs from -1 to"),
        (torch.tensor([[1, 100_000, end]]), "a token is a number from 0 to"),
        (torch.tensor([1, 2, end]), "must be \\(batch, length\\) whole numbers"),
        (torch.tensor([[1.0, 2.0]]), "must be \\(batch, length\\) whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.get_text_features(ids)
    for shape in ((2, 3, 16, 32), (3, 32, 16), (2, 1, 32, 16)):
        with pytest.raises(ValueError, match=r"it must be \(batch, 3, 32, 16\)"):
            encoder.get_image_features(torch.zeros(shape))


# -- Folders that are not what they should be


@pytest.mark.parametrize("name", [*ONNX_FILES["float32"].values(), *ONNX_FILES["int8"].values()])
def test_a_file_that_is_missing_or_damaged_is_named(copied, name):
    precision = "int8" if "int8" in name else "float32"
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged, or belongs to another export"):
        OnnxEncoder(copied, precision)
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        OnnxEncoder(copied, precision)


def test_a_file_that_is_no_graph_is_refused_in_one_line(copied):
    (copied / "text.onnx").write_bytes(b"no graph")
    index = json.loads((copied / ONNX_INDEX).read_text())
    index["files"]["float32"]["text"]["sha256"] = digest_file(copied / "text.onnx")
    (copied / ONNX_INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"text\.onnx"):
        OnnxEncoder(copied)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "format is 2, it must be 1"),
        ({"files": []}, "onnx.json is damaged"),
        ({"files": {"float32": {"text": {"sha256": "0"}}}}, "onnx.json is damaged"),
        ({"files": {"float16": {}}}, "onnx.json is damaged"),
        ({"weights": None}, "onnx.json is damaged"),
        ({"weights": "0" * 64}, "is not that of the exported model"),
    ],
)
def test_a_damaged_index_is_refused(copied, change, message):
    index = json.loads((copied / ONNX_INDEX).read_text())
    (copied / ONNX_INDEX).write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        load_onnx(copied)
    (copied / ONNX_INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"onnx\.json is not valid JSON"):
        load_onnx(copied)


def test_settings_of_another_model_are_refused(copied):
    file = copied / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a file of the processor, is not that of the exported model"):
        load_onnx(copied)
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_onnx(copied)


def test_an_export_is_found_in_the_folder_and_in_its_subfolder(exported, tmp_path):
    assert find_export(exported) == find_export(exported / "onnx") == exported / "onnx"
    with pytest.raises(FileNotFoundError, match=f"eccl-export-onnx --model {tmp_path} --output_dir {tmp_path}/onnx"):
        load_onnx(tmp_path)


def test_an_export_is_not_taken_for_a_model(exported):
    with pytest.raises(ValueError, match="is an ONNX export: load the model itself, or run the export with --runtime"):
        load_model(exported / "onnx")


def test_int8_that_was_not_exported_is_refused(copied):
    index = json.loads((copied / ONNX_INDEX).read_text())
    del index["files"]["int8"]
    (copied / ONNX_INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no int8 export, it has float32: run eccl-export-onnx with --int8"):
        load_onnx(copied, "int8")


def test_a_missing_package_is_named_with_its_extra(exported, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ImportError, match=r'pip install "eccl\[onnx\]"'):
            OnnxEncoder(exported)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r'onnxscript is not installed: pip install "eccl\[onnx\]"'):
        export_onnx(None, None, tmp_path / "out")


# -- The command, with the graphs of an earlier export: torch's exporter takes seconds


@pytest.fixture
def quick(exported, monkeypatch):
    def copy(model, part, file):
        shutil.copy(exported / "onnx" / file.name, file)

    monkeypatch.setattr(export_module, "_export", copy)
    monkeypatch.setattr(export_module, "_quantize", lambda source, target: copy(None, None, target))


def refusal(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        export_module.main([*map(str, words)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert raised.value.code == 2
    return line


def test_the_command_reports_each_file(quick, exported, tmp_path, capsys):
    words = ["--model", exported, "--output_dir", tmp_path / "out", "--int8"]
    export_module.main([*map(str, words)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:4]] == ["image.onnx", "text.onnx", "image_int8.onnx", "text_int8.onnx"]
    assert lines[4] == f"written: {tmp_path / 'out'}"
    assert digest_encoder(*load_model(exported)) == json.loads((tmp_path / "out" / ONNX_INDEX).read_text())["encoder"]


@pytest.mark.parametrize(
    "limit, value, message",
    [("_TOLERANCE", 0.0, "image.onnx does not agree with torch"), ("_LOWEST_COSINE", 1.1, "image_int8.onnx does not")],
)
def test_an_export_that_does_not_agree_leaves_nothing(
    quick, exported, tmp_path, capsys, monkeypatch, limit, value, message
):
    monkeypatch.setattr(export_module, limit, value)
    assert message in refusal(capsys, "--model", exported, "--output_dir", tmp_path / "new" / "out", "--int8")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_other_weights_does_not_agree(quick, loaded, tmp_path):
    other = ECCLModel(loaded[0].config).eval()
    with pytest.raises(ValueError, match=r"image\.onnx does not agree with torch"):
        export_onnx(other, loaded[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced(quick, exported, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = [*map(str, ("--model", exported, "--output_dir", out))]
    export_module.main([*words, "--int8"])
    assert "is not an empty folder" in refusal(capsys, *words)
    (out / "notes.txt").write_text("mine")
    assert "has notes.txt, which no export wrote" in refusal(capsys, *words, "--overwrite")
    (out / "notes.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_TOLERANCE", 0.0)
        refusal(capsys, *words, "--overwrite")
    load_onnx(out, "int8")  # The earlier export is still whole.
    # Left over from a run that was killed.
    (tmp_path / ".out.unfinished" / "out").mkdir(parents=True)
    (tmp_path / ".out.unfinished" / "out" / "image.onnx").write_text("half")
    export_module.main([*words, "--overwrite"])
    load_onnx(out)
    assert not (out / "text_int8.onnx").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    line = refusal(capsys, "--model", exported, "--output_dir", tmp_path / "other", "--overwrite")
    assert "is not an empty folder" in line


def test_the_model_is_not_overwritten(exported, capsys):
    assert "--model" in refusal(capsys, "--model", exported, "--output_dir", exported)
    assert "--model" in refusal(capsys, "--model", exported, "--output_dir", exported.parent)


def test_lora_that_is_not_merged_is_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match="it must be an ECCLModel: merge LoRA with merge_lora"):
        export_onnx(attach_lora(ECCLModel(loaded[0].config)), loaded[1], tmp_path / "out")


def test_an_encoder_that_is_too_large_is_refused_before_the_work(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_LARGEST_FILE", 10_000)
    with pytest.raises(ValueError, match=r"the image encoder has .* bytes, an ONNX file has at most 10,000"):
        export_onnx(*loaded, tmp_path / "out")


# -- Slow: exports of other models


@pytest.mark.slow
def test_lora_is_folded_into_the_export_of_an_adapter(backbone, tmp_path):
    torch.manual_seed(0)
    model = attach_lora(ECCLModel.from_clip(str(backbone), (32, 16), num_prompt_tokens=3, prompt_depth=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter", str(backbone))
    export_module.main(["--model", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "onnx")])
    encoder = OnnxEncoder(tmp_path / "onnx")
    assert compare(load_model(tmp_path / "adapter")[0], encoder) < 1e-5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert compare(merge_lora(model), encoder) > 1e-2


@pytest.mark.slow
def test_the_shipped_backbone_keeps_its_ranking_in_int8(tmp_path, benchmark):
    """It has no prompts, and was trained; captions and pictures are those of the synthetic benchmark."""
    model, processor = load_model(BACKBONE)
    export_onnx(model, processor, tmp_path / "onnx", int8=True)
    assert compare(model, OnnxEncoder(tmp_path / "onnx")) < 1e-5
    small = OnnxEncoder(tmp_path / "onnx", "int8")
    sizes = [sum((tmp_path / "onnx" / name).stat().st_size for name in files.values()) for files in ONNX_FILES.values()]
    assert sizes[1] < 0.4 * sizes[0]
    images = [{"image": path} for path in sorted(map(str, (benchmark / "imgs").rglob("*.jpg")))]
    for embed, data in ((embed_captions, SENTENCES), (embed_images, images)):
        features = [embed(each, processor, data, progress=False) for each in (model, small)]
        assert nn.functional.cosine_similarity(*features).min() > 0.97


FRESH = {
    "AutoModel": """
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=images, text=sentences, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
texts, pictures = output.text_embeds, output.image_embeds
""",
    "pipeline": """
from transformers import pipeline
search = pipeline("text-to-person-retrieval", model=folder, trust_remote_code=True)
search.index(images, progress=False)
pictures = search.image_embeds
# The pipeline gives scores: with the unit vectors of the pictures they are texts @ pictures.T.
texts = None
scores = [[match["score"] for match in sorted(found, key=lambda match: match["index"])] for found in search(sentences)]
""",
    "ONNX": """
from eccl.hub.onnx_encoder import load_onnx
encoder, processor = load_onnx(folder)
inputs = processor(images=images, text=sentences, return_tensors="pt")
texts = encoder.get_text_features(inputs["input_ids"]).pooler_output
pictures = encoder.get_image_features(inputs["pixel_values"]).pooler_output
""",
    "SentenceTransformer": """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder, trust_remote_code=True)
assert model.max_seq_length == 74, model.max_seq_length
texts, pictures = (torch.tensor(model.encode(each)) for each in (sentences, images))
""",
}


@pytest.mark.slow
def test_every_way_to_load_one_folder_gives_the_same_features(exported, tmp_path):
    """Each in a fresh process; only onnxruntime is run by this package."""
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (60, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    results = {}
    for name, program in FRESH.items():
        start = (
            "import sys, torch\nfrom PIL import Image\nfolder, target, scores = sys.argv[1], sys.argv[2], None\n"
            "images = [Image.open(f'{number}.png') for number in range(3)]\n"
            f"sentences = {SENTENCES!r}\n"
        )
        end = "torch.save({'texts': texts, 'pictures': pictures, 'scores': scores}, target)\n"
        environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
        words = [sys.executable, "-c", start + program + end, str(exported), f"{name}.pt"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    expected = results["AutoModel"]
    for name, tolerance in (("ONNX", 1e-5), ("SentenceTransformer", 2e-7)):
        for kind in ("texts", "pictures"):
            assert relative(results[name][kind], expected[kind]) < tolerance, (name, kind)
    unit = {kind: nn.functional.normalize(expected[kind], dim=-1) for kind in ("texts", "pictures")}
    torch.testing.assert_close(results["pipeline"]["pictures"], unit["pictures"], rtol=0, atol=1e-6)
    scores = torch.tensor(results["pipeline"]["scores"])
    torch.testing.assert_close(scores, unit["texts"] @ unit["pictures"].T, rtol=0, atol=1e-6)


def test_the_maximum_length_is_that_of_the_processor(exported, loaded):
    processor = ECCLProcessor.from_pretrained(exported)
    assert processor.tokenizer.model_max_length == loaded[0].config.max_text_length == 74
    assert CLIPTokenizer.from_pretrained(exported).model_max_length == 74
    # Another processor with the same tokenizer changes nothing of this one.
    ECCLProcessor(processor.image_processor, processor.tokenizer, 6)
    assert len(processor(text=SENTENCES[2])["input_ids"]) == 74
