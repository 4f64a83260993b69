"""The app over HTTP, through gradio_client, against the model's own answers and numbers."""

import base64
import inspect
import io
import pickle
import re
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from demo_folder import make_changed_checkpoint, make_demo_folder
from gradio_client import Client, handle_file
from PIL import Image
from release_marks import since_transformers
from tiny import tiny_model
from tiny_processor import tiny_processor
from transformers import set_seed
from video_clips import write_clip

from llava_next_ar.evaluation.measures import load_checkpoint
from llava_next_ar.pictures.strip import ColourBar, StripRow
from llava_next_ar.pictures.surprise import map_rows
from llava_next_ar.pictures.visualize import VisualizeSettings, read_clip
from llava_next_ar.processing.video_frames import load_video
from llava_next_ar.serving.space import accelerator, app, service
from llava_next_ar.serving.space.chat import GenerationSettings, conversation_of, prepare
from llava_next_ar.serving.space.drawing import compared, skill_html, strip_html, timeline_html
from llava_next_ar.serving.space.expectation import expectation_html
from llava_next_ar.serving.space.service import ModelService

QUESTION, FURTHER = "What is the color of the shape?", "Does the shape bounce off an edge of the picture?"
LENGTH = 6  # tokens of an answer
EXAMPLES = {path.name: path for path in app.EXAMPLES.glob("*.mp4")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_demo_folder(tmp_path_factory.mktemp("app"))
    make_changed_checkpoint(folder)
    return load_checkpoint(str(folder / "changed"))


@pytest.fixture(scope="module")
def served(checkpoint):
    """Address of a server that runs in this process."""
    demo = app.build_app(ModelService(*checkpoint, name="tiny"))
    _, address, _ = app.launch(
        demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", max_file_size="100kb"
    )
    yield address
    demo.close()


@pytest.fixture
def client(served) -> Client:
    """A client with a session of its own."""
    return Client(served, verbose=False)


def ask(client: Client, text: str, *files: Path, **options) -> str:
    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    return client.predict(message, **{"max_new_tokens": LENGTH, "api_name": "/chat", **options})


def part_of(path: Path) -> dict:
    return {"type": "image" if path.suffix == ".png" else "video", "path": str(path)}


def user(text: str, *files: Path) -> dict:
    return {"role": "user", "content": [*map(part_of, files), {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def generated(checkpoint, *messages: dict, num_frames: int | None = None, **options) -> str:
    """The answer of `generate` to a whole conversation."""
    model, processor = checkpoint
    inputs = processor.apply_chat_template(
        list(messages),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={} if num_frames is None else {"num_frames": num_frames, "sampling": "uniform"},
    )
    set_seed(3)
    tokens = model.generate(**inputs, **{"max_new_tokens": LENGTH, "do_sample": False, **options})
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011  the client's class differs by version
        call(*arguments, **options)
    return str(caught.value)


# -- Chat


def test_answers_of_several_turns_are_those_of_generate(checkpoint, client):
    """The second turn reads its own tokens alone: the tower encodes no frame again."""
    clip, model = EXAMPLES["direction.mp4"], checkpoint[0]
    first = ask(client, QUESTION, clip)
    assert first == generated(checkpoint, user(QUESTION, clip)) and first
    with mock.patch.object(model.model.vision_tower, "forward", wraps=model.model.vision_tower.forward) as tower:
        second = ask(client, FURTHER)
        assert tower.call_count == 0
        third = ask(client, QUESTION, EXAMPLES["order.mp4"])
        assert [len(call.args[0]) for call in tower.call_args_list] == [8]
    turns = [user(QUESTION, clip), assistant(first), user(FURTHER)]
    assert second == generated(checkpoint, *turns)
    turns += [assistant(second), user(QUESTION, EXAMPLES["order.mp4"])]
    assert third == generated(checkpoint, *turns)
    assert len({first, second, third}) > 1


def test_images_and_settings_are_those_of_generate(checkpoint, client, tmp_path):
    picture, clip = tmp_path / "picture.png", EXAMPLES["bounce.mp4"]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(picture)
    tall, other = tmp_path / "tall.png", EXAMPLES["order.mp4"]
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (70, 30, 3), dtype=np.uint8)).save(tall)
    images = [(picture,), (picture, tall), (picture, picture)]
    files = [(), *images, (clip, other), (clip, clip), (picture, clip), (clip, picture, tall)]
    expected = [generated(checkpoint, user(QUESTION, *chosen)) for chosen in files]
    assert [ask(Client(client.src, verbose=False), QUESTION, *chosen) for chosen in files] == expected
    assert len(set(expected)) == len(files)
    other = Client(client.src, verbose=False)
    assert ask(other, QUESTION, clip, num_frames=3) == generated(checkpoint, user(QUESTION, clip), num_frames=3)
    sampled = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    expected = generated(checkpoint, user(QUESTION, clip), do_sample=True, **sampled)
    answer = ask(Client(client.src, verbose=False), QUESTION, clip, seed=3, **sampled)
    assert answer == expected != generated(checkpoint, user(QUESTION, clip))


def test_an_answer_arrives_in_parts(client):
    message = {"text": QUESTION, "files": [handle_file(str(EXAMPLES["direction.mp4"]))]}
    job = client.submit(message, max_new_tokens=LENGTH, api_name="/chat")
    answer, parts = job.result(), job.outputs()
    assert len(parts) > 2 and parts[-1] == answer
    assert all(later.startswith(earlier) for earlier, later in zip(parts, parts[1:], strict=False))


def test_users_at_the_same_time_get_their_own_answers(checkpoint, served):
    expected = {name: generated(checkpoint, user(QUESTION, clip)) for name, clip in EXAMPLES.items()}
    clients = {name: Client(served, verbose=False) for name in EXAMPLES}
    jobs = {}
    for name, clip in EXAMPLES.items():
        message = {"text": QUESTION, "files": [handle_file(str(clip))]}
        jobs[name] = clients[name].submit(message, max_new_tokens=LENGTH, api_name="/chat")
    assert {name: job.result() for name, job in jobs.items()} == expected
    further = {name: ask(clients[name], FURTHER) for name in EXAMPLES}
    for name, clip in EXAMPLES.items():
        assert further[name] == generated(checkpoint, user(QUESTION, clip), assistant(expected[name]), user(FURTHER))


def test_a_turn_that_failed_does_not_break_the_next_one(checkpoint, client, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    message = error_of(ask, client, QUESTION, broken)
    assert "cannot read video broken.mp4: it is not a video" in message and "/" not in message
    assert ask(client, QUESTION, EXAMPLES["bounce.mp4"]) == generated(
        checkpoint, user(QUESTION, EXAMPLES["bounce.mp4"])
    )


@since_transformers("5.23", "it brought sanitize_control_tokens")
def test_control_tokens_of_a_user_are_text(checkpoint, client):
    assert isinstance(ask(client, "What is <video> ?", EXAMPLES["bounce.mp4"]), str)


def test_closing_an_answer_stops_the_model(checkpoint):
    """The stop button closes the iterator; the lock is free again after the token that is being made."""
    steps, forward = [], checkpoint[0].forward

    def counted(*arguments, **options):
        steps.append(1)
        return forward(*arguments, **options)

    own = ModelService(*checkpoint, name="tiny")
    message = {"text": QUESTION, "files": [str(EXAMPLES["direction.mp4"])]}
    checkpoint[0].generation_config.eos_token_id, before = None, checkpoint[0].generation_config.eos_token_id
    try:
        with mock.patch.object(checkpoint[0], "forward", counted):
            answer = own.answer(message, [], GenerationSettings(max_new_tokens=400), "session")
            next(answer)
            answer.close()
            assert own._lock.acquire(timeout=20)
            own._lock.release()
            assert len(steps) < 200
    finally:
        checkpoint[0].generation_config.eos_token_id = before
    assert not [thread for thread in threading.enumerate() if thread.name == "answer" and thread.is_alive()]


def test_a_conversation_is_read_in_each_form_that_gradio_has(tmp_path):
    clip = EXAMPLES["order.mp4"]
    answer, asked = assistant("red"), {"text": "and now?", "files": []}
    expected = [user(QUESTION, clip), answer, user("and now?")]
    for content in (
        [{"path": str(clip)}, QUESTION],
        [{"type": "file", "file": {"path": str(clip)}}, {"type": "text", "text": QUESTION}],
    ):
        history = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        assert conversation_of(asked, history) == expected
        unanswered = {"role": "user", "content": [{"path": str(tmp_path / "gone.mp4")}]}
        assert conversation_of(asked, [unanswered, *history, unanswered]) == expected
    with pytest.raises(ValueError, match="the message is empty"):
        conversation_of({"text": " ", "files": []}, [])


def test_an_edited_conversation_does_not_use_a_cache_of_another(checkpoint):
    """The cache holds placeholders, equal for all videos: a video that was exchanged must be encoded."""
    own = ModelService(*checkpoint, name="tiny")

    def answer(text: str, clip: str, history: list) -> str:
        settings = GenerationSettings(max_new_tokens=LENGTH)
        return list(
            own.answer({"text": text, "files": [str(EXAMPLES[clip])] if clip else []}, history, settings, "s")
        )[-1]

    first = answer(QUESTION, "direction.mp4", [])
    assert answer(QUESTION, "order.mp4", []) == generated(checkpoint, user(QUESTION, EXAMPLES["order.mp4"]))
    history = [{"role": "user", "content": [{"path": str(EXAMPLES["direction.mp4"])}, QUESTION]}]
    history.append({"role": "assistant", "content": first})
    expected = generated(checkpoint, user(QUESTION, EXAMPLES["direction.mp4"]), assistant(first), user(FURTHER))
    assert answer(FURTHER, "", history) == expected
    again = generated(checkpoint, user(QUESTION, EXAMPLES["direction.mp4"]), assistant(first), user(QUESTION))
    assert answer(QUESTION, "", history) == again  # the same session, its last turn asked in other words


# -- Expectation


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Inputs of an example, and all that the model returns for them."""
    model, processor = checkpoint
    settings = VisualizeSettings(model="", videos=(str(EXAMPLES["bounce.mp4"]),))
    clip = read_clip(model, processor, str(EXAMPLES["bounce.mp4"]), settings)
    (prediction,), (surprise,) = model.predict_next_frames(**clip.inputs), model.surprise(**clip.inputs)
    return clip, prediction, surprise, model.imagine(2, hold_back=True, **clip.inputs)[0]


def test_the_numbers_of_a_clip_are_those_of_the_model(client, expected):
    clip, prediction, surprise, imagined = expected
    page, numbers = client.predict(handle_file(str(EXAMPLES["bounce.mp4"])), 0, 2, api_name="/expect")
    assert numbers["metrics"] == pytest.approx(prediction.metrics, rel=1e-5) and numbers["notes"] == []
    frames = {name: [frame[name] for frame in numbers["frames"]] for name in numbers["frames"][0]}
    assert frames["frame"] == surprise.frame_index.tolist()
    assert frames["seconds"] == pytest.approx(clip.times[1:].tolist(), rel=1e-5)
    assert frames["surprise"] == pytest.approx(surprise.frames.tolist(), rel=1e-4)
    assert frames["error"] == pytest.approx(prediction.frame_metrics["mse"].tolist(), rel=1e-5)
    assert frames["copy_error"] == pytest.approx(prediction.frame_metrics["copy_mse"].tolist(), rel=1e-5)
    errors = imagined.frame_metrics()
    for name, key in (("error", "mse"), ("copy_error", "copy_mse"), ("straight_line_error", "linear_mse")):
        assert [own[name] for own in numbers["imagined"]] == pytest.approx(errors[key].tolist(), rel=1e-4)
    assert f"Skill {prediction.metrics['skill']:+.2f}" in page and f"{surprise.frames[2]:.2f}</figure>" in page


def test_the_numbers_of_each_patch_are_those_of_the_model(client, expected):
    surprise = expected[2]
    numbers = client.predict(handle_file(str(EXAMPLES["bounce.mp4"])), api_name="/surprise")
    for own, *of_model in zip(numbers["frames"], surprise.patches, surprise.errors, surprise.copy_errors, strict=True):
        for name, values in zip(("patches", "errors", "copy_errors"), of_model, strict=True):
            torch.testing.assert_close(torch.tensor(own[name]), values, rtol=1e-4, atol=1e-6)


def images_of(page: str) -> list[np.ndarray]:
    sources = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")) for source in sources]


def test_a_patch_has_the_colour_of_its_number_on_the_bar(expected):
    """The colour is looked up in the picture of the bar, as a reader does."""
    clip, _, surprise, _ = expected
    rows, bar = map_rows(clip.frames, surprise)
    page = strip_html(rows, [f"{time:.2f} s" for time in clip.times.tolist()], [bar])
    *maps, scale = images_of(page)
    assert len(maps) == len(surprise.frames) and scale.shape == (1, 256, 3)
    ratios = [
        (error + floor) / (copy + floor)
        for error, copy, floor in zip(surprise.errors, surprise.copy_errors, surprise.floors, strict=True)
    ]
    assert max(float(own.max()) for own in ratios) > 1.05
    for picture, ratio in zip(maps, ratios, strict=True):
        height, width = (size // count for size, count in zip(picture.shape[:2], ratio.shape, strict=True))
        centers = picture[height // 2 :: height, width // 2 :: width]
        places = np.clip(np.asarray(bar.scale.norm(ratio.numpy())), 0, 1)
        on_bar = scale[0][(places * 255).round().astype(int)]
        assert np.abs(centers.astype(int) - on_bar.astype(int)).max() <= 3
    for text, value in re.findall(r'<span style="left:([\d.]+)%">[≤≥ ]*([\d/]+)</span>', page):
        number = eval(value)  # noqa: S307  "1/4"
        assert float(text) == pytest.approx(100 * float(bar.scale.norm(number)), abs=0.01)


def test_a_narrow_timeline_keeps_the_most_surprising_frame_of_each_stretch(expected):
    """Places of thumbnails on a phone come from the same figures: those of the class `ar-wide` are hidden there."""
    surprise = expected[2]
    count, values = len(surprise.frames), torch.tensor([0.1, 0.2, 0.9, 0.3, 0.5, 0.4, 0.8])
    assert count == len(values)
    page = timeline_html([f"{number}.png" for number in range(count)], replace(surprise, frames=values))
    figures = re.findall(
        r'<figure class="([^"]*)" style="--wide:([\d.]+)%;--narrow:([\d.]+)%">.*?>([\d.]+)</figure>', page
    )
    assert [float(value) for *_, value in figures] == pytest.approx(values.tolist())
    narrow = [(float(place), float(value)) for name, _, place, value in figures if "ar-wide" not in name]
    assert [value for _, value in narrow] == pytest.approx([0.2, 0.9, 0.5, 0.4, 0.8])
    places = [place for place, _ in narrow]
    assert min(np.diff(places)) >= 18.9 and places[0] >= 8.4 and places[-1] <= 91.6
    assert page.count("ar-narrow") == 5


def test_names_of_rows_and_headings_are_text():
    row = StripRow(name="<b>", pictures=[np.ones((2, 2, 3)), None], captions=["<i>", ""])
    page = strip_html([row], ["<u>", "2 s"])
    assert not re.search("<[biu]>", page) and page.count("&lt;b&gt;") == 2 and "ar-empty" in page
    assert ColourBar.__name__ not in page


@pytest.mark.parametrize(
    ("error", "copy", "words"),
    [
        (0.56, 1.0, "44% less than"),
        (1.12, 1.0, "12% more than"),
        (1.001, 1.0, "as much as"),
        (0.0, 0.0, "as much as"),
        (0.1, 0.0, "more than"),
    ],
)
def test_errors_are_compared_in_words(error, copy, words):
    assert compared(error, copy) == words


def test_the_meaning_of_the_skill_is_said():
    said = skill_html({"skill": 0.44, "mse": 0.56, "copy_mse": 1.0}, ["a < b"])
    assert "Skill +0.44" in said and "44% less than copying the frame before" in said and "a &lt; b" in said
    assert "not defined" in skill_html({"skill": float("nan"), "mse": 0.0, "copy_mse": 0.0})


def test_heads_that_are_missing_untrained_or_look_ahead_are_reported(tmp_path):
    clip = str(write_clip(tmp_path / "clip.mp4", 8))
    services = {}
    for name, options in {
        "none": {"enable_autoregressive": False},
        "new": {},
        "ahead": {"head": {"use_frame_causal_mask": False}},
    }.items():
        model = tiny_model(**options)
        services[name] = ModelService(model, tiny_processor(model.config), name)
    for call in (lambda s: s.expect(clip, 4, 1), lambda s: next(s.run_file(clip, 4)), lambda s: s.open_live()):
        with pytest.raises(ValueError, match="this checkpoint has no head that predicts"):
            call(services["none"])
    _, expectation = services["new"].expect(clip, 4, 1)
    assert "this head has not been trained" in expectation.notes[0]
    read, expectation = services["ahead"].expect(clip, 4, 1)
    assert "this is not foresight" in expectation.notes[0]
    assert expectation.imagined is None and expectation.not_imagined
    page = expectation_html(read, expectation)
    assert f"Left out: {expectation.not_imagined}." in page.replace("&#x27;", "'")
    with pytest.raises(ValueError, match="use_frame_causal_mask"):
        services["ahead"].open_live()


# -- Live


def test_a_running_file_has_the_surprise_of_the_whole_one(checkpoint, client):
    clip = str(EXAMPLES["order.mp4"])
    own = ModelService(*checkpoint, name="tiny")
    pages, readers = zip(*own.run_file(clip, 4, at_its_pace=False), strict=True)
    model, processor = checkpoint
    settings = VisualizeSettings(model="", videos=(clip,), fps=4)
    whole = read_clip(model, processor, clip, settings)
    (surprise,) = model.surprise(**whole.inputs)
    live = readers[-1].surprise()
    assert len(pages) == len(whole.times) == 8
    torch.testing.assert_close(live.frames, surprise.frames, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(live.seconds, surprise.seconds)
    for name in ("patches", "errors", "copy_errors"):
        for mine, other in zip(getattr(live, name), getattr(surprise, name), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    job = client.submit(handle_file(clip), 4, False, api_name="/run_file")
    assert job.result() == pages[-1] and len(job.outputs()) >= 3
    marks = [page.count("<figure") for page in pages]
    assert marks == [0, *range(1, 8)]  # the timeline grows
    assert f"<b>surprise {float(surprise.frames[-1]):.2f}</b>" in pages[-1]
    assert "The first frame of 8 is read" in pages[0] and "8 of 8 frames are read." in pages[-1]


def test_pictures_of_a_webcam_are_read_one_by_one(checkpoint, client, tmp_path):
    frames = load_video(str(EXAMPLES["bounce.mp4"])).frames[:3].permute(0, 2, 3, 1).numpy()
    assert frames.shape == (3, 64, 64, 3)
    model, processor = checkpoint
    own = ModelService(model, processor, "tiny")
    reader = own.open_live()
    for second, frame in enumerate(frames):
        reader = own.watch(frame, 0.5 * second, reader)
    pixels = processor.video_processor(videos=[frames], return_tensors="pt", num_frames=3)["pixel_values_videos"][0]
    stream = model.surprise_stream(service.LiveReader(model, processor)._prompt_ids)
    torch.testing.assert_close(
        reader.surprise().frames, stream.read(pixels, [0.0, 0.5, 1.0]).frames, rtol=1e-4, atol=1e-5
    )
    pages = []
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
        pages.append(client.predict(handle_file(str(tmp_path / f"{number}.png")), api_name="/watch"))
    assert "The first frame is read" in pages[0] and "Frame 1," in pages[1] and "Frame 2," in pages[2]


def test_a_live_video_has_an_end(checkpoint, monkeypatch):
    monkeypatch.setattr("llava_next_ar.serving.space.live.MAX_LIVE_FRAMES", 2)
    own = ModelService(*checkpoint, name="tiny")
    reader, frame = own.open_live(), np.zeros((64, 64, 3), np.uint8)
    for second in (0.0, 1.0):
        reader = own.watch(frame, second, reader)
    assert reader.is_full
    with pytest.raises(ValueError, match="a live video ends after 2 frames"):
        own.watch(frame, 2.0, reader)


# -- ZeroGPU


def as_on_zero_gpu(duration: int):
    """A decorator that passes arguments and results through pickle, as the processes of ZeroGPU do."""
    assert duration == 60

    def decorate(function):
        def call(*arguments):
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments)))))

        def iterate(*arguments):
            for entry in function(*pickle.loads(pickle.dumps(arguments))):
                yield pickle.loads(pickle.dumps(entry))

        return iterate if inspect.isgeneratorfunction(function) else call

    return decorate


def test_on_zero_gpu_the_results_are_the_same(checkpoint, monkeypatch):
    usual = ModelService(*checkpoint, name="tiny")
    monkeypatch.setattr(accelerator, "spaces", mock.Mock(GPU=as_on_zero_gpu))
    monkeypatch.setattr(service, "IS_ZERO_GPU", True)
    lent = ModelService(*checkpoint, name="tiny")
    clip, settings = str(EXAMPLES["bounce.mp4"]), GenerationSettings(max_new_tokens=LENGTH)
    message = {"text": QUESTION, "files": [clip]}
    assert list(lent.answer(message, [], settings, "s")) == list(usual.answer(message, [], settings, "s"))
    assert lent.surprise(clip, None, 2) == usual.surprise(clip, None, 2)
    pages = [page for page, _ in lent.run_file(clip, 4, at_its_pace=True)]
    monkeypatch.setattr(service, "IS_ZERO_GPU", False)
    assert pages == [page for page, _ in usual.run_file(clip, 4, at_its_pace=False)]
    monkeypatch.setattr(service, "IS_ZERO_GPU", True)
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    readers = [lent.open_live(), usual.open_live()]
    monkeypatch.setattr(service, "IS_ZERO_GPU", False)
    readers[1] = usual.open_live()
    for second, frame in enumerate(frames):
        readers = [own.watch(frame, float(second), reader) for own, reader in zip((lent, usual), readers, strict=True)]
    torch.testing.assert_close(*(reader.surprise().frames for reader in readers), rtol=1e-4, atol=1e-5)


# -- Messages and limits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 0, 3), "no video was given: upload one, or choose an example"),
        (("direction.mp4", 1, 3), "frames are 1, expected 2 to 64"),
        (("direction.mp4", 65, 3), "frames are 65, expected 2 to 64"),
        (("picture.png", 0, 0), "one frame alone"),
        (("text.mp4", 0, 3), "cannot read video text.mp4: it is not a video"),
    ],
)
def test_errors_of_a_clip_are_messages(client, tmp_path, arguments, message):
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    (tmp_path / "text.mp4").write_text("a text")
    video, *rest = arguments
    if video is not None:
        video = handle_file(str(EXAMPLES.get(video) or tmp_path / video))
    said = error_of(client.predict, video, *rest, api_name="/expect")
    assert message in said and str(tmp_path) not in said and "gradio" not in said


def test_errors_of_a_chat_are_messages(client, monkeypatch):
    assert "the message is empty" in error_of(ask, client, "")
    assert "num_frames is -1, expected at least 1" in error_of(
        ask, client, QUESTION, EXAMPLES["order.mp4"], num_frames=-1
    )
    assert "Invalid file type" in error_of(ask, client, QUESTION, Path(__file__))
    monkeypatch.setattr(service, "prepare", mock.Mock(side_effect=RuntimeError("/secret/path")))
    said = error_of(ask, client, QUESTION, EXAMPLES["order.mp4"])
    assert "the model failed (RuntimeError); the log of the server has the details" in said and "secret" not in said
    monkeypatch.setattr(service, "prepare", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA")))
    assert "too little memory" in error_of(ask, client, QUESTION, EXAMPLES["order.mp4"])


def test_files_over_the_limit_are_rejected(client, tmp_path):
    (tmp_path / "large.mp4").write_bytes(b"0" * 120_000)
    assert "size" in error_of(ask, client, QUESTION, tmp_path / "large.mp4").lower()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("num_frames", 0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_name_their_value(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        GenerationSettings(**{name: value})


def test_the_examples_ship_and_are_small(checkpoint):
    assert set(EXAMPLES) == set(app.QUESTIONS)
    for name, clip in EXAMPLES.items():
        assert clip.stat().st_size < 20_000
        prompt = prepare(
            checkpoint[1], conversation_of({"text": app.QUESTIONS[name], "files": [clip]}, []), GenerationSettings()
        )
        assert prompt.inputs["pixel_values_videos"].shape[1] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "no/folder/here"), "no/folder/here"),
        (("--model", "x", "--device", "gpu"), "device is 'gpu'"),
        (("--model", "x", "--dtype", "float31"), "dtype is 'float31'"),
        (("--model", "x", "--max-file-size", "big"), "--max-file-size is 'big'"),
    ],
)
def test_the_command_line_names_what_is_wrong(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        app.main(list(options))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
