"""Draws `figures/demo_page.png` and `demo_page_narrow.png`: `python tests/demo_figures.py`.

The page as a visitor sees it after a race, in chromium, with the default lanes and nothing picked but the caption.
"""

import io

from PIL import Image
from test_demo_browser import CHROMIUM, FLAGS, SLOW, button, serving, sync_api, wait_for_pictures

from nitro_e_lite import viz
from nitro_e_lite.course.demo_protocol import build, default_lanes

SCENE, SEED = (1, "yellow", "star", "above", "purple", "heart"), 1
PARTS = ("Count", "Colour", "Shape", "Relation", "Second colour", "Second shape")
SHOTS = {
    "demo_page": (1400, 1, "light", "The demo's page: three lanes side by side, with times, places and verdicts."),
    "demo_page_narrow": (400, 2, "dark", "The same page on a telephone, dark: the lanes are still side by side."),
}


def shot(page) -> Image.Image:
    """The page from its head to the end of its lanes, after a race."""
    page.wait_for_selector(".nl-lanes .nl-medal >> nth=2")
    for label, value in zip(PARTS, SCENE, strict=True):
        page.get_by_label(label, exact=True).select_option(str(value))
    caption, _ = build(*SCENE)
    sync_api.expect(page.get_by_label("Caption")).to_have_value(caption)
    page.get_by_label("Seed", exact=True).fill(str(SEED))
    button(page, "Race").click()
    wait_for_pictures(page, caption)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # what fades in has faded in
    lanes = page.locator(".nl-lanes").bounding_box()
    clip = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": lanes["y"] + lanes["height"] + 24}
    return Image.open(io.BytesIO(page.screenshot(clip=clip)))


def main() -> None:
    """One server, two visitors."""
    with serving() as (_, address), sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, (width, scale, scheme, alt) in SHOTS.items():
            size = {"width": width, "height": 1500}
            page = browser.new_page(viewport=size, device_scale_factor=scale, color_scheme=scheme)
            page.set_default_timeout(SLOW)
            page.goto(address)
            params = {"caption": build(*SCENE)[0], "lanes": [f"{lane.model}@{lane.steps}" for lane in default_lanes()]}
            params |= {"width": width, "scheme": scheme}
            source = "python tests/demo_figures.py"
            print(viz.save_figure(shot(page), name, source=source, params=params, seed=SEED, alt=alt))
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
