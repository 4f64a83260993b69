"""Requests of vllm_run.py to a server of vLLM, which is started as a user starts it."""

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from start_times import free_port, wait_for
from vllm_cases import MAX_NEW_TOKENS, generate, prompt_inputs, user, write_video

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from documents import code_blocks  # noqa: E402
from processes import Program  # noqa: E402

_SECONDS_TO_ANSWER = 600


class Server:
    """`python -m vllm.entrypoints.openai.api_server` with its checkpoint and the folder that it may read.

    Attributes:
        seconds_to_start: wall time until it answers.
        replies: all that it sent.
    """

    def __init__(self, python: Path, checkpoint: Path, media: Path, environ: dict[str, str]) -> None:
        port = free_port()
        self.url, self.replies = f"http://127.0.0.1:{port}", []
        command = (
            *(
                python,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                checkpoint,
                "--served-model-name",
                "tiny",
            ),
            *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--enable-log-requests"),
            "--trust-request-mm-kwargs",
            *("--allowed-local-media-path", media, "--host", "127.0.0.1", "--port", port),
        )
        begin = time.monotonic()
        self.program = Program(command, cwd=media, env=environ, merge=True)
        try:
            wait_for(f"{self.url}/health", self.program)
        except BaseException:
            self.program.end()
            raise
        self.seconds_to_start = time.monotonic() - begin

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.program.process.terminate()
        self.program.end(timeout=60)

    def ask(self, messages: Sequence[dict[str, Any]], **options: Any) -> tuple[int, Any]:
        """(HTTP status, ids of the answer or the message of the error).

        Raises:
            RuntimeError: without a reply; with the end of the server's log.
        """
        body = {
            "model": "tiny",
            "messages": messages,
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
            "return_token_ids": True,
            **options,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER) as reply:
                status, text = reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        except OSError as error:
            log = self.program.stdout[-5000:]
            raise RuntimeError(
                f"no reply within {_SECONDS_TO_ANSWER} s ({error!r}); log of the server:\n{log}"
            ) from None
        self.replies.append(text)
        reply = json.loads(text)
        return status, reply["choices"][0]["token_ids"] if status == 200 else reply["error"]["message"]


# -- What is asked


def check_server(server: Server, folder: Path, files: dict[str, Path], model: Any, processor: Any) -> dict[str, bool]:
    """Sends requests of all kinds; returns, for each check, whether the answer was right."""
    cases = json.loads((folder / "conversations.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    with ThreadPoolExecutor(8) as pool:
        replies = dict(zip(cases, pool.map(server.ask, cases.values()), strict=True))
    results = {f"file: URL, {name}": reply == (200, expected[name]) for name, reply in replies.items()}
    for name in ("image, wide", "video, long", "one video twice"):
        results[f"data: URL, {name}"] = server.ask(_with_data_urls(cases[name])) == (200, expected[name])

    what = "What happens in the video?"
    few = generate(model, processor, [user(files["long"], what)], num_frames=3)
    assert few != expected["video, long"], "the option shows nothing"
    reply = server.ask([user(files["long"], what)], mm_processor_kwargs={"num_frames": 3})
    results["mm_processor_kwargs"] = reply == (200, few)

    results["docs/serve.md"] = _run_document(server, files["long"], processor)
    results |= _check_equal_sizes(server, files["short"].parent, model, processor)
    results |= _check_errors(server, files, what)
    results["answers after errors"] = server.ask(cases["video, long"]) == (200, expected["video, long"])
    return results


def _run_document(server: Server, video: Path, processor: Any) -> bool:
    """The block of docs/serve.md that asks a server with OpenAI's client."""
    (block,) = [block for block in code_blocks("docs/serve.md", "py") if "file:///data/clip.mp4" in block]
    for name, value in (
        ("http://localhost:8000", server.url),
        ("file:///data/clip.mp4", video.as_uri()),
        ("user/my-model", "tiny"),
        ("max_tokens=64", f"max_tokens={MAX_NEW_TOKENS}"),
    ):
        assert name in block
        block = block.replace(name, value)
    namespace: dict[str, Any] = {}
    exec(compile(block, "docs/serve.md", "exec"), namespace)
    inputs = prompt_inputs(processor, [user(video, "What happens in the video?")], num_frames=8)
    reply = namespace["reply"]
    return reply.usage.prompt_tokens == inputs["input_ids"].shape[1] and bool(reply.choices[0].message.content)


def _check_equal_sizes(server: Server, folder: Path, model: Any, processor: Any) -> dict[str, bool]:
    """Files of one size, and a file that is replaced: no answer may come from the other's cache entry."""
    paths = [write_video(folder / f"raw_{seed}.avi", 8, seed, codec="rawvideo") for seed in (11, 12, 13)]
    assert len({path.stat().st_size for path in paths}) == 1
    question = "What happens in the video?"
    wanted = [generate(model, processor, [user(path, question)]) for path in paths]
    assert len(set(map(tuple, wanted))) == 3, "the files show nothing"
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda path: server.ask([user(path, question)]), paths))
    results = {"files of one size": replies == [(200, ids) for ids in wanted]}
    paths[0].write_bytes(paths[1].read_bytes())
    results["a file that was replaced"] = server.ask([user(paths[0], question)]) == (200, wanted[1])
    return results


