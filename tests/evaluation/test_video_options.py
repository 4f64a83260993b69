"""Options for reading videos in each command line and in the processor (transformers#48073, lmms-eval#1433)."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from demo_folder import make_demo_folder
from video_clips import write_clip

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.evaluation import evaluate
from llava_next_ar.evaluation.lmms_eval_model import RequestAnswerer
from llava_next_ar.evaluation.settings import VIDEO_CHOICES, EvaluationSettings, make_parser
from llava_next_ar.pictures import visualize
from llava_next_ar.processing import video_decoding
from llava_next_ar.processing.frame_sampling import SAMPLING_POLICIES
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.training import recipes
from llava_next_ar.training import run as train

NUM_FRAMES = 8
QUESTION = "What moves?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_demo_folder(tmp_path_factory.mktemp("options"))
    write_clip(folder / "clip.mp4", NUM_FRAMES, width=64, height=48, fps=4)
    turns = [{"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    entries = [{"video": "clip.mp4", "conversations": turns}]
    (folder / "data.json").write_text(json.dumps(entries))
    for policy in ("uniform", "num_frames"):
        shutil.copytree(folder / "base", folder / policy)
        processor = LlavaNextARProcessor.from_pretrained(folder / "base", sampling=policy, num_frames=4)
        processor.save_pretrained(folder / policy)
    return folder


def words(options: dict, dash: str) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', dash)}", str(value))]


def by_call(folder, policy, options):
    processor = LlavaNextARProcessor.from_pretrained(folder / policy)
    return times_of(chat(processor, folder, **options))


def by_from_pretrained(folder, policy, options):
    return times_of(chat(LlavaNextARProcessor.from_pretrained(folder / policy, **options), folder))


def by_training(folder, policy, options):
    """The processor that a recipe gives, and the length of a sample as it is counted."""
    argv = ["--model", str(folder / "base"), "--processor", str(folder / policy), "--output_dir", str(folder / "out")]
    argv += ["--train_data", str(folder / "data.json"), "--use_cpu", "true", *words(options, "_")]
    args, data_args, _, training_args, _, _ = recipes.parse_arguments(argv)
    processor = train.load_processor(args, data_args, LlavaNextARConfig.from_pretrained(folder / "base"))
    data = train.load_data(data_args.train_data, data_args, training_args, processor, None)
    sample = data[0]
    assert data.lengths() == [len(sample["input_ids"])]
    return times_of(sample)


def by_evaluation(folder, policy, options):
    argv = ["--model", str(folder / policy), "--data", str(folder / "data.json"), *words(options, "-")]
    given = vars(make_parser("").parse_args(argv))
    names = EvaluationSettings.__dataclass_fields__
    settings = EvaluationSettings(**{name: value for name, value in given.items() if name in names})
    model, processor = evaluate.load_checkpoint(str(folder / policy))
    (record,) = evaluate.evaluate(settings, model, processor, progress=False)["videos"]
    gaps = record["next_frame"]["gap"]  # of each frame but the first, which is at 0
    return [0.0, *np.cumsum(gaps).tolist()]


def by_pictures(folder, policy, options):
    settings = visualize.VisualizeSettings(model="", videos=("",), question=QUESTION, **options)
    model, processor = evaluate.load_checkpoint(str(folder / policy))
    return visualize.read_clip(model, processor, str(folder / "clip.mp4"), settings).times.tolist()


def by_lmms_eval(folder, policy, options):
    answerer = RequestAnswerer(str(folder / policy), **options)
    return times_of(answerer.batch_of([SimpleNamespace(messages=messages(folder), name="one")]))


def messages(folder):
    content = [{"type": "video", "path": str(folder / "clip.mp4")}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def chat(processor, folder, **options):
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": options}
    return processor.apply_chat_template(messages(folder), **call)


def times_of(inputs) -> list[float]:
    times = inputs["video_timestamps"][0]
    return (times / 1e9 if times.dtype == torch.int64 else times).tolist()


WAYS = (by_call, by_from_pretrained, by_training, by_evaluation, by_pictures, by_lmms_eval)
ALL = [number / 4 for number in range(NUM_FRAMES)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        ("uniform", {"num_frames": 32}, ALL),
        ("uniform", {"num_frames": 32, "short_clip": "all"}, ALL),
        ("uniform", {"num_frames": 32, "short_clip": "error"}, "num_frames=32 is more than the 8 frames of the video"),
        ("num_frames", {"num_frames": 32}, "num_frames=32 is more than the 8 frames of the video"),
        ("num_frames", {"num_frames": 32, "short_clip": "all"}, ALL),
        ("uniform", {"sampling": "num_frames", "num_frames": 32}, "short_clip='all' returns these"),
        ("uniform", {"sampling": "uniform_time", "num_frames": 3}, [0.0, 0.75, 1.75]),
        ("uniform", {"sampling": "uniform_time", "num_frames": 32}, ALL),
        ("uniform", {"sampling": "fps_time", "fps": 1.0}, [0.0, 1.0]),
        ("uniform", {"sampling": "fps_time", "fps": 2.0, "max_frames": 2}, [0.0, 1.75]),
        ("uniform", {"sample_rate": 3}, [0.0, 0.75, 1.5]),
        ("uniform", {"num_frames": 2, "video_backend": "pyav"}, [0.0, 1.75]),
    ],
)
def test_one_behaviour_everywhere(way, policy, options, expected, folder):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            way(folder, policy, options)
    else:
        assert way(folder, policy, options) == pytest.approx(expected)


def test_the_command_lines_name_every_policy_and_back_end(capsys):
    texts = []
    for show in (lambda: make_parser("").parse_args(["--help"]), lambda: visualize.main(["--help"])):
        with pytest.raises(SystemExit):
            show()
        texts.append(capsys.readouterr().out)
    texts.append(recipes.make_parser().format_help())
    for text in texts:
        for name in (*SAMPLING_POLICIES, "torchcodec", "short_clip"):
            assert name in text.replace("short-clip", "short_clip"), name


@pytest.mark.parametrize("name", VIDEO_CHOICES)
def test_an_unknown_word_is_refused_with_those_that_exist(name, folder, capsys):
    words = {"by settings": EvaluationSettings, "by pictures": visualize.VisualizeSettings}
    for kind in words.values():
        place = {"data": ""} if kind is EvaluationSettings else {"videos": ("",)}
        with pytest.raises(ValueError, match=f"{name} is 'x', expected one of .*{VIDEO_CHOICES[name][-1]}"):
            kind(model="", **place, **{name: "x"})
    with pytest.raises(ValueError, match="'x'"):
        by_training(folder, "uniform", {name: "x"})


def test_a_command_repeats_the_options(folder):
    options = {"sampling": "fps_time", "fps": 2.5, "max_frames": 3, "short_clip": "all", "video_backend": "pyav"}
    line = evaluate.command_line(EvaluationSettings(model="m", data="d", **options))
    other = visualize.VisualizeSettings(model="m", videos=("v",), **options).command_line(folder)
    for text in (line, other):
        for name, value in options.items():
            assert f"--{name.replace('_', '-')} {value}" in text


def test_a_back_end_that_cannot_be_imported_is_one_sentence(folder, monkeypatch, capsys):
    def fail():
        raise ImportError("video backend 'torchcodec' cannot be imported: gone; pip install torchcodec")

    monkeypatch.setattr(video_decoding, "import_torchcodec", fail)
    backend = ["--video-backend", "torchcodec", "--model", str(folder / "base"), "--device", "cpu"]
    for command, argv in (
        (evaluate.main, ["--data", str(folder / "data.json")]),
        (visualize.main, ["--video", str(folder / "clip.mp4"), "--output", str(folder / "pictures")]),
    ):
        with pytest.raises(SystemExit) as end:
            command([*backend, *argv])
        assert end.value.code == 2
        assert "video backend 'torchcodec' cannot be imported: gone" in capsys.readouterr().err
