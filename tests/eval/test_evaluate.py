import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.eval import evaluate_eccl, heat_map, pictures, reports, reranking
from eccl.hub.adapter import attach_lora, merge_lora, save_adapter
from eccl.hub.loading import load_model
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from eccl.training.losses import unit_rows
from helpers import ROOT

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


def test_models_on_benchmarks_in_both_directions_with_the_published_beside(
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
        gallery = unit_rows(model.get_image_features(processor(images=images, return_tensors="pt")["pixel_values"]))
        for record in records:
            for caption in record["captions"]:
                query = model.get_text_features(processor(text=caption, return_tensors="pt")["input_ids"])
                hits += records[int((gallery @ unit_rows(query)[0]).argmax())]["id"] == record["id"]
    assert content["results"][0]["metrics"]["rank1"] == content["rank1"] == pytest.approx(100 * hits / 72)
    assert f"cuhk_pedes in {benchmark}, split test, text to image: every caption of test queries every image" in printed
    assert "test has 12 ids, 36 images, 72 captions; published: 1,000 ids" in printed
    assert "| ECCL (published) " in printed and "|  77.17 |  90.64 |   94.39 |  69.81 |      - |" in printed
    assert printed.count("| IRRA (published)") == 2
    markdown = (tmp_path / "results.md").read_text()
    assert markdown.startswith(printed.split("written:")[0].strip()[:200])
    index = yaml.safe_load(markdown.split("```yaml\n")[1].split("```")[0])["model-index"][0]
    assert index["name"] == "synthetic-backbone"
    first = index["results"][0]
    assert first["task"]["type"] == "text-to-image-person-retrieval" and first["dataset"]["split"] == "test"
    assert first["metrics"][0]["value"] == pytest.approx(content["rank1"], abs=1e-3)
    assert all((tmp_path / name).is_file() for name in ("rankings.png", "matching_curve.png"))


def test_embeddings_are_kept_and_taken_for_the_same_weights_and_rows_alone(benchmark, tmp_path, monkeypatch):
    common = ("--dataset", "synthetic_pedes", "--data_dir", benchmark, "--cache_dir", tmp_path / "cache")
    run("--model", BACKBONE, *common, "--output_dir", tmp_path / "first")
    run("--model", BACKBONE, *common, "--split", "validation", "--output_dir", tmp_path / "val")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    changed = ECCLModel.from_pretrained(BACKBONE)
    with torch.no_grad():
        changed.text_projection.weight.mul_(torch.rand(changed.text_projection.weight.shape))
    changed.save_pretrained(tmp_path / "changed")
    ECCLProcessor.from_pretrained(BACKBONE).save_pretrained(tmp_path / "changed")
    monkeypatch.setattr(evaluate_eccl, "embed_split", lambda *_, **__: pytest.fail("it was encoded again"))
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "cuhk_pedes", "--dataset", "rstpreid", "--data_dir", "x"], "2 --dataset and 1 --data_dir"),
        (["--dataset", "cuhk_pedes", "--data_dir", "x", "--rerank", "--direction", "image_to_text"], "--rerank is of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        run("--model", BACKBONE, *words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "data_dir", "split", "message"),
    [
        ("nowhere/at/all", None, "test", "error: .*nowhere/at/all"),
        (BACKBONE, "/nowhere", "test", "error: no .* in /nowhere"),
        (BACKBONE, None, "tset", "error: Unknown split .tset"),
    ],
)
def test_names_that_are_none_are_said_in_a_line(benchmark, model, data_dir, split, message):
    with pytest.raises(SystemExit, match=message):
        run("--model", model, "--dataset", "synthetic_pedes", "--data_dir", data_dir or benchmark, "--split", split)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(benchmark, tmp_path):
    figures = []
    for processes in (1, 2):
        launch = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else [])]
        output = tmp_path / str(processes)
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(ROOT / "eval" / "evaluate_eccl.py")]
        arguments = ["--model", BACKBONE, "--dataset", "synthetic_pedes", "--data_dir", str(benchmark), "--rerank"]
        arguments += ["--direction", "both", "--batch_size", "5", "--output_dir", str(output)]
        arguments += ["--cache_dir", str(output / "cache")]
        # From elsewhere: the script is run by its path.
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
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
        named = [query for own in few.values() for query in own]
        assert sorted(set(named)) == sorted(named) and few["best"] == [count - 1]


def test_matching_curves_rise_from_left_to_right():
    ranks = np.array([1, 1, 3, 30, 60])
    sheet = np.asarray(pictures.draw_matching_curves({"one": ranks, "two": np.array([1] * 5)}).convert("RGB"), int)
    blue = np.argwhere(abs(sheet[:440] - np.array([31, 97, 181])).sum(axis=2) < 60)
    heights = [blue[blue[:, 1] == column][:, 0].mean() for column in (64, 200, 600)]
    assert heights[0] > heights[1] > heights[2]


def test_a_table_has_a_dash_where_nothing_is_known():
    table = reports.format_table({"a": {"rank1": 100.0, "mAP": 3.14159}, "longer": {}}).splitlines()
    assert table[2] == "| a      | 100.00 |      - |       - |   3.14 |      - |"
    assert len({len(line) for line in table}) == 1


# -- Heat maps


def test_the_tokens_of_a_phrase_are_found():
    processor = ECCLProcessor.from_pretrained(BACKBONE)
    ids, places = heat_map.find_phrase(processor, "A man  in a Red coat and red shoes.", "red coat")
    assert ids == processor(text="A man in a red coat and red shoes.")["input_ids"]
    assert processor.tokenizer.decode([ids[place] for place in places]).strip() == "red coat"
    _, places = heat_map.find_phrase(processor, "red", "red")
    assert places == [1]
    with pytest.raises(ValueError, match="'blue' is not in the sentence"):
        heat_map.find_phrase(processor, "a red coat", "blue")
    with pytest.raises(ValueError, match="is not in the sentence"):
        heat_map.find_phrase(processor, "a red coat", " ")
    processor.max_text_length = 8
    with pytest.raises(ValueError, match="past the 8 tokens"):
        heat_map.find_phrase(processor, "a man and a woman and a child in coats", "coats")


def test_a_heat_map_is_of_cosines_before_pooling(benchmark, tmp_path, capsys):
    image = next((benchmark / "imgs").rglob("*.jpg"))
    sentence = "a person in a red coat and blue jeans"
    heat_map.main(
        [
            *("--model", BACKBONE, "--image", str(image), "--sentence", sentence, "--phrase", "blue jeans"),
            *("--output", str(tmp_path / "heat.png")),
        ]
    )
    assert "'blue jeans' answers most to row" in capsys.readouterr().out
    assert Image.open(tmp_path / "heat.png").height > 480
    model, processor = load_model(BACKBONE)
    scores = heat_map.patch_scores(model, processor, Image.open(image), sentence, "blue jeans")
    ids, places = heat_map.find_phrase(processor, sentence, "blue jeans")
    pixels = processor(images=Image.open(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens, patches = model.get_token_features(torch.tensor([ids])), model.get_patch_features(pixels)
    assert scores.shape == patches.shape[1:3] == (6, 2)
    phrase = sum(tokens[0, place] / tokens[0, place].norm() for place in places)
    for row in range(6):
        for column in range(2):
            expected = torch.cosine_similarity(phrase, patches[0, row, column], dim=0)
            assert scores[row, column].item() == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(SystemExit, match="error: 'hat' is not in"):
        heat_map.main(["--model", BACKBONE, "--image", str(image), "--sentence", sentence, "--phrase", "hat"])


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
