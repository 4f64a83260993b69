"""--check agrees with the run, code of a checkpoint's own is named, and a Hub that fails is not a missing processor."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import tiny_config
from tiny_processor import tiny_processor
from tiny_tokenizer import character_tokenizer
from video_clips import write_clip

from llava_next_ar.evaluation import settings as evaluation_settings
from llava_next_ar.evaluation.measures import load_checkpoint
from llava_next_ar.training import own_code, preflight, recipes
from llava_next_ar.training import run as train
from llava_next_ar.training.own_code import check_own_code, own_classes
from llava_next_ar.training.samples import SampleReader

CONFIGS = Path(__file__).resolve().parents[2] / "scripts" / "configs"
ASKED = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Configuration and processor of a checkpoint, written without its code, and data."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "base").mkdir()
    config = tiny_config()
    (folder / "base" / "config.json").write_text(config.to_json_string())
    processor = tiny_processor(config, num_frames=4)
    (folder / "base" / "processor_config.json").write_text(processor.to_json_string())
    processor.tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(processor.chat_template)
    write_clip(folder / "a.mp4", 6, width=64, height=48)
    files = {
        "good": [{"id": f"good{n}", "conversations": ASKED, "video": "a.mp4"} for n in range(4)],
        "silent": [{"video": "a.mp4"}] * 4,
        "misnamed": [{"id": "first", "conversation": ASKED, "video": "a.mp4"}] * 4,
        "bad": [
            {"id": "one", "conversations": ASKED, "video": "gone1.mp4"},
            {"id": "two", "conversations": ASKED, "video": "gone2.mp4"},
            {"id": "three", "conversations": [ASKED[0]], "video": "a.mp4"},
            {"conversations": ASKED, "video": "a.mp4"},
        ],
    }
    for name, entries in files.items():
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return folder


def run(work: Path, *more: str, data: str = "good", check: bool = True, model: str = "base") -> tuple[str, str]:
    """(exit status, or the line on standard error that explains status 2; the printed text) of train.py."""
    given = [
        "--model",
        str(work / model),
        "--output_dir",
        str(work / "never"),
        "--use_cpu",
        "true",
        "--num_heads",
        "2",
    ]
    given += ["--train_data", str(work / f"{data}.json"), "--config", str(CONFIGS / "full.yaml")]
    given += ["--num_frames", "4", *(["--check"] if check else [])]
    given += [] if "--dataloader_num_workers" in more else ["--dataloader_num_workers", "0"]
    printed, written = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["scripts/train.py"]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(written),
        pytest.raises(SystemExit) as caught,
    ):
        train.main([*given, *more])
    if caught.value.code != 2:
        return str(caught.value.code), printed.getvalue()
    (line,) = [line for line in written.getvalue().splitlines() if line.startswith("train.py: ")]
    assert written.getvalue().endswith(f"{line}\n")
    return line, printed.getvalue()


def test_a_check_of_good_data_passes_and_counts_for_n_processes(work, monkeypatch):
    code, report = run(work, "--num_processes", "4")
    assert code == "False" and "effective batch       32 = 1 per device x 8 accumulated x 4 processes" in report
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 3)
    _, report = run(work, "--num_processes", "3", "--dataloader_num_workers", "2")
    assert "6 workers (one thread each) share 3 cores: set dataloader_num_workers to 1 or less" in report
    code, _ = run(work, "--num_processes", "4", check=False)
    assert code.startswith("train.py: num_processes is for --check")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--report_to", "nothing_such"), "nothing_such is not supported"),
        (("--report_to", "neptune"), "(?i)neptune.* to be installed"),
        (("--attn_implementation", "flash_attention_2"), "(?i)flash.?attention"),
        (("--attn_implementation", "nothing_such"), "nothing_such"),
    ],
)
def test_what_the_run_refuses_fails_the_check(options, message, work):
    code, report = run(work, *options)
    (line,) = [line for line in report.splitlines() if line.startswith("FAILS: ")]
    assert code == "True"
    assert re.search(message, line)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (("--per_device_train_batch_size", "0"), "good", "per_device_train_batch_size must be at least 1, got 0"),
        (("--gradient_accumulation_steps", "0"), "good", "gradient_accumulation_steps must be at least 1, got 0"),
        (("--num_train_epochs", "0"), "good", "num_train_epochs must be above 0"),
        ((), "gone", "no such file: "),
        (("--attn_implementation", "sdpa", "--max_frames", "0"), "good", "max_frames"),
    ],
)
def test_mistakes_end_in_one_line(options, data, message, check, work):
    code, _ = run(work, *options, data=data, check=check)
    assert code.startswith("train.py: ") and message in code and "\n" not in code


def test_no_supervised_token_fails_the_check_unless_asked_for(work):
    code, report = run(work, data="silent")
    assert code == "True" and "FAILS: none of 4 samples has a supervised token" in report
    code, report = run(work, "--reconstruction_only", "true", data="silent")
    assert code == "False" and "nothing found" in report
    code, report = run(work, data="misnamed")
    assert code == "True" and "did you mean 'conversations'" in report
    code, _ = run(work, data="misnamed", check=False)
    assert "sample 0 (id 'first')" in code and "did you mean 'conversations'" in code


def test_bad_samples_are_readable_and_named_by_their_id(work):
    code, report = run(work, data="bad")
    lines = report.splitlines()
    assert "    2 x FileNotFoundError: no such file: ..." in lines
    assert "    1 x ValueError: the conversation has no answer (no turn from ... with text)" in lines
    assert f"        'three', sample 2 of {work / 'bad.json'}: ValueError: the conversation has no answer " in report
    assert all(f"{name!r}, sample {n} of" in report for n, name in enumerate(("one", "two")))
    _, report = run(work, "--on_bad_sample", "skip", data="bad")
    assert "epochs of 4 samples, of which about 1 can be used" in report


def test_headers_are_read_of_all_samples_and_media_are_decoded_of_a_few(work, monkeypatch):
    decoded = []
    encode = SampleReader.encode
    monkeypatch.setattr(SampleReader, "encode", lambda self, entry: decoded.append(entry) or encode(self, entry))
    code, report = run(work, "--check_decoded", "2")
    assert code == "False" and "samples               4 read, of which 2 decoded" in report and len(decoded) == 2
    code, report = run(work, "--check_decoded", "0")
    assert code == "False" and "samples               4 read, of which 0 decoded" in report and len(decoded) == 2
    assert run(work, "--check_decoded", "-1")[0].endswith("check_decoded must be at least 0, got -1")


def test_a_file_whose_header_alone_can_be_read_is_found_when_it_is_decoded(work):
    """Its index is whole and its frames are gone, as after a download that broke off."""
    with av.open(str(work / "front.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 64, 48
        for number in range(40):
            pixels = np.full((48, 64, 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    content = (work / "front.mp4").read_bytes()
    (work / "front.mp4").write_bytes(content[: content.index(b"mdat") + 100])
    (work / "cut.json").write_text(json.dumps([{"id": "cut", "conversations": ASKED, "video": "front.mp4"}] * 2))
    code, report = run(work, "--check_decoded", "1", data="cut")
    assert code == "True" and "bad samples           1 of 2" in report and "'cut', sample" in report


# --------------------------------------------------------------------------------------------------- code of its own


@pytest.fixture(scope="module")
def own(work) -> Path:
    """The checkpoint under a class of the user's own."""
    shutil.copytree(work / "base", work / "own")
    config = json.loads((work / "own" / "config.json").read_text())
    config["auto_map"]["AutoModelForImageTextToText"] = "user/repo--my_head.MyModel"
    (work / "own" / "config.json").write_text(json.dumps(config))
    (work / "own_adapter").mkdir()
    adapter = {"base_model_name_or_path": str(work / "own"), "peft_type": "LORA"}
    (work / "own_adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    shutil.copytree(work / "base", work / "own_processor")
    processor = json.loads((work / "own_processor" / "processor_config.json").read_text())
    processor["auto_map"]["AutoProcessor"] = "my_processor.MyProcessor"
    (work / "own_processor" / "processor_config.json").write_text(json.dumps(processor))
    return work / "own"


def test_code_of_a_checkpoints_own_is_not_ignored_silently(work, own):
    assert own_classes(str(work / "base")) == [] and own_classes(str(own)) == ["user/repo--my_head.MyModel"]
    assert own_classes(str(work / "own_adapter")) == own_classes(str(own))
    message = r"has code of its own \(.*my_head.MyModel\).* pass --trust_remote_code"
    for name in ("own", "own_adapter"):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(str(work / name))  # evaluate.py, visualize.py
    with pytest.raises(ValueError, match="my_processor.MyProcessor"):
        load_checkpoint(str(work / "own_processor"))
    check_own_code(str(own), trust_remote_code=True)
    for check in (True, False):
        code, _ = run(work, model="own", check=check)
        assert code.startswith(f"train.py: {own} has code of its own (user/repo--my_head.MyModel)")
    code, _ = run(work, "--processor", str(work / "own_processor"))
    assert "my_processor.MyProcessor" in code


# ------------------------------------------------------------------------------------------------ an absent processor


def arguments(model: str) -> tuple:
    given = ["--model", model, "--train_data", "x.json", "--output_dir", "never", "--use_cpu", "true"]
    model_args, data_args, *_ = recipes.parse_arguments(given)
    return model_args, data_args


def test_a_processor_that_cannot_be_loaded_is_not_taken_for_absent(work, monkeypatch, tmp_path):
    config = tiny_config()
    character_tokenizer().save_pretrained(tmp_path)
    made = train.load_processor(*arguments(str(tmp_path)), config)  # only a tokenizer: a new one
    assert made.video_processor.num_frames == 16
    kept = train.load_processor(*arguments(str(work / "base")), config)
    assert kept.video_processor.num_frames == 4

    def hiccup(*args, **kwargs):
        raise OSError("503 Service Unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(train.LlavaNextARProcessor, "from_pretrained", hiccup)
        with pytest.raises(OSError, match="503"):
            train.load_processor(*arguments(str(work / "base")), config)

    def no_answer(*args, **kwargs):
        raise LocalEntryNotFoundError("connection reset")

    monkeypatch.setattr(own_code, "hf_hub_download", no_answer)
    with pytest.raises(OSError, match="user/model is not a folder here, and the Hub cannot be asked for its .*json"):
        own_classes("user/model")
    with pytest.raises(
        OSError,
        match="user/model is not a folder here, .* its processor_config.json now",
    ):
        train.load_processor(*arguments("user/model"), config)


# --------------------------------------------------------------------------------------------------------------- help


def test_help_shows_defaults_and_says_what_negative_options_do():
    text = " ".join(recipes.make_parser("x").format_help().split())
    assert "Set check_data to false." in text and "Set freeze_vision_tower to false." in text
    assert "Rank of the adapters. (default: 64)" in text
    assert recipes.read_command_line(["--no_check_data", "--fps", "2"]) == {"check_data": False, "fps": 2}
    text = " ".join(evaluation_settings.make_parser("x").format_help().split())
    assert "do not measure generation, which is measured by default" in text and "default: True" not in text
    assert "tokens of an answer (default: 16)" in text


def test_a_check_reports_all_if_the_output_folder_holds_a_run(work):
    held = work / "never"
    held.mkdir()
    try:
        (held / "model.safetensors").write_bytes(b"")
        code, report = run(work)
        line, _ = run(work, check=False)
    finally:
        shutil.rmtree(held)
    assert code == "True" and "tokens per frame" in report
    (failure,) = [line for line in report.splitlines() if line.startswith("FAILS: ")]
    assert f"{held} holds a model" in failure and "--overwrite_output_dir true" in failure
    assert line.startswith(f"train.py: {held} holds a model")


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_hist", "four"), "'num_hist' expected int, got str (value: 'four')"),
        (("--num_hist", "[1"), "--num_hist is not valid YAML"),
        (("--mm_newline_position", "everywhere"), "everywhere"),
    ],
)
def test_values_of_the_wrong_form_end_in_one_line(options, message, check, work):
    line, _ = run(work, *options, check=check)
    assert line.startswith("train.py: ") and message in line


def test_a_recipe_that_is_not_yaml_is_named_with_the_line(work):
    (work / "bad.yaml").write_text("num_hist: 4\ntrain_data: [a.json\n")
    with pytest.raises(ValueError, match=r"bad\.yaml is not valid YAML: (?s:.*)line 3"):
        recipes.parse_arguments(["--config", str(work / "bad.yaml")])
