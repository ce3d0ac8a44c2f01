"""The demo's page in a real browser: Debian's chromium, headless, against a server as a person starts it."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from PIL import Image

from nitro_e_lite.course import demo_html

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = os.environ.get("NITRO_E_BROWSER") == "required"
if not CHROMIUM and not REQUIRED:
    pytest.skip("no chromium on this machine; apt install chromium brings it", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api") if not REQUIRED else __import__("playwright.sync_api").sync_api

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SLOW = 90_000  # milliseconds; a busy machine may take its time
EXAMPLE = "a red circle to the left of a blue square"
LOW_CONTRAST = """() => {
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
        const value = parts(color)[i] / 255;
        return sum + weight * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    }, 0);
    const chain = element => element ? [element, ...chain(element.parentElement)] : [];
    const read = [...document.querySelectorAll('.nl *')].filter(e => e.offsetWidth > 1 && (e.matches('input, select')
        || [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())));
    return read.filter(e => chain(e).every(x => getComputedStyle(x).opacity === '1')).map(e => {
        const behind = chain(e).map(x => getComputedStyle(x).backgroundColor).find(c => (parts(c)[3] ?? 1) === 1);
        const [low, high] = [light(getComputedStyle(e).color), light(behind)].sort((a, b) => a - b);
        return [(high + 0.05) / (low + 0.05), e.outerHTML.slice(0, 90)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@contextmanager
def serving(*options, **variables):
    """A running `nitro-e demo --web`, as process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nitro_e_lite.cli", "demo", "--web", "--port", str(port), *options]
    command += [] if "BROWSER" in variables else ["--no-browser"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        for line in process.stdout:
            if "The demo is at" in line:
                break
        else:
            raise RuntimeError("the demo did not start")
        yield process, f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()


@pytest.fixture(scope="module")
def server():
    """Short lanes of the shipped model, so that many drawings fit into a test."""
    with serving("--lane", "lite@6", "--lane", "lite@2", "--lane", "lite@1") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(server, browser):
    """Opens a page with its example drawn."""
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(SLOW)
        page.goto(server[1])
        page.wait_for_selector(".nl-lanes .nl-medal >> nth=2")
        return page

    yield open_page
    for context in contexts:
        context.close()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def write(page, caption):
    page.get_by_label("Caption").fill(caption)


def wait_for_status(page, pattern):
    page.locator(".nl-status").get_by_text(re.compile(pattern)).wait_for()


def wait_for_pictures(page, caption):
    """All three lanes are finished pictures of a caption."""
    wait_for_status(page, "^Done")
    finished = """caption => [...document.querySelectorAll('.nl-lanes img')].filter(
        i => i.alt.endsWith(': ' + caption) || i.alt.includes(': ' + caption + ';')).length == 3
        && document.querySelectorAll('.nl-lanes .nl-medal').length == 3"""
    page.wait_for_function(finished, arg=caption)


def wait_for_step(page):
    """A lane of fifty steps is on its way."""
    page.get_by_text(re.compile(r"^step \d+ of 50$")).first.wait_for()


def race(page, caption):
    write(page, caption)
    button(page, "Race").click()
    wait_for_pictures(page, caption)


def set_steps(page, lane, steps):
    field = page.locator(".nl-lane-top input").nth(lane)
    field.fill(str(steps))
    field.press("Tab")


def settle(server):
    """Waits until the page that is kept warm is laid out: whoever comes now comes alone."""
    before, spent = -1.0, 0.0
    while spent > before + 0.02:
        before = spent
        time.sleep(0.5)
        children = psutil.Process(server[0].pid).children()
        spent = sum(child.cpu_times().user + child.cpu_times().system for child in children)


def test_page_loads_from_this_machine_alone(server, browser):
    settle(server)
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(SLOW)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    begin = time.perf_counter()
    page.goto(server[1], wait_until="commit")
    button(page, "Race").wait_for()
    there = time.perf_counter() - begin
    page.wait_for_selector(".nl-lanes .nl-medal >> nth=2")
    shown = time.perf_counter() - begin
    button(page, "Race").click()
    wait_for_status(page, "finished after|^Done")
    own = time.perf_counter() - begin
    print(f"a page alone is there in {there:.1f} s (bar: 2), with pictures in {shown:.1f} s (bar: 5), ", end="")
    print(f"with the first picture of a race of its own in {own:.1f} s")
    assert page.get_by_role("heading", level=1).inner_text() == "Twenty steps beside four"
    elsewhere = [url for url in asked if not url.startswith((server[1], "data:"))]
    assert (elsewhere, errors) == ([], [])
    context.close()


def test_a_click_draws_and_a_second_caption_replaces_the_pictures(visit):
    page = visit()
    page.get_by_label("Count").select_option("2")
    sync_api.expect(page.get_by_label("Caption")).to_have_value("two red circles")
    button(page, "One by one").click()
    wait_for_pictures(page, "two red circles")
    times = page.locator(".nl-lanes .nl-meter b").all_inner_texts()
    assert len(times) == 3 and all(re.fullmatch(r"\d+ ms|\d+\.\d\d s", text) for text in times)
    assert page.locator(".nl-lanes em").count() == 2  # speed-ups against the first lane
    assert page.locator(".nl-lanes .nl-verdict b").all_inner_texts()[0] in ("Right", "Wrong")
    before = page.locator(".nl-lanes img").nth(0).get_attribute("src")
    race(page, "a small green square")
    assert page.locator(".nl-lanes img").nth(0).get_attribute("src") != before
    assert page.locator(".nl-lanes .nl-verdict b").all_inner_texts() == ["Seen"] * 3
    assert page.locator(".nl-film img").count() == 6


def test_bad_captions_are_answered(visit):
    page = visit()
    for caption, answer in (("", "Write a caption"), ("x" * 201, "201 characters")):
        write(page, caption)
        button(page, "One by one").click()
        wait_for_status(page, answer)
    write(page, "a red dog")
    page.locator(".nl-hint").get_by_text("dog").wait_for()
    set_steps(page, 0, 1000)
    assert page.locator(".nl-lane-top input").nth(0).input_value() == "50"
    set_steps(page, 0, 2)
    race(page, "a red heart")


def test_stop_stops_and_a_second_click_does_not_double(visit):
    page = visit()
    for lane in (0, 1, 2):  # long enough to be under way still, when a loaded machine is late with the click
        set_steps(page, lane, 50)
    hung = page.locator(".nl-thumb").count()
    write(page, "a blue heart")
    button(page, "Race").dblclick()
    wait_for_step(page)
    button(page, "One by one").click()
    wait_for_status(page, "Still drawing")
    begin = time.perf_counter()
    button(page, "Stop").click()
    wait_for_status(page, "^Stopped")
    assert time.perf_counter() - begin < 5
    for lane in (0, 1, 2):
        set_steps(page, lane, 3)
    race(page, "a blue heart")
    sync_api.expect(page.locator(".nl-thumb")).to_have_count(hung + 3)  # they are hung after the last picture is shown


def test_reload_while_drawing_frees_the_turn(visit, server):
    page = visit()
    set_steps(page, 0, 50)
    button(page, "Race").click()
    wait_for_step(page)
    kernels = psutil.Process(server[0].pid).children()
    page.reload()
    page.wait_for_selector(".nl-lanes .nl-medal >> nth=2")
    assert psutil.wait_procs(kernels, timeout=5)[0], "the page that left keeps its kernel"
    race(page, "a white star")


def test_two_tabs_take_turns_and_get_their_own_pictures(visit):
    first, second = visit(), visit()
    set_steps(first, 0, 50)
    write(first, "a pink heart")
    button(first, "Race").click()
    wait_for_step(first)
    write(second, "a black cross")
    button(second, "Race").click()
    wait_for_status(second, "You are next")
    button(first, "Stop").click()
    wait_for_pictures(second, "a black cross")
    set_steps(first, 0, 2)
    race(first, "a pink heart")


def test_keyboard_alone_is_enough(visit):
    page = visit()
    page.get_by_label("Caption").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a green star")
    page.keyboard.press("Enter")
    wait_for_pictures(page, "a green star")
    reached = []
    page.get_by_label("Count").focus()
    for _ in range(60):
        reached.append(page.evaluate("document.activeElement.textContent || document.activeElement.title"))
        page.keyboard.press("Tab")
    assert all(any(name in text for text in reached) for name in ("New seed", "Race", "Stop", "Save PNG", "2 steps"))
    assert any(text.startswith("Bring back") for text in reached)
    button(page, "New seed").focus()
    page.keyboard.press("Space")
    sync_api.expect(page.get_by_label("Seed", exact=True)).not_to_have_value("0", timeout=SLOW)
    wait_for_pictures(page, "a green star")


def test_everything_has_a_name_for_those_who_cannot_see_it(visit):
    page = visit()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('.nl button, .nl input, .nl select, .nl a, .nl img')].filter(e =>
            !(e.ariaLabel || e.textContent.trim() || e.title || e.alt || (e.labels && e.labels.length)
              || e.closest('.nl-thumb'))).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    names = page.evaluate("[...document.querySelectorAll('.nl-lane-top input')].map(e => e.ariaLabel)")
    assert len(set(names)) == 3
    assert page.locator(".nl-status [role=status]").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"


def test_gallery_brings_settings_back_and_pictures_are_saved_with_them(visit):
    page = visit()
    page.get_by_label("Seed", exact=True).fill("7")
    race(page, "a yellow star above a purple heart")
    page.get_by_label("Seed", exact=True).fill("8")
    race(page, "two orange triangles")
    page.get_by_role("button", name=re.compile("Bring back: a yellow star above a purple heart, 2 steps")).click()
    wait_for_status(page, "^Back: seed 7")
    assert page.get_by_label("Caption").input_value() == "a yellow star above a purple heart"
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile("Save the picture of 2 steps")).click()
    picture = Image.open(io.BytesIO(download.value.path().read_bytes()))
    facts = ("prompt", "steps", "seed", "model")
    assert [picture.text[name] for name in facts] == ["a yellow star above a purple heart", "2", "7", "lite"]
    command = page.locator(".nl-command").nth(1).inner_text()
    assert "--steps 2 --guidance 3 --seed 7" in command
    page.context.grant_permissions(["clipboard-read"])
    page.get_by_role("button", name="Copy the command that draws the picture of 2 steps").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == command


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_telephone_and_follows_the_systems_colours(visit, scheme):
    page = visit(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    level = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", level)[:3])) < 300) == (scheme == "dark")
    small = page.evaluate("[...document.querySelectorAll('.nl button')].filter(e => e.offsetHeight < 30).length")
    assert small == 0, "fingers need room"
    frames = page.evaluate("[...document.querySelectorAll('.nl-frame')].map(e => e.getBoundingClientRect().toJSON())")
    assert len({frame["top"] for frame in frames}) == 1 and min(frame["width"] for frame in frames) > 96, "side by side"
    write(page, "a red dog")
    page.locator(".nl-hint").get_by_text("dog").wait_for()
    assert page.evaluate(LOW_CONTRAST) == [], "WCAG AA"


@pytest.mark.parametrize("light", [True, False])
def test_in_jupyterlab_the_widgets_follow_its_theme_whatever_the_systems(browser, light):
    page = browser.new_page(color_scheme="dark" if light else "light")
    page.set_content(f"<body data-jp-theme-light={str(light).lower()}>{demo_html.style()}<div class=nl>text</div>")
    ink, paper = page.evaluate("(e => [e.color, e.backgroundColor])(getComputedStyle(document.querySelector('.nl')))")
    assert (ink, paper)[light] == max(ink, paper, key=lambda color: sum(map(int, re.findall(r"\d+", color)[:3])))
    page.close()


def test_a_killed_worker_is_started_again_and_the_visitor_is_told(visit, server):
    page = visit()
    set_steps(page, 0, 50)
    button(page, "Race").click()
    wait_for_step(page)
    children = psutil.Process(server[0].pid).children()
    (worker,) = [child for child in children if "demo_worker" in " ".join(child.cmdline())]
    worker.kill()
    wait_for_status(page, "started again")
    set_steps(page, 0, 2)
    race(page, "a red square")


def test_a_page_whose_kernel_is_gone_says_so(visit, server):
    page = visit()
    kernel = page.evaluate("JSON.parse(document.getElementById('jupyter-config-data').textContent).kernelId")
    assert page.request.post(f"{server[1]}voila/api/shutdown/{kernel}").ok
    sync_api.expect(page.get_by_text("fell asleep")).to_be_visible(timeout=SLOW)
    button(page, "Reload").click()
    page.wait_for_selector(".nl-lanes .nl-medal >> nth=2")


def test_twenty_visitors_all_get_pictures(browser, server):
    context = browser.new_context(viewport={"width": 800, "height": 600})
    begin = time.perf_counter()
    pages = [context.new_page() for _ in range(20)]
    for page in pages:
        page.set_default_timeout(3 * SLOW)
        page.goto(server[1], wait_until="commit")
    for page in pages:
        page.wait_for_selector(".nl-lanes .nl-medal >> nth=2")
    opened = time.perf_counter() - begin
    for number, page in enumerate(pages):
        page.get_by_label("Seed", exact=True).fill(str(number + 1))
        button(page, "Race").click()
    for page in pages:
        wait_for_pictures(page, EXAMPLE)
    sources = {page.locator(".nl-lanes img").nth(0).get_attribute("src") for page in pages}
    assert len(sources) == 20
    family = [server[0], *psutil.Process(server[0].pid).children(recursive=True)]
    memory = {child.pid: psutil.Process(child.pid).memory_full_info().uss / 1e6 for child in family}
    print(f"20 pages opened in {opened:.0f} s (bar: 30), drawn after {time.perf_counter() - begin:.0f} s")
    print(f"{len(memory)} processes hold {sum(memory.values()):.0f} MB")
    context.close()
    deadline = time.monotonic() + 60
    while len(psutil.Process(server[0].pid).children()) > 4 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(psutil.Process(server[0].pid).children()) <= 4, "kernels of pages that are gone stay"


def test_pages_asked_for_while_the_server_is_held_up_come_all_the_same(browser, server):
    """What a kernel answered later than voila's 4 s was thrown away: such a page stayed empty until it was reloaded."""
    context = browser.new_context()
    pages = [context.new_page() for _ in range(6)]
    for page in pages:
        page.evaluate("address => { setTimeout(() => { location.href = address }, 10) }", server[1])
    for _ in range(3):
        server[0].send_signal(signal.SIGSTOP)
        time.sleep(4.2)
        server[0].send_signal(signal.SIGCONT)
        time.sleep(0.25)
    for page in pages:
        page.wait_for_selector(".nl-lanes .nl-medal >> nth=2", timeout=SLOW)
    context.close()


def test_it_opens_a_browser_and_control_c_leaves_no_process(browser, tiny_folder, tmp_path):
    opened = tmp_path / "opened"
    with serving("--model", str(tiny_folder), BROWSER=f"sh -c 'echo $0 > {opened}' %s") as (process, address):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector(".nl-lanes .nl-medal >> nth=2", timeout=SLOW)
        assert opened.read_text().strip() == address
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "The demo has ended." in process.stdout.read()
        assert psutil.wait_procs(family, timeout=10)[1] == []
        page.close()
