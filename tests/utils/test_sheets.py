from PIL import Image

from eccl.utils.sheets import draw_ranked_images


def test_frames_tell_right_from_wrong(tmp_path):
    Image.new("RGB", (10, 30), "white").save(tmp_path / "a.png")
    sheet = draw_ranked_images([("a query", [(tmp_path / "a.png", True), (tmp_path / "a.png", False)])], height=90)
    colours = {colour for _, colour in sheet.getcolors(100000)}
    assert (20, 160, 60) in colours and (210, 40, 40) in colours
