"""The command as a process of its own, and a headless Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tc_streamlit_chat.store import Conversations, Store

TESTDATA = Path(__file__).resolve().parents[4] / "shared" / "testdata"
SECONDS = 60  # that anything may take on a busy machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", type=Path, help="Keep pictures of the browser chat's pages there.")


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of real models, which is not part of the repository."""
    if not TESTDATA.is_dir():
        pytest.skip("the test data beside the repository (../shared/testdata) is absent")
    return TESTDATA


@contextmanager
def command(*arguments: object, home: Path, folder: Path | None = None) -> Iterator[str]:
    """`torchchat browser` with these arguments, in a folder; its address."""
    environment = {**os.environ, "XDG_DATA_HOME": str(home / "data"), "XDG_CACHE_HOME": str(home / "cache"),
                   "XDG_CONFIG_HOME": str(home / "config"), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "torchchat_core", "browser", "--port", "0", *map(str, arguments)],
                               env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=None, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("Running on "):
            raise AssertionError(f"{line}")
        yield line.removeprefix("Running on ").strip()
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)


@pytest.fixture(scope="session")
def run_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Starts the command; the address. It ends with the session."""
    with ExitStack() as stack:
        def run(*arguments: object, folder: Path | None = None) -> str:
            return stack.enter_context(command(*arguments, home=tmp_path_factory.mktemp("home"), folder=folder))

        yield run


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    """The conversations of the page at `served`."""
    return Conversations(Store(tmp_path_factory.mktemp("conversations") / "c.sqlite3"), "")


@pytest.fixture(scope="session")
def served(run_browser: Callable[..., str], kept: Conversations) -> str:
    """The address of a page with the model that comes along."""
    return run_browser("--temperature", "0", "--conversations", kept.store.path)


class Page:
    """One Chromium, which has cookies and tabs of its own."""

    def __init__(self, width: int = 1280, height: int = 860, dark: bool = False) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                         "--force-color-profile=srgb", f"--window-size={width},{height}",
                         "--disable-background-networking"):
            options.add_argument(argument)
        options.binary_location = str(shutil.which("chromium"))
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.resize(width, height)
        self.scheme("dark" if dark else "light")

    def resize(self, width: int, height: int) -> None:
        """As on a screen of that size: a window cannot be as narrow as a phone."""
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})

    def scheme(self, name: str) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                    {"features": [{"name": "prefers-color-scheme", "value": name}]})

    def open(self, address: str) -> Page:
        self.driver.get(address)
        return self

    def wait(self, found: Callable[[], Any], what: str = "") -> Any:
        """What `found` gives once it gives something; elements may go away while the page is drawn anew."""
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException, WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        def look(_: Any) -> Any:
            try:
                return found()
            except (StaleElementReferenceException, WebDriverException, IndexError, StopIteration):
                return None

        try:
            return WebDriverWait(self.driver, SECONDS, poll_frequency=0.05).until(look)
        except TimeoutException:
            raise AssertionError(f"waited for {what or found}; the page says:\n{self.text[-1500:]}") from None

    def all(self, selector: str) -> list[Any]:
        from selenium.webdriver.common.by import By

        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> Any:
        return self.wait(lambda: next(iter(self.all(selector)), None), selector)

    @property
    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    @property
    def focused(self) -> str:
        """What takes keys: the name of a field or button."""
        return str(self.driver.execute_script("""
            const found = document.activeElement;
            return found.getAttribute('aria-label') || found.innerText || found.placeholder || ''""")).strip()

    def press(self, *keys: str, held: str | None = None) -> None:
        """Presses keys, wherever the focus is; `held`: while that one is down."""
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver)
        if held is not None:
            actions.key_down(held)
        actions.send_keys(*keys)
        if held is not None:
            actions.key_up(held)
        actions.perform()

    def sees(self, text: str) -> None:
        self.wait(lambda: text in self.text, text)

    def click(self, selector: str) -> None:
        """The first one that is seen: Streamlit has copies of some buttons, to measure them."""
        def clicked() -> bool:
            next(each for each in self.all(selector) if each.is_displayed()).click()
            return True

        self.wait(clicked, selector)

    def send(self, text: str) -> None:
        """Types a message, and Enter."""
        from selenium.webdriver.common.keys import Keys

        def typed() -> bool:
            field = self.all("[data-testid=stChatInputTextArea]")[0]
            if not field.is_enabled():
                return False
            field.send_keys(text, Keys.ENTER)
            return True

        self.wait(typed, "the field for messages")

    def messages(self, role: str) -> list[str]:
        """What was said, without the buttons and figures beside it."""
        return list(self.driver.execute_script("""
            const texts = '[data-testid=stText], [data-testid=stMarkdown]:not(:has([data-testid=stCaptionContainer]))';
            return [...document.querySelectorAll(arguments[0])].map(message =>
                [...message.querySelectorAll(texts)].map(text => text.innerText).join("\\n"))""",
                                               f"[class*=st-key-said-{role}]"))

    def answers(self, count: int) -> list[str]:
        """What the model said, once there are so many answers and none is being written."""
        def complete() -> list[str] | None:
            found = self.messages("assistant")
            return found if len(found) == count and not self.all(".st-key-stop") else None

        return list(self.wait(complete, f"{count} answers"))

    def fill(self, selector: str, text: str, *keys: str) -> None:
        """Types into a field, in place of what is there, and presses keys."""
        from selenium.webdriver.common.keys import Keys

        def filled() -> bool:
            field = self.all(selector)[0]
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(text or Keys.BACKSPACE, *keys)
            return True

        self.wait(filled, selector)


@pytest.fixture(scope="module")
def browsers() -> Iterator[Callable[..., Page]]:
    """Starts Chromium; every call another one."""
    pytest.importorskip("selenium")
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} cannot be found: install the packages chromium and chromium-driver")
    started: list[Page] = []

    def start(**settings: Any) -> Page:
        started.append(Page(**settings))
        return started[-1]

    yield start
    for page in started:
        page.driver.quit()
