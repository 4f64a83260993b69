# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Handler of a Hugging Face Inference Endpoint for a LLaVA-NeXT-AR checkpoint, written by llava-next-ar push --endpoint.

The endpoint constructs `EndpointHandler` once and calls it with the JSON body of each request:

    {"inputs": {"video": "https://example.com/clip.mp4", "text": "What happens?"}, "parameters": {"max_new_tokens": 64}}
    {"inputs": [{"role": "user", "content": [{"type": "video", "url": "data:video/mp4;base64,..."}]}],
     "parameters": {"surprise": true, "max_new_tokens": 0}}

The file needs the code that travels with the checkpoint and public packages, not the package llava-next-ar. Videos and images
are http, https and data: URLs. Files of the container cannot be read, and addresses that are not public are not contacted:
each redirect is validated too (server-side request forgery).
"""

import http.client
import ipaddress
import math
import os
import re
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

# Environment variables of the endpoint, and their defaults.
PRIVATE_ADDRESSES = "LLAVA_NEXT_AR_PRIVATE_ADDRESSES"  # "1" allows downloads from addresses that are not public
MAX_DOWNLOAD_BYTES = "LLAVA_NEXT_AR_MAX_DOWNLOAD_BYTES"
DOWNLOAD_SECONDS = "LLAVA_NEXT_AR_DOWNLOAD_SECONDS"
_DEFAULTS = {MAX_DOWNLOAD_BYTES: 2.0 * 2**30, DOWNLOAD_SECONDS: 600.0}
_SILENCE = 30.0  # seconds without a byte after which a download fails
_CHUNK = 2**16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

DEFAULT_MAX_NEW_TOKENS = 256
_INTEGER, _NUMBER, _FLAG = (int,), (int, float), (bool,)
GENERATION = {
    "max_new_tokens": _INTEGER,
    "do_sample": _FLAG,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INTEGER,
    "num_beams": _INTEGER,
    "repetition_penalty": _NUMBER,
    "no_repeat_ngram_size": _INTEGER,
}
SAMPLING = {
    "num_frames": _INTEGER,
    "fps": _NUMBER,
    "max_frames": _INTEGER,
    "sample_rate": _INTEGER,
    "sampling": (str,),
}
OTHERS = {"seed": _INTEGER, "stop": (str, list), "surprise": _FLAG, "next_frame": _FLAG}
PARAMETERS = {**GENERATION, **SAMPLING, **OTHERS}

_TEXT_KEYS = ("text", "question", "prompt")
_MEDIA_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
_SOURCE_KEYS = ("image", "video", "url", "path", "base64", "image_url", "video_url")
_URL = re.compile(r"(https?://|data:[^,]*,)", re.IGNORECASE)
_ERRORS = (ValueError, TypeError, OSError)


class EndpointHandler:
    """Answers, surprise and next-frame metrics of one checkpoint.

    Args:
        path: folder of the checkpoint: a model, or an adapter with its base on the Hub.
    """

    def __init__(self, path: str = "") -> None:
        self.path = str(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype="auto")
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        # Neither the tokenizer nor the seed of the process can be shared by requests that run at the same time.
        self.lock = threading.Lock()

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Answer one request.

        Args:
            data: `inputs` and optionally `parameters`. `inputs` is a text; a dict with `text` and any of `image`, `images`,
                `video`, `videos`; a list of chat messages; or a list of these for several answers. The keys of `parameters`
                are those of `PARAMETERS`.

        Returns:
            One dict for each input: `generated_text` (unless `max_new_tokens` is 0); with `surprise`, the scores of the
            frames of each video; with `next_frame`, the metrics of the predictions of each video.

        Raises:
            ValueError: on an invalid request, or a medium that cannot be read. The message names the place and the URL and
                holds no local path. The endpoint answers with status 400.
        """
        inputs, parameters = _request(data)
        results = []
        for where, conversation in _conversations(inputs):
            with tempfile.TemporaryDirectory() as folder:
                names = {folder: "a temporary folder", **({self.path: "the checkpoint"} if self.path else {})}
                try:
                    results.append(self._answer(where, conversation, parameters, folder, names))
                except _ERRORS as error:
                    message = str(error) if where == "inputs" or str(error).startswith(where) else f"{where}: {error}"
                    for path in sorted(names, key=len, reverse=True):
                        message = message.replace(path, names[path])
                    raise ValueError(message) from None
        return results

    def _answer(
        self,
        where: str,
        conversation: Sequence[Any],
        parameters: dict[str, Any],
        folder: str,
        names: dict[str, str],
    ) -> dict[str, Any]:
        """Result for one conversation.

        Args:
            folder: for downloads.
            names: local path -> name in messages; downloads are added.
        """
        messages = [_message(f"{where}[{i}]", one, folder, names) for i, one in enumerate(conversation)]
        result: dict[str, Any] = {}
        with self.lock:
            inputs = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={name: parameters[name] for name in SAMPLING if name in parameters},
            )
            length, limit = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
            if length > limit:
                raise ValueError(
                    f"the prompt has {length} tokens, more than the {limit} of the model: give fewer frames"
                )
            inputs = inputs.to(self.model.device)
            if parameters.get("max_new_tokens") != 0:
                result["generated_text"] = self._generate(inputs, parameters)
            if parameters.get("surprise"):
                result["surprise"] = [_surprise(one) for one in self.model.surprise(**inputs)]
            if parameters.get("next_frame"):
                predicted = self.model.predict_next_frames(**inputs)
                result["next_frame"] = [{"video": one.video_index, **_finite(one.metrics)} for one in predicted]
        return result

    def _generate(self, inputs: Mapping[str, torch.Tensor], parameters: dict[str, Any]) -> str:
        options = {name: parameters[name] for name in GENERATION if name in parameters}
        options.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        if options.get("temperature") == 0:
            options.pop("temperature")
            options["do_sample"] = False
        elif options.keys() & {"temperature", "top_p", "top_k"}:
            options.setdefault("do_sample", True)
        if "stop" in parameters:
            options |= {"stop_strings": parameters["stop"], "tokenizer": self.processor.tokenizer}
        if "seed" in parameters:
            set_seed(parameters["seed"])
        generated = self.model.generate(**inputs, **options)
        return self.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON holds them: None for NaN and infinity."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _surprise(own: Any) -> dict[str, Any]:
    """Surprise of the frames of one video; `seconds` since its first frame, `copying`: that of the copy baseline."""
    copy_errors = torch.stack([error.float().mean() for error in own.copy_errors]).cpu()
    columns = (own.frame_index, own.seconds, own.frames, copy_errors / (copy_errors + own.floors))
    names = ("seconds", "surprise", "copying")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    frames = [{"frame": frame, **_finite(dict(zip(names, row, strict=True)))} for frame, *row in rows]
    return {"video": own.video_index, "frames": frames}


