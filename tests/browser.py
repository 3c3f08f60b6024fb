"""The page in a real browser: Debian's chromium without a window, driven by selenium."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).parents[1]
LACKING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


@contextmanager
def page(folder: Path, *words: str, code: Path = ROOT) -> Iterator[str]:
    """Start minilora-page, with the package that lies in `code`, in a folder, and yield its address."""
    command = [sys.executable, "-m", "minilora.apps.page", *words, "--port", "0"]
    with open(folder / "page.log", "w") as log:
        env = os.environ | {"PYTHONPATH": str(code)}
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        yield wait(lambda: re.search(r"http://\S+", (folder / "page.log").read_text()), process)[0]
    finally:
        process.terminate()
        process.wait(20)


def wait(look: Callable, process: subprocess.Popen | None = None, seconds: float = 120):
    """Return the first result of `look` that is true."""
    end, result = time.monotonic() + seconds, None
    while not result:
        with suppress(WebDriverException):  # the page is made anew at that moment
            result = look()
        if time.monotonic() > end or (process and process.poll() is not None):
            raise TimeoutError(f"what was waited for did not come in {seconds:.0f} s")
        if not result:
            time.sleep(0.1)
    return result


class Browser:
    """A browser that shows the page; fields and buttons are found by their ids."""

    def __init__(self, address: str, size: str = "1280,960"):
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.open(address)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        self.driver.quit()

    def open(self, address: str) -> None:
        self.driver.get(address)
        wait(lambda: self.all("button[role=tab]"))

    def all(self, css: str) -> list:
        return [element for element in self.driver.find_elements(By.CSS_SELECTOR, css) if element.is_displayed()]

    def one(self, css: str):
        return wait(lambda: self.all(css))[0]

    def tab(self, name: str) -> None:
        wait(lambda: [tab.click() or tab for tab in self.all("button[role=tab]") if tab.text == name])

    def click(self, name: str) -> None:
        wait(lambda: [button.click() or button for button in self.all(f"#{name}")])

    def text(self, css: str) -> str:
        """Return the text of an element, or what stands in it if it is a field."""
        found = self.all(css)
        return (found[0].get_attribute("value") or found[0].text) if found else ""

    def type(self, name: str, text: str) -> None:
        """Put a text into a field, in place of what is there."""
        field = self.one(f"#{name} textarea, #{name} input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def choose(self, name: str, text: str) -> None:
        """Choose in a field that has several things to choose from."""
        field = self.one(f"#{name} input")
        field.click()
        wait(lambda: self.is_typed(field, text))  # on a busy machine the page puts the old text back once
        field.send_keys(Keys.ENTER, Keys.TAB)
        self.driver.execute_script("document.activeElement.blur()")

    def is_typed(self, field, text: str) -> bool:
        """Type a text in place of what stands in a field; False if something else stands there afterwards."""
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        return field.get_attribute("value") == text

    def slide(self, name: str, value: float) -> None:
        """Move a slider, as a hand does: the page hears of it at once."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        self.driver.execute_script(script, self.one(f"#{name} input[type=range]"), str(value))
