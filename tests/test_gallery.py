import json
import shutil

import pytest
import torch
from PIL import Image

from eccl.eval import evaluate_eccl
from eccl.gallery_eccl import Gallery, draw_matches, load_model, main
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"


@pytest.fixture(scope="module")
def model():
    return load_model(str(BACKBONE))


def test_search_ranks_by_cosine(model, make_raw):
    root, records = make_raw()
    gallery = Gallery.from_folder(*model, root / "imgs")
    found = gallery.search("a person in a green coat", top_k=4)
    encoder, processor = model
    scores = {}
    for record in records:
        image = Image.open(root / "imgs" / record["file_path"])
        inputs = processor(images=image, text=["a person in a green coat"], return_tensors="pt")
        with torch.no_grad():
            output = encoder(**inputs)
        scores[record["file_path"]] = torch.cosine_similarity(output.text_embeds, output.image_embeds).item()
    expected = sorted(scores, key=scores.get, reverse=True)[:4]
    assert [str(match.path.relative_to(root / "imgs")) for match in found] == expected
    assert [match.score for match in found] == pytest.approx([scores[path] for path in expected], abs=1e-5)


def test_the_command_prints_and_draws_what_it_found(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    arguments = ["--model", str(BACKBONE), "--images", str(root), "--query", "a red coat", "--top_k", "2"]
    main([*arguments, "--output", str(tmp_path / "found.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '"a red coat" among 6 images:' and len(lines) == 4
    assert Image.open(tmp_path / "found.png").width > 100


def test_bad_input_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Gallery.from_folder(*model, tmp_path / "none")
    with pytest.raises(ValueError, match="holds no image"):
        Gallery.from_folder(*model, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.jpg cannot be read"):
        Gallery.from_folder(*model, tmp_path)
    Image.new("RGB", (5, 5)).save(tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match="sentence is empty"):
        Gallery.from_folder(*model, tmp_path).search("  ")


def test_frames_tell_right_from_wrong(tmp_path):
    Image.new("RGB", (10, 30), "white").save(tmp_path / "a.png")
    sheet = draw_matches([("a query", [(tmp_path / "a.png", True), (tmp_path / "a.png", False)])], height=90)
    colours = {colour for _, colour in sheet.getcolors(100000)}
    assert (20, 160, 60) in colours and (210, 40, 40) in colours


def test_evaluation_writes_flat_results_with_before_and_oracle(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    shutil.copytree(root, tmp_path / "set")
    (tmp_path / "set" / "synthetic.json").write_text(json.dumps({"oracle_rank1": {"test": 97.5}}))
    arguments = ["--model", str(BACKBONE), "--dataset", "cuhk_pedes", "--data_dir", str(tmp_path / "set")]
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