# -- Requests


def _request(data: Any) -> tuple[Any, dict[str, Any]]:
    """Inputs and validated parameters of a request."""
    if not isinstance(data, Mapping) or "inputs" not in data:
        raise ValueError("a request must be a JSON object with 'inputs', and optionally 'parameters'")
    unknown = sorted(data.keys() - {"inputs", "parameters"})
    if unknown:
        raise ValueError(f"a request has the unknown key {unknown[0]!r}, expected inputs and parameters")
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"parameters must be a JSON object, got {type(parameters).__name__}")
    given = {name: value for name, value in parameters.items() if value is not None}
    for name, value in given.items():
        types = PARAMETERS.get(name)
        if types is None:
            raise ValueError(f"unknown parameter {name!r}, expected one of {', '.join(PARAMETERS)}")
        if not isinstance(value, types) or (isinstance(value, bool) and types is not _FLAG):
            raise ValueError(f"parameter {name} must be {' or '.join(one.__name__ for one in types)}, got {value!r}")
    if given.get("max_new_tokens", 0) < 0:
        raise ValueError(f"parameter max_new_tokens must be at least 0, got {given['max_new_tokens']}")
    if given.get("max_new_tokens") == 0 and not (given.get("surprise") or given.get("next_frame")):
        raise ValueError("max_new_tokens=0 asks for no text: set surprise or next_frame")
    if isinstance(given.get("stop"), list) and not all(isinstance(one, str) for one in given["stop"]):
        raise ValueError("parameter stop must be a string or a list of strings")
    return data["inputs"], given


def _is_conversation(inputs: Any) -> bool:
    return (
        bool(inputs) and isinstance(inputs, list) and all(isinstance(one, Mapping) and "role" in one for one in inputs)
    )


def _conversations(inputs: Any) -> list[tuple[str, list[Any]]]:
    """Name and chat messages of each input of a request."""
    if isinstance(inputs, list) and not _is_conversation(inputs):
        if not inputs:
            raise ValueError("'inputs' is an empty list")
        return [(f"inputs[{i}]", _conversation(f"inputs[{i}]", one)) for i, one in enumerate(inputs)]
    return [("inputs", _conversation("inputs", inputs))]


def _conversation(where: str, one: Any) -> list[Any]:
    if _is_conversation(one):
        return one
    if isinstance(one, str):
        return [{"role": "user", "content": [{"type": "text", "text": one}]}]
    if not isinstance(one, Mapping):
        raise ValueError(
            f"{where} must be a text, an object with text, image and video, or a list of chat messages, got "
            f"{type(one).__name__}"
        )
    unknown = sorted(one.keys() - {*_TEXT_KEYS, *_MEDIA_KEYS})
    if unknown:
        known = ", ".join((*_TEXT_KEYS, *_MEDIA_KEYS))
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}, expected one of {known}")
    texts = [one[name] for name in _TEXT_KEYS if one.get(name) is not None]
    if len(texts) > 1 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} must have one string as {' or '.join(_TEXT_KEYS)}")
    content: list[dict[str, Any]] = []
    for name, kind in _MEDIA_KEYS.items():
        sources = one.get(name) or []
        content += [{"type": kind, "url": source} for source in (sources if isinstance(sources, list) else [sources])]
    content += [{"type": "text", "text": text} for text in texts]
    if not content:
        raise ValueError(f"{where} is empty, expected text, image or video")
    return [{"role": "user", "content": content}]


