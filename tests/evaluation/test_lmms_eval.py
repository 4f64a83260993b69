"""scripts/lmms_eval_model.py with requests such as lmms-eval's; `make test-lmms-eval` runs lmms-eval itself."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from demo_folder import NUM_FRAMES, entries_of, make_changed_checkpoint, make_demo_folder
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import tiny_model
from tiny_processor import tiny_processor
from video_clips import picture

from llava_next_ar.evaluation import evaluate
from llava_next_ar.evaluation.lmms_eval_model import Prompt, RequestAnswerer, media_of, to_messages
from llava_next_ar.evaluation.settings import EvaluationSettings

GREEDY = {"max_new_tokens": 4, "until": ["\n\n"], "do_sample": False}


@dataclass(frozen=True)
class Request:
    """The part of lmms-eval's `Instance` that a model reads."""

    args: tuple


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_demo_folder(tmp_path_factory.mktemp("lmms_eval"))
    make_changed_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def answerers(folder) -> dict[int, RequestAnswerer]:
    """By batch size; both of one model."""
    answerers = {size: RequestAnswerer(str(folder / "changed"), batch_size=size) for size in (1, 4)}
    answerers[4].model = answerers[1].model
    return answerers


@pytest.fixture(scope="module")
def task_dict(folder) -> dict[str, Any]:
    """The questions of the clips as documents of a task, and others with images, with both and without any."""
    clips = [
        {
            "text": entry["conversations"][0]["value"].removeprefix("<video>\n"),
            "visuals": [str(folder / "clips" / entry["video"])],
            "choices": entry["choices"],
        }
        for entry in entries_of(folder)
    ]
    photo = Image.fromarray(picture(3))
    others = [
        {"text": "Which color?", "visuals": [photo], "choices": ["red", "blue"]},
        {"text": "Where?", "visuals": [photo, clips[0]["visuals"][0]], "choices": ["left"]},
        {"text": "Does it bounce? Answer with yes or no.", "visuals": None, "choices": ["yes", "no"]},
    ]
    return {"clips": {"test": clips}, "others": {"val": others}}


def visuals_of(document: dict[str, Any]) -> Any:
    return document["visuals"]


def places(task_dict: dict[str, Any]) -> list[tuple[int, str, str]]:
    return [
        (n, task, split) for task in task_dict for split in task_dict[task] for n in range(len(task_dict[task][split]))
    ]


def generation_requests(task_dict: dict[str, Any], **kwargs: Any) -> list[Request]:
    return [
        Request((task_dict[task][split][number]["text"], {**GREEDY, **kwargs}, visuals_of, number, task, split))
        for number, task, split in places(task_dict)
    ]


def choice_requests(task_dict: dict[str, Any]) -> list[Request]:
    """As lmms-eval asks for the choices of a question: one by one, behind a space."""
    return [
        Request((task_dict[task][split][number]["text"], f" {choice}", visuals_of, number, task, split))
        for number, task, split in places(task_dict)
        for choice in task_dict[task][split][number]["choices"]
    ]


# -- The same whatever is in the batch, and the same as scripts/evaluate.py


def test_texts_depend_neither_on_batch_size_nor_on_order(answerers, task_dict):
    requests = generation_requests(task_dict)
    single = answerers[1].generate_until(requests, task_dict, progress=False)
    assert len(set(single)) > 3
    assert answerers[4].generate_until(requests, task_dict, progress=False) == single
    assert answerers[4].generate_until(requests[::-1], task_dict, progress=False)[::-1] == single


def test_losses_depend_neither_on_batch_size_nor_on_order(answerers, task_dict):
    requests = choice_requests(task_dict)
    single = answerers[1].loglikelihood(requests, task_dict, progress=False)
    assert len({round(loss, 4) for loss, _ in single}) == len(requests)
    for order in (slice(None), slice(None, None, -1)):
        batched = answerers[4].loglikelihood(requests[order], task_dict, progress=False)[order]
        assert [greedy for _, greedy in batched] == [greedy for _, greedy in single]
        assert [loss for loss, _ in batched] == pytest.approx([loss for loss, _ in single], rel=1e-5)


def test_both_are_those_of_the_evaluation_script(folder, answerers, task_dict):
    settings = EvaluationSettings(
        model=str(folder / "changed"),
        data=str(folder / "clips" / "test.json"),
        max_new_tokens=4,
        bootstrap_samples=0,
        reconstruction=False,
    )
    answers = evaluate.evaluate(settings, answerers[1].model, answerers[1].processor, progress=False)["answers"]
    clips = {"clips": task_dict["clips"]}
    texts = answerers[4].generate_until(generation_requests(clips), clips, progress=False)
    assert texts == [answer["generated"] for answer in answers]
    losses = [loss for loss, _ in answerers[4].loglikelihood(choice_requests(clips), clips, progress=False)]
    assert losses == pytest.approx([-number for answer in answers for number in answer["log_likelihoods"]], rel=1e-5)


