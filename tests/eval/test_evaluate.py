import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from eccl.dataset_scripts import BENCHMARKS
from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.eval import evaluate_eccl, heat_map, pictures, reports, reranking, scoring
from eccl.eval.benchmarks.explanation import draw_sample
from eccl.hub import loading
from eccl.hub.adapter import attach_lora, merge_lora, save_adapter
from eccl.hub.loading import load_model
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor, load_tokenizer
from eccl.search.explanation import explain
from eccl.training.losses import unit_rows
from helpers import ROOT, launch_command

BACKBONE = str(ROOT / "assets" / "synthetic-backbone")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    sizes = {"train_ids": 1, "val_ids": 3, "test_ids": 12, "images_per_id": 3}
    write_benchmark(SyntheticBenchmark("cuhk_pedes", **sizes), folder, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def other_benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "other"
    sizes = {"train_ids": 1, "val_ids": 0, "test_ids": 5, "images_per_id": 2, "captions_per_image": 1}
    write_benchmark(SyntheticBenchmark("icfg_pedes", domain="target", **sizes), folder, num_workers=1)
    return folder


def run(*words):
    evaluate_eccl.main([str(word) for word in words])


def test_models_are_scored_on_benchmarks_in_both_directions_next_to_the_published_figures(
    benchmark, other_benchmark, tmp_path, capsys
):
    run(
        *("--model", BACKBONE, "--dataset", "cuhk_pedes", "--data_dir", benchmark),
        *("--dataset", "icfg_pedes", "--data_dir", other_benchmark),
        *("--direction", "both", "--rerank", "--output_dir", tmp_path),
    )
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    found = [(r["dataset"], r["direction"], r["reranked"], r["queries"], r["gallery"]) for r in content["results"]]
    assert found == [
        ("cuhk_pedes", "text_to_image", False, 72, 36),
        ("cuhk_pedes", "text_to_image", True, 72, 36),
        ("cuhk_pedes", "image_to_text", False, 36, 72),
        ("icfg_pedes", "text_to_image", False, 10, 10),
        ("icfg_pedes", "text_to_image", True, 10, 10),
        ("icfg_pedes", "image_to_text", False, 10, 10),
    ]
    assert all(set(r["metrics"]) == set(reports.METRICS) for r in content["results"])
    # The figures are those of a loop over all pairs.
    model, processor = load_model(BACKBONE)
    records = [r for r in json.loads((benchmark / "reid_raw.json").read_text()) if r["split"] == "test"]
    images = [Image.open(benchmark / "imgs" / record["file_path"]) for record in records]
    hits = 0
    with torch.no_grad():
        gallery = unit_rows(
            model.get_image_features(processor(images=images, return_tensors="pt")["pixel_values"]).pooler_output
        )
        for record in records:
            for caption in record["captions"]:
                query = model.get_text_features(processor(text=caption, return_tensors="pt")["input_ids"]).pooler_output
                hits += records[int((gallery @ unit_rows(query)[0]).argmax())]["id"] == record["id"]
    assert content["results"][0]["metrics"]["rank1"] == content["rank1"] == pytest.approx(100 * hits / 72)
    assert (
        f"cuhk_pedes in {benchmark}, split test, text to image: every caption of the split queries every image of the "
        "split; 72 queries, 36 images in the gallery. All figures are in percent."
    ) in printed
    assert "every image of the split queries every caption of the split; 36 queries, 72 captions in the" in printed
    assert "not the published cuhk_pedes, so the published figures cannot be compared with the others: test" in printed
    assert "test has 12 ids, 36 images, 72 captions; published: 1,000 ids" in printed
    assert "| ECCL (published) " in printed and "|  77.17 |  90.64 |   94.39 |  69.81 |      - |" in printed
    assert printed.count("| IRRA (published)") == 2
    markdown = (tmp_path / "results.md").read_text()
    # The file can be given away: it has the names of the folders, and not their paths.
    assert markdown.startswith(printed.replace(f"{benchmark.parent}/", "").split("written:")[0].strip()[:200])
    assert str(benchmark.parent) not in markdown and str(BACKBONE) not in markdown
    index = yaml.safe_load(markdown.split("```yaml\n")[1].split("```")[0])["model-index"][0]
    assert index["name"] == "synthetic-backbone"
    first = index["results"][0]
    assert first["task"]["type"] == "text-to-image-person-retrieval" and first["dataset"]["split"] == "test"
    assert first["metrics"][0]["value"] == pytest.approx(content["rank1"], abs=1e-3)
    assert all((tmp_path / name).is_file() for name in ("rankings.png", "matching_curve.png"))


def test_kept_embeddings_are_read_only_for_the_same_weights_and_the_same_split(benchmark, tmp_path, monkeypatch):
    common = ("--dataset", "synthetic_pedes", "--data_dir", benchmark, "--cache_dir", tmp_path / "cache")
    run("--model", BACKBONE, *common, "--output_dir", tmp_path / "first")
    run("--model", BACKBONE, *common, "--split", "validation", "--output_dir", tmp_path / "val")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    changed = ECCLModel.from_pretrained(BACKBONE)
    with torch.no_grad():
        changed.text_projection.weight.mul_(torch.rand(changed.text_projection.weight.shape))
    changed.save_pretrained(tmp_path / "changed")
    ECCLProcessor.from_pretrained(BACKBONE).save_pretrained(tmp_path / "changed")
    monkeypatch.setattr(scoring, "embed_split", lambda *_, **__: pytest.fail("it was encoded again"))
    run("--model", BACKBONE, *common, "--output_dir", tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second"))
    assert first == second
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        run("--model", tmp_path / "changed", *common)


def test_an_adapter_and_a_plain_clip_are_scored_too(benchmark, tmp_path, capsys):
    torch.manual_seed(0)
    model = attach_lora(ECCLModel.from_clip(BACKBONE, (96, 32), num_prompt_tokens=2, prompt_depth=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    save_adapter(model, tmp_path / "adapter", BACKBONE)
    merged = merge_lora(model)
    merged.save_pretrained(tmp_path / "merged")
    processor = ECCLProcessor.for_model(merged.config, CLIPTokenizer.from_pretrained(BACKBONE))
    processor.save_pretrained(tmp_path / "merged")
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text, vision = {"vocab_size": len(tokenizer)} | special | shape, shape | {"image_size": 32, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    models = [word for name in ("adapter", "merged", "clip") for word in ("--model", tmp_path / name)]
    common = (
        "--dataset",
        "synthetic_pedes",
        "--data_dir",
        benchmark,
        "--split",
        "val",
        "--output_dir",
        tmp_path / "out",
    )
    run(*models, *common)
    adapter, whole, plain = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert adapter["metrics"] == whole["metrics"] != plain["metrics"]
    assert load_model(str(tmp_path / "clip"))[0].config.vision_config.image_size == [384, 128]


def fails_with(capsys, command, words, message):
    """Runs a command that must end with one line on stderr and status 2; returns everything else on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        command([str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert raised.value.code == 2 and len(errors) == 1 and message in errors[0] and lines[-1] == errors[0]
    return lines[:-1]


@pytest.fixture
def no_work(monkeypatch):
    """Makes loading a model or a data set fail: the mistake must be found before."""
    for name in ("load_model", "load_benchmarks"):
        monkeypatch.setattr(scoring, name, lambda *_, **__: pytest.fail("the work has begun"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--dataset", "cuhk_pedes", "--dataset", "rstpreid", "--data_dir", "x"],
            "there are 2 --dataset and 1 --data_dir: give one --data_dir for each --dataset",
        ),
        (
            ["--dataset", "cuhk_pedes", "--data_dir", "x", "--rerank", "--direction", "image_to_text"],
            "--rerank only applies to text_to_image",
        ),
        (["--dataset", "cuhk_pedes", "--data_dir", "x", "--batch_size", "0"], "--batch_size: 0 is too small"),
        (["--dataset", "cuhk_pedes", "--data_dir", "x", "--batch_size", "many"], "'many' is not a whole number"),
        (["--dataset", "cuhk_pedes", "--data_dir", "x", "--num_workers", "-1"], "--num_workers: -1 is too small"),
        (
            [*(2 * ["--dataset", "cuhk_pedes", "--data_dir", "x"]), "--before", "results.json"],
            "--before shows one earlier evaluation, but there are 2 --dataset",
        ),
        (["--dataset", "cuhk_peds", "--data_dir", "x"], "--dataset is 'cuhk_peds', it must be one of cuhk_pedes, icfg"),
    ],
)
def test_wrong_arguments_are_refused_before_the_work(words, message, capsys, no_work):
    fails_with(capsys, evaluate_eccl.main, ["--model", BACKBONE, *words], message)


def test_files_that_cannot_be_read_or_written_are_refused_before_the_work(tmp_path, capsys, no_work):
    common = ["--model", BACKBONE, "--dataset", "cuhk_pedes", "--data_dir", "x"]
    file = tmp_path / "file"
    file.write_text("[]")
    for option in ("--output_dir", "--cache_dir"):
        fails_with(capsys, evaluate_eccl.main, [*common, option, file], f"{file} cannot be a folder: {file} is a file")
        fails_with(capsys, evaluate_eccl.main, [*common, option, file / "a" / "b"], f"cannot be a folder: {file} is a")
    fails_with(capsys, evaluate_eccl.main, [*common, "--before", tmp_path / "none.json"], f"{tmp_path / 'none.json'}")
    figures = {"rank1": 1, "rank5": 1.5, "rank10": 2, "mAP": 3, "mINP": 4}
    for content, message in (
        ("{", "which is not a results.json of an evaluation: "),
        ("[]", "in which rank1 is None: it must be a number"),
        (json.dumps(figures | {"mAP": "3"}), "in which mAP is '3'"),
        (json.dumps(figures | {"mINP": True}), "in which mINP is True"),
        (json.dumps(figures | {"rank5": float("nan")}), "in which rank5 is nan"),
    ):
        file.write_text(content)
        fails_with(capsys, evaluate_eccl.main, [*common, "--before", file], f"--before is {file}, ")
        fails_with(capsys, evaluate_eccl.main, [*common, "--before", file], message)
    file.write_text(json.dumps(figures | {"results": []}))
    assert evaluate_eccl.read_before(file) == figures


@pytest.mark.parametrize(
    ("model", "data_dir", "split", "message"),
    [
        ("nowhere/at/all", None, "test", "error: nowhere/at/all is not the folder of a model, nor can it be read from"),
        (BACKBONE, "/nowhere", "test", "error: no reid_raw.json or ICFG-PEDES.json or data_captions.json in /nowhere"),
        (BACKBONE, None, "tset", "error: Unknown split"),
        (BACKBONE, None, "test[:0]", 'error: Instruction "test[:0]" corresponds to no data'),
    ],
)
def test_a_name_that_does_not_exist_is_reported_before_a_model_is_loaded(
    benchmark, model, data_dir, split, message, capsys, monkeypatch
):
    monkeypatch.setattr(scoring, "load_model", lambda *_: pytest.fail("a model is loaded"))
    words = ["--model", model, "--dataset", "synthetic_pedes", "--data_dir", data_dir or benchmark, "--split", split]
    fails_with(capsys, evaluate_eccl.main, words, message)


def test_a_part_of_a_split_of_a_synthetic_set_is_scored_without_an_oracle(benchmark, tmp_path, capsys):
    common = ("--model", BACKBONE, "--dataset", "synthetic_pedes", "--data_dir", benchmark)
    run(*common, "--split", "test[:3]", "--output_dir", tmp_path / "part")
    assert "| oracle " not in capsys.readouterr().out
    content = json.loads((tmp_path / "part" / "results.json").read_text())
    assert "oracle_rank1" not in content and content["results"][0]["gallery"] == 3
    oracle = json.loads((benchmark / "synthetic.json").read_text())["oracle_rank1"]["test"]
    run(*common, "--output_dir", tmp_path / "whole")
    assert f"| {oracle:6.2f} |      - |" in capsys.readouterr().out
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["oracle_rank1"] == oracle


def test_the_oracle_is_found_next_to_the_annotation_wherever_that_is(benchmark, tmp_path, capsys):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "CUHK-PEDES").symlink_to(benchmark)
    run("--model", BACKBONE, "--dataset", "cuhk_pedes", "--data_dir", tmp_path / "parent", "--split", "val")
    assert "| oracle " in capsys.readouterr().out
    (tmp_path / "synthetic.json").write_text('{"oracle_rank1": 3}')
    with pytest.raises(ValueError, match=r"synthetic.json is not the file of a synthetic benchmark: it has no oracle"):
        scoring.read_oracle(tmp_path, "test")
    assert scoring.read_oracle(tmp_path / "parent", "test") is None


def test_every_model_has_its_row_next_to_the_row_before(benchmark, tmp_path, capsys):
    common = ("--dataset", "synthetic_pedes", "--data_dir", benchmark, "--split", "val")
    run("--model", BACKBONE, *common, "--output_dir", tmp_path / "before")
    models = [tmp_path / folder / "model" for folder in ("one", "two")]
    for model in models:
        model.parent.mkdir()
        model.symlink_to(BACKBONE)
    capsys.readouterr()
    words = [word for model in models for word in ("--model", model)]
    run(*words, *common, "--before", tmp_path / "before" / "results.json", "--output_dir", tmp_path / "after")
    methods = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert methods[2:] == ["before", *map(str, models), "oracle"]


def test_curves_have_different_labels():
    names = ["a/model", "b/model", "b/other", "b/other", "."]
    assert scoring.shorten_names(names) == {"a/model": "a/model", "b/model": "b/model", "b/other": "other", ".": "."}

    def label(*sources):
        return scoring.label_benchmarks([scoring.Benchmark(*source, "test", None, [], None) for source in sources])

    assert label(("cuhk_pedes", "x")) == [""]
    assert label(("cuhk_pedes", "x"), ("rstpreid", "y")) == [" on x", " on y"]
    assert label(("cuhk_pedes", "x"), ("rstpreid", "x")) == [" on cuhk_pedes in x", " on rstpreid in x"]


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit) as raised:
        evaluate_eccl.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0
    assert all(name in printed for name in BENCHMARKS)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(benchmark, tmp_path):
    figures = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        command = launch_command(
            processes, "eval/evaluate_eccl.py", "--model", BACKBONE, "--dataset", "synthetic_pedes",
            "--data_dir", benchmark, "--rerank", "--direction", "both", "--batch_size", 5, "--output_dir", output,
            "--cache_dir", output / "cache",
        )  # fmt: skip
        # In another folder, because the file is started by its path.
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("synthetic-backbone (re-ranked)") == 1
        figures.append(json.loads((output / "results.json").read_text()))
    assert figures[0] == figures[1]


# -- Re-ranking


def test_reranking_equals_sets_of_neighbours():
    generator = torch.Generator().manual_seed(0)
    texts, images = (unit_rows(torch.randn(size, 5, generator=generator)) for size in (7, 9))
    blocks = list(reranking.rerank_blocks(texts, images, num_neighbours=3, weight=0.4, block_size=2))
    assert [len(block) for block in blocks] == [2, 2, 2, 1]
    ours = torch.cat(blocks)
    neighbours = [set((image @ images.T).topk(3).indices.tolist()) for image in images]
    for text, row in zip(texts, ours, strict=True):
        similarities = text @ images.T
        best = set(similarities.topk(3).indices.tolist())
        for image in range(9):
            jaccard = len(best & neighbours[image]) / len(best | neighbours[image])
            assert row[image].item() == pytest.approx(similarities[image].item() + 0.4 * jaccard, abs=1e-6)
    torch.testing.assert_close(torch.cat(list(reranking.rerank_blocks(texts, images, weight=0.0))), texts @ images.T)
    assert next(reranking.rerank_blocks(texts, images, num_neighbours=50)).shape == (7, 9)
    with pytest.raises(ValueError, match="num_neighbours is 0"):
        next(reranking.rerank_blocks(texts, images, num_neighbours=0))


# -- Pictures


def test_queries_are_chosen_from_both_ends_and_at_random():
    precisions = np.linspace(0, 100, 20)[::-1]
    chosen = pictures.choose_queries(precisions, each=3)
    assert chosen["best"] == [0, 1, 2] and chosen["worst"] == [19, 18, 17]
    assert len(set(chosen["random"]) - set(range(3)) - set(range(17, 20))) == 3
    assert chosen == pictures.choose_queries(precisions, each=3)
    for count in (1, 2, 3, 4):
        few = pictures.choose_queries(np.arange(count, dtype=float))
        chosen = [query for queries in few.values() for query in queries]
        assert sorted(set(chosen)) == sorted(chosen) and few["best"] == [count - 1]


def test_matching_curves_rise_from_left_to_right():
    ranks = np.array([1, 1, 3, 30, 60])
    sheet = np.asarray(pictures.draw_matching_curves({"one": ranks, "two": np.array([1] * 5)}).convert("RGB"), int)
    blue = np.argwhere(abs(sheet[:440] - np.array([31, 97, 181])).sum(axis=2) < 60)
    heights = [blue[blue[:, 1] == column][:, 0].mean() for column in (64, 200, 600)]
    assert heights[0] > heights[1] > heights[2]


def test_a_table_has_a_dash_for_a_missing_figure():
    table = reports.format_table({"a": {"rank1": 100.0, "mAP": 3.14159}, "longer": {}}).splitlines()
    assert table[2] == "| a      | 100.00 |      - |       - |   3.14 |      - |"
    assert len({len(line) for line in table}) == 1


# -- Heat maps


def test_a_phrase_is_found_as_whole_words_before_parts_of_words():
    for sentence, phrase, before in (
        ("A man  in a Red\ncoat and red shoes.", "red coat", "a man in a "),
        ("A woman and a man.", "MAN", "a woman and a "),
        ("A man in a t-shirt and a shirt, red", "shirt", "a man in a t-shirt and a "),
        ("a coat, and a coat.", "coat.", "a coat, and a "),
        ("a coat, a hat", "coat, a", "a "),
        ("a woman", "man", "a wo"),
        ("a red coat", "ed co", "a r"),
    ):
        cleaned, start, stop = heat_map.locate_phrase(sentence, phrase)
        assert cleaned == " ".join(sentence.lower().split())
        assert (cleaned[:start], cleaned[start:stop]) == (before, phrase.lower())
    for phrase in ("blue", " ", "", "."):
        with pytest.raises(ValueError, match=f"the phrase {phrase!r} is not in the sentence 'a red coat'"):
            heat_map.locate_phrase("a red coat", phrase)


def test_a_heat_map_adds_the_maps_of_the_words(benchmark, tmp_path, capsys):
    file = next((benchmark / "imgs").rglob("*.jpg"))
    sentence = "A person in a red coat,  and Blue jeans."
    heat_map.main(
        [
            *("--model", BACKBONE, "--image", str(file), "--sentence", sentence, "--phrase", "blue jeans"),
            *("--output", str(tmp_path / "heat.png")),
        ]
    )
    printed = capsys.readouterr().out
    model, processor = load_model(BACKBONE)
    image = Image.open(file)
    explanation = explain(model, processor, image, sentence)
    assert explanation.words[4:] == ["red", "coat,", "and", "blue", "jeans."]
    for phrase, words in (
        ("blue jeans", (7, 8)),
        ("RED  coat", (4, 5)),
        ("person", (1,)),
        ("jeans.", (8,)),
        ("at, and b", (5, 6, 7)),
    ):
        scores = heat_map.patch_scores(model, processor, image, sentence, phrase)
        assert isinstance(scores, torch.Tensor) and scores.shape == (12, 4)
        expected = sum(explanation.scores[word] for word in words)
        assert np.allclose(scores, expected, atol=1e-6) and np.ptp(expected) > 0.05
    best = heat_map.patch_scores(model, processor, image, sentence, "blue jeans").argmax().item()
    assert f"best match for 'blue jeans': row {best // 4}, column {best % 4} of 12 x 4 patches, from 0" in printed
    assert Image.open(tmp_path / "heat.png").height > 480
    with pytest.raises(ValueError, match="the sentence has 92 tokens, start and end included, but the model reads 77"):
        heat_map.patch_scores(model, processor, image, "red " * 89 + "coat", "coat")


def test_a_heat_map_shows_the_place_of_a_phrase():
    """The garments are drawn, so their places are known."""
    model, processor = load_model(BACKBONE)
    hits = []
    for number in range(8):
        sample = draw_sample(number, 1, model.config.grid_size)
        for part in sample.parts:
            scores = heat_map.patch_scores(model, processor, sample.image, sample.text, part.phrase)
            hits.append(part.region.flat[scores.argmax()])
    # A map of cosines before pooling hits a quarter.
    assert len(hits) > 12 and np.mean(hits) > 0.6


def test_a_drawn_heat_map_is_orange_above_zero_and_blue_below():
    scores = torch.zeros(12, 4)
    scores[:3], scores[-3:] = 1.25, -0.5
    sheet = np.asarray(heat_map.draw_heat_map(Image.new("L", (40, 120), 128), scores, "a red coat"), dtype=int)
    grey = np.full(3, 128)
    top, left, width = len(sheet) - 16 - 480, 16, 160
    plain, explained = (sheet[top : top + 480, start : start + width] for start in (left, 2 * left + width))
    assert (plain == grey).all() and (sheet[top - 1, left:200] == 255).all()
    assert explained[10, 80, 0] > explained[10, 80, 2] + 100 and explained[-10, 80, 2] > explained[-10, 80, 0] + 50
    assert abs(explained[240, 80] - grey).max() <= 1


def test_mistakes_are_reported_before_the_model_is_loaded(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model is loaded"))
    image = next((benchmark / "imgs").rglob("*.jpg"))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    common = {"--model": BACKBONE, "--image": image, "--sentence": "a red coat", "--phrase": "coat"}
    common["--output"] = tmp_path / "heat.png"
    for changes, message in (
        ({"--output": "heat.txt"}, "heat.txt does not end like a picture file: give a name that ends in .png or .jpg"),
        ({"--output": "heat"}, "heat does not end like a picture file"),
        ({"--output": tmp_path / "folder.png"}, "folder.png is a folder, not a picture file"),
        ({"--output": image / "heat.png"}, f"{image} cannot be a folder: {image} is a file"),
        ({"--image": tmp_path / "none.jpg"}, f"--image is {tmp_path / 'none.jpg'}, but there is no such file"),
        ({"--image": tmp_path / "broken.jpg"}, "broken.jpg cannot be read as an image"),
        ({"--phrase": "hat"}, "the phrase 'hat' is not in the sentence 'a red coat'"),
        ({"--phrase": " "}, "the phrase ' ' is not in the sentence"),
    ):
        words = [word for option in (common | changes).items() for word in option]
        fails_with(capsys, heat_map.main, words, message)
    assert not (tmp_path / "heat.png").exists()


# -- The report


def test_evaluation_writes_flat_results_with_before_and_oracle(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    shutil.copytree(root, tmp_path / "set")
    (tmp_path / "set" / "synthetic.json").write_text(json.dumps({"oracle_rank1": {"test": 97.5}}))
    arguments = ["--model", BACKBONE, "--dataset", "cuhk_pedes", "--data_dir", str(tmp_path / "set")]
    evaluate_eccl.main([*arguments, "--output_dir", str(tmp_path / "before")])
    before = json.loads((tmp_path / "before" / "results.json").read_text())
    # One image in the test split: whatever is asked, it is found.
    assert [result["queries"] for result in before.pop("results")] == [2]
    assert before == {"rank1": 100, "rank5": 100, "rank10": 100, "mAP": 100, "mINP": 100, "oracle_rank1": 97.5}
    evaluate_eccl.main(
        [*arguments, "--before", str(tmp_path / "before" / "results.json"), "--output_dir", str(tmp_path / "after")]
    )
    after = json.loads((tmp_path / "after" / "results.json").read_text())
    assert after["before"] == {name: 100 for name in ("rank1", "rank5", "rank10", "mAP", "mINP")}
    assert (tmp_path / "after" / "rankings.png").is_file()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    methods = [line.split("|")[1].strip() for line in table]
    assert methods[methods.index("before") :][:3] == ["before", "after", "oracle"]


def test_a_damaged_file_of_cached_embeddings_is_named_and_made_anew(benchmark, tmp_path, capsys):
    words = ("--model", BACKBONE, "--dataset", "synthetic_pedes", "--data_dir", benchmark, "--cache_dir", tmp_path)
    run(*words)
    table = capsys.readouterr().out
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (b"", whole[:50], b"{}" * 200):
        file.write_bytes(damaged)
        run(*words)
        streams = capsys.readouterr()
        assert streams.out == table and f"{file} cannot be read, so the split is encoded again" in streams.err
        assert file.read_bytes() == whole


def test_a_second_model_that_is_not_whole_is_refused_before_the_first_is_scored(
    benchmark, tmp_path, capsys, monkeypatch
):
    model = ECCLModel.from_pretrained(BACKBONE)
    with torch.no_grad():
        model.text_projection.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    load_tokenizer(BACKBONE).save_pretrained(tmp_path / "bad")
    monkeypatch.setattr(scoring, "embed_split", lambda *_, **__: pytest.fail("a model is scored"))
    words = ["--model", BACKBONE, "--model", tmp_path / "bad", "--dataset", "synthetic_pedes", "--data_dir", benchmark]
    fails_with(capsys, evaluate_eccl.main, words, "NaN or infinite values: text_projection.weight")
