"""Limits of remote code, which runs on the machines of others, and of data, which come from others.

The code: no pickle, nothing that runs text or other programs, a fixed list of imports, no effect of importing or loading
but what was asked for. The data: no file but the one that was named, no network, no more memory than a video can need.
"""

import ast
import base64
import json
import os
import sys
import zlib
from pathlib import Path

import processes
import pytest
from PIL import Image
from tiny import tiny_model
from tiny_processor import tiny_processor
from video_clips import picture, write_clip

from llava_next_ar.hub.hub_code import code_files
from llava_next_ar.processing import video_decoding
from llava_next_ar.processing.video_decoding import VideoReadError
from llava_next_ar.processing.video_frames import FrameSampling, load_video, open_image
from llava_next_ar.processing.video_inputs import load_images
from llava_next_ar.training.data import BadSampleError, LlavaVideoDataset
from llava_next_ar.training.media_paths import path_below

ROOT = Path(__file__).parents[2]
CODE = {name: content.decode() for name, content in code_files().items()}  # that of every checkpoint

# -- Limits of the code

FORBIDDEN_MODULES = {
    *(
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "subprocess",
        "multiprocessing",
        "pty",
    ),
    *("ctypes", "importlib", "runpy", "code", "codeop", "socket", "ftplib", "telnetlib", "http", "httpx", "requests"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "breakpoint", "globals"),
    *("os.system", "os.popen", "os.fork", "os.putenv", "os.environ.setdefault", "os.environ.update", "os.startfile"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load", "torch.ops.load_library"),
    *("torch.set_num_threads", "torch.set_default_dtype", "torch.set_default_device", "warnings.filterwarnings"),
    *("warnings.simplefilter", "logging.basicConfig", "torch.manual_seed", "random.seed", "np.random.seed"),
}


ALLOWED_IMPORTS = {"from http.client import HTTPException"}  # an error of urllib's, which video_frames may use


def forbidden(source: str) -> list[str]:
    """Forbidden imports and calls, anywhere in the code of a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            if ast.unparse(node) in ALLOWED_IMPORTS:
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            found += [f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN_CALLS or name.startswith(("os.exec", "os.spawn")):
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append("np.load with allow_pickle")
    return found


@pytest.mark.parametrize("module", CODE)
def test_no_pickle_no_evaluation_no_other_program(module):
    assert forbidden(CODE[module]) == []


def test_the_search_finds_what_it_looks_for():
    bad = {
        "import pickle": "import pickle",
        "from subprocess import run": "import subprocess",
        "def f():\n    import importlib.util": "import importlib.util",
        "x = [eval(y) for y in z]": "eval",
        "os.system('ls')": "os.system",
        "os.execv('a', b)": "os.execv",
        "torch.load(f)": "torch.load without weights_only=True",
        "torch.load(f, weights_only=False)": "torch.load without weights_only=True",
        "np.load(f, allow_pickle=True)": "np.load with allow_pickle",
        "yaml.load(f)": "yaml.load",
    }
    assert {source: forbidden(source) for source in bad} == {source: [name] for source, name in bad.items()}
    good = "re.compile('a'); model.eval(); torch.compile(m); torch.load(f, weights_only=True); np.load(f); yaml.safe_load(f)"
    assert forbidden(good) == []


# Torch, transformers and their requirements: without one of these the import fails.
REQUIRED = {
    *("PIL", "huggingface_hub", "jinja2", "numpy", "packaging", "tokenizers", "torch", "transformers"),
}
# Tried at import; a call that needs a missing one raises an error that names it.
OPTIONAL = {"av", "decord", "liger_kernel", "matplotlib", "torchcodec", "transformers"}


def third_party(source: str) -> tuple[set[str], set[str]]:
    """Top-level modules that a module imports: always, and inside `try`. transformers sees it in the same way."""
    required, optional = set(), set()

    def look(node: ast.AST, is_tried: bool) -> None:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        (optional if is_tried else required).update(name.split(".")[0] for name in names)
        for child in ast.iter_child_nodes(node):
            look(child, is_tried or isinstance(node, ast.Try))

    look(ast.parse(source), False)
    return required - sys.stdlib_module_names, optional - sys.stdlib_module_names


def test_what_remote_code_imports_is_this_list():
    required, optional = map(set().union, *map(third_party, CODE.values()))
    assert required == REQUIRED
    assert optional == OPTIONAL


# Runs in a separate process, before and while this package is imported and a checkpoint is loaded.
WATCH = """
import json, os, random, sys, tempfile, threading, warnings, logging
sys.dont_write_bytecode = True
folder, root, modules, third_party = sys.argv[1], sys.argv[2], sys.argv[3].split(), sys.argv[4].split()
import importlib
for name in third_party:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import numpy, torch, transformers
import transformers.models.llava_onevision.modeling_llava_onevision
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from transformers import conversion_mapping

events = []
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "urllib.Request", "http.client.connect")
PROCESS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
OTHER = ("os.putenv", "os.unsetenv", "_thread.start_new_thread", "pickle.find_class", "ctypes.dlopen")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.chmod", "os.link", "os.symlink", "shutil.rmtree")

