# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Sources of media (path, URL, data URI, bytes) and pictures: still frames and animations, read with Pillow.

`local_file` returns the bytes of a source. `ImageReader` reads a list of pictures, `PictureReader` the frames of one
picture file with their own delays. Both convert with `rgb_picture`: upright (EXIF orientation), transparency on white,
16-bit grey scaled to 8 bits.
"""

import base64
import contextlib
import io
import logging
import math
import os
import re
import struct
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, features

from .video_decoding import MAX_FRAME_PIXELS, Emit, VideoReadError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".apng", ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_CHANNELS = (1, 3, 4)
# For other formats, Pillow may run other programs.
_IMAGE_FORMATS = (
    *("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"),
    *(["AVIF"] if "avif" in features.modules and features.check("avif") else []),  # from Pillow 11.3 on
)
_ANIMATED_FORMATS = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")  # further pictures in other formats are thumbnails
# Raised by Pillow for damaged files.
PICTURE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
IMAGE_FPS = 2.0  # of frames without times, as in LLaVA-NeXT's folders of frames
_DEFAULT_DELAYS = {"AVIF": 0.1, "GIF": 0.1, "PNG": 1 / 15, "WEBP": 0.1}  # seconds, for frames without a delay
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_TURNS = dict(enumerate(_TURNS, start=2))  # by EXIF orientation

MAX_DOWNLOAD_BYTES = "LLAVA_NEXT_AR_MAX_DOWNLOAD_BYTES"  # environment variables: these limits protect the machine
DOWNLOAD_SECONDS = "LLAVA_NEXT_AR_DOWNLOAD_SECONDS"
_DOWNLOAD_DEFAULTS = {MAX_DOWNLOAD_BYTES: 2 * 2**30, DOWNLOAD_SECONDS: 600}
_SILENCE = 30.0  # seconds without a byte until a server counts as lost
_CHUNK = 2**16


# -- Addresses


def is_url(source: Any) -> bool:
    """Test a source for a http, https, file or data URL. Paths may contain any character, `#`, `?` and `%` too."""
    return isinstance(source, str) and re.match(r"(https?|file)://|data:[^,]*,", source, re.IGNORECASE) is not None


def source_name(source: Any) -> str:
    """Short name of a source for messages, without the content of data URLs and base64 texts."""
    if not isinstance(source, (str, os.PathLike)):
        name = getattr(source, "name", None)
        return name if isinstance(name, str) else "<file object>" if hasattr(source, "read") else "<bytes>"
    name = os.fsdecode(source)
    shown = name.partition(",")[0][:60] + "," if _is_data(name) else name[:60]
    if len(name) > 100 and re.fullmatch(r"[\w+/=\s-]+", name):  # base64 is more likely than a path
        shown = name[:12]
    elif not _is_data(name) and len(name) <= 500:
        return name
    return f"{shown}... ({len(name)} characters)"


def _is_data(source: Any) -> bool:
    return is_url(source) and source[:5].lower() == "data:"


def names_picture(source: "str | os.PathLike", *, only_still: bool = False) -> bool:
    """Test the name of a path or URL for a picture, with `only_still` for one other than GIF."""
    name = os.fspath(source).lower()
    if _is_data(name):
        return name.startswith("data:image/") and not (only_still and name.startswith("data:image/gif"))
    name = _without_query(name)
    return name.endswith(IMAGE_SUFFIXES) and not (only_still and name.endswith(".gif"))


@contextlib.contextmanager
def local_file(source: Any) -> "Iterator[str | bytes]":
    """Yield the path or the content of a path, URL, bytes or file object; delete downloads at the end.

    Raises:
        VideoReadError: if a download fails, a data URL cannot be decoded, or the source is missing or empty.
        TypeError: for another type.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, (bytes, bytearray, memoryview)):
            file = bytes(source)
        elif hasattr(source, "read"):
            with contextlib.suppress(io.UnsupportedOperation):
                source.seek(0)
            file = source.read()
            if isinstance(file, str):
                raise TypeError("a file object must be opened in binary mode, got one in text mode")
        elif not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                "a video is a path, URL, bytes, file object, array, tensor or list of images, "
                f"not {type(source).__name__}"
            )
        elif not is_url(source):
            file = os.fspath(source)
        elif _is_data(source):
            file = _data_of(source)
        elif source[:5].lower() == "file:":
            file = urllib.request.url2pathname("/" + source.partition("://")[2].partition("/")[2])  # `#`, `?` too
        else:
            file = stack.enter_context(_downloaded(source))
        if isinstance(file, str) and not os.path.exists(file):
            raise VideoReadError(source_name(source), "no such file")
        if not (os.path.getsize(file) if isinstance(file, str) else len(file)) and not os.path.isdir(file):
            raise VideoReadError(source_name(source), "the file is empty")
        yield file


