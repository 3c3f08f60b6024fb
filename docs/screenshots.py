"""Make the pictures of docs/page.md anew: the page in a real browser, while it trains on dataset/mountain.

Needs the extra "test", chromium and chromedriver; on two cores a few minutes.
"""

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium.webdriver import ActionChains

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, page, wait  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
SIZE = (1280, 1000)  # pixels of the window
LARGEST = 150_000  # bytes of a picture
SHOWN_AT = 0.7  # share of the steps at which the run is photographed


def shoot(browser: Browser, name: str) -> None:
    """Write what the browser shows as a PNG file, with fewer colours where it would be too large."""
    ActionChains(browser.driver).move_by_offset(1, 1).click().move_by_offset(-1, -1).perform()  # what is open closes
    browser.driver.execute_script("window.scrollTo(0, 0)")
    time.sleep(1)  # what moves has come to rest
    picture = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
    path = PICTURES / f"page_{name}.png"
    for colours in (256, 128, 64, 32):
        picture.quantize(colours).save(path, optimize=True)
        if path.stat().st_size < LARGEST:
            break
    print(f"wrote {path}, {path.stat().st_size:,} bytes")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("dataset/robot", "dataset/mountain", "minilora"):  # as in a clone, so that paths are short
            shutil.copytree(ROOT / part, folder / part)
        with page(folder, code=folder) as address, Browser(address, f"{SIZE[0]},{SIZE[1]}") as browser:
            browser.choose("pictures-folder", "dataset/robot")
            wait(lambda: "robot" in browser.text("#captions"))
            shoot(browser, "pictures")

            browser.tab("Train")
            browser.click("start")
            steps = int(wait(lambda: browser.text("#headline").partition(" of ")[2].split(" ")[0], seconds=300))
            wait(lambda: _step(browser) >= SHOWN_AT * steps, seconds=3600)
            shoot(browser, "train")
            wait(lambda: browser.text("#headline").startswith("finished"), seconds=3600)

            browser.open(address)
            browser.tab("Draw")
            browser.choose("draw-loras", "out/mountain")
            browser.click("draw")
            browser.slide("draw-strength-0", 0.8)
            wait(lambda: browser.all("#picture img"))
            wait(lambda: "mountain:0.8" in browser.text("#draw-line textarea"))
            shoot(browser, "draw")

            browser.tab("Merge")
            browser.choose("merge-loras", "out/mountain")
            browser.slide("merge-strength-0", 0.8)
            browser.click("merge")
            wait(lambda: "wrote" in browser.text("#report textarea"))
            shoot(browser, "merge")


def _step(browser: Browser) -> int:
    words = browser.text("#headline").split()
    return int(words[1]) if words[:1] == ["step"] else 0


if __name__ == "__main__":
    main()
