"""The pages in a real Chromium: what a person does, and what he sees."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.figures import Details
from tc_streamlit_chat.pages.session import NAMED
from tc_streamlit_chat.store import Conversations

Browsers = Callable[..., Any]
PHONE = {"width": 390, "height": 844}
BEING_WRITTEN = """
    const stop = document.querySelector('.st-key-stop');
    return stop && stop.closest('[data-testid=stChatMessage]').querySelector('[data-testid=stMarkdown]')?.innerText"""
STORY = "Tell me a short story."


@pytest.fixture(scope="module")
def page(browsers: Browsers, served: str) -> Any:
    """A Chromium at the page."""
    return browsers().open(served)


def fresh(page: Any, address: str) -> Any:
    page.open(address)
    page.sees("What shall we talk about?")
    return page


def test_a_message_is_answered_as_it_comes_and_found_again_after_a_reload(page: Any, served: str) -> None:
    fresh(page, served).send(STORY)
    seen = set()
    deadline = time.monotonic() + 60
    while not page.all("[class*=st-key-said-assistant]") and time.monotonic() < deadline:
        seen.add(page.driver.execute_script(BEING_WRITTEN))
    answer = page.answers(1)[0]
    assert "tokens/s · first after" in page.text
    beginnings = {text for text in seen if text and answer.startswith(text[:40])}
    assert beginnings, f"the answer was not seen while it was written: {seen}"
    address = page.driver.current_url
    assert "?c=" in address
    page.driver.refresh()
    assert page.answers(1)[0] == answer
    assert STORY in page.text
    page.open(served)  # the page without an address of a conversation: it is in the list
    page.sees("What shall we talk about?")
    page.click(".st-key-conversations button")
    assert page.answers(1)[0] == answer
    assert page.driver.current_url == address


def asked(kept: Conversations, text: str, **settings: Any) -> str:
    """The end of the address of a conversation that waits for an answer."""
    conversation = kept.create(text, Configuration(**settings).to_json())
    kept.add(conversation, "user", [(text, Details())])
    return f"/?{NAMED}={conversation}"


# A bias against the end of an answer: it goes on until it is stopped.
ENDLESS = {"temperature": 1.0, "logit_bias": dict.fromkeys(range(5), -10000.0)}


def test_an_answer_is_stopped_and_made_again(page: Any, served: str, kept: Conversations) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(served + asked(kept, STORY, sampling=ENDLESS))
    page.click(".st-key-answer button")

    def stopped(press: Callable[[], object]) -> str:
        """The answer that is stopped. On a busy machine the press may come after the model's limit: once more, then."""
        for _ in range(5):
            page.wait(lambda: page.all(".st-key-stop") or "cut at the limit" in page.text, "an answer that is written")
            page.wait(lambda: re.search(r"\d+ tokens", page.text), "tokens of it")
            press()
            text = page.answers(1)[0]
            page.wait(lambda: "stopped" in page.text or "cut at the limit" in page.text, "the reason of its end")
            if "stopped" in page.text:
                return text
            page.click("[class*=st-key-again-] button")
        raise AssertionError("the answer was at its limit five times before it could be stopped")

    def stop_button() -> None:
        for button in page.all(".st-key-stop button")[:1]:
            button.click()

    first = stopped(stop_button)
    page.click("[class*=st-key-again-] button")
    second = stopped(lambda: page.press(Keys.ESCAPE))
    assert first
    assert re.search(r"(\d+) of \1", page.text)
    page.click("[class*=st-key-back-] button")
    page.wait(lambda: re.search(r"(\d+) of (?!\1)", page.text), "an earlier answer")
    assert page.answers(1)[0] != second


def test_a_message_is_edited_and_answered_anew(page: Any, served: str) -> None:
    fresh(page, served).send("What is torchchat?")
    first = page.answers(1)[0]
    page.click("[class*=st-key-edit-] button")
    page.fill("[class*=st-key-text-] textarea", "Who are you?")
    page.click("[data-testid=stBaseButton-primaryFormSubmit]")
    page.sees("I am the small model")
    assert page.answers(1)[0] != first
    assert page.messages("user") == ["Who are you?"]