def decode_base64(text: str) -> bytes:
    """Decode base64; raises ValueError for other text. White space, the URL-safe alphabet and missing padding are valid."""
    text = "".join(text.split()).replace("-", "+").replace("_", "/")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _data_of(url: str) -> bytes:
    header, _, content = url.partition(",")
    try:
        content = urllib.parse.unquote_to_bytes(content)
        return decode_base64(content.decode("ascii")) if header.lower().endswith(";base64") else content
    except ValueError as error:
        raise VideoReadError(source_name(url), f"its data is not base64: {type(error).__name__}") from None


# -- Downloads


@contextlib.contextmanager
def _downloaded(url: str) -> Iterator[str]:
    """Yield the path of a temporary copy: reading out of order over the network would fetch most bytes several times.

    Raises:
        VideoReadError: if the download fails, is larger than MAX_DOWNLOAD_BYTES or takes longer than DOWNLOAD_SECONDS
            (environment variables).
    """
    name, max_bytes, seconds = source_name(url), *map(_download_limit, _DOWNLOAD_DEFAULTS)
    end = time.monotonic() + seconds
    too_slow = VideoReadError(
        name, f"download takes longer than {seconds:g} seconds ({DOWNLOAD_SECONDS} sets another limit)"
    )
    with tempfile.TemporaryDirectory() as folder:
        # some formats of FFmpeg are known by the suffix alone
        path = os.path.join(folder, "download" + re.search(r"(\.\w{1,9})?$", _without_query(url))[0])
        try:
            with _response(url, seconds) as response, open(path, "wb") as file:
                announced = int(response.headers.get("Content-Length") or -1)
                size = 0
                while size <= max_bytes and announced <= max_bytes:
                    if time.monotonic() > end:
                        raise too_slow
                    chunk = response.read1(_CHUNK)  # of the received bytes; `read` waits for all
                    if not chunk:
                        break
                    size += file.write(chunk)
        except VideoReadError:
            raise
        except (HTTPException, OSError, ValueError) as error:
            if isinstance(error, TimeoutError) and time.monotonic() > end:
                raise too_slow from error
            raise VideoReadError(name, f"download failed: {error}") from error
        if max(size, announced) > max_bytes:
            found = f"has {announced} bytes" if announced > max_bytes else "announces no size and goes on"
            raise VideoReadError(
                name, f"download {found}, the limit is {max_bytes:.0f} ({MAX_DOWNLOAD_BYTES} sets another limit)"
            )
        if announced not in (-1, size):
            raise VideoReadError(name, f"download stopped after {size} of {announced} bytes")
        yield path


def _without_query(url: str) -> str:
    """The address without query and fragment; paths and file URLs have none."""
    return url.partition("#")[0].partition("?")[0] if is_url(url) and url[:4].lower() == "http" else url


def _response(url: str, seconds: float) -> Any:
    """Open an address as `urlopen` does, with one time limit until the headers are read. The time-out of a socket holds
    for each byte, so a thread opens the address and is abandoned after the limit."""
    response: Future = Future()

    def work() -> None:
        response.set_running_or_notify_cancel()
        try:
            response.set_result(urllib.request.urlopen(url, timeout=min(_SILENCE, seconds + 1)))
        except Exception as error:  # raised again by `result`
            response.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return response.result(seconds)
    except FutureTimeoutError:  # TimeoutError itself from Python 3.11 on
        response.add_done_callback(lambda late: late.exception() or late.result().close())
        raise TimeoutError("no answer") from None


def _download_limit(name: str) -> float:
    text = os.environ.get(name)
    try:
        value = _DOWNLOAD_DEFAULTS[name] if text is None else float(text)
    except ValueError:
        value = -1
    if not value > 0:
        raise ValueError(f"the environment variable {name} must be a number above 0, got {text!r}")
    return value


