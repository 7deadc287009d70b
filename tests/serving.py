"""The HTTP server for tests: the demo model, or its tokenizer with another chat template, behind a real uvicorn."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

import moe_nvfp4
from moe_nvfp4.async_runner import AsyncMoERunner
from moe_nvfp4.engine.invariants import check
from moe_nvfp4.launch.http_app import create_app
from moe_nvfp4.launch.http_server import Server
from moe_nvfp4.launch.http_settings import ServerSettings
from moe_nvfp4.runner import MoERunner

DEMO = Path(moe_nvfp4.__file__).parent / "demo"

# What matters of the templates of Qwen3: roles, tools, calls, and how to switch the thinking off.
HERMES = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
<tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer"}, "exact": {"type": "boolean"}},
            "required": ["days", "exact"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}


def demo_with(folder: Path, template: str) -> Path:
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def demo_runner(folder: Path = DEMO, **settings: Any) -> MoERunner:
    chosen = {"device": "cpu", "max_batch_size": 8, "max_seq_len": 1024, "verbose": False} | settings
    return MoERunner.from_pretrained(folder, **chosen)


class Saying(AsyncMoERunner):
    """Makes the model say a text, by a grammar that allows nothing else."""

    text = ""

    def follow(self, prompts: Any, sampling: Any, receiver: Any) -> Any:
        return super().follow(prompts, replace(sampling, grammar=f"root ::= {json.dumps(self.text)}"), receiver)


def calls_of(days: int) -> str:
    call = json.dumps({"name": "weather", "arguments": {"days": days, "exact": True}})
    return f"\n<tool_call>\n{call}\n</tool_call>"


class Serving:
    """One server in a thread."""

    def __init__(self, runners: dict[str, MoERunner], settings: ServerSettings):
        self.runners = runners
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        asynchronous = {name: AsyncMoERunner(runner) for name, runner in runners.items()}
        self.app = create_app(asynchronous, settings)
        self.server: Server = self.app.state.server
        config = uvicorn.Config(self.app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        until(lambda: self._uvicorn.started)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self._uvicorn.serve(sockets=[self.listener])

        asyncio.run(serve())

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def value(self, name: str, **labels: str) -> float:
        """Of a metric, summed over the labels that are not given."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.server.metrics.registry.render().splitlines() if line[: len(name)] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))


@contextmanager
def serving(runners: dict[str, MoERunner], **settings: Any) -> Iterator[Serving]:
    one = Serving(runners, ServerSettings(**settings))
    one.start()
    try:
        yield one
        for runner in runners.values():
            if hasattr(runner, "cache"):  # it has not been closed
                require_free(runner)
        assert not one.server.relays
    finally:
        one.stop()


def require_free(runner: MoERunner, seconds: float = 10) -> None:
    """Every slot and page comes back."""
    scheduler = runner.engine.scheduler
    until(lambda: not scheduler.running and not scheduler.waiting, seconds)
    runner.engine.call(lambda: check(scheduler))
    assert runner.engine.free_slots == scheduler.limits.slots
    assert all(pool.held == 0 for pool in scheduler.memory.pools)


def until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
