"""The demo's page, used as a visitor uses it: a real browser, with a mouse, with keys only, and on a phone."""

import base64
import contextlib
import io
import os
import re
import shutil
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, TimeoutError, expect, sync_playwright

from ov_decidiffusion.demo.app import make_demo
from ov_decidiffusion.demo.sessions import Sessions
from ov_decidiffusion.generation.metadata import settings_of
from ov_decidiffusion.generation.presets import PRESETS
from training.oracle import read_picture

PROMPT = "a fox in the snow"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(__file__).parents[1] / "node_modules" / "axe-core" / "axe.min.js"
PICTURES = os.environ.get("DEMO_PICTURES")  # a folder for screenshots of every state
IN_CI = bool(os.environ.get("CI"))
pytestmark = pytest.mark.skipif(not BROWSER and not IN_CI, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@contextmanager
def visit(browser, demo, **options):
    """A visitor of their own, who sees no error in the console and no request to another host."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(demo.local_url)
    page.get_by_label("Prompt", exact=True).wait_for()
    page.wait_for_timeout(500)  # until the page has said hello
    yield page
    foreign = [url for url in asked if not url.startswith((demo.local_url, "data:", "blob:"))]
    context.close()
    assert not wrong and not foreign, (wrong, foreign)


@pytest.fixture
def page(browser, demo):
    with visit(browser, demo) as page:
        yield page


@pytest.fixture
def slow(int8_pipe, monkeypatch):
    """The same loop at ten steps a second at most; tells how many ran."""
    seen, denoise = [], type(int8_pipe).denoise

    def slowly(*arguments, **options):
        for step in denoise(int8_pipe, *arguments, **options):
            time.sleep(0.1)
            seen.append(step.index)
            yield step

    monkeypatch.setattr(int8_pipe, "denoise", slowly)
    return seen


def photograph(page: Page, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


def fill(page: Page, label: str, value) -> None:
    name = label if label in ("Prompt", "Negative prompt", "Seed") else f"number input for {label}"
    page.get_by_label(name, exact=True).fill(str(value))


def unfold(page: Page, name: str) -> None:
    page.get_by_role("button", name=f"{name} ▼").click()
    page.wait_for_timeout(400)


def status_is(page: Page, pattern: str) -> None:
    expect(page.locator("#status [role=status]")).to_have_text(re.compile(pattern))


def generate(page: Page, prompt: str | None = PROMPT) -> None:
    if prompt is not None:
        fill(page, "Prompt", prompt)
    page.get_by_role("button", name="Generate").click()


def make(page: Page, prompt: str | None = PROMPT, pictures: int = 1) -> None:
    """Generate, and wait until the pictures are there."""
    thumbnails = page.locator("#gallery .thumbnail-item")
    before = thumbnails.count()
    generate(page, prompt)
    expect(thumbnails).to_have_count(before + pictures)
    status_is(page, "^Done")


def shown(page: Page) -> Image.Image:
    """The picture on the stage, as the browser got it."""
    source = page.locator("#result img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def download(page: Page, folder: Path) -> Path:
    with page.expect_download() as started:
        page.locator("#download").click()
    file = folder / started.value.suggested_filename
    started.value.save_as(file)
    return file


def paste(page: Page, file: Path, event: str = "paste", after: str = "null") -> None:
    """What Ctrl+V, or a drop on the page, tells it, after a promise."""
    page.evaluate(
        f"async ([event, name, content]) => {{ await {after};"
        """
            const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, { type: "image/png" }));
            const happened = event === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.querySelector("#stage").dispatchEvent(happened);
        }""",
        [event, file.name, base64.b64encode(file.read_bytes()).decode()],
    )


def test_a_picture_is_made_and_its_file_makes_it_again(page, demo, int8_pipe, tmp_path):
    assert page.get_by_role("button", name="Run", exact=True).count() == 0, "buttons that nobody named"
    photograph(page, "arrival")
    unfold(page, "About this model")
    expect(page.locator("#about")).to_contain_text(int8_pipe.origin["checkpoint"])
    page.get_by_role("button", name="About this model ▼").click()
    expect(page.locator("#stop")).to_be_hidden()
    generate(page)
    status_is(page, r"^Done after [\d.]+ s\.$")
    assert "fox" in read_picture(shown(page)).objects
    expect(page.locator("#result img")).to_have_attribute("alt", PROMPT)
    width = page.locator("#result img").bounding_box()["width"]
    assert width > 400, "a small picture is shown large"
    expect(page.locator("#stop")).to_be_hidden()
    photograph(page, "done")
    file = download(page, tmp_path)
    assert re.fullmatch(r"a-fox-in-the-snow-\d+\.png", file.name)
    again = int8_pipe(**settings_of(file)).images[0]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(file)))


@pytest.mark.parametrize("size", [(1280, 720), (390, 844)])
def test_a_stranger_sees_finished_pictures_and_a_click_draws_one_live(browser, demo, int8_pipe, size):
    with visit(browser, demo, viewport={"width": size[0], "height": size[1]}) as page:
        first, *tiles = int8_pipe.defaults["showcase"]
        for place in ("#prompt", "#generate", "#result img"):
            expect(page.locator(place)).to_be_in_viewport(ratio=0.9)
        expect(page.locator("#caption")).to_contain_text(first["prompt"])
        expect(page.locator("#actions")).to_be_hidden()
        names = page.locator("#tiles .thumbnail-item").evaluate_all("all => all.map((one) => one.ariaLabel)")
        assert names == [one["prompt"] for one in tiles]
        page.locator("#tiles .thumbnail-item").nth(1).click()
        status_is(page, "^Done")
        expect(page.get_by_label("Prompt", exact=True)).to_have_value(tiles[1]["prompt"])
        expected = int8_pipe(tiles[1]["prompt"], seed=tiles[1]["seed"]).images[0]
        np.testing.assert_array_equal(np.asarray(shown(page)), np.asarray(expected))
        page.get_by_role("button", name="Surprise me").click()
        expect(page.locator("#gallery .thumbnail-item")).to_have_count(2)
        known = int8_pipe.defaults["understands"]
        asked = page.get_by_label("Prompt", exact=True).input_value()
        assert any(asked == f"{thing} {place}" for thing in known["objects"] for place in known["places"])


def test_words_are_completed_and_those_that_are_not_known_are_marked(page):
    field = page.get_by_label("Prompt", exact=True)
    field.press_sequentially("an ow")
    page.get_by_role("button", name="Complete with an owl", exact=True).click()
    field.press_sequentially(" in a for")
    page.get_by_role("button", name="Complete with in a forest at night", exact=True).click()
    expect(field).to_have_value("an owl in a forest at night")
    expect(page.locator("#known")).to_be_empty()
    field.fill("an owll in a kitchen ")
    expect(page.locator("#known .unknown")).to_have_text(["owll", "kitchen"])
    page.get_by_role("button", name="Replace owll with owl").click()
    expect(field).to_have_value("an owl in a kitchen ")
    expect(page.locator("#known .unknown")).to_have_text(["kitchen"])


def test_what_is_asked_for_during_a_run_is_queued_and_a_reload_finds_it(browser, demo, slow):
    page = browser.new_context().new_page()  # a page that is loaded again complains of what it was loading
    page.goto(demo.local_url)
    unfold(page, "Options")
    fill(page, "Steps", 40)
    fill(page, "Negative prompt", "white")
    generate(page)
    status_is(page, "^Step")
    expect(page.locator("#download")).to_be_hidden()
    fill(page, "Steps", 3)
    page.get_by_label("Prompt", exact=True).fill("an owl in a forest at night")
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.get_by_text("Queued: it starts when your picture before it is done.").wait_for()
    status_is(page, "1 more queued$")
    page.reload()
    status_is(page, r"^Step \d+ of 40")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("an owl in a forest at night")
    unfold(page, "Options")
    expect(page.get_by_label("number input for Steps", exact=True)).to_have_value("3")
    expect(page.get_by_label("Negative prompt", exact=True)).to_have_value("white")
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(2)
    expect(page.locator("#caption")).to_contain_text("an owl in a forest at night")
    expect(page.locator("#stop")).to_be_hidden()
    page.context.close()


def test_escape_stops_and_focus_goes_to_stop_and_back(page, slow):
    unfold(page, "Options")
    fill(page, "Steps", 60)
    fill(page, "Prompt", PROMPT)
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_focused()
    status_is(page, "^Step")
    page.keyboard.press("Escape")
    status_is(page, "^Stopped after")
    expect(page.locator("#generate")).to_be_focused()


def test_in_two_pages_each_acts_on_the_picture_that_it_shows(page, demo):
    make(page, "a rocket in space")
    other = page.context.new_page()
    other.goto(demo.local_url)
    expect(other.locator("#caption")).to_contain_text("a rocket in space")
    make(other, "a whale under water")
    page.get_by_role("button", name="Reuse settings").click()
    page.get_by_text("The picture's settings are filled in.").wait_for()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a rocket in space")
    page.locator("#gallery .thumbnail-item").first.click()
    expect(page.locator("#caption")).to_contain_text("a rocket in space")


def test_large_sizes_are_asked_about_and_larger_ones_refused(page, slow):
    unfold(page, "Options")
    fill(page, "Steps", 1)
    for size, told in (("256x192", "3 times the size that the model learned on"), ("320x320", "6 times")):
        page.get_by_label("Size").fill(size)
        page.get_by_label("Size").press("Enter")
        expect(page.locator("#size-hint")).to_contain_text(told)
    generate(page)
    page.get_by_text("Press Generate again to make it.").wait_for()
    assert not slow
    make(page)
    assert shown(page).size == (320, 320)
    page.get_by_label("Size").fill("1024x1024")
    page.get_by_label("Size").press("Enter")
    generate(page)
    page.get_by_text("is more than 16 times the model's own: choose less.").wait_for()
    status_is(page, "^Nothing was made")


def test_all_pictures_come_in_one_file_and_copies_stay(page, demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo.studio.sessions, "_outputs", tmp_path / "outputs")
    fresh = page.context.browser.new_context().new_page()
    fresh.goto(demo.local_url)
    fresh.wait_for_timeout(1000)
    make(fresh, "a rocket in space")
    make(fresh, "a <b>whale</b> under water")  # no words of a prompt are read as HTML
    assert "a <b>whale</b> under water" in fresh.locator("#caption").inner_text()
    with fresh.expect_download() as started:
        fresh.get_by_role("button", name="Download all").click()
    with zipfile.ZipFile(started.value.path()) as archive:
        names = archive.namelist()
    assert len(names) == 2 and sorted(names) == sorted(file.name for file in (tmp_path / "outputs").iterdir())
    fresh.context.close()


def test_a_pictures_steps_are_shown_as_a_film(page, tmp_path):
    unfold(page, "Options")
    fill(page, "Steps", 6)
    make(page, "a rocket in space")
    finished = np.asarray(shown(page).convert("RGB"), float)
    page.locator("#film").click()
    status_is(page, "^Its steps as a film")
    with Image.open(download(page, tmp_path)) as film:
        assert film.format == "GIF" and film.n_frames == 7  # six beliefs, and the picture
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB").resize((128, 128)), float)
    assert np.abs(last - finished)[40:].mean() < 10  # of 255; the number of the step stands above


def test_a_preview_comes_from_the_first_step_on(page, slow):
    unfold(page, "Options")
    fill(page, "Prompt", PROMPT)
    fill(page, "Seed", 3)
    fill(page, "Steps", 30)
    page.get_by_label("Prompt", exact=True).press("Enter")
    status_is(page, r"^Step \d+ of 30, [\d.]+ s left$")  # known from the second step on
    expect(page.locator("#result img")).to_have_attribute("alt", "a preview")
    expect(page).to_have_title(re.compile(r"^Step \d+ of 30"))
    status_is(page, r"^Step (1[5-9]|2\d) of 30")
    preview = shown(page)
    photograph(page, "preview")
    status_is(page, "^Done")
    expect(page.locator("#result img")).to_have_attribute("alt", PROMPT)
    expect(page).to_have_title("DeciDiffusion on OpenVINO")
    small, picture = (np.asarray(one.convert("RGB").resize((16, 16)), float).ravel() for one in (preview, shown(page)))
    assert np.corrcoef(small, picture)[0, 1] > 0.8


def test_stop_acts_within_a_step_and_keeps_what_the_preview_showed(page, slow):
    unfold(page, "Options")
    fill(page, "Steps", 100)
    generate(page)
    status_is(page, "^Step [2-9]")
    page.locator("#stop").click()
    status_is(page, "^Stopped after")
    assert len(slow) < 40
    expect(page.locator("#caption")).to_contain_text(re.compile(r"stopped after step \d+ of 100"))
    assert shown(page).size == (128, 128)
    photograph(page, "stopped")
    fill(page, "Steps", 3)
    generate(page, None)  # no wish to stop is left over
    status_is(page, "^Done")


def test_waiting_is_told_and_can_be_stopped_and_nobody_sees_anothers_pictures(browser, demo, slow):
    with visit(browser, demo) as first, visit(browser, demo) as second:
        unfold(first, "Options")
        fill(first, "Steps", 60)
        generate(first)
        status_is(first, "^Step")
        generate(second, "a whale under water")
        status_is(second, r"^One picture ahead of yours, about [\d.]+ s\.$")
        photograph(second, "waiting")
        second.locator("#stop").click()
        status_is(second, "^Stopped while waiting")
        assert max(slow) < 55, "at once, not when its turn comes"
        generate(second, None)
        status_is(second, "^Done")
        status_is(first, "^Done")
        expect(second.locator("#gallery .thumbnail-item")).to_have_count(1)
        expect(first.locator("#gallery .thumbnail-item")).to_have_count(1)


def test_whoever_leaves_frees_the_machine(browser, demo, slow, monkeypatch):
    monkeypatch.setattr("ov_decidiffusion.demo.studio.GRACE_SECONDS", 0.5)  # for a page that is loaded again
    with visit(browser, demo) as page:
        unfold(page, "Options")
        fill(page, "Steps", 100)
        generate(page)
        status_is(page, "^Step")
    time.sleep(3)
    steps = len(slow)
    time.sleep(1)
    assert 0 < len(slow) == steps < 80
    with visit(browser, demo) as page:
        make(page)


def test_the_session_is_kept_over_a_reload_and_its_pictures_can_be_gone_on_from(page, tmp_path):
    make(page)
    unfold(page, "Options")
    fill(page, "Number of pictures", 3)
    fill(page, "Negative prompt", "white")
    make(page, "an owl in a forest at night", 3)
    status_is(page, "^Done: 3 pictures")
    photograph(page, "gallery")
    page.reload()
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(4)
    unfold(page, "Options")
    expect(page.get_by_label("number input for Number of pictures", exact=True)).to_have_value("3")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("an owl in a forest at night")
    page.locator("#gallery .thumbnail-item").last.click()
    expect(page.locator("#caption")).to_contain_text(PROMPT)
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(page.get_by_label("Negative prompt", exact=True)).to_have_value("")
    expect(page.get_by_label("Lock seed")).to_be_checked()
    before = shown(page)
    generate(page, None)
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(5)
    status_is(page, "^Done")
    np.testing.assert_array_equal(np.asarray(shown(page)), np.asarray(before))
    page.locator("#gallery .thumbnail-item").nth(1).click()
    page.get_by_role("button", name="Reuse seed").click()
    expect(page.get_by_label("Seed", exact=True)).not_to_have_value(str(settings_of(before)["seed"]))
    page.get_by_role("button", name="Vary").click()
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(6)
    page.locator("#resource").click()
    for count in (7, 8):
        expect(page.locator("#editor canvas").first).to_be_visible()
        page.wait_for_timeout(1500)
        generate(page, "a red car on a blue background")
        expect(page.locator("#gallery .thumbnail-item")).to_have_count(count)
        status_is(page, "^Done")
        assert "strength" in settings_of(download(page, tmp_path))
        page.reload()


def test_a_source_by_upload_and_by_paste_and_a_mask_painted_on_it(page, int8_pipe, tmp_path):
    source, foreign = int8_pipe("a house in a meadow", seed=1).images[0], tmp_path / "source.png"
    Image.fromarray(np.asarray(source)).save(foreign)
    unfold(page, "Start from a picture")
    page.locator("#editor input[type=file]").first.set_input_files(foreign)
    page.wait_for_timeout(1500)
    make(page)
    uploaded = settings_of(download(page, tmp_path))
    assert uploaded["strength"] == 0.8 and "overlay" not in uploaded

    page.get_by_role("button", name="Remove").click()
    paste(page, foreign)
    page.get_by_text("Taken as the starting point.").last.wait_for()
    page.wait_for_timeout(1500)
    page.locator("#editor").get_by_role("button", name="Brush", exact=True).click()
    page.wait_for_timeout(700)
    page.locator("#editor canvas").first.scroll_into_view_if_needed()
    box = page.locator("#editor canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    for x, y in ((25, 0), (25, 25), (-25, 25), (-25, -25), (25, -25)):
        page.mouse.move(middle[0] + x, middle[1] + y, steps=4)
    page.mouse.up()
    page.wait_for_timeout(1000)
    photograph(page, "mask")
    make(page)
    file = download(page, tmp_path)
    assert settings_of(file)["overlay"] is True
    made, was = np.asarray(Image.open(file), int), np.asarray(source, int)
    assert (made[:10] == was[:10]).all(), "what was not painted stays to the pixel"
    assert np.abs(made - was)[54:74, 54:74].mean() > 3
    photograph(page, "inpainted")


def test_a_photograph_that_is_dropped_stands_upright(page, tmp_path):
    lying = Image.new("CMYK", (128, 128), (0, 255, 255, 0))
    lying.paste((255, 0, 255, 0), [64, 0, 128, 128])
    exif = Image.Exif()
    exif[0x0112] = 6  # its left is the top, as phones say it
    lying.save(tmp_path / "photo.jpg", exif=exif)
    unfold(page, "Start from a picture")
    paste(page, tmp_path / "photo.jpg", "drop")
    page.get_by_text("Taken as the starting point.").last.wait_for()
    page.wait_for_timeout(1500)
    fill(page, "How much to change", 0.1)
    make(page)
    red, green, _ = np.asarray(shown(page), int).transpose(2, 0, 1)
    assert (red - green)[:56].mean() > 100 and (green - red)[72:].mean() > 100


def test_a_picture_of_ours_dropped_on_the_page_fills_its_settings_in(page, int8_pipe, tmp_path):
    arguments = {"seed": 77, "negative_prompt": "white", "num_inference_steps": 7, "guidance_scale": 3.5}
    picture = int8_pipe("a lion in the desert", solver="euler", **arguments).images[0]
    picture.save(tmp_path / "ours.png")
    unfold(page, "Options")
    paste(page, tmp_path / "ours.png", "drop")
    page.get_by_text("The picture's settings are filled in.").wait_for()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a lion in the desert")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("77")
    make(page, None)
    np.testing.assert_array_equal(np.asarray(shown(page)), np.asarray(picture))
    quick = int8_pipe("a lion in the desert", seed=78, preset="fast", num_inference_steps=9).images[0]
    quick.save(tmp_path / "quick.png")
    paste(page, tmp_path / "quick.png", "drop")  # another preset does not bring its own number of steps along
    expect(page.get_by_label("Seed", exact=True)).to_have_value("78")
    page.wait_for_timeout(1500)
    expect(page.get_by_label("number input for Steps", exact=True)).to_have_value("9")
    make(page, None)
    np.testing.assert_array_equal(np.asarray(shown(page)), np.asarray(quick))


def test_a_seed_that_is_typed_is_the_pictures(page, int8_pipe):
    unfold(page, "Options")
    fill(page, "Prompt", PROMPT)
    fill(page, "Seed", 4711)
    expect(page.get_by_label("Lock seed")).to_be_checked()
    page.get_by_label("Seed", exact=True).press("Enter")
    status_is(page, "^Done")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("4711")
    expected = int8_pipe(PROMPT, seed=4711).images[0]
    np.testing.assert_array_equal(np.asarray(shown(page)), np.asarray(expected))


def test_two_settings_are_compared_with_a_slider(page):
    fill(page, "Prompt", PROMPT)
    unfold(page, "Compare")
    expect(page.get_by_label("number input for Steps B")).to_have_value(str(PRESETS["fast"]["num_inference_steps"]))
    page.locator("#compare").click()
    expect(page.locator("#caption")).to_contain_text(re.compile(r"A: Best, [\d.]+ s · B: Fast, [\d.]+ s"))
    expect(page.locator("#slider img")).to_have_count(2)
    page.wait_for_timeout(500)
    expect(page.locator("#slider img").first).to_be_in_viewport(ratio=0.95)
    unfold(page, "Compare")
    page.get_by_label("number input for Steps B").press("Enter")  # compares, and does not generate
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(4)
    expect(page.locator("#slider")).to_be_visible()
    photograph(page, "compared")


def test_compared_pictures_can_be_gone_on_from_when_earlier_ones_were_deleted_meanwhile(page, demo, monkeypatch):
    monkeypatch.setattr(demo.studio, "sessions", Sessions())  # after an hour, as it were
    fill(page, "Prompt", PROMPT)
    unfold(page, "Compare")
    page.locator("#compare").click()
    expect(page.locator("#caption")).to_contain_text(re.compile(r"A: Best, [\d.]+ s · B: Fast, [\d.]+ s"))
    page.locator("#gallery .thumbnail-item").last.click()
    expect(page.locator("#caption")).to_contain_text(PROMPT)
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(2)
    demo.studio.sessions.close()


def test_stop_ends_both_sides_of_a_comparison(page, slow):
    fill(page, "Prompt", PROMPT)
    unfold(page, "Compare")
    fill(page, "Steps A", 60)
    page.locator("#compare").click()
    status_is(page, "^A: Step [2-9]")
    page.locator("#stop").click()
    status_is(page, "^A: Stopped after")
    page.wait_for_timeout(2000)
    assert slow.count(0) == 1
    status_is(page, "^A: Stopped after")


def close_messages(page: Page) -> None:
    """They go by themselves too, perhaps in the midst of a click."""
    closing = page.get_by_role("button", name="Close")
    while closing.count():
        with contextlib.suppress(TimeoutError):
            closing.first.click(timeout=3000)


def test_what_is_wrong_is_said_in_words(page, tmp_path):
    generate(page, "  ")
    page.get_by_text("Write a prompt first").first.wait_for()
    status_is(page, "^Nothing was made")
    unfold(page, "Options")
    fill(page, "Negative prompt", "Clouds")
    generate(page, "a large fox and an owl in the kitchen")
    status_is(page, "^Done")
    expect(page.locator("#known .unknown")).to_have_text(["kitchen", "clouds"])  # as long as they stand there
    fill(page, "Negative prompt", "")
    expect(page.locator("#known .unknown")).to_have_text(["kitchen"])
    fill(page, "Seed", "-5")
    generate(page, None)
    page.get_by_text("The seed must be a whole number from 0 to").first.wait_for()
    close_messages(page)
    fill(page, "Seed", "1")
    generate(page, "a (star:50)")
    page.get_by_text("weighs 'star' by 50").first.wait_for()
    unfold(page, "Start from a picture")
    for name, content, message in (("cut.jpg", b"\xff\xd8\xff\xe0" + bytes(40), "This picture is damaged"),):
        (tmp_path / name).write_bytes(content)
        paste(page, tmp_path / name)
        page.get_by_text(message).first.wait_for()
        photograph(page, "refused")
        close_messages(page)
        page.get_by_text(message).first.wait_for(state="hidden")


def test_a_picture_pasted_while_another_is_read_is_taken_too(page, tmp_path):
    (tmp_path / "text.png").write_bytes(b"hello")
    Image.new("RGB", (128, 128), "red").save(tmp_path / "red.png")
    page.locator("#incoming input[type=file]").wait_for(state="attached")
    page.evaluate(
        """() => {
            window.fieldGone = new Promise((resolve) => new MutationObserver(() => {
                if (!document.querySelector("#incoming input[type=file]")) resolve();
            }).observe(document, { subtree: true, childList: true }));
        }"""
    )
    paste(page, tmp_path / "text.png")
    paste(page, tmp_path / "red.png", after="window.fieldGone")
    page.get_by_text("This picture is damaged").first.wait_for()
    page.get_by_text("Taken as the starting point").first.wait_for()


def test_everything_can_be_done_with_keys_alone(page):
    page.keyboard.type(PROMPT)  # the prompt has the focus at first
    page.keyboard.press("Control+Enter")
    status_is(page, "^Done")
    unfold(page, "Options")
    page.get_by_label("Prompt", exact=True).focus()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.ariaLabel"))
    for name in ("Generate", "Random seed", "Download", "Reuse settings", "Vary", "Edit", "Compare"):
        assert any(name in str(one) for one in reached), (name, reached)
    expect(page.get_by_role("button", name="Vary")).to_be_enabled()
    page.get_by_role("button", name="Vary").focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px", outline
    page.keyboard.press("Enter")
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(2)


def test_on_a_phone_the_result_comes_into_view_and_nothing_is_cut_off(browser, demo, slow):
    with visit(browser, demo, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        photograph(page, "phone-arrival")
        fill(page, "Prompt", PROMPT)
        page.get_by_role("button", name="Generate").tap()
        status_is(page, "^Step")
        expect(page.locator("#result img")).to_be_in_viewport(ratio=0.6)
        status_is(page, "^Done")
        page.wait_for_timeout(500)
        expect(page.locator("#result img")).to_be_in_viewport(ratio=0.6)
        page.screenshot(path=Path(PICTURES) / "phone-done.png") if PICTURES else None
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_at_200_percent_the_picture_fits_and_nothing_lies_over_it(browser, demo):
    with visit(browser, demo, viewport={"width": 640, "height": 360}) as page:
        box = page.locator("#result img").bounding_box()
        assert 200 < box["height"] < 360
        assert page.evaluate("getComputedStyle(document.querySelector('#generate')).position") != "fixed"
        assert page.evaluate("document.documentElement.scrollWidth") <= 640


def violations(page: Page) -> list:
    found = page.evaluate("axe.run()")["violations"]
    return [(one["id"], [node["target"] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, demo, slow, scheme):
    if not AXE.exists() and not IN_CI:
        pytest.skip("needs axe-core: npm ci --prefix tests")
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True} if scheme == "dark" else {}
    with visit(browser, demo, color_scheme=scheme, **phone) as page:
        make(page)
        unfold(page, "Options")
        unfold(page, "Start from a picture")
        page.wait_for_timeout(800)
        photograph(page, f"unfolded-{scheme}")
        page.evaluate(AXE.read_text(encoding="utf-8"))
        assert not violations(page)
        if scheme == "light":
            return  # what is behind it has the same colours
        unfold(page, "Compare")
        unfold(page, "65 things in 34 places")
        unfold(page, "About this model")
        assert not violations(page)
        fill(page, "Steps", 60)
        generate(page, "a fox in a kitchen")
        status_is(page, "^Step")
        assert not violations(page), "during a run"


def test_a_server_that_restarts_is_told_and_what_was_typed_is_still_there(browser, int8_pipe):
    first = make_demo(int8_pipe)
    first.launch(prevent_thread_lock=True, quiet=True)
    port, closed = first.server_port, threading.Event()
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(first.local_url)
    fill(page, "Prompt", PROMPT)
    page.wait_for_timeout(700)
    first.close(verbose=False)
    closed.set()
    page.get_by_label("Prompt", exact=True).press("Enter")  # what tells of the loss may cover the button
    page.get_by_text(re.compile("[Cc]onnection")).first.wait_for()
    photograph(page, "lost")
    second = make_demo(int8_pipe)
    second.launch(prevent_thread_lock=True, quiet=True, server_port=port)
    try:
        page.reload()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
        page.get_by_role("button", name="Generate").click()
        status_is(page, "^Done")
    finally:
        context.close()
        second.close(verbose=False)