# -- Picture files


def open_image(file: "str | os.PathLike | BinaryIO | bytes") -> Image.Image:
    """Open an image as `Image.open` does (path, open file or content), in one of the usual formats by its content and not
    larger than `MAX_FRAME_PIXELS`.

    Raises:
        OSError: if the file is missing or not such an image.
        ValueError: if the image is too large.
    """
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_IMAGE_FORMATS)
        _check_size(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large: {error}") from error
    return image


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_FRAME_PIXELS:
        image.close()
        raise ValueError(f"the image is {image.width}x{image.height}, more than {MAX_FRAME_PIXELS} pixels")


def open_picture(file: str | bytes, name: str) -> Image.Image | None:
    """Open a picture; None for a video. FFmpeg reads concatenated JPEG, PNG or PPM files as a video."""
    try:
        image = open_image(file)
    except OSError:
        return None
    except PICTURE_ERRORS as error:
        raise VideoReadError(name, str(error)) from error
    is_row = image.format == "PNG" and _PNG_END + _PNG_START in (
        file if isinstance(file, bytes) else Path(file).read_bytes()
    )
    if not is_row and (image.format in _ANIMATED_FORMATS or names_picture(name)):
        return image
    image.close()
    return None


def is_animation(source: "str | os.PathLike") -> bool:
    """Test a local file or data URL for more than one picture; False for unreadable and remote sources."""
    if is_url(source) and not _is_data(source):
        return False
    try:
        with local_file(source) as file, open_image(file) as image:
            return num_pictures(image) > 1
    except PICTURE_ERRORS:
        return False


def num_pictures(image: Image.Image) -> int:
    """Number of frames that the file announces. A PNG may contain one more picture, for readers without animation."""
    if image.format not in _ANIMATED_FORMATS:
        return 1
    try:
        return getattr(image, "n_frames", 1) - _first_frame(image)
    except PICTURE_ERRORS:  # of a damaged GIF, without a number
        return 2


def _first_frame(image: Image.Image) -> int:
    return int(getattr(image, "default_image", False) is True and image.n_frames > 1)


def load_picture(
    source: Any, *, only_still: bool = False, convert: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """Load a path, URL, bytes or file object as an upright RGB image, or as `convert` returns it; the first frame of an
    animation.

    Raises:
        OSError, ValueError: if it is missing, damaged or too large, or an animation with `only_still`.
    """
    with local_file(source) as file, open_image(file) as image:
        try:
            return (convert or rgb_picture)(_still(image) if only_still else image).copy()  # `with` closes the file
        except PICTURE_ERRORS as error:
            raise ValueError(str(error)) from error


def _still(image: Image.Image) -> Image.Image:
    if (count := num_pictures(image)) > 1:
        raise ValueError(f"it holds {count} pictures, expected one frame; pass an animation as a video")
    return image


# -- Pixels


def rgb_picture(image: Image.Image) -> Image.Image:
    """Upright RGB image: EXIF orientation applied, transparency laid on white, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: if its values have no known range (modes I and F).
    """
    return _on_white(native_picture(image))


def native_picture(image: Image.Image) -> Image.Image:
    """As `rgb_picture`, in the smallest of the modes L, RGB and RGBA that loses nothing."""
    image.load()  # Pillow turns TIFF files here
    return _upright(_with_8_bits(image), image)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _upright(picture: Image.Image, file: Image.Image) -> Image.Image:
    """Turn the picture by the EXIF orientation of its file."""
    try:
        turn = _TURNS.get(file.getexif().get(ExifTags.Base.Orientation))
    except PICTURE_ERRORS as error:  # damaged EXIF data must not lose the picture
        logger.warning("the EXIF data of an image cannot be read, its orientation is ignored: %s", error)
        return picture
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Convert to mode L, RGB or RGBA."""
    # Pillow reads one channel with up to 16 bits, three with 8 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(np.round(values / 257).astype(np.uint8))  # 65535 / 255
        transparent = image.info.get("transparency")
        if transparent is None:
            return grey
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return grey.convert("RGBA")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"the image holds {kind} (mode {image.mode}) of unknown range, expected 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def tensor_of(array: "np.ndarray | torch.Tensor") -> torch.Tensor:
    """Read-only tensor of pixel values: integers from 0 to 255 become uint8, floats stay floats.

    Raises:
        ValueError: for values of other types, and integers out of range (of pictures with 16 bits, for example).
    """
    if isinstance(array, torch.Tensor):
        array = array.detach()
        if array.is_floating_point():
            return array if array.dtype.itemsize > 1 else array.float()
        if array.dtype == torch.uint8:
            return array
        array = array.cpu().numpy()  # torch does not compare all integer types
    if array.dtype.kind not in "iuf":
        raise ValueError(f"pixels are integers from 0 to 255 or floats, got {array.dtype}")
    if array.dtype.kind != "f" and array.dtype != np.uint8:
        check_range(array, 0, 255, "; divide 16-bit values by 257" if array.dtype.itemsize > 1 else "")
        array = array.astype(np.uint8)
    if array.dtype not in (np.uint8, np.float16, np.float32, np.float64) or not array.dtype.isnative:
        array = array.astype(np.float32)
    # torch warns of read-only arrays (nothing is written here) and has no negative strides
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def check_range(frames: "np.ndarray | torch.Tensor", low: float, high: float, hint: str = "") -> tuple[float, float]:
    """Return the minimum and maximum. Raises ValueError if one is outside of [low, high] or non-finite."""
    least, greatest = frames.min().item(), frames.max().item()
    is_finite = math.isfinite(least) and math.isfinite(greatest)
    if not (is_finite and low <= least <= greatest <= high):
        name, expected = str(frames.dtype).removeprefix("torch."), f"must lie in [{low:g}, {high:g}]"
        if high == math.inf:
            expected = "must not be negative where they are normalized" if low == 0 else "must be finite"
        found = f"[{least:g}, {greatest:g}]{hint}" if is_finite else "non-finite values"
        raise ValueError(f"{name} frames {expected}, got {found}")
    return least, greatest


def check_shape(shape: Sequence[int]) -> None:
    """Validate the shape of a frame or of a video: it needs a dimension of channels.

    Raises:
        ValueError: with the shape and the expected ones.
    """
    shape, hint = tuple(shape), ""
    if len(shape) in (3, 4) and {shape[-1], shape[-3]} & set(_CHANNELS):
        return
    if len(shape) == 3:
        hint = "; a grey video [T, H, W] needs a fourth dimension: video[..., None]"
    elif len(shape) == 4 and shape[0] in _CHANNELS:
        hint = "; a video [C, T, H, W] needs its first two dimensions swapped"
    raise ValueError(
        f"a video is [T, H, W, C] or [T, C, H, W], a frame [H, W, C] or [C, H, W], with 1, 3 or 4 channels C, got "
        f"shape {shape}{hint}"
    )


def rgb_of_array(frame: "np.ndarray | torch.Tensor") -> np.ndarray:
    """`[H, W]`, `[H, W, C]` or `[C, H, W]` (the former, if it could be both), integers from 0 to 255 or floats in
    [0, 1], to `[H, W, 3]` uint8 RGB. Raises ValueError for other shapes and values."""
    frame = frame[..., None] if frame.ndim == 2 else frame
    check_shape(frame.shape)
    if not math.prod(frame.shape):
        raise ValueError(f"a frame of shape {tuple(frame.shape)} has no pixels")
    pixels = tensor_of(frame)
    if pixels.is_floating_point():
        check_range(pixels, 0, 1)
        pixels = (pixels.double() * 255).round().to(torch.uint8)
    pixels = pixels.cpu().numpy()
    if pixels.shape[-1] not in _CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 3:
        return pixels
    return np.asarray(_on_white(Image.fromarray(np.ascontiguousarray(pixels))))


# -- Readers


class ImageReader:
    """Reader of a list of images: arrays, PIL images, paths and URLs, evenly spaced in time."""

    def __init__(self, images: Sequence[Any], name: str, fps: float | None) -> None:
        if not len(images):
            raise VideoReadError(name, "it holds no frames")
        self.name, self.images, self.missing, self.costs = name, images, 0, None
        self.fps = float(fps or IMAGE_FPS)
        self.timestamps = np.arange(len(images)) / self.fps
        self.duration = len(images) / self.fps

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        for index in indices.tolist():
            emit(index, self._rgb(self.images[index], index))
        return set()

    def close(self) -> None:
        pass

    def _rgb(self, image: Any, index: int) -> np.ndarray:
        name = f"frame {index}"
        try:
            if isinstance(image, (np.ndarray, torch.Tensor)):
                return rgb_of_array(image)
            if isinstance(image, Image.Image):
                return np.asarray(rgb_picture(_still(image)))
            if isinstance(image, (str, os.PathLike)):
                name += f" ({source_name(image)})"
                return np.asarray(load_picture(image, only_still=True))
        except PICTURE_ERRORS as error:
            cause = error.cause if isinstance(error, VideoReadError) else error
            raise VideoReadError(self.name, f"{name}: {cause}") from error
        raise TypeError(f"{name} is a {type(image).__name__}, expected an image, an array or a path")


class PictureReader:
    """Reader of one picture file: an animation with its own delays, or a still picture shown for `1 / fps`.

    Attributes:
        duration: seconds, the delay of the last frame included.
    """

    def __init__(self, image: Image.Image, name: str, fps: float | None) -> None:
        self.name, self._image, self._canvas, self.costs = name, image, None, None
        announced = num_pictures(image)
        delays: list[float] = []  # seconds
        starts: list[float] = []  # milliseconds, in AVIF
        cause, is_damaged = "it has no readable picture", False
        try:
            self._first = _first_frame(image)
            while True:
                self._show(len(delays))
                milliseconds = image.info.get("duration") or 0
                starts.append(image.info.get("timestamp") or 0)
                # without a delay, as FFmpeg shows it
                default = _DEFAULT_DELAYS.get(image.format) if announced > 1 else None
                delays.append(milliseconds / 1000 or default or 1 / (fps or IMAGE_FPS))
        except EOFError:  # behind the last one
            pass
        except PICTURE_ERRORS as error:
            cause, is_damaged = str(error), True
        if not delays:
            raise VideoReadError(name, cause)
        if image.format == "AVIF" and all(np.diff(starts) > 0):  # each delay is rounded, times are not
            delays[:-1] = np.diff(starts) / 1000
        self.missing = max(announced - len(delays), int(is_damaged))
        self.timestamps = np.cumsum([0.0, *delays[:-1]])
        self.duration = float(np.sum(delays))
        self.fps = len(delays) / self.duration

    def read(self, indices: np.ndarray, emit: Emit) -> set[int]:
        wanted = set(indices.tolist())
        for index in range(max(wanted) + 1):
            try:
                picture = self._show(index)
            except PICTURE_ERRORS as error:  # a damaged file can fail at the second read alone
                logger.debug("%s: decoding fails at frame %d: %s", self.name, index, error)
                break
            if index in wanted:
                emit(index, np.asarray(_on_white(_upright(picture, self._image))))
                wanted.remove(index)
        return wanted

    def close(self) -> None:
        pass

    def _show(self, index: int) -> Image.Image:
        """Decode the next frame, or the first one again. Raises EOFError behind the last one."""
        image = self._image
        image.seek(self._first + index)
        _check_size(image)
        if image.format != "PNG" or not getattr(image, "is_animated", False):
            image.load()
            return _with_8_bits(image)
        # Pillow 13 blends half transparent parts of APNG frames wrongly: it only decodes, and frames are composed here.
        dispose, blend, box = image.dispose_op, image.blend_op, image.dispose_extent or (0, 0, *image.size)
        image.blend_op = PngImagePlugin.Blend.OP_SOURCE
        image.load()
        if index == 0:
            self._canvas = Image.new("RGBA", image.size)
        before = self._canvas
        shown, part = before.copy(), _with_8_bits(image).convert("RGBA").crop(box)
        if blend == PngImagePlugin.Blend.OP_OVER:
            shown.alpha_composite(part, box[:2])
        else:
            shown.paste(part, box[:2])
        self._canvas = before if dispose == PngImagePlugin.Disposal.OP_PREVIOUS else shown.copy()
        if dispose == PngImagePlugin.Disposal.OP_BACKGROUND:
            self._canvas.paste((0, 0, 0, 0), box)
        return shown


def images_in(folder: str) -> list[Path]:
    """Image files of a folder in the order of their numbers: frame_2 before frame_10."""
    paths = [path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise VideoReadError(folder, f"the folder holds no images ({' '.join(IMAGE_SUFFIXES)})")
    return sorted(
        paths, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    )
