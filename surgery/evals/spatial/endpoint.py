"""The same questions to a server that speaks OpenAI's protocol (vLLM, SGLang, TGI, llama.cpp), for `base` alone.

A server runs its own kernels, so attention cannot be steered there. Requests go out in parallel; the confidence is that
of the first token if the server gives log-probabilities, and else unknown.
"""

import base64
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from surgery.data.spatial.items import Item
from surgery.errors import CheckpointError, ResourceError, UsageError, printable
from surgery.evals.spatial.evaluate import Asking, Row, grouped, judge

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def client(url: str, *, key: str | None = None, timeout: float = 120.0) -> Any:
    """A client of the server at `url` ("http://localhost:8000/v1"). Raises UsageError, ResourceError."""
    if not url.startswith(("http://", "https://")):
        raise UsageError("endpoint", f"--endpoint {printable(url)}: no URL", hint="http://localhost:8000/v1")
    try:
        import openai
    except ImportError:
        raise ResourceError(
            "missing-package", "endpoints need the openai client", hint="install surgery[endpoint]"
        ) from None
    return openai.OpenAI(base_url=url, api_key=key or "none", timeout=timeout, max_retries=2)


def ask_endpoint(server: Any, model: str, items: Sequence[Item], asking: Asking) -> Iterator[Row]:
    """A record an item, as they come, in the order of `items`; `asking.batch` requests at a time.

    Raises UsageError for other methods than base, ResourceError naming what the server answered when a request fails.
    """
    if asking.methods != ("base",) or asking.answer != "generate":
        raise UsageError(
            "endpoint",
            "a server answers method base alone, by generating",
            hint="leave out --endpoint to steer a local checkpoint",
        )
    with ThreadPoolExecutor(asking.batch) as pool:
        futures = [pool.submit(_ask, server, model, item, asking) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _ask(server: Any, model: str, item: Item, asking: Asking) -> Row:
    import openai

    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(p)}} for p in item.images]
    content.append({"type": "text", "text": item.question})
    began = time.perf_counter()
    try:
        reply = server.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=asking.max_new_tokens,
            temperature=0,
            seed=asking.seed,
            logprobs=True,
        )
        choice = reply.choices[0]
    except openai.AuthenticationError:
        raise ResourceError(
            "endpoint", "the server refused the key", hint="set OPENAI_API_KEY to the server's key"
        ) from None
    except (openai.OpenAIError, IndexError, TypeError) as err:
        raise ResourceError(
            "endpoint",
            f"item '{printable(item.id)}': {type(err).__name__}: {printable(str(err), limit=160)}",
            hint="is the server up, and CKPT one of its models' names? Go on with --resume",
        ) from err
    first = choice.logprobs.content[0].logprob if choice.logprobs and choice.logprobs.content else None
    text = (choice.message.content or "").strip()
    return {
        "id": item.id,
        "gold": item.answer,
        "group": grouped(item),
        "options": list(item.options),
        "confidence": None if first is None else math.exp(first),
        "seconds": round(time.perf_counter() - began, 4),
        "answers": {"base": judge(item, text) | {"alpha": 1.0}},
    }


def _data_url(path: Path) -> str:
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise CheckpointError("bad-image", f"{path}: of no kind that is sent", hint=f"one of {', '.join(_KINDS)}")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
