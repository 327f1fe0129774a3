"""The search page in a real browser: Chromium, driven by Playwright.

ECCL_SCREENSHOTS=docs python -m pytest tests/search/test_browser.py -k screenshots

draws the pictures of docs/search.md.
"""

import http.client
import os
import re
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from app_helpers import HOSTILE_CAMERA, HOSTILE_NOTE, PICTURES, draw_person, encode_jpeg, make_gallery, served

from eccl.search.app import Settings, make_app
from helpers import ROOT, wait_until

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing: apt-get install chromium"),
]
expect = playwright.expect
SENTENCE = "a woman in a red coat"
LIMITS = Settings(requests_per_minute=1_000_000, most_pixels=10_000, largest_upload=50_000)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, backbone):
    with make_gallery(tmp_path_factory.mktemp("gallery"), backbone) as gallery:
        yield gallery


@pytest.fixture(scope="module")
def url(gallery, tmp_path_factory):
    """The address of the page. At the end, Gradio must have left no file."""
    folder = tmp_path_factory.mktemp("gradio")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    with served(make_app(gallery, LIMITS)) as url:
        yield url
    del os.environ["GRADIO_TEMP_DIR"]
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=30_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens pages of separate users; at the end, none may have asked another host, or broken a script."""
    contexts, asked, broken = [], [], []

    def visit(address: str, width: int = 1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(address)
        expect(page.get_by_label("Describe the person")).to_be_visible()
        return page

    yield visit
    hosts = {urlsplit(address).hostname for address in asked if urlsplit(address).scheme not in ("data", "blob")}
    for context in contexts:
        context.close()
    assert hosts == {"127.0.0.1"} and broken == []


def search(page, sentence: str = SENTENCE) -> None:
    page.get_by_label("Describe the person").fill(sentence)
    page.get_by_role("button", name="Search").click()


def status(page):
    return page.locator("#status [role=status]")


def cards(page):
    return page.locator(".cards li")


def ids(page) -> list[str]:
    return page.locator(".cards img").evaluate_all("images => images.map(image => image.src.split('/').pop())")


def open_filters(page) -> None:
    page.get_by_role("button", name="Filters and order").click()
    expect(page.get_by_label("Not like this")).to_be_visible()


def is_drawn(picture) -> bool:
    return picture.evaluate("image => image.complete && image.naturalWidth > 0")


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_sentence_finds_pictures(visit, url, gallery):
    page = visit(url)
    search(page)
    expect(status(page)).to_have_text(f"Results 1 to 20 for “{SENTENCE}”.")
    assert ids(page) == [match.id for match in gallery.search(SENTENCE, 20)]
    wait_until(lambda: is_drawn(page.locator(".cards img").first))
    page.get_by_role("button", name="Next page").click()
    expect(status(page)).to_contain_text("Results 21 to 30")
    assert ids(page) == [match.id for match in gallery.search(SENTENCE, 20, offset=20)]
    page.get_by_role("button", name="Previous page").click()
    expect(status(page)).to_contain_text("Results 1 to 20")
    expect(page.locator("#timeline [role=img]")).to_have_count(2)
    with page.expect_download() as download:
        page.get_by_role("link", name="Save as CSV").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert len(lines) == 1 + PICTURES and lines[0].startswith("rank,id,score,name,camera,")


def test_filters_and_the_link_that_restores_them(visit, url, gallery):
    page = visit(url)
    open_filters(page)
    page.get_by_label("From (UTC)").fill("2026-05-01 09:00")
    page.get_by_label("Until (UTC)").fill("2026-05-01 12:00")
    page.get_by_label("Cameras (none: all)").click()
    page.get_by_role("option", name="north").click()
    page.keyboard.press("Escape")
    page.get_by_label("Column", exact=True).click()
    page.get_by_role("option", name="floor").click()
    page.get_by_label("Value of the column").fill("0")
    page.get_by_label("Only the best picture of each tracklet").check()
    page.get_by_label("time", exact=True).check()
    search(page)
    words = ", cameras north, from 2026-05-01 09:00 until 2026-05-01 12:00, floor = 0, one of each tracklet, by time"
    expect(status(page)).to_contain_text(words)
    found = gallery.get(ids(page))
    # Pictures 6 to 23 are of these hours; those with even numbers are of this camera, every third is of this floor.
    assert sorted(match.path[-6:-4] for match in found.values()) == ["06", "12", "18"]
    assert ids(page) == sorted(found, key=lambda id: found[id].columns["time"])
    link = page.get_by_role("link", name="Link to this search").get_attribute("href")
    other = visit(url + "/" + link)
    expect(status(other)).to_contain_text(words)
    assert ids(other) == ids(page)
    expect(other.get_by_label("Describe the person")).to_have_value(SENTENCE)
    open_filters(other)
    expect(other.get_by_label("Value of the column")).to_have_value("0")
    expect(other.get_by_label("Only the best picture of each tracklet")).to_be_checked()
    wrong = visit(url + "/?sentence=a&top_k=many")
    expect(status(wrong)).to_have_text("Not done: top_k is 'many', it must be a number")


def test_details_show_the_heat_map_of_chosen_words(visit, url):
    page = visit(url)
    search(page)
    page.get_by_role("button", name="Details").nth(1).click()
    heading = page.locator("#details h2")
    expect(heading).to_be_focused()
    heat = page.locator("#details img[data-heat]")
    wait_until(lambda: is_drawn(heat))
    expect(page.locator("#details meter")).to_have_count(6)
    whole = heat.get_attribute("src")
    page.get_by_label("red").check()
    page.get_by_label("coat").check()
    expect(page.get_by_alt_text("Heat map of red coat")).to_be_visible()
    assert heat.get_attribute("src") == whole + "&words=4,5"
    wait_until(lambda: is_drawn(heat))
    # Another result starts with the whole sentence again.
    page.get_by_role("button", name="Details").nth(2).click()
    expect(page.get_by_alt_text("Heat map of the whole sentence")).to_be_visible()
    expect(page.get_by_label("coat")).not_to_be_checked()
    assert heat.get_attribute("src") != whole
    page.get_by_role("button", name="Close").click()
    expect(heading).to_have_count(0)
    expect(cards(page)).to_have_count(20)


def test_marks_move_the_results_of_one_user_only(visit, url, gallery):
    page, other = visit(url), visit(url)
    search(page)
    search(other, "a man with a backpack")
    expect(cards(page)).to_have_count(20)
    expect(cards(other)).to_have_count(20)
    first = ids(page)
    page.get_by_role("button", name="More like this").nth(19).click()
    expect(status(page)).to_contain_text("more like 1")
    assert ids(page) == [match.id for match in gallery.refine(SENTENCE, [first[19]], top_k=20)] != first
    page.get_by_role("button", name="Less like this").nth(5).click()
    expect(status(page)).to_contain_text("less like 1")
    pressed = page.locator("button[aria-pressed=true][data-action=like]")
    assert pressed.get_attribute("data-id") == first[19]
    pressed.click()
    expect(status(page)).not_to_contain_text("more like")
    other.get_by_role("button", name="Next page").click()
    expect(status(other)).to_have_text("Results 21 to 30 for “a man with a backpack”. These are all.")


def test_a_mistake_is_told_and_the_old_results_stay(visit, url, gallery, monkeypatch):
    page = visit(url)
    search(page)
    expect(cards(page)).to_have_count(20)
    before = ids(page)
    search(page, "")
    expect(status(page)).to_have_text("Not done: the query is empty: write a sentence, or choose a picture")
    search(page, "x" * 10_000)
    expect(status(page)).to_have_text("Not done: sentence has 10,000 characters, at most 1,000 are read")
    search(page, "<b onclick='x()'>" * 5 + "x" * 1_000)
    expect(status(page)).to_contain_text("sentence has 1,085 characters")

    def fail(*_, **__):
        raise ConnectionError("the server does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "search", fail)
        search(page)
        expect(status(page)).to_have_text("Not done: the gallery does not answer: try again later")
    assert ids(page) == before
    with monkeypatch.context() as patch:
        patch.setattr(gallery, "threshold", 0.999)
        search(page)
        expect(status(page)).to_contain_text("Nobody fits for")
    expect(cards(page)).to_have_count(0)


def test_a_picture_is_a_query(visit, url):
    page = visit(url)
    chooser, told = page.locator("#picture input"), page.locator("#picture [role=status]")

    def choose(content: bytes) -> None:
        chooser.set_input_files({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": content})

    choose(b"no picture")
    expect(told).to_contain_text("Not done: the file is not a picture")
    choose(encode_jpeg(draw_person(3).resize((200, 100))))
    expect(told).to_have_text("Not done: the picture has 20,000 pixels, at most 10,000 are read")
    choose(b"x" * 60_000)
    expect(told).to_have_text("Not done: the request has 60,000 bytes, at most 50,000 are read")
    choose(encode_jpeg(draw_person(3)))
    expect(told).to_have_text("The picture takes part in the search.")
    page.get_by_role("button", name="Search").click()
    expect(cards(page).first).to_contain_text("1.000")
    page.get_by_role("button", name="Details").first.click()
    expect(page.locator("#details h2")).to_have_text("person 03.jpg")
    expect(page.locator("#details")).to_contain_text("A heat map needs a sentence.")
    page.get_by_role("button", name="Remove the picture").click()
    page.get_by_role("button", name="Search").click()
    expect(status(page)).to_contain_text("the query is empty")


def test_a_full_queue_is_told_in_words(visit, gallery, monkeypatch):
    go, started, real = threading.Event(), [], gallery.search

    def wait(*values, **options):
        started.append(1)
        assert go.wait(120)
        return real(*values, **options)

    with served(make_app(gallery, replace(LIMITS, workers=1, waiting=1))) as address:
        pages = [visit(address) for _ in range(3)]
        search(pages[2])
        expect(cards(pages[2])).to_have_count(20)
        monkeypatch.setattr(gallery, "search", wait)
        search(pages[0], "a first user")
        wait_until(lambda: started)
        search(pages[1], "a second user")
        pages[1].wait_for_timeout(1_000)
        search(pages[2], "a third user")
        expect(status(pages[2])).to_have_text("Not done: too many searches are waiting: try again in a few seconds")
        expect(cards(pages[2])).to_have_count(20)
        go.set()
        expect(status(pages[0])).to_contain_text("a first user")
        expect(status(pages[1])).to_contain_text("a second user")


def test_the_keyboard_is_enough(visit, url):
    page = visit(url)

    def tab_to(element, most: int) -> None:
        for _ in range(most):
            if element.evaluate("element => element === document.activeElement"):
                return
            page.keyboard.press("Tab")
        raise AssertionError("the element cannot be reached")

    tab_to(page.get_by_label("Describe the person"), 5)
    page.keyboard.type(SENTENCE)
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(20)
    tab_to(page.get_by_role("button", name="Details").first, 15)
    page.keyboard.press("Enter")
    expect(page.locator("#details h2")).to_be_focused()
    tab_to(page.get_by_label("red"), 10)
    page.keyboard.press("Space")
    expect(page.get_by_alt_text("Heat map of red")).to_be_visible()
    tab_to(page.get_by_role("button", name="Less like this").first, 20)
    page.keyboard.press("Space")
    expect(status(page)).to_contain_text("less like 1")


def test_every_control_has_a_name_and_results_are_announced(visit, url):
    page = visit(url)
    open_filters(page)
    search(page)
    page.get_by_role("button", name="Details").first.click()
    expect(page.locator("#details h2")).to_be_focused()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button, img')]
        .filter(each => each.checkVisibility() && !(each.labels?.length || each.ariaLabel || each.alt || each.title
            || each.innerText?.trim() || each.getAttribute('aria-labelledby')))
        .map(each => each.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    expect(page.get_by_role("status").filter(has_text="Results 1 to 20")).to_have_count(1)
    names = page.get_by_role("group").evaluate_all("groups => groups.map(group => group.ariaLabel)")
    assert any(re.fullmatch(r"Result 1, score -?\d\.\d{3}, camera .*, 2026-.* UTC", name or "") for name in names)


def test_a_small_screen_does_not_scroll_sideways(visit, url):
    page = visit(url, width=360)
    assert fits(page)
    search(page)
    expect(cards(page)).to_have_count(20)
    assert fits(page)
    page.get_by_role("button", name="Details").nth(1).click()
    expect(page.locator("#details h2")).to_be_focused()
    open_filters(page)
    search(page, "x" * 10_000)
    expect(status(page)).to_contain_text("10,000 characters")
    assert fits(page)


def test_a_script_in_a_name_is_text(visit, url):
    page = visit(url)
    hostile = "<b onclick='x()'>a woman</b> ${alert(1)} {{x}}"
    search(page, hostile)
    expect(status(page)).to_contain_text(hostile)
    expect(page.locator(".cards").get_by_text(HOSTILE_CAMERA).first).to_be_visible()
    expect(page.locator("#timeline").get_by_text(HOSTILE_CAMERA)).to_be_visible()
    place = page.locator(".cards li", has_text=HOSTILE_CAMERA).first
    place.get_by_role("button", name="Details").click()
    expect(page.locator("#details").get_by_text(HOSTILE_NOTE)).to_be_visible()
    open_filters(page)
    page.get_by_label("Cameras (none: all)").click()
    page.get_by_role("option", name=HOSTILE_CAMERA).click()
    search(page, hostile)
    expect(status(page)).to_contain_text(f"cameras {HOSTILE_CAMERA}")
    visit(url + "/?sentence=a&cameras=" + HOSTILE_CAMERA.replace("<", "%3C"))
    assert page.title() == "Person search"


@pytest.mark.parametrize(
    "path",
    [
        "/crop/../../etc/passwd",
        "/crop/..%2f..%2fetc%2fpasswd",
        "/assets/../../../etc/passwd",
        "/static/..%2f..%2froutes.py",
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "//etc/passwd",
        "/assets/..\\..\\routes.py",
    ],
)
def test_no_file_outside_the_gallery_is_served(url, path):
    # This client sends a path as it is; a browser would resolve the dots.
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 404 and b"root:" not in content and b"import " not in content


@pytest.mark.skipif("ECCL_SCREENSHOTS" not in os.environ, reason="ECCL_SCREENSHOTS names no folder for them")
def test_screenshots(visit, tmp_path):
    from eccl.dataset_scripts.synthetic.__main__ import main as draw_benchmark
    from eccl.hub.loading import load_model
    from eccl.search.gallery import Gallery, Picture

    folder = Path(os.environ["ECCL_SCREENSHOTS"])
    draw_benchmark(["--layout", "cuhk_pedes", "--domain", "target", "--output_dir", str(tmp_path / "data")])
    files = sorted(file for file in (tmp_path / "data" / "imgs").rglob("*") if file.is_file())
    start = datetime(2026, 5, 1, 8, tzinfo=UTC)
    sentence = "A woman in a red coat and blue jeans with a black backpack"
    with Gallery.open(*load_model(str(ROOT / "assets" / "synthetic-backbone")), tmp_path / "gallery.db") as gallery:
        times = (start + timedelta(seconds=20 * row) for row in range(len(files)))
        pictures = [
            Picture(file, {"camera": file.parent.name, "time": time, "tracklet": file.stem.split("_")[0]})
            for file, time in zip(files, times, strict=True)
        ]
        gallery.add(pictures, progress=False)
        with served(make_app(gallery, LIMITS)) as url:
            for name, width in (("page", 1200), ("phone", 360)):
                page = visit(url, width=width)
                search(page, sentence)
                expect(cards(page)).to_have_count(20)
                for picture in page.locator(".cards img").all():
                    picture.scroll_into_view_if_needed()
                    wait_until(lambda picture=picture: is_drawn(picture))
                page.evaluate("window.scrollTo(0, 0)")
                page.screenshot(path=folder / f"search_{name}.jpg", type="jpeg", quality=75)
                if width == 1200:
                    page.get_by_role("button", name="Details").first.click()
                    page.get_by_label("red").check()
                    page.get_by_label("coat").check()
                    heat = page.locator("#details img[data-heat]")
                    page.wait_for_timeout(1_000)
                    wait_until(lambda heat=heat: is_drawn(heat))
                    page.locator("#details h2").scroll_into_view_if_needed()
                    page.screenshot(path=folder / "search_heat_map.jpg", type="jpeg", quality=75)
    for name in ("page", "phone", "heat_map"):
        assert 10_000 < (folder / f"search_{name}.jpg").stat().st_size < 200_000