def hook(event, arguments):
    if event in NETWORK or event in PROCESS or event in OTHER or event in CHANGES:
        events.append([event, repr(arguments)[:200]])
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"):
        events.append(["write", str(arguments[0])])
    elif event == "open" and arguments[1] is None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        events.append(["write", str(arguments[0])])

def state():
    return {
        "environment": dict(os.environ),
        "threads": [threading.active_count(), torch.get_num_threads()],
        "torch": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
                  hash(torch.get_rng_state().numpy().tobytes())],
        "random": [hash(random.getstate()), hash(numpy.random.get_state()[1].tobytes())],
        "warnings": [repr(one) for one in warnings.filters],
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable,
                    transformers.logging.get_verbosity()],
        "directory": os.getcwd(),
        "renamed": sorted(conversion_mapping._checkpoint_conversion_mapping_cache),
    }

conversion_mapping.get_checkpoint_conversion_mapping("llava_onevision")  # fills the table that ours is added to
before = state()
sys.addaudithook(hook)
for module in modules:
    importlib.import_module("llava_next_ar." + module)
imported, events = events, []
after_import = state()
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules") and model.autoregressive_module is not None
assert type(processor).__module__.startswith("transformers_modules")
loaded, events = events, []
print(json.dumps({"before": before, "imported": imported, "after_import": after_import, "loaded": loaded,
                  "after_load": state()}))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Events observed while all modules were imported and a checkpoint with its processor was loaded from a folder."""
    folder = tmp_path_factory.mktemp("watched")
    model = tiny_model()
    model.save_pretrained(folder / "saved")
    tiny_processor(model.config).save_pretrained(folder / "saved")
    paths = [path for name in CODE for path in ROOT.glob(f"*/{name}") if path.parent.name != "tests"]
    modules = " ".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    third_party = " ".join(sorted(REQUIRED | OPTIONAL)) + " matplotlib.pyplot"
    command = [sys.executable, "-c", WATCH, str(folder / "saved"), str(ROOT), modules, third_party]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_MODULES_CACHE": str(folder / "modules")}
    done = processes.run(command, timeout=300, cwd=folder, env=environment)
    return folder, json.loads(done.stdout.strip().splitlines()[-1])


def test_importing_does_nothing_else(watched):
    _, seen = watched
    assert seen["imported"] == []
    # The one exception, documented in the model's module: how the names of OneVision's checkpoints are translated.
    renamed = set(seen["after_import"].pop("renamed")) - set(seen["before"].pop("renamed"))
    assert renamed == {"LlavaNextARForConditionalGeneration", "LlavaNextARModel"}
    assert seen["after_import"] == seen["before"]


def test_loading_from_a_folder_touches_neither_the_network_nor_foreign_files(watched):
    """With the Hub client online, which has no reason for a request."""
    folder, seen = watched
    quiet = ("_thread.start_new_thread",)  # transformers reads weights with a pool of threads
    events = [(kind, what) for kind, what in seen["loaded"] if kind not in quiet]
    modules = str(folder / "modules")
    assert [event for event in events if not (event[0] == "write" and event[1].startswith(modules))] == []
    assert seen["after_load"]["environment"] == seen["before"]["environment"]
    assert seen["after_load"]["torch"][:4] == seen["before"]["torch"][:4]
    for name in ("warnings", "logging", "directory"):
        assert seen["after_load"][name] == seen["before"][name]


# -- Limits of data


@pytest.fixture
def scene(tmp_path):
    """A folder of media, and beside it a secret that no file of the folder may reach."""
    root = tmp_path / "media"
    root.mkdir()
    write_clip(root / "clip.mp4", 8, width=64, height=48)
    secret = write_clip(tmp_path / "secret.mp4", 8, width=64, height=48)
    Image.fromarray(picture(3)).save(tmp_path / "secret.png")
    return root, secret


def sdp(port: int) -> str:
    stream = f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    return f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n{stream}"


# FFmpeg goes by content: each of these is a list of other places under the suffix of a video (but for HLS, which must have
# its own). All but the last two opened what they name before `FORMATS` was there.
PLAYLISTS = {
    "neighbour.mp4": "ffconcat version 1.0\nfile clip.mp4\n",
    "linked.mp4": "ffconcat version 1.0\nfile link.mp4\n",
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.ts\n#EXT-X-ENDLIST\n",
    "stream.mp4": sdp(52004),
    "absolute.mp4": "ffconcat version 1.0\nfile {secret}\n",
    "remote.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_playlist_is_no_video(scene, monkeypatch, name, as_bytes, backend):
    """Bytes have no folder: without the limit FFmpeg reads the working folder, and waits on a socket for minutes."""
    pytest.importorskip({"pyav": "av", "decord": "decord"}[backend])
    root, secret = scene
    (root / "link.mp4").symlink_to(secret)
    write_clip(root / "clip.ts", 8, width=64, height=48)
    monkeypatch.chdir(root)
    path = root / name
    path.write_text(PLAYLISTS[name].format(secret=secret))
    with pytest.raises(VideoReadError, match="not supported|not a video|not MP4"):
        load_video(path.read_bytes() if as_bytes else path, backend=backend)


@pytest.mark.parametrize("name", ["frame%d.png", "concat:clip.mp4", "subfile,,start,0,end,0,,:clip.mp4", "pipe:0"])
def test_a_name_is_neither_a_pattern_nor_an_address(scene, monkeypatch, name):
    root, _ = scene
    for index in range(3):
        Image.fromarray(picture(index)).save(root / f"frame{index}.png")
    (root / name).write_bytes(b"no video")
    monkeypatch.chdir(root)
    with pytest.raises(VideoReadError, match="not supported|not a video"):
        load_video(name, backend="pyav")


def test_odd_names_are_read_all_the_same(scene, monkeypatch):
    root, _ = scene
    monkeypatch.chdir(root)
    for name in ("50%d.mp4", "a:b.mp4", "file:x.mp4", "é ü.mp4", "-i.mp4"):
        (root / name).write_bytes((root / "clip.mp4").read_bytes())
        assert load_video(Path(name).absolute(), backend="pyav").total_frames == 8


def test_the_list_of_formats_knows_what_ffmpeg_calls_them():
    """A misspelt name would reject valid videos."""
    import av

    known = {part for name in av.formats_available for part in name.split(",")}
    # FFmpeg is built with some or without, but most are there
    assert len(set(video_decoding.FORMATS) - known) <= 5, set(video_decoding.FORMATS) - known
    lists = {"concat", "hls", "dash", "sdp", "rtsp", "image2", "lavfi", "imf", "vobsub", "webm_dash_manifest"}
    assert not lists & set(video_decoding.FORMATS)


def test_a_program_is_not_run_for_a_frame(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file's suffix."""
    from PIL import EpsImagePlugin

    def ghostscript(*arguments, **options):
        raise AssertionError("Ghostscript was run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / "frame.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(VideoReadError, match="cannot identify image file"):
        load_video([path, path])
    encoded = base64.b64encode(path.read_bytes()).decode()
    for source in (str(path), f"data:image/png;base64,{encoded}", encoded):
        with pytest.raises(ValueError, match="cannot load image .*cannot identify"):
            load_images(source)
    with pytest.raises(OSError, match="cannot identify"), path.open("rb") as file:
        open_image(file)


# -- A data set keeps to its folder


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model().config, num_frames=2)


