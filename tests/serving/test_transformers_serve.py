"""`transformers serve` with a checkpoint and its remote code: a real server, whose answers equal those of `generate`."""

import base64
import inspect
import json
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
from PIL import Image
from tiny import spread_answers, tiny_model
from tiny_processor import tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.import_utils import is_serve_available
from video_clips import picture, write_clip

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")

QUESTION, NUM_TOKENS, OF_SERVER = "What happens?", 6, 32
OPTION = "--chat-template-kwargs '{\"num_frames\": null}'"
SOURCES = ("path", "file", "http", "data")


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server of a checkpoint that samples as transformers does, and beside it a web server of clips and pictures.

    Attributes: `media` (name -> path), `web` and `url` (addresses), `model` and `processor` (in this process), `checkpoint`.
    """
    folder = tmp_path_factory.mktemp("served")
    model = tiny_model()
    checkpoint = folder / "checkpoint"
    spread_answers(model)
    model.save_pretrained(checkpoint)
    tiny_processor(model.config, num_frames=4, sampling="num_frames").save_pretrained(checkpoint)
    media = {
        "clip.mp4": write_clip(folder / "clip.mp4", 40),
        "short.mp4": write_clip(folder / "short.mp4", 6),
        "other.mp4": write_clip(folder / "other.mp4", 50, width=96, height=128),
        "picture.png": folder / "picture.png",
        "tall.png": folder / "tall.png",
        "broken.mp4": folder / "broken.mp4",
    }
    Image.fromarray(picture(5, 40, 60)).save(media["picture.png"])
    Image.fromarray(picture(9, 70, 30)).save(media["tall.png"])
    media["broken.mp4"].write_bytes(media["clip.mp4"].read_bytes()[:500])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", checkpoint, "--trust-remote-code"]
    files = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(folder)))
    threading.Thread(target=files.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    with processes.Program(
        [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", port], merge=True
    ) as program:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health", program)
        yield SimpleNamespace(
            url=url,
            web=f"http://127.0.0.1:{files.server_port}",
            media=media,
            checkpoint=str(checkpoint),
            model=AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval(),
            processor=AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True),
        )
    files.shutdown()


def _wait_for(url: str, program: processes.Program, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert program.process.poll() is None, program.stdout
            assert time.monotonic() < end, program.stdout
            time.sleep(0.2)


def source_of(server: Any, kind: str, name: str) -> str:
    path = server.media[name]
    if kind == "data":
        mime = "video/mp4" if name.endswith("mp4") else "image/png"
        return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"path": str(path), "file": path.as_uri(), "http": f"{server.web}/{name}"}[kind]


def post(server: Any, path: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat(
    server: Any, content: list[dict[str, Any]], *, stream: bool = False, history: Sequence[Any] = (), **options: Any
) -> tuple[int, str]:
    """Status and answer of a chat completion; the body of the reply if it is an error. `history`: earlier messages."""
    messages = [*history, {"role": "user", "content": content}]
    body = {"model": server.checkpoint, "messages": messages, "stream": stream}
    status, reply = post(
        server, "/v1/chat/completions", {**body, "max_tokens": NUM_TOKENS, "temperature": 0, **options}
    )
    if status != 200:
        return status, reply
    if not stream:
        return status, json.loads(reply)["choices"][0]["message"]["content"]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in events(reply)]
    assert len(deltas) > 2
    return status, "".join(deltas)


def respond(server: Any, content: list[dict[str, Any]], *, stream: bool = False) -> tuple[int, str]:
    """The same by the responses API."""
    body = {"model": server.checkpoint, "input": [{"role": "user", "content": content}], "stream": stream}
    status, reply = post(server, "/v1/responses", {**body, "max_output_tokens": NUM_TOKENS, "temperature": 0})
    if status != 200:
        return status, reply
    if not stream:
        return status, json.loads(reply)["output"][0]["content"][0]["text"]
    deltas = [event["delta"] for event in events(reply) if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 1
    return status, "".join(deltas)


def events(reply: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in reply.splitlines() if line.startswith("data: {")]


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def image(url: str, api: str = "chat") -> dict[str, Any]:
    return (
        {"type": "image_url", "image_url": {"url": url}}
        if api == "chat"
        else {"type": "input_image", "image_url": url}
    )


def text(words: str = QUESTION, api: str = "chat") -> dict[str, str]:
    return {"type": "text" if api == "chat" else "input_text", "text": words}


def local(path: Path) -> dict[str, str]:
    return {"type": "video" if path.suffix == ".mp4" else "image", "path": str(path)}


def generated(server: Any, *paths: Path, history: Sequence[Any] = (), **options: Any) -> str:
    """Answer of the model in this process, with what the server adds to a video."""
    inputs = server.processor.apply_chat_template(
        [*history, {"role": "user", "content": [*map(local, paths), {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    ids = server.model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return server.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("source", SOURCES)
def test_answers_are_those_of_generate(server, source, api, stream):
    ask = chat if api == "chat" else respond
    expected = {
        "clip.mp4": generated(server, server.media["clip.mp4"], num_frames=OF_SERVER),
        "picture.png": generated(server, server.media["picture.png"]),
    }
    assert len(set(expected.values())) == 2
    for name, answer in expected.items():
        url = source_of(server, source, name)
        content = [video(url) if name == "clip.mp4" else image(url, api), text(api=api)]
        assert ask(server, content, stream=stream) == (200, answer), name


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("clip.mp4", "picture.png"),
        ("picture.png", "tall.png"),
        ("picture.png", "picture.png"),
        ("picture.png", "picture.png", "tall.png"),
        ("clip.mp4", "other.mp4"),
        ("clip.mp4", "clip.mp4"),
        ("picture.png", "other.mp4", "tall.png"),
    ],
    ids=lambda names: "+".join(names) or "text",
)
def test_each_kind_of_prompt_is_answered_as_by_generate(server, names):
    paths = [server.media[name] for name in names]
    content = [video(str(path)) if path.suffix == ".mp4" else image(str(path)) for path in paths]
    options = {"num_frames": OF_SERVER} if any(path.suffix == ".mp4" for path in paths) else {}
    assert chat(server, [*content, text()]) == (200, generated(server, *paths, **options))


@pytest.mark.parametrize("names", [(), ("other.mp4",)], ids=["text", "another video"])
def test_a_second_turn_is_answered_as_by_generate(server, names):
    first, paths = server.media["clip.mp4"], [server.media[name] for name in names]
    said = {"role": "assistant", "content": [{"type": "text", "text": "The colours change."}]}
    turns = [
        [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}, said]
        for part in (video(str(first)), local(first))
    ]
    answer = chat(server, [*(video(str(path)) for path in paths), text()], history=turns[0])
    expected = generated(server, *paths, history=turns[1], num_frames=OF_SERVER)
    assert answer == (200, expected)
    assert expected != generated(server, *(paths or [first]), num_frames=OF_SERVER), "the first turn shows nothing"


def test_a_clip_of_fewer_frames_gives_all_of_them(server):
    """In `generate` that is an error of this sampling policy; the 32 frames are the server's wish, not the client's."""
    short = server.media["short.mp4"]
    with pytest.raises(ValueError, match="num_frames=32 is more than the 6 frames"):
        generated(server, short, num_frames=OF_SERVER)
    all_frames = generated(server, short, num_frames=6)
    assert chat(server, [video(str(short)), text()]) == (200, all_frames)
    assert respond(server, [video(str(short)), text(api="responses")]) == (200, all_frames)


@pytest.mark.parametrize("name", ["clip.mp4", "short.mp4"])
def test_null_keeps_the_sampling_of_the_checkpoint(server, name):
    """As `--chat-template-kwargs` does for all requests."""
    path = server.media[name]
    own = chat(server, [video(str(path)), text()], chat_template_kwargs={"num_frames": None})
    assert own == (200, generated(server, path))


@pytest.mark.parametrize(
    "content, options, expected",
    [
        ([video("/no/such.mp4")], {}, "cannot read video /no/such.mp4: no such file"),
        ([image("/no/such.png")], {}, "cannot load image '/no/such.png'"),
        ([video("{web}/none.mp4")], {}, r"{web}/none.mp4: download failed: HTTP Error 404"),
        ([video("{broken}")], {}, "{broken}"),
        ([video("data:video/mp4;base64,AAAA")], {}, "data:video/mp4;base64,"),
        ([image("{clip}")], {}, "cannot load image"),
        ([video("{clip}")], {"fps": 2}, rf"fps=2 and num_frames=32 exclude each other.*{re.escape(OPTION)}"),
        ([video("{short}")], {"short_clip": "error"}, rf"num_frames=32 is more than the 6 .*{re.escape(OPTION)}"),
        ([video("{clip}")], {"num_frame": 4}, "unknown option 'num_frame'"),
        ([video("{clip}")], {"num_frames": 0}, "num_frames=0 must be an integer of at least 1"),
        ([text("<video>")], {}, "the prompts hold 1 and no videos were passed"),
    ],
)
def test_errors_are_the_client_s_and_name_the_cause(server, content, options, expected):
    values = {
        "{web}": server.web,
        **{f"{{{name}}}": str(server.media[f"{name}.mp4"]) for name in ("broken", "clip", "short")},
    }
    body = json.dumps(content)
    for name, value in values.items():
        body, expected = body.replace(name, value), expected.replace(name, value)
    status, reply = chat(server, [*json.loads(body), text()], chat_template_kwargs=options)
    assert status == 400
    assert re.search(expected, json.loads(reply)["detail"]), reply


def test_the_server_answers_after_errors(server):
    assert chat(server, [text("Hello")])[0] == 200


def test_the_option_of_the_message_exists():
    from transformers.cli.serve import Serve

    assert "chat_template_kwargs" in inspect.signature(Serve.__init__).parameters
