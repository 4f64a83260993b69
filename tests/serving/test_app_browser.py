"""The app in a real browser, at the width of a desktop and of a phone, in a light and a dark look; run by `make test-app`.

Each step writes a screenshot into the folder APP_SCREENSHOTS. APP_MODEL names another checkpoint than a tiny
untrained one. The pictures of the docs are parts of the screenshots, written into the folder APP_DOCS.
"""

import io
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from browser import find_chromium
from demo_folder import make_changed_checkpoint, make_demo_folder
from PIL import Image

from llava_next_ar.evaluation.measures import load_checkpoint
from llava_next_ar.processing.video_frames import load_video
from llava_next_ar.serving.space import app
from llava_next_ar.serving.space.chat import GenerationSettings
from llava_next_ar.serving.space.service import ModelService

playwright = pytest.importorskip("playwright.sync_api", reason="`make test-app` installs playwright")
pytestmark = pytest.mark.slow

CLIP = app.EXAMPLES / "bounce.mp4"
QUESTION = "What is the color of the shape?"
WAIT = 120_000  # milliseconds
LOOKS = [(1280, 900, "light"), (1280, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]
# Texts that are cut off, cover each other or leave the page. Texts in scrolling parts count where they are visible.
FAULTS = """() => {
  const width = document.documentElement.clientWidth, faults = [], lines = [];
  if (document.documentElement.scrollWidth > width) faults.push(`page: ${document.documentElement.scrollWidth} > ${width}`);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement, text = node.textContent.trim();
    if (!text || !parent.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (parent.closest('script, style, [role=progressbar], .toast-wrap, footer')) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    let clip = {left: -1e9, right: 1e9, top: -1e9, bottom: 1e9}, own = false;
    for (let e = parent; e && e !== document.documentElement; e = e.parentElement) {
      const style = getComputedStyle(e), box = e.getBoundingClientRect();
      if (style.overflowX !== 'visible') {
        own = own || scrolls(e);
        if (!own && e.scrollWidth > e.clientWidth + 1 && style.textOverflow === 'ellipsis') faults.push(`cut off: ${text}`);
        clip = {left: Math.max(clip.left, box.left), right: Math.min(clip.right, box.right),
                top: Math.max(clip.top, box.top), bottom: Math.min(clip.bottom, box.bottom)};
      }
    }
    for (const r of range.getClientRects()) {
      const box = {left: Math.max(r.left, clip.left), right: Math.min(r.right, clip.right),
                   top: Math.max(r.top, clip.top), bottom: Math.min(r.bottom, clip.bottom), text, parent};
      if (box.right - box.left < 2 || box.bottom - box.top < 2) continue;
      if (box.right > width + 1 || box.left < -1) faults.push(`leaves the page: ${text}`);
      for (const other of lines) {
        const x = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const y = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        const pinned = box.parent.closest('th[scope=row]') || other.parent.closest('th[scope=row]');
        if (x > 1.5 && y > 3 && !pinned) faults.push(`covers: ${text} / ${other.text}`);
      }
      lines.push(box);
    }
  }
  return [...new Set(faults)];
}"""
# Parts of the page that leave the block around them, unless they lie in a part that scrolls or is cut on purpose.
OUTSIDE = """() => {
  const faults = [];
  for (const e of document.querySelectorAll('.block *, button, input, textarea, video, img')) {
    const block = e.parentElement?.closest('.block, .form, .tabitem'), box = e.getBoundingClientRect();
    if (!block || !box.width || !box.height) continue;
    if (e.closest('svg, .toast-wrap, [role=progressbar], .sr-only, .streaming-bar')) continue;
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    let clipped = false;
    for (let p = e.parentElement; p !== block; p = p.parentElement) clipped ||= getComputedStyle(p).overflowX !== 'visible';
    if (clipped || getComputedStyle(block).overflowX !== 'visible' && block.scrollWidth > block.clientWidth + 1) continue;
    const around = block.getBoundingClientRect();
    if (box.left < around.left - 1.5 || box.right > around.right + 1.5)
      faults.push(`outside its block: ${e.tagName}.${e.className} ${[box.left, box.right]}, ${[around.left, around.right]}`);
  }
  return [...new Set(faults)];
}"""
# Texts with less contrast than WCAG 2.2 AA asks for (https://www.w3.org/TR/WCAG22/#contrast-minimum). Texts on pictures and of
# controls that are off are left out, as there.
FAINT = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true}), faults = [];
  const rgba = text => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = text; context.fillRect(0, 0, 1, 1);
    const d = context.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255];
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = colour => { const c = colour.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
  const check = (parent, text, colour) => {
    const layers = [];
    let opacity = 1;
    for (let e = parent; e; e = e.parentElement) {
      const style = getComputedStyle(e); opacity *= Number(style.opacity);
      if (style.backgroundImage !== 'none') return;
      layers.push(rgba(style.backgroundColor));
    }
    const ground = layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
    const ink = rgba(colour); ink[3] *= opacity;
    const both = [light(over(ink, ground)), light(ground)].sort((a, b) => b - a), ratio = (both[0] + 0.05) / (both[1] + 0.05);
    const style = getComputedStyle(parent), size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const symbol = !/[\\p{L}\\p{N}]/u.test(text);  // a graphical object
    const least = symbol || size >= 24 || bold && size >= 18.66 ? 3 : 4.5;
    if (ratio < least) faults.push(`faint (${ratio.toFixed(1)}): ${text.slice(0, 60)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !parent.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (parent.closest('script, style, svg, [role=progressbar], .controls, :disabled, .sr-only')) continue;
    check(parent, text, getComputedStyle(parent).color);
  }
  for (const e of document.querySelectorAll('textarea[placeholder]'))
    if (e.checkVisibility() && !e.value && !e.disabled) check(e, e.placeholder, getComputedStyle(e, '::placeholder').color);
  return [...new Set(faults)];
}"""


@pytest.fixture(scope="module")
def model_service(tmp_path_factory) -> ModelService:
    source = os.environ.get("APP_MODEL")
    if not source:
        folder = make_demo_folder(tmp_path_factory.mktemp("browser"))
        make_changed_checkpoint(folder)
        source = str(folder / "changed")
    return ModelService(*load_checkpoint(source), name=Path(source).name if Path(source).is_absolute() else source)


@pytest.fixture(scope="module")
def address(model_service):
    demo = app.build_app(model_service)
    _, address, _ = app.launch(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield address
    demo.close()


@pytest.fixture(scope="module")
def chromium():
    program = find_chromium()
    if program is None:
        if "APP_SCREENSHOTS" in os.environ:  # `make test-app`
            pytest.fail("no Chromium: install it (apt-get install chromium), or name it by CHROMIUM")
        pytest.skip("no Chromium is installed, or named by CHROMIUM")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=program, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


class Visit:
    """A page with its complaints: errors of the console, exceptions, and requests to other servers."""

    def __init__(self, chromium, address: str, look: tuple[int, int, str], shots: Path) -> None:
        width, height, scheme = look
        size = {"width": width, "height": height}
        phone = {"is_mobile": True, "has_touch": True} if width < 600 else {}
        self.context = chromium.new_context(viewport=size, color_scheme=scheme, permissions=["camera"], **phone)
        self.page, self.complaints = self.context.new_page(), []
        self._name, self._shots, self._size, self._number = f"{width}_{scheme}", shots, size, 0
        self.page.set_default_timeout(WAIT)
        self.page.on("console", self._note)
        self.page.on("pageerror", self._note_exception)
        own = (address.rstrip("/"), "data:", "blob:")
        self.page.on(
            "request", lambda one: None if one.url.startswith(own) else self.complaints.append(f"asks for {one.url}")
        )
        self.page.goto(address)
        self.page.wait_for_selector("#chatbot")
        self.page.get_by_placeholder("Ask about a video or images").wait_for()

    def _note_exception(self, error) -> None:
        if "play() request was interrupted" not in str(error):  # of gradio's webcam, which it restarts
            self.complaints.append(f"exception: {error}")

    def _note(self, message) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    def check(self, step: str) -> None:
        """A screenshot of the whole page, and no fault on it."""
        self.page.wait_for_timeout(600)
        height = self.page.evaluate("document.documentElement.scrollHeight")
        self.page.set_viewport_size({**self._size, "height": max(height, self._size["height"])})
        self.page.wait_for_timeout(400)
        self._number += 1
        self.page.screenshot(path=self._shots / f"{self._name}_{self._number}_{step}.png", full_page=True)
        faults = [fault for script in (FAULTS, OUTSIDE, FAINT) for fault in self.page.evaluate(script)]
        self.page.set_viewport_size(self._size)
        assert faults + self.complaints == [], f"{self._name}, {step}"

    def ask(self, question: str, *files: Path) -> str:
        """Ask in the chat as a person does; returns the answer."""
        before = self.page.locator("#chatbot .bot.message").count()
        box = self.page.locator("textarea").first  # gradio drops its placeholder after the first turn
        if files:
            upload = self.page.locator("input[type=file]").first
            upload.set_input_files([str(file) for file in files])
            self.page.locator(".thumbnails, .thumbnail-item").first.wait_for()
        box.fill(question)
        box.press("Enter")
        self.page.wait_for_function(f"document.querySelectorAll('#chatbot .bot.message').length > {before}")
        self.page.wait_for_function("!document.querySelector('#chatbot .pending, .stop-button')", timeout=WAIT)
        self.page.wait_for_timeout(300)
        return self.page.locator("#chatbot .bot.message").last.inner_text().strip()

    def tab(self, *names: str) -> None:
        for name in names:
            self.page.get_by_role("tab", name=name, exact=True).click()

    def upload(self, element: str, file: Path) -> None:
        self.page.locator(f"{element} input[type=file]").set_input_files(str(file))
        self.page.locator(f"{element} video").wait_for()


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("APP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    if os.environ.get("APP_DOCS"):
        make_pictures_of_docs(folder, Path(os.environ["APP_DOCS"]))


def make_pictures_of_docs(shots: Path, folder: Path) -> None:
    """Parts of the screenshots in both looks and at both widths, small enough for the documentation."""

    def part(name: str, top: int, height: int) -> Image.Image:
        look, step = name.rsplit("_", 1)
        (path,) = shots.glob(f"{look}_[0-9]_{step}.png")
        with Image.open(path) as shot:
            return shot.convert("RGB").crop((0, top, shot.width, top + height))

    phones = [
        part("390_light_start", 0, 844),
        part("390_dark_chat", 0, 844),
        part("390_light_expectation", 870, 844),
        part("390_dark_running", 840, 844),
    ]
    row = Image.new("RGB", (len(phones) * 406 - 16, 844), "#808080")
    for number, phone in enumerate(phones):
        row.paste(phone, (406 * number, 0))
    pictures = {
        "app_light": part("1280_light_expectation", 0, 1200),
        "app_dark": part("1280_dark_chat", 0, 780),
        "app_phone": row,
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.webp", quality=85, method=6)


@pytest.fixture(params=LOOKS, ids=lambda look: f"{look[0]}-{look[2]}")
def visit(request, chromium, address, shots):
    visit = Visit(chromium, address, request.param, shots)
    yield visit
    visit.context.close()


@pytest.fixture
def desktop(chromium, address, shots):
    visit = Visit(chromium, address, LOOKS[0], shots)
    yield visit
    visit.context.close()


def test_every_step_looks_right(visit, model_service, tmp_path):
    """Chat of two turns, a whole clip and a running file, each without a fault on the page."""
    picture = tmp_path / "picture.png"
    Image.fromarray(load_video(str(CLIP)).frames[0].permute(1, 2, 0).numpy()).resize((240, 240)).save(picture)
    visit.check("start")
    settings = GenerationSettings()
    first = visit.ask(QUESTION, CLIP)
    message = {"text": QUESTION, "files": [str(CLIP)]}
    assert first.split() == list(model_service.answer(message, [], settings, ""))[-1].split()
    visit.ask("In which direction does the shape move?")
    visit.check("chat")
    visit.ask(QUESTION, picture)
    visit.page.get_by_text("Generation settings").click()
    visit.check("settings")
    visit.tab("Expectation")
    visit.check("empty")
    visit.upload("#clip-video", CLIP)
    visit.page.get_by_role("button", name="Show the expectation").click()
    visit.page.locator(".ar-expectation").wait_for()
    visit.check("expectation")
    heights = visit.page.evaluate("[...document.querySelectorAll('.ar-expectation img')].map(i => i.naturalHeight)")
    assert len(heights) > 40 and min(heights) > 0
    shown = visit.page.locator("#expectation").inner_text()
    numbers = model_service.surprise(str(CLIP), None, 3)
    assert f"Skill {numbers['metrics']['skill']:+.2f}" in shown
    for frame in numbers["frames"]:
        assert f"{frame['surprise']:.2f}" in visit.page.locator(".ar-thumbs").first.text_content()
    colours_are_those_of_the_pictures(visit.page)
    visit.tab("Live: file")
    visit.upload("#file-video", CLIP)
    visit.page.get_by_role("button", name="Start", exact=True).click()
    visit.page.locator("#running").get_by_text("Frame 3,").wait_for()
    visit.page.wait_for_timeout(1500)
    visit.check("running")
    assert "4 of 4 frames are read." in visit.page.locator("#running").inner_text()
    visit.tab("Live: webcam")
    visit.check("webcam")
    visit.tab("Live: file")
    visit.page.locator("#file-video").get_by_role("button", name="Clear").click()
    visit.page.get_by_role("button", name="Start", exact=True).click()
    visit.page.get_by_text("no video was given: upload one, or choose an example").first.wait_for()
    visit.page.locator("#running").get_by_text("then press “Start”").wait_for()
    visit.check("message")


def test_the_most_surprising_frame_has_a_thumbnail_on_a_phone(chromium, address, shots, model_service):
    """A phone has room for 5 thumbnails; those left out are the least surprising of their stretch."""
    visit = Visit(chromium, address, LOOKS[2], shots)
    visit.tab("Expectation")
    visit.upload("#clip-video", CLIP)
    visit.page.get_by_role("button", name="Show the expectation").click()
    visit.page.locator(".ar-expectation").wait_for()
    shown = visit.page.locator(".ar-thumbs figure:visible")
    values = [float(text) for text in shown.all_inner_texts()]
    surprise = [frame["surprise"] for frame in model_service.surprise(str(CLIP), None, 3)["frames"]]
    assert len(surprise) == 7 and len(values) == 5 and max(values) == round(max(surprise), 2)
    boxes = [figure.bounding_box() for figure in shown.all()]
    assert all(left["x"] + left["width"] <= right["x"] for left, right in zip(boxes, boxes[1:], strict=False))
    assert min(box["width"] for box in boxes) >= 36
    visit.context.close()


def colours_are_those_of_the_pictures(page) -> None:
    """Pixels of the screen, in the middle of each patch, against the data of the picture."""
    names = page.locator("#expectation img.ar-exact")
    for number in (0, 3, names.count() - 1):
        element = names.nth(number)
        element.scroll_into_view_if_needed()
        with Image.open(io.BytesIO(element.screenshot())) as shot:
            drawn = np.asarray(shot.convert("RGB")).astype(int)
        source = np.asarray(
            element.evaluate(
                "async i => { const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight;"
                "const p = c.getContext('2d'); p.drawImage(i, 0, 0); return [...p.getImageData(0, 0, c.width, c.height).data] }"
            )
        )
        side = int((len(source) / 4) ** 0.5)
        source = source.reshape(side, side, 4)[..., :3]
        for row in (0.125, 0.375, 0.625, 0.875):
            for column in (0.125, 0.375, 0.625, 0.875):
                on_screen = drawn[int(row * drawn.shape[0]), int(column * drawn.shape[1])]
                assert np.abs(on_screen - source[int(row * side), int(column * side)]).max() <= 2, (
                    number,
                    row,
                    column,
                )


def test_errors_are_messages_on_the_page(desktop, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    page = desktop.page
    page.locator("input[type=file]").first.set_input_files(str(broken))
    page.locator(".thumbnail-item").first.wait_for()
    box = page.locator("textarea").first
    box.fill(QUESTION)
    box.press("Enter")
    page.get_by_text(re.compile("cannot read video broken.mp4")).first.wait_for()
    desktop.complaints.clear()  # the browser itself cannot play the file either
    page.wait_for_timeout(500)
    page.screenshot(path=desktop._shots / "error.png")
    assert (
        page.locator("#chatbot .user").get_by_text(QUESTION).is_visible()
    )  # the message does not hide the conversation
    assert page.locator("#chatbot .error:visible").count() == 0
    assert desktop.ask(QUESTION, CLIP)  # the chat goes on
    desktop.tab("Expectation")
    page.get_by_role("button", name="Show the expectation").click()
    page.get_by_text("no video was given: upload one, or choose an example").first.wait_for()


def test_an_example_fills_the_question(desktop, model_service):
    desktop.page.get_by_text(app.QUESTIONS["order.mp4"]).first.click()
    box = desktop.page.locator("textarea").first
    desktop.page.wait_for_function("document.querySelector('textarea').value.length > 0")
    assert box.input_value() == app.QUESTIONS["order.mp4"]
    box.press("Enter")
    desktop.page.wait_for_selector("#chatbot .bot.message")
    assert desktop.complaints == []


def test_the_stop_button_stops_an_answer(desktop, model_service, monkeypatch):
    """An answer that would take over 30 seconds is stopped: the model is free, and no further word comes."""
    model, page, steps = model_service.model, desktop.page, []
    forward = model.forward

    def slow(*arguments, **options):
        steps.append(1)
        time.sleep(0.3)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", slow)
    # Without an end, up to the longest answer of the settings.
    monkeypatch.setattr(model.generation_config, "suppress_tokens", model_service.processor.tokenizer.all_special_ids)
    box = page.locator("textarea").first
    box.fill(QUESTION)
    box.press("Enter")
    page.wait_for_function(
        "document.querySelector('#chatbot .bot.message')?.innerText.trim().split(/\\s+/).length > 3"
    )
    page.locator("button.stop-button").click()
    assert model_service._lock.acquire(timeout=20)
    model_service._lock.release()
    assert len(steps) < 100
    page.wait_for_timeout(1000)
    length = len(page.locator("#chatbot .bot.message").last.inner_text())
    page.wait_for_timeout(1500)
    assert len(page.locator("#chatbot .bot.message").last.inner_text()) == length > 10


def test_a_webcam_is_watched(desktop):
    """Chromium's own test camera."""
    page = desktop.page
    desktop.tab("Expectation", "Live: webcam")
    page.locator("#webcam").get_by_role("button").first.click()
    start, watched = time.monotonic(), page.locator("#watched")
    while not (found := re.search(r"Frame (\d+),", watched.inner_text())) or int(found[1]) < 3:
        assert time.monotonic() - start < 120, watched.inner_text()
        for button in page.locator("#webcam button:visible").all():
            if found is None and re.search(
                "record|webcam", (button.inner_text() + str(button.get_attribute("aria-label"))).lower()
            ):
                button.click()
                break
        page.wait_for_timeout(2000)
    desktop.check("watched")
