import datasets
import numpy as np
import pytest
from PIL import Image

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.dataset_scripts import describe
from eccl.dataset_scripts.annotations import SplitSize
from eccl.utils.sheets import draw_contact_sheet
from helpers import clip_tokenizer


def test_it_prints_sizes_beside_the_published_and_draws_rows(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    describe.main(["cuhk_pedes", "--data_dir", str(root), "--sheet", str(tmp_path / "sheet.png")])
    printed = capsys.readouterr().out
    assert "| train | 3 | 4 | 8 | 11,003 ids, 34,054 images, 68,126 captions |" in printed
    # "a person in a coat number 0 ." and "someone walks by with a red bag ." are 8 tokens each, and two ends.
    assert "captions, in tokens of CLIP: 10 to 10, median 10, mean 10.0" in printed and "0 of 12 are longer" in printed
    assert "images, width x height: 33 to 128 x 77 to 384" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    # The rows' own colours, and black text.
    assert {(40, 215, 120), (0, 0, 0)} <= colours


def test_what_is_wrong_is_said_in_a_line_and_nothing_is_drawn(make_raw, tmp_path):
    root, _ = make_raw()
    (root / "imgs" / "cam_a" / "1.png").write_bytes(b"no image")
    arguments = ["cuhk_pedes", "--data_dir", str(root), "--sheet", str(tmp_path / "sheet.png")]
    with pytest.raises(SystemExit, match=r"error: .*reid_raw.json: 1 problems"):
        describe.main(arguments)
    assert not (tmp_path / "sheet.png").exists()
    with pytest.warns(UserWarning, match="1 unreadable images are left out"):
        describe.main([*arguments, "--on_bad_image", "skip"])
    assert (tmp_path / "sheet.png").is_file()
    for name in ("sheet.xyz", "nowhere/sheet.png"):
        with pytest.raises(SystemExit, match=r"error: .*(sheet.xyz|nowhere)"):
            describe.main([*arguments[:-1], str(tmp_path / name)])
    with pytest.raises(SystemExit, match="error: "):
        describe.main([*arguments, "--tokenizer", str(tmp_path / "none")])


def test_deep_images_are_remarked_on(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    Image.fromarray(np.full((20, 10), 4000, np.uint16)).save(root / "imgs" / "cam_a" / "1.png")
    describe.main(["cuhk_pedes", "--data_dir", str(root), "--sheet", str(tmp_path / "sheet.png")])
    assert "1 images have more than 8 bits a channel" in capsys.readouterr().out


def test_caption_lengths_are_those_of_a_list():
    captions = ["a man", "a " * 200, "a red coat"]
    lengths = describe.caption_lengths(captions, clip_tokenizer())
    assert lengths == (4, 5, pytest.approx((4 + 5 + 202) / 3), 202, 202, 1)


def test_a_table_says_where_sizes_agree(make_raw):
    root, _ = make_raw()
    splits = datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    table = describe.size_table(splits, {"train": SplitSize(3, 4, 8), "val": SplitSize(9, 9, 9)}).splitlines()
    assert table[2:] == [
        "| train | 3 | 4 | 8 | the same |",
        "| val | 1 | 1 | 2 | 9 ids, 9 images, 9 captions |",
        "| test | 1 | 1 | 2 | not published |",
    ]


def test_the_sheet_is_the_seeds_and_takes_any_picture(make_raw):
    root, _ = make_raw()
    rows = datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train")
    wide = Image.new("L", (900, 30), 128)
    wide.save(root / "imgs" / "cam_a" / "wide.png")
    first, again, other = (draw_contact_sheet(rows, 2, seed).tobytes() for seed in (0, 0, 3))
    assert first == again != other
    rows = [{"image": wide, "person_id": 3, "captions": ["word " * 300]}]
    sheet = draw_contact_sheet(rows)
    assert sheet.height > 1000
