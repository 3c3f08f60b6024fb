"""The gallery opens in a real browser without errors, and each of its sliders changes its picture."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Put into a copy of the page: takes down errors, moves the sliders, and leaves what it saw as text.
WATCH = """
<script>
  const errors = [];
  addEventListener("error", (event) => errors.push(event.message || event.target.src), true);
</script>
"""
MOVE = """
<script>
  for (const figure of document.querySelectorAll("figure")) {  // a background that does not load is no error of its own
    const picture = document.createElement("img");
    picture.src = getComputedStyle(figure.querySelector(".window")).backgroundImage.slice(5, -2);
    picture.style.display = "none";
    document.body.append(picture);
  }
  addEventListener("load", () => {
    const sliders = [...document.querySelectorAll("input")];
    const seen = (slider) => [...slider.closest("figure").querySelectorAll(".window")]
      .map((window) => getComputedStyle(window).backgroundPosition).join();
    const moved = sliders.map((slider) => {
      const places = [];
      for (let n = +slider.min; n <= +slider.max; n++) {
        slider.value = n;
        slider.dispatchEvent(new Event("input"));
        places.push(seen(slider) + " " + slider.nextElementSibling.textContent);
      }
      slider.value = slider.name === MOVED ? slider.max : slider.min;
      slider.dispatchEvent(new Event("input"));
      const box = slider.closest("figure").querySelector(".windows").getBoundingClientRect();
      return {name: slider.name, places, box: [box.left, box.top, box.right, box.bottom]};
    });
    const result = document.createElement("pre");
    result.id = "result";
    result.textContent = JSON.stringify({errors, sliders: moved});
    document.body.append(result);
  });
</script>
"""


def chromium(folder: Path, moved: str, *options: str) -> str:
    """Open a copy of the page with the sliders called `moved` at their ends; return what is printed."""
    page = folder / "docs" / "index.html"
    shutil.copytree(DOCS / "pictures", page.parent / "pictures", dirs_exist_ok=True)
    text = (DOCS / "index.html").read_text()
    page.write_text(text.replace("<style>", WATCH + "<style>", 1) + MOVE.replace("MOVED", json.dumps(moved)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command += ["--window-size=1200,8000", f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def screenshot(folder: Path, moved: str) -> np.ndarray:
    path = folder / f"shot{moved}.png"
    chromium(folder, moved, f"--screenshot={path}")
    return np.array(Image.open(path).convert("RGB"))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_each_slider_changes_its_picture(tmp_path):
    found = re.search(r'<pre id="result">(.*?)</pre>', chromium(tmp_path, "", "--dump-dom"), re.DOTALL)
    assert found, "the page did not finish loading"
    seen = json.loads(found[1])
    assert seen["errors"] == []
    assert len(seen["sliders"]) >= 4
    at_start = screenshot(tmp_path, "")
    for name in ("--x", "--y"):
        moved = screenshot(tmp_path, name)
        for slider in seen["sliders"]:
            assert len(set(slider["places"])) == len(slider["places"]) > 1
            left, top, right, bottom = map(round, slider["box"])
            changed = (moved != at_start)[top:bottom, left:right].mean()
            if slider["name"] == name:
                assert changed > 0.05, slider  # of the bytes: another picture, not a label that changes


def test_every_picture_and_page_of_the_docs_exists():
    for page in [*DOCS.glob("*.md"), DOCS / "index.html"]:
        targets = re.findall(r"\]\(([^)#]+)\)|(?:src|href)=\"([^\"#]+)\"|url\(([^)]+)\)", page.read_text())
        for target in {t for found in targets for t in found if t and not t.startswith("http")}:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
