"""Pictures of a page of runs, for the documentation: ``python bench/screenshot.py PAGE.html docs/show``.

Writes ``docs/show-light.png`` and ``docs/show-dark.png``: the beginning of the page as a browser draws it in the two
schemes, with few enough colours to be small. Needs playwright (``make test`` installs it) and a chromium of the system.
"""

import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1100, 980
COLOURS = 64
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def main(page: Path, pictures: str) -> None:
    """Draw the top of ``page`` into ``<pictures>-light.png`` and ``<pictures>-dark.png``."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium on this machine (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in SCHEMES:
            context = browser.new_context(color_scheme=scheme, viewport={"width": WIDTH, "height": HEIGHT})
            shown = context.new_page()
            shown.goto(page.resolve().as_uri())
            drawn = Image.open(BytesIO(shown.screenshot())).convert("RGB").quantize(COLOURS)
            target = Path(f"{pictures}-{scheme}.png")
            drawn.save(target, optimize=True)
            print(target, target.stat().st_size, "bytes")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
