"""The handler of an Inference Endpoint: called as the endpoint does, and the limits of its downloads."""

import base64
import json
import math
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hub_programs import run_program
from hub_server import HubServer
from PIL import Image
from tiny import spread_answers, tiny_model
from tiny_processor import tiny_processor
from transformers import AutoModelForImageTextToText
from video_clips import picture, write_clip

from llava_next_ar.hub.push import collect_files
from llava_next_ar.hub.push_targets import endpoint_files
from llava_next_ar.serving.endpoint import handler as endpoint

QUESTION, NUM_TOKENS = "What happens?", 6
LIMITS = {"max_new_tokens": NUM_TOKENS, "do_sample": False}


class Web:
    """A web server on every loopback address; `serve(path, content | status, **headers)` adds an answer."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.seen: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.seen.append(self.path)
                status, headers, content = web.answers.get(self.path, (404, {}, b""))
                if self.path == "/slow":
                    time.sleep(3)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def serve(self, path: str, content: bytes = b"", status: int = 200, **headers: str) -> str:
        self.answers[path] = (status, {name.replace("_", "-"): value for name, value in headers.items()}, content)
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture(scope="module")
def web():
    found = Web()
    yield found
    found.server.shutdown()


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(picture(5, 40, 60)).save(folder / "picture.png")
    Image.fromarray(picture(9, 70, 30)).save(folder / "tall.png")
    clip, other = write_clip(folder / "clip.mp4", 40), write_clip(folder / "other.mp4", 20, width=96, height=128)

    def data(path: Path, mime: str) -> str:
        return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"

    picture_path = folder / "picture.png"
    return SimpleNamespace(
        clip=clip,
        other=other,
        picture=picture_path,
        clip_data=data(clip, "video/mp4"),
        tall=folder / "tall.png",
        tall_data=data(folder / "tall.png", "image/png"),
        other_data=data(other, "video/mp4"),
        picture_data=data(picture_path, "image/png"),
    )


@pytest.fixture(scope="module")
def parts():
    model = tiny_model()
    spread_answers(model)
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
    return model, tiny_processor(model.config, num_frames=4)


def inputs_of(
    parts: tuple[Any, Any], *paths: Path, question: str = QUESTION, history: Sequence[Any] = (), **options: Any
) -> Any:
    content = [*map(local, paths), {"type": "text", "text": question}]
    return parts[1].apply_chat_template(
        [*history, {"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


def local(path: Path) -> dict[str, str]:
    return {"type": "video" if path.suffix == ".mp4" else "image", "path": str(path)}


def turns(first: dict[str, str]) -> list[dict[str, Any]]:
    """A question about a file, and its answer."""
    said = {"role": "assistant", "content": [{"type": "text", "text": "The colours change."}]}
    return [{"role": "user", "content": [first, {"type": "text", "text": "What is it?"}]}, said]


def generated(parts: tuple[Any, Any], *paths: Path, question: str = QUESTION, **options: Any) -> str:
    inputs = inputs_of(parts, *paths, question=question, **options)
    ids = parts[0].generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return parts[1].decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def called(parts, media, web, tmp_path_factory):
    """Request -> result, by the handler of a pushed repository in a process that has no package llava_next_ar."""
    folder = tmp_path_factory.mktemp("endpoint")
    for part in parts:
        part.save_pretrained(folder / "run")
    (folder / "run" / "notes.txt").write_text("local")
    clip = web.serve("/clip.mp4", media.clip.read_bytes())
    web.serve("/moved", status=302, Location=clip)
    requests = make_requests(media, clip)
    (folder / "requests.json").write_text(json.dumps([*requests.values()]))
    with HubServer() as hub:
        hub.add_user("ann", "hf_ann")
        options = {"endpoint": hub.endpoint, "home": folder / "push", "token": "hf_ann"}
        run_program("push_endpoint", str(folder / "run"), "ann/model", **options)
        os.environ[endpoint.PRIVATE_ADDRESSES] = "1"
        try:
            options["home"] = folder / "serve"
            results = run_program(
                "call_endpoint", "ann/model", str(folder / "requests.json"), hide_package=True, **options
            )
        finally:
            del os.environ[endpoint.PRIVATE_ADDRESSES]
    found = dict(zip(requests, results.result, strict=True))
    return SimpleNamespace(results=found, serve=str(folder / "serve"))


def make_requests(media: SimpleNamespace, clip: str) -> dict[str, Any]:
    """Name -> request."""
    ask = {"video": media.clip_data, "text": QUESTION}
    chat = [
        {"type": "video_url", "video_url": {"url": clip}},
        {"type": "image", "url": media.picture_data},
        {"type": "text", "text": QUESTION},
    ]
    messages = [{"role": "user", "content": chat}]
    scores = {"surprise": True, "next_frame": True, "max_new_tokens": 0}

    def part(**values: Any) -> dict[str, Any]:
        return {"inputs": [{"role": "user", "content": [values, {"type": "text", "text": QUESTION}]}]}

    return {
        "text": {"inputs": QUESTION, "parameters": LIMITS},
        "video": {"inputs": ask, "parameters": LIMITS},
        "http": {"inputs": {"videos": [clip], "question": QUESTION}, "parameters": LIMITS},
        "redirect": {"inputs": {"video": clip.replace("clip.mp4", "moved"), "text": QUESTION}, "parameters": LIMITS},
        "image": {"inputs": {"image": media.picture_data, "text": QUESTION}, "parameters": LIMITS},
        "other": {"inputs": {"video": media.other_data, "text": QUESTION}, "parameters": LIMITS},
        "two images": {
            "inputs": {"images": [media.picture_data, media.tall_data], "text": QUESTION},
            "parameters": LIMITS,
        },
        "image twice": {"inputs": {"images": [media.picture_data] * 2, "text": QUESTION}, "parameters": LIMITS},
        "two videos": {"inputs": {"videos": [clip, media.other_data], "text": QUESTION}, "parameters": LIMITS},
        "video twice": {"inputs": {"videos": [clip, clip], "text": QUESTION}, "parameters": LIMITS},
        "video and images": {
            "inputs": [
                {
                    "role": "user",
                    "content": [*chat[:2], {"type": "image", "url": media.tall_data}, chat[2]],
                }
            ],
            "parameters": LIMITS,
        },
        "second turn": {
            "inputs": [*turns({"type": "video", "url": clip}), {"role": "user", "content": chat[2:]}],
            "parameters": LIMITS,
        },
        "second video": {
            "inputs": [
                *turns({"type": "video", "url": clip}),
                {"role": "user", "content": [{"type": "video", "url": media.other_data}, chat[2]]},
            ],
            "parameters": LIMITS,
        },
        "messages": {"inputs": messages, "parameters": LIMITS},
        "batch": {"inputs": [QUESTION, ask, messages], "parameters": LIMITS},
        "frames": {"inputs": ask, "parameters": {**LIMITS, "num_frames": 2}},
        "frames of a part": {
            "inputs": [{"role": "user", "content": [{"type": "video", "url": clip, "num_frames": 2}, chat[2]]}],
            "parameters": LIMITS,
        },
        "seed": {"inputs": [ask, ask], "parameters": {**LIMITS, "do_sample": True, "temperature": 2.0, "seed": 3}},
        "cold": {"inputs": ask, "parameters": {"max_new_tokens": NUM_TOKENS, "temperature": 0}},
        "stop": {"inputs": ask, "parameters": {**LIMITS, "stop": ["!", "?"]}},
        "scores": {"inputs": ask, "parameters": scores},
        "path": part(type="video", path=str(media.clip)),
        "path as url": part(type="video", url=str(media.clip)),
        "file url": part(type="image", url=media.picture.as_uri()),
        "video is a path": {"inputs": {"video": "/etc/hostname", "text": QUESTION}},
        "ftp": part(type="video", url="ftp://127.0.0.1/x.mp4"),
        "frames are paths": part(type="video", video=[str(media.picture)] * 2),
        "base64": part(type="image", base64=media.picture_data.partition(",")[2]),
        "video_url is a path": part(type="video_url", video_url={"url": str(media.clip)}),
        "two sources": part(type="video_url", video_url={"url": clip, "path": str(media.clip)}),
        "one of a batch": {
            "inputs": [QUESTION, {"video": "data:video/mp4;base64,AAAA", "text": QUESTION}],
            "parameters": LIMITS,
        },
        "no such url": part(type="video", url=clip.replace("clip", "none")),
        "not a video": part(type="video", url="data:video/mp4;base64,AAAA"),
        "a page": part(type="video", url=clip + "?"),
        "no body": [],
        "two": {"inputs": "a", "messages": messages},
        "unknown key": {"inputs": "a", "stream": True},
        "unknown parameter": {"inputs": "a", "parameters": {"max_tokens": 3}},
        "type of a parameter": {"inputs": "a", "parameters": {"max_new_tokens": "3"}},
        "range of a parameter": {"inputs": ask, "parameters": {"num_frames": 0}},
        "temperature": {"inputs": ask, "parameters": {"temperature": -1.0}},
        "surprise of a text": {"inputs": "a", "parameters": scores},
        "nothing": {"inputs": {}},
        "key of an input": {"inputs": {"vidio": clip}},
        "long": {"inputs": "word " * 3000, "parameters": LIMITS},
        "role": {"inputs": [{"content": "a"}]},
        "no inputs": {"messages": messages},
    }


def text_of(result: Any) -> list[str]:
    assert isinstance(result, list), result
    return [one["generated_text"] for one in result]


def test_answers_are_those_of_generate(called, parts, media):
    one, both = generated(parts, media.clip), generated(parts, media.clip, media.picture)
    words = generated(parts)
    image, more = generated(parts, media.picture), generated(parts, media.clip, num_frames=2)
    assert len({one, both, words, image, more}) == 5
    expected = {"text": [words], "image": [image], "messages": [both], "batch": [words, one, both]}
    history = turns(local(media.clip))
    expected |= {
        "other": [generated(parts, media.other)],
        "two images": [generated(parts, media.picture, media.tall)],
        "image twice": [generated(parts, media.picture, media.picture)],
        "two videos": [generated(parts, media.clip, media.other)],
        "video twice": [generated(parts, media.clip, media.clip)],
        "video and images": [generated(parts, media.clip, media.picture, media.tall)],
        "second turn": [generated(parts, history=history)],
        "second video": [generated(parts, media.other, history=history)],
    }
    assert len({answer for name in expected for answer in expected[name]}) == 12
    expected |= dict.fromkeys(("video", "http", "redirect", "cold"), [one])
    expected |= dict.fromkeys(("frames", "frames of a part"), [more])
    assert {name: text_of(called.results[name]) for name in expected} == expected


def test_generation_parameters_are_applied(called, parts, media):
    first, second = text_of(called.results["seed"])
    assert first == second != generated(parts, media.clip)
    (stopped,) = text_of(called.results["stop"])
    assert generated(parts, media.clip).startswith(stopped)


def test_surprise_and_metrics_are_those_of_the_model(called, parts, media):
    (result,) = called.results["scores"]
    assert result.keys() == {"surprise", "next_frame"}  # max_new_tokens=0 asks for no text
    model, inputs = parts[0], inputs_of(parts, media.clip)
    (expected,), (predicted,) = model.surprise(**inputs), model.predict_next_frames(**inputs)
    (own,) = result["surprise"]
    assert own["video"] == 0 and [row["frame"] for row in own["frames"]] == [1, 2, 3]
    np.testing.assert_allclose([row["surprise"] for row in own["frames"]], expected.frames.tolist(), rtol=1e-5)
    np.testing.assert_allclose([row["seconds"] for row in own["frames"]], expected.seconds.tolist(), rtol=1e-6)
    assert all(0 < row["copying"] < 1 for row in own["frames"])
    (metrics,) = result["next_frame"]
    assert metrics.pop("video") == 0
    assert metrics.keys() == predicted.metrics.keys()
    np.testing.assert_allclose([*metrics.values()], [*predicted.metrics.values()], rtol=1e-5)


ERRORS = {
    "path": r"inputs\[0\]\['content'\]\[0\]: path is '/.*expected an http, https or data: URL",
    "path as url": "url is '/.*expected an http, https or data: URL",
    "file url": "url is 'file:///.*expected an http, https or data: URL",
    "video is a path": "url is '/etc/hostname', expected an http, https or data: URL",
    "ftp": "url is 'ftp://127.0.0.1/x.mp4', expected",
    "frames are paths": "video is list, expected an http, https or data: URL",
    "base64": "base64 is '.*expected an http, https or data: URL",
    "video_url is a path": "video_url is '/.*expected an http",
    "two sources": "video_url is dict, expected an http",
    "one of a batch": r"^ValueError: inputs\[1\]: cannot read video data:video/mp4;base64,",
    "no such url": r"cannot download http://127.0.0.1:\d+/none.mp4: HTTP Error 404",
    "not a video": "data:video/mp4;base64,",
    "a page": r"cannot download http://127.0.0.1:\d+/clip.mp4\?: HTTP Error 404",
    "no body": "a request must be a JSON object with 'inputs', and optionally 'parameters'",
    "no inputs": "a request must be a JSON object with 'inputs'",
    "two": "unknown key 'messages', expected inputs and parameters",
    "unknown key": "unknown key 'stream', expected inputs and parameters",
    "unknown parameter": "unknown parameter 'max_tokens', expected one of max_new_tokens, ",
    "type of a parameter": "parameter max_new_tokens must be int, got '3'",
    "range of a parameter": "num_frames=0 must be an integer of at least 1",
    "temperature": "temperature",
    "surprise of a text": "at least one video with two frames",
    "nothing": "inputs is empty, expected text, image or video",
    "key of an input": "inputs has the unknown key 'vidio', expected one of text",
    "long": r"the prompt has \d+ tokens, more than the 2048 of the model",
    "role": r"inputs\[0\] has the unknown key 'content', expected one of text",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_cause_and_no_local_path(called, name):
    result = called.results[name]
    assert isinstance(result, dict) and result["error"].startswith("ValueError: "), result
    assert re.search(ERRORS[name], result["error"], re.DOTALL), result
    assert called.serve not in result["error"] and tempfile.gettempdir() + "/tmp" not in result["error"]


def test_all_requests_are_looked_at(called):
    is_error = {name for name, result in called.results.items() if isinstance(result, dict)}
    assert is_error == ERRORS.keys()


def test_results_are_json(called):
    assert json.loads(json.dumps(called.results, allow_nan=False)) == called.results
    assert endpoint._finite({"skill": math.nan, "mse": 1.0}) == {"skill": None, "mse": 1.0}


# -- Downloads


@pytest.fixture
def one_public(monkeypatch, web):
    """127.0.0.2 counts as public, every other loopback address as private."""
    monkeypatch.setattr(endpoint, "_is_public", lambda ip: ip == "127.0.0.2")
    monkeypatch.delenv(endpoint.PRIVATE_ADDRESSES, raising=False)
    return f"http://127.0.0.2:{web.port}"


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1:{port}/secret", "file:///etc/hostname", "ftp://127.0.0.2/x", "//127.0.0.1:{port}/secret"],
)
def test_a_redirect_leads_to_public_addresses_only(one_public, web, tmp_path, target):
    web.serve("/secret", b"secret")
    web.serve("/redirect", status=302, Location=target.format(port=web.port))
    web.seen.clear()
    with pytest.raises(OSError, match="not public|not allowed|unknown url type"):
        endpoint._download(f"{one_public}/redirect", str(tmp_path / "file"))
    assert web.seen == ["/redirect"] and not (tmp_path / "file").exists()


def test_a_public_address_is_read_and_a_private_one_is_not(one_public, web, tmp_path, monkeypatch):
    web.serve("/clip", b"content")
    endpoint._download(f"{one_public}/clip", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"content"
    private = f"http://127.0.0.1:{web.port}/clip"
    with pytest.raises(OSError, match="the address of 127.0.0.1 is not public"):
        endpoint._download(private, str(tmp_path / "other"))
    monkeypatch.setenv(endpoint.PRIVATE_ADDRESSES, "1")
    endpoint._download(private, str(tmp_path / "other"))


def test_a_name_is_resolved_once(one_public, web, tmp_path, monkeypatch):
    """A second answer of the name server, which is private, must not be the address that is contacted."""
    resolve, answers = socket.getaddrinfo, iter(["127.0.0.2", "127.0.0.1"])

    def change(host: str, *args: Any, **options: Any) -> Any:
        return resolve(next(answers) if host == "changing.test" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", change)
    web.serve("/clip", b"content")
    endpoint._download(f"http://changing.test:{web.port}/clip", str(tmp_path / "file"))
    assert next(answers) == "127.0.0.1"


@pytest.mark.parametrize(
    "ip, is_public",
    [
        *((ip, True) for ip in ("8.8.8.8", "2001:4860:4860::8888", "64:ff9b::8.8.8.8")),
        *((ip, False) for ip in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0")),
        *((ip, False) for ip in ("100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1")),
        *((ip, False) for ip in ("64:ff9b::10.0.0.1", "2002:0a00:0001::", "::")),
    ],
)
def test_public_addresses(ip, is_public):
    assert endpoint._is_public(ip) is is_public


def test_proxies_are_not_asked(one_public, web, tmp_path, monkeypatch):
    """A proxy would resolve the name itself, and reach private addresses."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.2:{web.port}")
    with pytest.raises(OSError, match="not public"):
        endpoint._download("http://127.0.0.1:1/clip", str(tmp_path / "file"))


