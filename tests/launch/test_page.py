"""The page in headless Chromium, against a server whose answers are written here: what no small model says."""

import asyncio
import json
import re
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
import uvicorn  # noqa: E402
from fastapi import FastAPI, HTTPException, Request  # noqa: E402
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse  # noqa: E402
from serving import demo_runner, serving  # noqa: E402

from moe_nvfp4.launch.page import FILE, page_router  # noqa: E402
from moe_nvfp4.sampling import SamplingParams  # noqa: E402

BYTES = 25_000
MARKDOWN = """Read **this**, `x < 3` and *that*:

3. one <b>file</b>
4. two
still two

```python
a = "**not bold**"
```
# Title
- <img src=x onerror="document.title='broken in'">
- <script>document.title = 'broken in'</script>

[x](javascript:alert(1)) The end."""


class Script:
    """What the next answers are, and what was asked."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.pieces: list[dict[str, Any]] = []
        self.ends = True  # False: the connection ends in the middle of the answer
        self.hangs = False
        self.refusals: list[Response] = []
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.polls = 0

    def says(self, text: str, thought: str = "") -> None:
        self.pieces = [{"reasoning_content": word} for word in re.findall(r"\S+\s*", thought)]
        self.pieces += [{"content": text[at : at + 5]} for at in range(0, len(text), 5)]
        self.ends, self.hangs = True, False


def scripted(script: Script) -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "first"}, {"id": "second"}]}

    @app.get("/v1/experts")
    async def experts(model: str) -> dict[str, Any]:
        script.polls += 1
        if model == "second":
            raise HTTPException(404)
        counts = [[1, 2, 3, 4], [100 + 3 * script.polls, 10, 10, 10 + script.polls]]
        return {"model": model, "layers": [{"layer": 3 + row, "counts": one} for row, one in enumerate(counts)]}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        lines = (
            "# TYPE moe_nvfp4_requests_waiting gauge",
            'moe_nvfp4_requests_waiting{model="first"} 7',
            'moe_nvfp4_requests_waiting{model="second"} 90',
            'moe_nvfp4_pages_free{model="first",group="0"} 1000',
            'moe_nvfp4_pages_free{model="first",group="1"} 234',
        )
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        script.asked.append(await request.json())
        if script.refusals:
            return script.refusals.pop()
        return StreamingResponse(_stream(script), media_type="text/event-stream")

    return app


async def _stream(script: Script) -> AsyncIterator[str]:
    try:
        for delta in script.pieces:
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await asyncio.sleep(0.001)
        while script.hangs:
            await asyncio.sleep(0.05)
            yield ": still there\n\n"
    except asyncio.CancelledError:
        script.left.set()
        raise
    if script.ends:
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield _event({"choices": [], "usage": {"completion_tokens": 1234}}) + "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = [
        path for name in ("chromium-headless-shell", "chromium", "chromium-browser") if (path := shutil.which(name))
    ]
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        if not found and not Path(own).exists():
            pytest.skip("needs Chromium: `playwright install chromium`, or chromium on the PATH")
        browser = started.chromium.launch(executable_path=found[0] if found else own, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Script]]:
    script, listener = Script(), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(scripted(script), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/", script
    script.reset()  # nothing hangs any more
    server.should_exit = True
    thread.join(10)


@pytest.fixture(params=["light"])
def page(browser: Any, served: tuple[str, Script], request: pytest.FixtureRequest) -> Iterator[Any]:
    url, script = served
    script.reset()
    opened = browser.new_page(color_scheme=request.param)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda line: problems.append(line.text) if "Security Policy" in line.text else None)
    opened.goto(url)
    opened.get_by_role("option", name="second").wait_for(state="attached")
    yield opened
    opened.close()
    assert not problems


@pytest.fixture
def script(served: tuple[str, Script]) -> Script:
    return served[1]


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def ended(page: Any) -> None:
    page.get_by_role("button", name="Send").wait_for()


def test_the_real_server(browser: Any) -> None:
    """The demo model's answer, its gauges, and what they come from."""
    with demo_runner() as runner, serving({"demo": runner}) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_role("option", name="demo").wait_for(state="attached")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Most tokens").fill("12")
        ask(page, "Tell me a story")
        ended(page)
        messages = [{"role": "user", "content": "Tell me a story"}]
        offline = runner.generate(messages, SamplingParams(max_new_tokens=12))
        shown = page.get_by_role("article", name="Answer").inner_text()
        assert "Ended at the most tokens allowed." in shown
        for word in re.findall(r"[a-z]{4,}", offline.text):
            assert word in shown
        assert page.locator("#tokens").inner_text() == "12"
        page.get_by_text("Free pages").wait_for(timeout=10_000)
        assert int(page.locator("#gauges dd").last.inner_text().replace(",", "")) > 0
        page.close()


def test_one_small_file() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.encode()) <= BYTES
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text
    assert not re.findall(r"https?://", text)


