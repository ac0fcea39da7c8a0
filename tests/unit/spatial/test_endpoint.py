"""Asking a server, which a thread of this test is."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from surgery.data.spatial.items import Item
from surgery.errors import ResourceError, UsageError
from surgery.evals.spatial.endpoint import ask_endpoint, client
from surgery.evals.spatial.evaluate import Asking

pytest.importorskip("openai")
SEEN: list[dict] = []


class Server(BaseHTTPRequestHandler):
    """Answers "left" with probability 1/2, and refuses the model "absent"."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN.append(body)
        absent = body["model"] == "absent"
        first = {"token": "left", "logprob": -0.6931471805599453, "bytes": None, "top_logprobs": []}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": " left "}}
        choice["logprobs"] = {"content": [first], "refusal": None}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps({"error": {"message": "no such model"}} if absent else reply).encode()
        self.send_response(404 if absent else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    SEEN.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_with_picture_and_question(url: str, scenes: list[Item]) -> None:
    rows = list(ask_endpoint(client(url), "m", scenes[:5], Asking(batch=2, max_new_tokens=7)))
    assert [r["id"] for r in rows] == [i.id for i in scenes[:5]]
    assert all(r["answers"]["base"]["said"] == "left" and r["confidence"] == pytest.approx(0.5) for r in rows)
    picture, text = SEEN[0]["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text["text"] in {i.question for i in scenes[:5]} and SEEN[0]["max_tokens"] == 7


def test_a_request_that_fails_names_the_item_and_the_cause(url: str, scenes: list[Item]) -> None:
    with pytest.raises(ResourceError, match="no such model") as caught:
        list(ask_endpoint(client(url), "absent", scenes[:1], Asking()))
    assert scenes[0].id in caught.value.message and "--resume" in caught.value.hint


def test_a_server_is_not_steered(url: str, scenes: list[Item]) -> None:
    with pytest.raises(UsageError, match="base alone"):
        list(ask_endpoint(client(url), "m", scenes[:1], Asking(("scaling",), alpha=2.0)))
    with pytest.raises(UsageError, match="no URL"):
        client("localhost:8000")
    assert SEEN == []