def test_a_document_is_read_once_for_all_its_choices(answerers, task_dict):
    read = []

    def counting(document: dict[str, Any]) -> Any:
        read.append(document["text"])
        return document["visuals"]

    clips = {"clips": task_dict["clips"]}
    requests = [Request((*r.args[:2], counting, *r.args[3:])) for r in choice_requests(clips)]
    answerers[4].loglikelihood(requests, clips, progress=False)
    assert read == [document["text"] for document in clips["clips"]["test"]]


def test_no_more_than_a_batch_of_documents_is_in_memory(answerers, task_dict):
    clips, read, at_work = {"clips": task_dict["clips"]}, [], []

    def counting(document: dict[str, Any]) -> Any:
        read.append(document["text"])
        return document["visuals"]

    requests = [Request((*r.args[:2], counting, *r.args[3:])) for r in generation_requests(clips)]
    hook = answerers[4].model.lm_head.register_forward_hook(lambda *_: at_work.append(len(read)))
    try:
        answerers[4].generate_until(requests, clips, progress=False)
    finally:
        hook.remove()
    assert sorted(set(at_work)) == [4, 8] and len(requests) == 8


# -- Likelihoods


def test_the_greedy_choice_is_the_one_that_is_generated(answerers, task_dict):
    document = task_dict["clips"]["test"][0]
    place = (visuals_of, 0, "clips", "test")
    ask = Request((document["text"], {**GREEDY, "max_new_tokens": 2}, *place))
    (said,) = answerers[1].generate_until([ask], task_dict, progress=False)
    model, processor = answerers[1].model, answerers[1].processor
    # Untrained, it never ends its turn: where it would go on, the answer as a whole is not greedy.
    (_, ended) = answerers[1].loglikelihood([Request((document["text"], said, *place))], task_dict, progress=False)[0]
    assert not ended
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    bias = torch.zeros(len(model.lm_head.weight))
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    try:
        bias[end] = 1e3
        scores = answerers[1].loglikelihood(
            [Request((document["text"], choice, *place)) for choice in ("", "left")], task_dict, progress=False
        )
    finally:
        hook.remove()
    assert scores[0] == (pytest.approx(0), True) and not scores[1][1]


def test_mean_losses_are_those_of_a_token(folder, answerers, task_dict):
    mean = RequestAnswerer(str(folder / "base"), likelihood="mean")
    mean.model = answerers[1].model
    requests = choice_requests({"clips": task_dict["clips"]})
    sums = answerers[1].loglikelihood(requests, task_dict, progress=False)
    words = [len(request.args[1].split()) for request in requests]
    assert len(set(words)) > 1
    expected = [loss / (number + 1) for (loss, _), number in zip(sums, words, strict=True)]  # and the end of the turn
    assert [loss for loss, _ in mean.loglikelihood(requests, task_dict, progress=False)] == pytest.approx(expected)


def test_a_task_may_name_its_choice_by_a_function_of_the_document(answerers, task_dict):
    text, _, *place = choice_requests(task_dict)[0].args
    by_text = Request((text, task_dict["clips"]["test"][0]["choices"][0], *place))
    by_function = Request((text, lambda document: document["choices"][0], *place))
    scores = answerers[1].loglikelihood([by_text, by_function], task_dict, progress=False)
    assert scores[0] == scores[1]