def answer(**media) -> dict:
    kind = next(iter(media))
    turns = [{"from": "human", "value": f"<{kind}>\nWhat?"}, {"from": "gpt", "value": "That."}]
    return {**media, "conversations": turns}


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("name", ["../secret", "{secret}", "link", "folder/../../secret", "linked_folder/secret"])
def test_no_path_leads_out_of_the_folder(scene, processor, kind, name):
    root, secret = scene
    suffix = {"video": ".mp4", "image": ".png"}[kind]
    secret = secret.with_suffix(suffix)
    (root / "folder").mkdir()
    (root / f"link{suffix}").symlink_to(secret)
    (root / "linked_folder").symlink_to(root.parent)
    name = name.format(secret=secret.with_suffix("")) + suffix
    data = [answer(**{kind: name})]
    with pytest.raises(BadSampleError, match=f"leads to .*secret{suffix}, outside of"):
        LlavaVideoDataset(data, processor, video_root=root)[0]
    allowed = LlavaVideoDataset(data, processor, video_root=root, allow_outside_root=True)[0]
    assert (allowed["labels"] != -100).any()


def test_a_folder_of_frames_holds_no_link_that_leads_out(scene, processor):
    """The folder lies inside, its frames outside."""
    root, secret = scene
    frames = root / "frames"
    frames.mkdir()
    for index in range(3):
        Image.fromarray(picture(index)).save(frames / f"{index}.png")
    (frames / "3.png").symlink_to(frames / "0.png")
    data = [answer(video="frames")]
    dataset = LlavaVideoDataset(data, processor, video_root=root)
    assert "pixel_values_videos" in dataset[0]
    (frames / "4.png").symlink_to(secret.with_suffix(".png"))
    with pytest.raises(
        BadSampleError, match=r"'4\.png' in the video folder 'frames' leads to .*secret\.png, outside of"
    ):
        dataset[0]