def test_downloads_have_limits(one_public, web, tmp_path, monkeypatch):
    target = str(tmp_path / "file")
    web.serve("/large", b"x" * 2000)
    web.serve("/short", b"x" * 10, Content_Length="100")
    web.serve("/empty")
    web.serve("/slow", b"x")
    monkeypatch.setenv(endpoint.MAX_DOWNLOAD_BYTES, "1000")
    monkeypatch.setenv(endpoint.DOWNLOAD_SECONDS, "1")
    for path, message in {
        "/large": f"more than 1000 bytes .{endpoint.MAX_DOWNLOAD_BYTES} sets",
        "/short": "IncompleteRead|stopped after 10 of 100",
        "/empty": "it is empty",
        "/slow": f"longer than 1 seconds .{endpoint.DOWNLOAD_SECONDS} sets",
    }.items():
        start = time.monotonic()
        with pytest.raises(Exception, match=message):
            endpoint._download(one_public + path, target)
        assert time.monotonic() - start < 2.5


def test_an_adapter_is_served(parts, media, tmp_path):
    peft = pytest.importorskip("peft")
    parts[0].save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", trust_remote_code=True)
    targets = r".*language_model.*\.(q_proj|v_proj|o_proj|down_proj)"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    parts[1].save_pretrained(tmp_path / "adapter")
    expected = generated((adapted, parts[1]), media.clip)
    assert expected != generated(parts, media.clip)
    handler = endpoint.EndpointHandler(str(tmp_path / "adapter"))
    request = {"inputs": {"video": media.clip_data, "text": QUESTION}, "parameters": LIMITS}
    assert handler(request) == [{"generated_text": expected}]


def test_requests_at_the_same_time_do_not_mix(parts, media, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    handler = endpoint.EndpointHandler(str(tmp_path))
    sampled = {"max_new_tokens": NUM_TOKENS, "do_sample": True, "temperature": 2.0}
    requests = [
        {"inputs": {"video": media.clip_data, "text": QUESTION}, "parameters": {**sampled, "seed": seed}}
        for seed in range(6)
    ]
    alone = [handler(request) for request in requests]
    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(handler, requests)] == alone
    assert len({one["generated_text"] for (one,) in alone}) > 1


def test_the_pushed_file_is_this_module(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    assert "handler.py" not in collect_files(tmp_path)[0]
    assert endpoint_files()["handler.py"] == Path(endpoint.__file__).read_bytes()