def test_two_tabs_and_two_browsers_do_not_mix(page: Any, browsers: Browsers, served: str) -> None:
    other = fresh(browsers(), served)
    fresh(page, served)
    page.send(STORY)
    other.send("Who are you?")
    second = other.answers(1)[0]
    first = page.answers(1)[0]
    assert second.startswith("I am the small model")
    assert not first.startswith("I am the small model")
    address = page.driver.current_url
    page.driver.switch_to.new_window("tab")
    fresh(page, served).send("What can I do with torchchat?")
    third = page.answers(1)[0]
    assert third not in (first, second)
    page.driver.close()
    page.driver.switch_to.window(page.driver.window_handles[0])
    page.driver.get(address)
    assert page.answers(1)[0] == first


def test_an_answer_goes_to_its_conversation_when_the_tab_is_closed(page: Any, served: str) -> None:
    page.driver.switch_to.new_window("tab")
    fresh(page, served).send(STORY)
    page.wait(lambda: "?c=" in page.driver.current_url)
    address = page.driver.current_url
    page.driver.close()
    page.driver.switch_to.window(page.driver.window_handles[0])
    page.open(address)
    assert page.answers(1)[0]


def test_settings_are_applied_and_wrong_ones_are_told(page: Any, served: str) -> None:
    from selenium.webdriver.common.keys import Keys

    fresh(page, served).click(".st-key-settings button")
    page.sees("Executor")
    page.wait(lambda: page.all("[data-testid=stTab]"))[2].click()
    page.fill("[class*=st-key-seed-] input", "many", Keys.TAB)
    page.sees("seed is 'many'; it has to be a whole number")
    page.fill("[class*=st-key-seed-] input", "7", Keys.TAB)
    page.wait(lambda: page.all("[data-testid=stTab]"))[1].click()
    page.fill("[class*=st-key-length-] input", "4", Keys.TAB)
    page.click("[class*=st-key-apply-] button")
    page.wait(lambda: not page.all("[data-testid=stDialog]"))
    page.send(STORY)
    page.answers(1)
    page.sees("4 tokens")
    page.sees("cut at the limit")


def test_everything_can_be_done_with_the_keyboard(page: Any, served: str) -> None:
    from selenium.webdriver.common.keys import Keys

    fresh(page, served).send("Who are you?")
    page.answers(1)
    page.press(Keys.ESCAPE)
    page.press("n", held=Keys.ALT)
    page.sees("What shall we talk about?")
    names = set()
    for _ in range(30):
        page.press(Keys.TAB)
        names.add(page.focused)
    wanted = ("New conversation", "Search conversations", "Settings", "Write a message", "Compare", "Measure")
    assert all(any(word in name for name in names) for word in wanted), names
    assert not any("Fullscreen" in name for name in names)  # of a picture that is no picture


def test_what_is_typed_goes_to_the_message_or_to_what_is_edited(page: Any, served: str) -> None:
    from selenium.webdriver.common.keys import Keys

    fresh(page, served)
    page.wait(lambda: page.focused == "Write a message", "the focus on a page that was just loaded")
    page.press("Who are you?", Keys.ENTER)
    page.answers(1)
    assert page.focused == "Write a message"
    page.driver.execute_script("document.activeElement.blur()")
    page.press("rc")  # for which Streamlit has shortcuts
    assert page.driver.switch_to.active_element.get_attribute("value") == "rc"
    page.click("[class*=st-key-said-user] [class*=st-key-edit-] button")
    page.wait(lambda: page.focused == "Edit the message", "the focus in what is edited")
    page.press(" really?", Keys.ESCAPE)
    page.wait(lambda: not page.all("[class*=st-key-text-]"), "the end of editing")
    page.wait(lambda: page.focused == "Write a message", "the focus after editing")
    page.click("[class*=st-key-said-assistant] [class*=st-key-edit-] button")
    page.wait(lambda: page.focused == "Edit the message", "the focus in what is edited")
    page.press(" Really.")
    page.press(Keys.ENTER, held=Keys.CONTROL)
    page.sees("edited by hand")
    assert page.messages("user") == ["Who are you?"]
    assert page.answers(1)[0].endswith(" Really.")


def test_what_is_written_during_an_answer_is_sent_after_it(page: Any, served: str, kept: Conversations) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(served + asked(kept, STORY, sampling=ENDLESS))
    page.click(".st-key-answer button")
    page.one(".st-key-stop")
    page.send("Forget this.")
    page.click(".st-key-take-back button")
    page.wait(lambda: not page.all(".st-key-said-user-waiting"), "the end of what was taken back")
    page.send("Who are you?")
    page.sees("Sent after this answer.")
    page.driver.refresh()
    page.sees("Sent after this answer.")
    page.press(Keys.ESCAPE)
    page.wait(lambda: len(page.messages("user")) == 2 and len(page.messages("assistant")) == 1, "the next question")
    page.press(Keys.ESCAPE)
    page.answers(2)
    assert page.messages("user") == [STORY, "Who are you?"]