def test_a_link_that_is_bent_after_the_check_leads_nowhere_else(scene):
    root, secret = scene
    link = root / "link.mp4"
    link.symlink_to(root / "clip.mp4")
    path = path_below(root, "link.mp4")
    link.unlink()
    link.symlink_to(secret)
    assert path == str((root / "clip.mp4").resolve())


@pytest.mark.parametrize(
    "name",
    ["http://127.0.0.1:9/x.mp4", "https://127.0.0.1:9/x.mp4", "file:///etc/hostname", "ftp://127.0.0.1/x", "data:x"],
)
def test_addresses_only_where_they_are_allowed(scene, processor, name):
    root, _ = scene
    with pytest.raises(BadSampleError, match="is a URL, expected a path below .*allow_outside_root=True accepts it"):
        LlavaVideoDataset([answer(video=name)], processor, video_root=root)[0]


# -- Memory


def peak_memory(code: str, *arguments: object) -> float:
    """Peak memory of a process in MiB; `code` must not raise."""
    code = f"import sys, resource\n{code}\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    return float(processes.run_python("-c", code, *arguments, timeout=120).split()[-1])


def test_frames_of_gigantic_size_are_refused_before_memory_is_taken(tmp_path):
    """A few hundred bytes that unpack to gigabytes: a PNG as frame, as image and inside a film, and a film's header."""
    pytest.importorskip("resource")
    small, side = tmp_path / "small.png", 30_000  # 900 megapixels
    Image.new("L", (16, 16)).save(small)
    content = bytearray(small.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    write_clip(tmp_path / "motion.avi", 2, codec="mjpeg", options={}, pixel_format="yuvj420p")
    content = bytearray((tmp_path / "motion.avi").read_bytes())
    start = content.find(b"strf") + 12  # width and height of the stream, and of each of its pictures
    content[start : start + 8] = side.to_bytes(4, "little") * 2
    picture_header = b"\xff\xc0\x00\x11\x08"
    while (start := content.find(picture_header, start + 1)) >= 0:
        content[start + 5 : start + 9] = side.to_bytes(2, "big") * 2
    (tmp_path / "header.avi").write_bytes(content)
    code = """
from llava_next_ar.processing.video_frames import load_video, open_image
from llava_next_ar.processing.video_inputs import load_images
folder, side = sys.argv[1:]
for source, reader in (
    ("bomb.png", open_image), ("bomb.png", load_images), ("bomb.png", load_video),
    ("bomb.png", lambda path: load_video([path])), ("header.avi", load_video),
):
    try:
        reader(f"{folder}/{source}")
    except ValueError as error:
        assert source in str(error) or reader is open_image, error
        assert any(word in str(error) for word in ("too large", "pixels", "exceeds limit")), error
    else:
        raise AssertionError(f"{source} was read by {reader}")
"""
    nothing = "from llava_next_ar.processing.video_inputs import load_images"
    assert peak_memory(code, tmp_path, side) - peak_memory(nothing) < 100


def test_a_limit_below_the_size_of_a_film_refuses_it_by_name(scene, monkeypatch):
    root, _ = scene
    monkeypatch.setattr(video_decoding, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoReadError, match=r"clip\.mp4: its frames are 64x48, more than 3071 pixels"):
        load_video(root / "clip.mp4", FrameSampling(num_frames=2), backend="pyav")


# -- Chat templates come with checkpoints


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(processor, template):
    with pytest.raises(ValueError, match="the chat template rejects the conversation: .*(unsafe|immutable|too big)"):
        processor.apply_chat_template([{"role": "user", "content": "Hi."}], chat_template=template)
