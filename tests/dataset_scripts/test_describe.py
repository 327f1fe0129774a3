import datasets
import numpy as np
import pytest
from PIL import Image

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.dataset_scripts import describe
from eccl.dataset_scripts.annotations import SplitSize
from eccl.utils.sheets import draw_contact_sheet
from helpers import clip_tokenizer


def run(root, *more):
    describe.main(["cuhk_pedes", "--data_dir", str(root), *map(str, more)])


def read_error(capsys, root, *more):
    """Runs the command, which must fail with one line on stderr, and returns this line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(root, *more)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err[captured.err.index("error: ") :]


def test_it_prints_all_sizes(make_raw, tmp_path, capsys, monkeypatch):
    root, _ = make_raw()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(root)
    printed = capsys.readouterr().out
    assert "| train | 3 | 4 | 8 | 11,003 ids, 34,054 images, 68,126 captions |" in printed
    # "a person in a coat number 0 ." and "someone walks by with a red bag ." have 8 tokens each; start and end are 2.
    assert "captions, in tokens of CLIP: 10 to 10, median 10, mean 10.0" in printed and "0 of 12 are longer" in printed
    assert "images, width x height: 33 to 128 x 77 to 384" in printed
    # A picture is written only if --output is given.
    assert list((tmp_path / "here").iterdir()) == [] and "picture" not in printed


def test_it_draws_a_contact_sheet_if_output_is_given(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    run(root, "--output", tmp_path / "sheet.png")
    assert f"picture: {tmp_path / 'sheet.png'}" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    # The colours of the images, and the black of the text.
    assert {(40, 215, 120), (0, 0, 0)} <= colours


def test_a_mistake_gives_one_line_and_no_picture(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    (root / "imgs" / "cam_a" / "1.png").write_bytes(b"no image")
    output = tmp_path / "sheet.png"
    assert "reid_raw.json: 1 problems" in read_error(capsys, root, "--output", output)
    assert not output.exists()
    with pytest.warns(UserWarning, match="1 unreadable images are left out"):
        run(root, "--output", output, "--on_bad_image", "skip")
    assert output.is_file()
    for name, reason in (("sheet.xyz", "sheet.xyz, it must end like a picture file"), ("no/a.png", "is not a folder")):
        assert reason in read_error(capsys, root, "--output", tmp_path / name)
    assert "error: " in read_error(capsys, root, "--tokenizer", tmp_path / "none")


def test_images_with_more_than_8_bits_are_reported(make_raw, capsys):
    root, _ = make_raw()
    Image.fromarray(np.full((20, 10), 4000, np.uint16)).save(root / "imgs" / "cam_a" / "1.png")
    run(root)
    assert "1 images have more than 8 bits per channel" in capsys.readouterr().out


def test_caption_lengths_are_counted_in_tokens():
    captions = ["a man", "a " * 200, "a red coat"]
    lengths = describe.caption_lengths(captions, clip_tokenizer())
    assert lengths == (4, 5, pytest.approx((4 + 5 + 202) / 3), 202, 202, 1)


def test_the_table_says_which_sizes_are_the_published_ones(make_raw):
    root, _ = make_raw()
    splits = datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    table = describe.size_table(splits, {"train": SplitSize(3, 4, 8), "val": SplitSize(9, 9, 9)}).splitlines()
    assert table[2:] == [
        "| train | 3 | 4 | 8 | the same |",
        "| val | 1 | 1 | 2 | 9 ids, 9 images, 9 captions |",
        "| test | 1 | 1 | 2 | not published |",
    ]


def test_the_seed_chooses_the_images_of_the_contact_sheet_and_any_image_fits(make_raw):
    root, _ = make_raw()
    dataset = datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train")
    wide = Image.new("L", (900, 30), 128)
    wide.save(root / "imgs" / "cam_a" / "wide.png")
    first, again, other = (draw_contact_sheet(dataset, 2, seed).tobytes() for seed in (0, 0, 3))
    assert first == again != other
    items = [{"image": wide, "person_id": 3, "captions": ["word " * 300]}]
    sheet = draw_contact_sheet(items)
    assert sheet.height > 1000