def test_a_conversation_is_renamed_searched_exported_and_deleted(page: Any, served: str) -> None:
    from selenium.webdriver.common.keys import Keys

    fresh(page, served).send("Who are you?")
    page.answers(1)
    menu = "[data-testid=stPopoverBody]"
    page.click("[class*=st-key-more-] button")
    page.sees("Export as Markdown")
    page.sees("Export as JSON")
    title = "A *quiet* :red[xylotheque] <b> a -> b :smile:"
    page.fill("[class*=st-key-title-] input", title, Keys.ENTER)
    page.wait(lambda: page.text.replace("\u2060", "").count(title) == 2, "the title, here and in the list")
    page.wait(lambda: not page.all(menu), "the end of the menu")
    assert page.driver.title == f"{title} \u00b7 torchchat"
    page.fill(".st-key-search input", "XYLOTHEQUE")  # found while it is typed
    page.wait(lambda: len(page.all("[class*=st-key-open-]")) == 1)
    page.fill(".st-key-search input", "no such words")
    page.sees("No conversation has these words.")
    page.fill(".st-key-search input", "")
    page.wait(lambda: page.all("[class*=st-key-open-]"))
    page.click("[class*=st-key-more-] button")
    page.click(".st-key-delete button")
    page.sees("Delete this conversation?")
    page.wait(lambda: not page.all(menu), "the end of the menu, which would cover the question")
    page.click(".st-key-delete-now button")
    page.sees("What shall we talk about?")
    assert "quiet" not in page.text


# Sends both clicks at once, so that the server skips the run in which the menu is open, as on a busy machine.
OPEN_AND_DELETE = """
    const done = arguments[0], send = WebSocket.prototype.send, held = [];
    WebSocket.prototype.send = function(data) { held.push(() => send.call(this, data)); };
    document.querySelector("[class*=st-key-more-] button").click();
    (function look() {
        const button = document.querySelector(".st-key-delete button");
        if (!button) return setTimeout(look);
        button.click();
        setTimeout(() => {
            WebSocket.prototype.send = send;
            for (const each of held) each();
            done(held.length);
        }, 500);
    })()"""


def test_the_menu_closes_if_both_clicks_reach_the_server_at_once(page: Any, served: str, kept: Conversations) -> None:
    conversation = kept.create("Soon deleted", Configuration().to_json())
    kept.add(conversation, "user", [("Hello", Details())])
    page.open(f"{served}/?{NAMED}={conversation}")
    page.one("[class*=st-key-more-] button")
    assert page.driver.execute_async_script(OPEN_AND_DELETE) == 2
    page.sees("Delete this conversation?")
    page.wait(lambda: not page.all("[data-testid=stPopoverBody]"), "the end of the menu")
    page.click(".st-key-delete-now button")
    page.sees("What shall we talk about?")


def test_what_a_model_writes_does_nothing(page: Any, served: str) -> None:
    """The text is put in the place of an answer, since no small model writes such things."""
    fresh(page, served).send("Who are you?")
    page.answers(1)
    page.click("[class*=st-key-said-assistant] [class*=st-key-edit-] button")
    page.fill("[class*=st-key-text-] textarea", "<script>document.title='taken'</script>"
              "<img src=x onerror=\"document.title='taken'\"> "
              "![](http://attacker.example/x.png) [go](javascript:document.title='taken') costs $5 and $6")
    page.click("[data-testid=stBaseButton-primaryFormSubmit]")
    page.sees("costs $5 and $6")
    page.one("[class*=st-key-info-]")  # the whole answer has been drawn
    assert page.driver.title == "Who are you? \u00b7 torchchat"
    assert "<script>" in page.text
    asked = [json.loads(each["message"])["message"] for each in page.driver.get_log("performance")]
    urls = [each["params"]["response"]["url"] for each in asked if each["method"] == "Network.responseReceived"]
    assert urls
    assert all(url.startswith((served, "data:", "blob:", "chrome")) for url in urls), urls


WRITTEN = """So \\[ x^2 \\] holds, and $$ y $$ too.

```python
print(1)
```

![a cat](https://example.org/cat.png)"""