def _message(where: str, message: Mapping[str, Any], folder: str, names: dict[str, str]) -> dict[str, Any]:
    """A message whose media are local downloads or data: URLs."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [_part(f"{where}['content'][{i}]", part, folder, names) for i, part in enumerate(content)]
    return {**message, "content": parts}


def _part(place: str, part: Any, folder: str, names: dict[str, str]) -> Any:
    if not isinstance(part, Mapping):
        return part
    part = dict(part)
    for key in part.keys() & {*_SOURCE_KEYS}:
        source = part[key]
        if source is None:
            continue
        inner = source
        if isinstance(source, Mapping):  # {"image_url": {"url": ...}}
            inner = source.get("url") if not source.keys() & {*_SOURCE_KEYS} - {"url"} else source
        if key in ("path", "base64") or not isinstance(inner, str) or not _URL.match(inner):
            shown = repr(inner[:60]) if isinstance(inner, str) else type(inner).__name__
            raise ValueError(f"{place}: {key} is {shown}, expected an http, https or data: URL")
        if inner[:5].lower() != "data:":
            number = len(names)
            suffix = re.search(r"(\.\w{1,9})?$", urlsplit(inner).path)[0]
            path = os.path.join(folder, f"download{number}{suffix}")
            try:
                _download(inner, path)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", None) if type(error) is URLError else None
                raise ValueError(f"{place}: cannot download {inner[:500]}: {reason or error}") from None
            names[path] = inner[:500]
            inner = path
        part[key] = {**source, "url": inner} if isinstance(source, Mapping) else inner
    return part


# -- Downloads


class _AddressError(OSError):
    """The host of a URL has an address that is not public."""


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if address.version == 6:
        if address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            address = address.ipv4_mapped or address.sixtofour or address
    return address.is_global and not address.is_multicast


def connect_to_public(address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
    """`socket.create_connection` to a public address.

    The name is resolved once, so that the address that is validated is the one that is contacted (DNS rebinding).

    Raises:
        OSError: if an address of the host is not public, or none accepts the connection.
    """
    host, port = address
    found = list(dict.fromkeys(entry[4][:2] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    if os.environ.get(PRIVATE_ADDRESSES) != "1" and not all(_is_public(ip) for ip, _ in found):
        raise _AddressError(f"the address of {host} is not public")
    for number, target in enumerate(found, 1):
        try:
            return socket.create_connection(target, timeout, source_address)
        except OSError:
            if number == len(found):
                raise
    raise OSError(f"{host} has no address")


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = connect_to_public


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = connect_to_public


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, request)


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http and https alone: without proxies, which would resolve names themselves, and without files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Handler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "llava-next-ar-endpoint")]
    return opener


def _limit(name: str) -> float:
    return float(os.environ.get(name) or _DEFAULTS[name])


def _download(url: str, path: str) -> None:
    """Write the content of a URL to a file.

    Raises:
        OSError, http.client.HTTPException, ValueError: if the download fails, or exceeds a limit of bytes or seconds.
    """
    seconds, done = _limit(DOWNLOAD_SECONDS), Future()
    end = time.monotonic() + seconds

    def work() -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(_copy(url, path, end))
        except Exception as error:  # raised again by `result`
            done.set_exception(error)

    # The time-out of a socket holds for each byte; a thread allows one limit for headers and content together.
    threading.Thread(target=work, daemon=True).start()
    try:
        done.result(seconds)
    except FutureTimeoutError:
        raise OSError(f"it takes longer than {seconds:g} seconds ({DOWNLOAD_SECONDS} sets another limit)") from None


def _copy(url: str, path: str, end: float) -> None:
    limit, size = _limit(MAX_DOWNLOAD_BYTES), 0
    too_large = f"it has more than {limit:.0f} bytes ({MAX_DOWNLOAD_BYTES} sets another limit)"
    with _opener().open(url, timeout=_SILENCE) as response, open(Path(path), "wb") as file:
        announced = int(response.headers.get("Content-Length") or -1)
        if announced > limit:
            raise OSError(too_large)
        while chunk := response.read1(_CHUNK):
            size += file.write(chunk)
            if size > limit:
                raise OSError(too_large)
            if time.monotonic() > end:
                raise OSError("it takes too long")
    if announced not in (-1, size):
        raise OSError(f"it stopped after {size} of {announced} bytes")
    if not size:
        raise OSError("it is empty")