def test_the_space_before_a_choice_is_no_part_of_an_answer(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor(model.config).save_pretrained(tmp_path)  # its tokens are characters, spaces among them
    answerer, documents = RequestAnswerer(str(tmp_path)), {"texts": {"test": [None]}}
    asked = [Request(("Where?", choice, lambda _: None, 0, "texts", "test")) for choice in (" up", "up", "u p")]
    with_space, without, other = answerer.loglikelihood(asked, documents, progress=False)
    assert with_space == without != other


def test_requests_without_a_document_are_refused(answerers, task_dict):
    with pytest.raises(ValueError, match="acc_mutual_info"):
        answerers[1].loglikelihood([Request(("", "left"))], task_dict, progress=False)


# -- Generation


def test_a_text_ends_before_the_first_stop_string(answerers, task_dict):
    clips = {"clips": task_dict["clips"]}
    free = answerers[4].generate_until(generation_requests(clips, max_new_tokens=8), clips, progress=False)
    stop = free[0].split()[3]
    calls = []
    hook = answerers[4].model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        cut = answerers[1].generate_until(
            generation_requests(clips, max_new_tokens=8, until=["never", stop])[:1], clips, progress=False
        )
    finally:
        hook.remove()
    assert cut == [free[0][: free[0].index(stop)].strip()] and len(cut[0]) < len(free[0])
    assert len(calls) == free[0].split().index(stop) + 1 < 8  # and nothing is generated behind it
    batched = answerers[4].generate_until(
        generation_requests(clips, max_new_tokens=8, until=stop), clips, progress=False
    )
    assert batched == [text.partition(stop)[0].strip() for text in free]


def test_lmms_evals_own_stop_string_counts_where_it_is_asked_for(folder, answerers):
    asked = RequestAnswerer(str(folder / "base"), stop_at_blank_line=True)
    assert answerers[1].decoding_options({"until": ["\n\n", "Q:"]})[1] == ["Q:"]
    assert asked.decoding_options({"until": ["\n\n", "Q:"]})[1] == ["\n\n", "Q:"]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"do_sample": False, "num_beams": 1, "max_new_tokens": 1024}),
        ({"temperature": 0, "do_sample": True, "top_p": 1.0}, {"do_sample": False}),
        ({"temperature": 1.0, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True}),
        (
            {"num_beams": 3, "max_new_tokens": 5, "until": None},
            {"do_sample": False, "num_beams": 3, "max_new_tokens": 5},
        ),
        ({"image_aspect_ratio": "original"}, {"do_sample": False}),
    ],
)
def test_generation_options_of_tasks(answerers, kwargs, expected):
    options, stops = answerers[1].decoding_options(kwargs)
    assert options == {"num_beams": 1, "max_new_tokens": 1024, **expected} and stops == []


def test_each_request_is_generated_with_its_own_options(answerers, task_dict):
    clips = {"clips": task_dict["clips"]}
    requests = [
        Request((r.args[0], {**r.args[1], "max_new_tokens": 1 + number % 3}, *r.args[2:]))
        for number, r in enumerate(generation_requests(clips))
    ]
    texts = answerers[4].generate_until(requests, clips, progress=False)
    assert [len(text.split()) for text in texts] == [1 + number % 3 for number in range(len(requests))]


def test_rounds_go_on_until_the_task_says_so(answerers, task_dict):
    """Each document sets its number of rounds; later ones see the earlier answers and other media."""
    clips = {"clips": task_dict["clips"]}

    def doc_to_text(document: dict[str, Any], previous_output: Any, round_idx: int, previous_round_info: Any) -> tuple:
        assert len(previous_output) == round_idx
        assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
        is_over = round_idx == len(document["choices"]) - 1
        return None, f"{previous_output[-1]} Answer", is_over, previous_output, round_idx

    first = [Request((*r.args[:3], doc_to_text, *r.args[3:])) for r in generation_requests(clips)]
    said = answerers[4].generate_until_multi_round(first, clips, progress=False)
    assert [len(texts) for texts in said] == [len(d["choices"]) - 1 for d in clips["clips"]["test"]]
    assert {len(texts) for texts in said} == {1, 3}
    assert [texts[0] for texts in said] == answerers[1].generate_until(
        generation_requests(clips), clips, progress=False
    )
    (number,) = [number for number, texts in enumerate(said) if len(texts) == 3][:1]
    follow_up = Request((f"{said[number][0]} Answer", GREEDY, lambda document: None, number, "clips", "test"))
    assert answerers[1].generate_until([follow_up], clips, progress=False) == [said[number][1]]


# -- What a document shows