def test_an_answer_is_copied_and_its_parts_are_drawn(page: Any, served: str, kept: Conversations) -> None:
    conversation = kept.create("Formulas", Configuration().to_json())
    kept.add(conversation, "user", [("Show me", Details())])
    kept.add(conversation, "assistant", [(WRITTEN, Details(model="small, eager", reason="stop"))])
    page.open(f"{served}/?{NAMED}={conversation}")
    page.sees("print(1)")
    assert len(page.all(".katex-display")) == 2
    assert [link.get_attribute("href") for link in page.all(".stChatMessage a")] == ["https://example.org/cat.png"]
    language = "return getComputedStyle(document.querySelector('.stChatMessage .stCode'), '::before').content"
    page.wait(lambda: page.driver.execute_script(language) == '"python"', "the language of the code block")
    page.driver.execute_cdp_cmd("Browser.grantPermissions",
                                {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    page.click("[class*=st-key-copy-] button")
    copied = "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)))"
    page.wait(lambda: page.driver.execute_async_script(copied) == WRITTEN, "the answer in the clipboard")


def test_the_figures_of_an_answer_open_below_it(page: Any, served: str, kept: Conversations) -> None:
    conversation = kept.create("Figures", Configuration().to_json())
    for text in ("First", "Second"):
        kept.add(conversation, "user", [(text, Details())])
        kept.add(conversation, "assistant", [(f"{text} answer.", Details(model="small, eager", reason="stop"))])
    page.open(f"{served}/?{NAMED}={conversation}")
    page.sees("Second answer.")
    page.click("[class*=st-key-info-] button")
    figures = page.one("[class*=st-key-figures-]")
    top, bottom = (page.driver.execute_script("return arguments[0].getBoundingClientRect().top", each)
                   for each in (page.one("[class*=st-key-tools-]"), page.all("[class*=st-key-said-user]")[1]))
    assert top < figures.rect["y"] - page.driver.execute_script("return scrollY") < bottom
    page.click("[class*=st-key-info-] button")
    page.wait(lambda: not page.all("[class*=st-key-figures-]"), "the end of the figures")


CONTROLS = {"button", "textbox", "searchbox", "combobox", "link", "spinbutton", "switch", "tab", "radio"}


def test_every_button_and_field_has_a_name_for_a_screen_reader(page: Any, served: str, kept: Conversations) -> None:
    conversation = kept.create("Names", Configuration().to_json())
    kept.add(conversation, "user", [("Hello", Details())])
    kept.add(conversation, "assistant", [("Hello!", Details(model="small, eager", reason="stop")), ("Hi!", Details())])
    for path in (f"/?{NAMED}={conversation}", "/compare", "/measure"):
        page.open(served + path)
        page.one("button[data-testid^=stBaseButton]")
        page.wait(lambda: not page.all("[data-testid=stStatusWidget]"), "the end of drawing")
        nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        names = [(each["role"]["value"], each.get("name", {}).get("value", "")) for each in nodes
                 if not each["ignored"] and each["role"]["value"] in CONTROLS]
        assert names
        assert all(name.strip() and not re.search(r"\w_\w", name) for _, name in names), (path, names)


def test_two_models_are_compared(page: Any, served: str, request: pytest.FixtureRequest) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(f"{served}/compare")
    page.sees("Both are the same now")
    page.one(".st-key-compared-prompt textarea").send_keys("Who are you?")
    page.fill("[class*=st-key-recipe-compare-right] input", "linear:int8", Keys.ENTER)
    page.click(".st-key-ask-both button")
    page.sees("nswers are the same")
    assert "Both are the same now" not in page.text
    assert "linear:int8" in page.one(".st-key-compared-right").text
    page.click(".st-key-verify button")
    page.sees("Mean KL divergence")
    page.sees("agree")
    page.resize(1280, 1500)
    pictured(page, request, "compare")
    page.resize(1280, 860)


def test_what_recipes_cost_is_measured_and_drawn(page: Any, run_browser: Callable[..., str], testdata: Any,
                                                 request: pytest.FixtureRequest) -> None:
    address = run_browser("TinyStories-656K", "--temperature", "0", folder=testdata / "hf")
    page.open(address)
    page.sees("How does the story begin?")  # it has no chat template
    page.open(f"{address}/measure")
    page.sees("Executors")
    page.wait(lambda: [each for each in page.all(".st-key-kind button") if each.text == "Quality"])[0].click()
    page.sees("What each recipe costs")
    page.click(".st-key-measure-now button")
    page.sees("Measurements")
    page.driver.switch_to.frame(page.one("iframe"))
    page.sees("perplexity")
    assert "TinyStories-656K" in page.text
    page.driver.switch_to.default_content()
    assert "What each recipe costs" in page.text
    page.resize(1280, 1250)
    pictured(page, request, "measure")
    page.resize(1280, 860)


@pytest.mark.parametrize(("name", "settings", "dark"), [
    ("light", {"width": 1280, "height": 860}, False), ("dark", {"width": 1280, "height": 860}, True),
    ("phone", PHONE, False)])
def test_it_is_readable_in_light_and_dark_and_on_a_phone(page: Any, served: str, name: str, settings: dict[str, int],
                                                         dark: bool, request: pytest.FixtureRequest) -> None:
    page.scheme("dark" if dark else "light")
    page.resize(**settings)
    try:
        fresh(page, served)
        pictured(page, request, f"welcome-{name}")
        page.send(STORY)
        page.answers(1)
        assert contrast(page, "[class*=st-key-said-assistant] p") > 4.5
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= settings["width"]
        avatars = [each.is_displayed() for each in page.all("[data-testid^=stChatMessageAvatar]")]
        assert avatars == [name != "phone"] * 2
        pictured(page, request, f"chat-{name}")
    finally:
        page.scheme("light")
        page.resize(1280, 860)


def test_buttons_can_be_read_and_stay_in_reach(page: Any, served: str, kept: Conversations) -> None:
    conversation = kept.create("A long one", Configuration().to_json())
    for _ in range(12):
        kept.add(conversation, "user", [(STORY, Details())])
        kept.add(conversation, "assistant", [("Once upon a time.\n\n" * 5, Details())])
    page.scheme("dark")
    try:
        page.open(f"{served}/?{NAMED}={conversation}")
        page.answers(12)
        page.wait(lambda: page.driver.execute_script(
            "return document.querySelector('[data-testid=stAppScrollToBottomContainer]').scrollTop > 1000"), "the end")
        page.click(".st-key-settings button")  # of the heading
        page.sees("Executor")
        assert contrast(page, "[class*=st-key-apply-] button") > 4.5
        assert contrast(page, "[data-testid=stTab][aria-selected=true]") > 4.5
    finally:
        page.scheme("light")


def test_on_a_phone_the_list_makes_way_for_what_was_chosen(page: Any, served: str, kept: Conversations) -> None:
    conversation = kept.create("Chosen on a phone", Configuration().to_json())
    kept.add(conversation, "user", [("Good morning", Details())])
    page.resize(**PHONE)
    try:
        fresh(page, served)
        page.click("[data-testid=stExpandSidebarButton]")
        page.click(f".st-key-open-{conversation} button")
        page.wait(lambda: page.messages("user") == ["Good morning"], "the conversation")
        page.wait(lambda: page.driver.execute_script("""
            const side = document.querySelector('[data-testid=stSidebar]').getBoundingClientRect();
            return side.right <= 1 || side.width < 1"""), "the end of the list")
    finally:
        page.resize(1280, 860)


def contrast(page: Any, selector: str) -> float:
    """Between a text and what is behind it, as WCAG 2 has it."""
    page.one(selector)
    found = page.driver.execute_script("""
        const text = document.querySelector(arguments[0]);
        let behind = text;
        while (getComputedStyle(behind).backgroundColor.match(/, 0\\)$/)) behind = behind.parentElement;
        return [getComputedStyle(text).color, getComputedStyle(behind).backgroundColor];""", selector)
    lights = [_luminance([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) for colour in found]
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def _luminance(channels: list[float]) -> float:
    linear = [each / 255 / 12.92 if each <= 10 else ((each / 255 + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def pictured(page: Any, request: pytest.FixtureRequest, name: str) -> None:
    """A picture of the page, where the command line asks for such."""
    folder = request.config.getoption("--screenshots", default=None)
    if folder is not None:
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 1, "y": 1})
        page.driver.execute_async_script("""
            const done = arguments[0];  // once nothing moves any more
            const ending = document.getAnimations().filter(each => each.effect.getComputedTiming().endTime < Infinity);
            Promise.allSettled(ending.map(each => each.finished)).then(() => setTimeout(done, 300))""")
        page.driver.save_screenshot(str(folder / f"browser-{name}.png"))