def test_an_answer_in_markdown_cannot_break_out(page: Any, script: Script) -> None:
    script.says(MARKDOWN, thought="Let me think.")
    ask(page, "question <i>1</i>")
    ended(page)
    answer = page.get_by_role("article", name="Answer")
    assert page.get_by_role("article", name="You").inner_text() == "question <i>1</i>"
    assert answer.locator("strong").all_inner_texts() == ["this"]
    assert answer.locator("em").all_inner_texts() == ["that"]
    assert answer.locator("code").all_inner_texts() == ["x < 3", 'a = "**not bold**"']
    assert [" ".join(item.split()) for item in answer.locator("ol li").all_inner_texts()] == [
        "one <b>file</b>",
        "two still two",
    ]
    assert answer.locator("ol").get_attribute("start") == "3"
    assert answer.locator("ul li").count() == 2
    assert answer.locator("h3").inner_text() == "Title"
    assert answer.locator("img, script, a, b").count() == 0
    assert page.title() == "moe-nvfp4"
    assert not answer.get_by_text("Let me think.").is_visible()  # folded away
    answer.get_by_text("Thought for").click()
    assert answer.get_by_text("Let me think.").is_visible()
    assert page.locator("#tokens").inner_text() == "1234"  # the usage's, not a count of pieces
    assert float(page.locator("#speed").inner_text()) > 0
    assert page.locator("#first").inner_text().endswith(" s")
    assert "The end." in page.get_by_role("status").inner_text()  # read aloud once, when complete


def test_what_is_asked(page: Any, script: Script) -> None:
    script.says("Fine.")
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Most tokens").fill("99")
    page.get_by_label("Model", exact=True).select_option("second")
    page.get_by_label("Message").press_sequentially("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    ask(page, "more")
    ended(page)
    first, second = script.asked
    assert first["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert second["messages"][1:] == [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": "more"}]
    assert (first["model"], first["temperature"], first["max_tokens"], first["stream"]) == ("second", 0.2, 99, True)
    page.get_by_role("button", name="New chat").click()
    assert page.get_by_role("article").count() == 0
    ask(page, "anew")
    ended(page)
    assert len(script.asked[-1]["messages"]) == 1


@pytest.mark.parametrize("by", ["Escape", "button"])
def test_stop_ends_the_request(page: Any, script: Script, by: str) -> None:
    script.says("Half an answer")
    script.hangs = True
    ask(page, "go on for ever")
    page.get_by_text("Half an answer").first.wait_for()
    assert not page.get_by_role("button", name="Send").is_visible()
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.get_by_text("Stopped.").first.wait_for()
    assert script.left.wait(10)  # the server saw the client leave


def test_an_answer_that_was_cut_off_is_called_so(page: Any, script: Script) -> None:
    script.says("Half an answer")
    script.ends = False
    ask(page, "question")
    ended(page)
    assert page.locator(".problem").inner_text() == "The answer was cut off before its end."


def test_a_refusal_is_shown_and_can_be_tried_again(page: Any, script: Script) -> None:
    error = {"error": {"message": "The queue is full.", "type": "rate_limit_error"}}
    script.refusals = [JSONResponse(error, status_code=429, headers={"Retry-After": "3"})]
    script.says("At last.")
    ask(page, "question")
    ended(page)
    assert page.locator(".problem").inner_text() == "The queue is full. Try again in 3 s."
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("article", name="Answer").get_by_text("At last.").wait_for()
    assert page.get_by_role("article").count() == 2
    assert script.asked[0] == script.asked[1]


def test_an_error_within_the_stream(page: Any, script: Script) -> None:
    script.refusals = [PlainTextResponse(_event({"error": {"message": "The engine stopped."}}))]
    ask(page, "question")
    ended(page)
    assert page.locator(".problem").inner_text() == "The engine stopped."


def test_the_server_and_its_experts(page: Any, script: Script) -> None:
    busiest = page.get_by_text("Busiest: expert 0 of layer 4, 3.0 times its share.")
    busiest.wait_for(timeout=10_000)  # the second poll: 3 of 4 new tokens were expert 0's
    assert page.locator("#gauges").inner_text().split("\n") == ["Requests waiting", "7", "Free pages", "1,234"]
    assert page.get_by_role("img", name="Heat map of 2 layers").is_visible()
    page.get_by_label("Model", exact=True).select_option("second")
    page.locator("#experts").wait_for(state="hidden")  # no counts, no map
    polls = script.polls
    page.wait_for_timeout(4500)
    assert script.polls == polls  # and no more questions


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_contrast_and_names(page: Any, script: Script) -> None:
    """Text against its ground at least 4.5 to 1 in both schemes; everything that takes the focus has a name."""
    script.says("Some `code`.", thought="Hm.")
    ask(page, "question")
    ended(page)
    shown = page.evaluate(CONTRASTS)
    assert len(shown) > 15
    assert [entry for entry in shown if entry["ratio"] < 4.5] == []
    seen = set()
    page.get_by_label("Message").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(e => e === document.body ? 'end' : e.ariaLabel || (e.labels && e.labels[0] || e).innerText.trim())"
            "(document.activeElement)"
        )
        assert name
        seen.add(name)
    assert {"Message", "Send", "Model", "New chat", "Temperature", "Conversation"} <= seen
    phone = {"width": 360, "height": 640}
    page.set_viewport_size(phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= phone["width"]


CONTRASTS = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = e => { const c = numbers(getComputedStyle(e).backgroundColor);
    return c.length === 4 && c[3] === 0 ? (e.parentElement ? ground(e.parentElement) : [255, 255, 255]) : c; };
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && e.tagName !== "SCRIPT" &&
      [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return { text: e.textContent.trim().slice(0, 30), ratio: (a + .05) / (b + .05) };
  });
}"""