def test_media_come_before_the_text_or_where_it_names_them():
    photo = Image.fromarray(picture(0))
    (before,) = to_messages("Which?", [photo, "a.mp4"])
    assert [part["type"] for part in before["content"]] == ["image", "video", "text"]
    assert before["content"][0]["image"] is photo and before["content"][1]["video"] == "a.mp4"
    (within,) = to_messages("First <image> then <image>, which?", ["a.png", photo])
    assert [part["type"] for part in within["content"]] == ["text", "image", "text", "image", "text"]
    assert (
        to_messages("Why?", None)
        == to_messages("Why?", [])
        == [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    )
    with pytest.raises(ValueError, match="2 <image> placeholders for 1"):
        to_messages("<image> and <image>", [photo])


def test_what_may_be_a_visual():
    photo, frames = Image.fromarray(picture(0)), [Image.fromarray(picture(number)) for number in range(3)]
    assert media_of(photo) == ("image", photo)
    assert media_of("x.JPG") == ("image", "x.JPG")
    assert media_of(Path("x.mp4")) == ("video", "x.mp4")
    assert media_of(frames) == ("video", frames)
    array = np.zeros((2, 8, 8, 3), np.uint8)
    assert media_of(array) == ("video", array)
    assert media_of({"type": "video", "url": "x.mkv"}) == ("video", "x.mkv")
    part = {"type": "video", "path": "x.mp4", "video_start": 1.0, "video_end": 2.0}
    for refused in (part, {"array": np.zeros(9), "sampling_rate": 16000}, 3, [], np.zeros((8, 8))):
        with pytest.raises(ValueError, match="a visual is"):
            media_of(refused)


def test_a_document_that_cannot_be_read_is_named(answerers, task_dict, folder):
    broken = {"clips": {"test": [{"text": "Why?", "visuals": str(folder / "missing.mp4")}]}}
    with pytest.raises(ValueError, match="document clips/test/0: .*missing.mp4"):
        answerers[1].generate_until(
            [Request(("Why?", GREEDY, visuals_of, 0, "clips", "test"))], broken, progress=False
        )


# -- Arguments


def test_sampling_of_videos(folder, task_dict):
    few = RequestAnswerer(str(folder / "base"), num_frames=3)
    prompt = Prompt("clips/test/0", "Why?", task_dict["clips"]["test"][0]["visuals"])
    assert few.batch_of([prompt])["pixel_values_videos"].shape[1] == 3
    # More than there are: all of them, whereas a call's own num_frames raises.
    many = RequestAnswerer(str(folder / "base"), num_frames=NUM_FRAMES + 1)
    assert many.batch_of([prompt])["pixel_values_videos"].shape[1] == NUM_FRAMES
    by_time = RequestAnswerer(str(folder / "base"), fps=1, max_frames=2)
    assert by_time.batch_of([prompt])["pixel_values_videos"].shape[1] == 2
    with pytest.raises(ValueError, match="fps=1 and num_frames=2"):
        RequestAnswerer(str(folder / "base"), fps=1, num_frames=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": "0"}, "batch_size is 0"),
        ({"dtype": "float33"}, "dtype is 'float33'"),
        ({"revision": 12}, "revision is 12"),
        ({"revision": "main"}, "which has none"),
        ({"base_revision": "main"}, "is not an adapter"),
        ({"likelihood": "median"}, "likelihood is 'median'"),
    ],
)
def test_arguments_out_of_range_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        RequestAnswerer(str(folder / "base"), **options)


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's module with its model replaced, where of lmms-eval there are only the names that it imports."""

    def module(name: str, **names: Any) -> None:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**names))

    module("lmms_eval.api.instance", GenerationResult=None, Instance=None)
    module("lmms_eval.api.model", lmms=object)
    module("lmms_eval.models.registry_v2", ModelManifest=lambda *args, **kwargs: None)
    name = "llava_next_ar.evaluation.lmms_eval_plugin"
    monkeypatch.delitem(sys.modules, name, raising=False)
    plugin = importlib.import_module(name)
    yield plugin
    sys.modules.pop(name)


@pytest.mark.parametrize(
    ("asked", "processes", "given", "used"),
    [
        ("cpu", 1, "cpu", "cpu"),
        ("cuda:1", 1, "cuda:0", "cuda:1"),
        ("cuda", 2, "cuda:1", "cuda:1"),
        (None, 2, "cuda:1", "cuda:1"),
        (None, 2, "cpu", "cpu"),
        ("cpu", 2, "cuda:1", "device is 'cpu', but the launcher gave this process cuda:1"),
        ("cuda:0", 2, "cuda:1", "device is 'cuda:0', but the launcher gave this process cuda:1"),
    ],
)
def test_the_device_is_the_one_asked_for_or_an_error(plugin, monkeypatch, asked, processes, given, used):
    """With several processes, `--device cpu` once became a GPU without a word."""
    state = SimpleNamespace(num_processes=processes, device=torch.device(given))
    monkeypatch.setattr(plugin, "PartialState", lambda: state)
    monkeypatch.setattr(plugin, "RequestAnswerer", lambda **options: SimpleNamespace(**options, batch_size=1))
    if used.startswith("device is"):
        with pytest.raises(ValueError, match=used):
            plugin.LlavaNextAR(device=asked, pretrained="m")
        return
    model = plugin.LlavaNextAR(device=asked, pretrained="m")
    assert (model.answerer.device, model.device) == (used, torch.device(used))


def test_an_adapter_on_its_base_and_by_itself(folder, task_dict, tmp_path):
    base = RequestAnswerer(str(folder / "changed"))
    requests = choice_requests({"clips": task_dict["clips"]})[:4]
    before = base.loglikelihood(requests, task_dict, progress=False)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base.model, lora)
    adapted.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    expected = base.loglikelihood(requests, task_dict, progress=False)
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, before, strict=True)) > 1e-3
    for arguments in ({"pretrained": str(folder / "changed"), "peft": str(tmp_path)}, {"pretrained": str(tmp_path)}):
        assert RequestAnswerer(**arguments).loglikelihood(requests, task_dict, progress=False) == expected