def _check_errors(server: Server, files: dict[str, Path], what: str) -> dict[str, bool]:
    folder = files["short"].parent
    damaged = folder / "damaged.mp4"
    damaged.write_bytes(files["medium"].read_bytes()[:40] + b"CONTENT-THAT-NOBODY-MAY-SEE" * 40)
    short = folder / "tiny.mp4"
    short.write_bytes(b"CONTENT-THAT-NOBODY-MAY-SEE")
    picture = folder / "damaged.png"
    picture.write_bytes(files["wide"].read_bytes()[:200])
    outside = folder.parent / "outside.mp4"
    outside.write_bytes(files["short"].read_bytes())
    video = [user(files["short"], what)]
    # name -> messages, options, status, and a part of the message
    requests: dict[str, tuple[Any, dict[str, Any], int, str]] = {
        "damaged video": ([user(damaged, what)], {}, 400, "cannot read"),
        "damaged video, data: URL": (_with_data_urls([user(damaged, what)]), {}, 400, "cannot read"),
        "damaged video of 27 bytes": ([user(short, what)], {}, 400, "cannot read"),
        "a good and a damaged video": ([user(files["long"], damaged, what)], {}, 400, "cannot read"),
        "damaged image": ([user(picture, what)], {}, 400, ""),
        "missing file": ([user(folder / "missing.mp4", what)], {}, 500, ""),
        "file outside of the folder": ([user(outside, what)], {}, 400, ""),
        "unknown option": (video, {"mm_processor_kwargs": {"num_framse": 3}}, 400, "num_framse"),
        "option out of range": (video, {"mm_processor_kwargs": {"num_frames": 0}}, 400, "num_frames"),
        "sampling by vLLM": (video, {"media_io_kwargs": {"video": {"num_frames": 4}}}, 400, "mm_processor_kwargs"),
    }
    results = {}
    for name, (messages, options, status, part) in requests.items():
        reply = server.ask(messages, **options)
        results[f"error, {name}"] = reply[0] == status and part in reply[1] and "<video file" not in reply[1]
        if not results[f"error, {name}"]:
            print(f"{name}: {reply}", file=sys.stderr)
    return results


def _with_data_urls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    converted = json.loads(json.dumps(messages))
    for message in converted:
        for part in message["content"]:
            kind = part["type"]
            if kind != "text":
                path = Path(part[kind]["url"].removeprefix("file://"))
                media = "image/png" if path.suffix == ".png" else "video/mp4"
                part[kind]["url"] = f"data:{media};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return converted


def shown_content(text: str, files: Sequence[Path]) -> list[str]:
    """Names of the files of which a part is in the text: as it is, escaped, in hexadecimal, base64, or as numbers."""
    return [path.name for path in files if any(needle in text for needle in _needles(path.read_bytes()))]


def _needles(content: bytes) -> set[str]:
    encoded = base64.b64encode(content).decode()
    found = set()
    for place in range(10):
        at = place * len(content) // 30 * 3  # three bytes are four characters of base64
        chunk = content[at : at + 18]
        if len(set(chunk)) < 8:  # such as zeros, which a log holds anyway
            continue
        numbers = list(chunk)
        found |= {repr(chunk)[2:-1], chunk.hex(), encoded[at * 4 // 3 : at * 4 // 3 + 24], chunk.decode("latin-1")}
        found |= {", ".join(map(str, numbers[:6])), " ".join(map(str, numbers[:6]))}
    return found - {""}
