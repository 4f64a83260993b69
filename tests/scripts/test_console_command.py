"""The console command: its sub-commands, their help, `ask`, recipes by name, and launches."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import yaml
from demo_folder import entries_of, make_changed_checkpoint, make_demo_folder
from modules import MODULES, ROOT, name_of
from PIL import Image
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llava_next_ar.evaluation.ask import main as ask
from llava_next_ar.evaluation.ask import media_part
from llava_next_ar.evaluation.measures import load_checkpoint
from llava_next_ar.scripts.command import COMMANDS, main
from llava_next_ar.training.recipes import parse_arguments, recipe_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = make_demo_folder(tmp_path_factory.mktemp("command"))
    make_changed_checkpoint(path)
    return path


def run(*words: object, cwd: Path = ROOT, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava_next_ar.scripts.command", *map(str, words)]
    return processes.run(command, cwd=cwd, timeout=300, status=status)


def test_the_command_is_the_entry_point_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"llava-next-ar": "llava_next_ar.scripts.command:main"}
    assert run("--version").stdout.strip() == project["version"]


def test_its_help_names_every_command_and_imports_none_of_them(tmp_path):
    code = (
        "import sys; from llava_next_ar.scripts.command import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "assert not {'torch', 'transformers', 'numpy', 'yaml'} & sys.modules.keys()"
    printed = processes.run_python("-c", code, cwd=tmp_path)
    assert [line.split()[0] for line in printed.split("commands:\n")[1].splitlines()] == list(COMMANDS)


def is_there(module: str) -> bool:
    return (ROOT / module.split(":")[0].replace(".", "/")).with_suffix(".py").is_file()


def test_an_unknown_command_is_named():
    error = run("trian", status=2).stderr
    assert "'trian'" in error and "train" in error.replace("trian", "")


@pytest.mark.parametrize("name", [name for name, (module, _) in COMMANDS.items() if is_there(module)])
def test_each_command_prints_its_own_name_in_its_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert not end.code
    assert f"usage: llava-next-ar {name}" in capsys.readouterr().out


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for name in [name for name in sys.modules if name.startswith("llava_next_ar.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--model", "x"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert re.fullmatch(r"llava-next-ar evaluate: .*accelerate.*pip install 'llava-next-ar\[all\]'\n", error)


def test_check_is_train_with_check(monkeypatch):
    seen = []
    monkeypatch.setattr("llava_next_ar.training.run.main", seen.append)
    main(["check", "--config", "lora"])
    main(["train", "--config", "lora"])
    assert seen == [["--check", "--config", "lora"], ["--config", "lora"]]


# --- bad input, and Ctrl-C --------------------------------------------------------------------------------------------

# Of each command, a line whose first file or folder does not exist.
ABSENT = {
    "ask": ["none/such/model", "What?"],
    "check": ["--config", "lora", "--model", "none/such/model", "--train_data", "d.json", "--output_dir", "o"],
    "train": ["--config", "lora", "--model", "none/such/model", "--train_data", "d.json", "--output_dir", "o"],
    "merge": ["none/such/model", "merged"],
    "evaluate": ["--model", "none/such/model", "--data", "d.json", "--device", "cpu"],
    "visualize": ["--model", "none/such/model", "--video", "{clip}", "--output", "pictures", "--device", "cpu"],
    "convert": ["none/such/model", "converted"],
    "consolidate": ["none/such/model", "whole"],
    "push": ["none/such/model", "user/model", "--dry-run"],
    "compare": ["none/such/model"],
}


@pytest.mark.parametrize("name", ABSENT)
def test_a_folder_that_does_not_exist_is_one_line_with_the_status_of_bad_input(
    name, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    clip = folder / "clips" / entries_of(folder)[0]["video"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([name, *(word.format(clip=clip) for word in ABSENT[name])])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith(f"llava-next-ar {name}: ") and "no such folder: none/such/model" in line
    assert not list(tmp_path.iterdir())


def test_a_script_puts_the_name_of_its_file_before_an_error():
    error = processes.run(
        [sys.executable, "scripts/convert.py", "none/such", "out", "--to_"], cwd=ROOT, status=2
    ).stderr
    assert error.startswith("convert.py: unrecognized arguments: --to_; did you mean --to?")


def test_every_command_takes_both_spellings_of_an_option():
    """One parser class gives them (tests/hub/test_command_line.py); recipes read their keys in both spellings."""
    alone = {"serving/jobs/train_job.py", "serving/space/app.py"}  # they run on other machines, without the package
    others = {name_of(path) for path in MODULES if "argparse.ArgumentParser(" in path.read_text()}
    assert others - alone == set()
    line = ["--config", "lora", "--model", "m", "--train-data", "d", "--output-dir", "o"]
    assert parse_arguments(line)[1].train_data == parse_arguments([w.replace("-d", "_d") for w in line])[1].train_data


@pytest.mark.parametrize(
    "started", [["-m", "llava_next_ar.scripts.command", "evaluate"], [ROOT / "scripts" / "evaluate.py"]]
)
def test_ctrl_c_while_modules_load_ends_without_a_traceback(started, tmp_path):
    stand_in = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    stand_in += "except BaseException as error:\n    raise ImportError('as extension modules do') from error\n"
    (tmp_path / "torch.py").write_text(stand_in)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = processes.run([sys.executable, *started, "--model", "m"], cwd=ROOT, env=env, timeout=60, status=130)
    assert done.stderr.strip() in ("llava-next-ar evaluate: interrupted", "evaluate.py: interrupted")


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (KeyboardInterrupt(), 130, "llava-next-ar compare: interrupted"),
        (ValueError("a is 1,\n  expected 2"), 2, "llava-next-ar compare: a is 1, expected 2"),
        (FileNotFoundError(2, "No such file", "x"), 2, "llava-next-ar compare: [Errno 2] No such file: 'x'"),
        (SystemExit("llava-next-ar compare: no token"), 2, "llava-next-ar compare: no token"),
        (SystemExit(1), 1, ""),
    ],
)
def test_an_error_of_a_program_has_one_line_and_one_status(error, status, printed, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr("llava_next_ar.hub.compare.main", fail)
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    with pytest.raises(SystemExit) as end:
        main(["compare", "x"])
    assert (end.value.code, capsys.readouterr().err.strip()) == (status, printed)


def test_an_unexpected_error_of_a_training_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise ValueError("in step 1000")

    monkeypatch.setattr("llava_next_ar.training.run.main", fail)
    with pytest.raises(ValueError, match="in step 1000"):
        main(["train", "--config", "lora"])


# --- recipes and launch files by name --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_found_by_its_name_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path(path.stem) == path
    assert recipe_path(str(path)) == path


def test_a_file_wins_over_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lora").write_text("lora_r: 3")
    arguments = ["--config", "lora", "--model", "m", "--train_data", "d", "--output_dir", "o"]
    assert parse_arguments(arguments)[0].lora_r == 3
    Path("lora").unlink()
    assert parse_arguments(arguments)[0].lora_r == 64


def test_an_unknown_recipe_or_launch_file_is_named_with_those_that_exist():
    with pytest.raises(FileNotFoundError, match="'lorra', expected a file or one of .*lora"):
        recipe_path("lorra")
    error = run("train", "--launch", "dpp", status=2).stderr
    assert "--launch is 'dpp', expected a file or one of cpu, ddp" in error


@pytest.mark.parametrize(
    "words", [["--launch", "fsdp2", "--num_processes", "3"], ["--num-processes=3", "--launch=fsdp2"]]
)
def test_launch_hands_the_rest_to_accelerate(words, monkeypatch):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    main(["train", "--config", "lora", *words, "--max_steps", "2"])
    (options,) = seen
    assert Path(options.config_file) == ROOT / "scripts" / "accelerate" / "fsdp2.yaml"
    assert (options.num_processes, options.module, options.training_script) == (3, True, "llava_next_ar.scripts.train")
    assert options.training_script_args == ["--config", "lora", "--max_steps", "2"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (subprocess.CalledProcessError(2, ["python"]), 2),
        (subprocess.CalledProcessError(-9, ["python"]), 137),
        (ChildFailedError("train", {0: ProcessFailure(0, 1, 143, "none")}), 143),
        (SignalException("stopped", signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_launch_ends_with_the_status_of_its_processes(error, status, monkeypatch):
    def fail(options):
        raise error

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    monkeypatch.setattr(sys, "argv", ["llava-next-ar"])
    with pytest.raises(SystemExit) as end:
        main(["train", "--launch", "ddp", "--config", "lora"])
    assert end.value.code == status


@pytest.mark.slow
def test_train_and_evaluate_run_on_two_processes(folder, tmp_path):
    data = folder / "clips" / "test.json"
    words = ["--config", "demo", "--model", folder / "base", "--train_data", data, "--output_dir", tmp_path / "run"]
    words += ["--max_steps", 2, "--per_device_train_batch_size", 1]
    done = run("train", "--launch", "cpu", *words, cwd=tmp_path)
    assert "x 2 processes" in done.stdout
    recipe = yaml.safe_load((tmp_path / "run" / "train_config.yaml").read_text())
    assert recipe["max_steps"] == 2 and "launch" not in recipe
    words = ["--model", tmp_path / "run", "--data", data, "--device", "cpu", "--output", tmp_path / "results.json"]
    run("evaluate", *words, "--launch", "cpu", "--no-report", cwd=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["run"]["num_processes"] == 2 and len(results["answers"]) == len(entries_of(folder))


# --- ask -------------------------------------------------------------------------------------------------------------


def expected_answer(folder: Path, parts: list[dict], question: str, **options) -> tuple[str, dict, object]:
    model, processor = load_checkpoint(str(folder / "changed"))
    conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text, inputs, model


def test_ask_prints_the_answer_and_the_surprise_of_each_frame(folder, capsys):
    entry = entries_of(folder)[0]
    clip = str(folder / "clips" / entry["video"])
    question = entry["conversations"][0]["value"].removeprefix("<video>\n")
    text, inputs, model = expected_answer(folder, [{"type": "video", "path": clip}], question)
    ask([str(folder / "changed"), clip, question, "--max-new-tokens", "6", "--surprise", "--device", "cpu"])
    answer, name, header, *rows = capsys.readouterr().out.splitlines()
    assert text.strip() and answer.strip() == text.strip()
    assert name == clip and header.split() == ["frame", "seconds", "surprise", "copying"]
    (surprise,) = model.surprise(**inputs)
    shown = [[float(word) for word in row.split()] for row in rows]
    assert [row[0] for row in shown] == surprise.frame_index.tolist()
    assert [row[2] for row in shown] == pytest.approx(surprise.frames.tolist(), abs=5e-4)
    copies = [(c.mean() / (c.mean() + f)).item() for c, f in zip(surprise.copy_errors, surprise.floors, strict=True)]
    assert [row[3] for row in shown] == pytest.approx(copies, abs=5e-4)
    assert any(abs(row[2] - row[3]) > 1e-3 for row in shown)  # the head was changed: it does not copy


def test_ask_takes_several_videos_and_images_in_their_order(folder, tmp_path, capsys):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    clips = [str(folder / "clips" / name) for name in dict.fromkeys(entry["video"] for entry in entries_of(folder))][
        :2
    ]
    parts = [{"type": "video", "path": clips[0]}, {"type": "image", "path": str(tmp_path / "a.png")}]
    parts.append({"type": "video", "path": clips[1]})
    text, _, _ = expected_answer(folder, parts, "next", processor_kwargs={"num_frames": 4})
    media = [part["path"] for part in parts]
    ask([str(folder / "changed"), *media, "next", "--max-new-tokens", "6", "--num-frames", "4", "--surprise"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == text.strip()
    assert [line for line in lines if line in clips] == clips
    assert sum(line.split()[0].isdigit() for line in lines[1:]) == 2 * 3


def test_an_animated_picture_is_a_video_and_a_still_one_an_image(folder, tmp_path, capsys):
    frames = [Image.new("RGB", (48, 48), color) for color in ("red", "blue", "green", "white")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=200)
    frames[0].save(tmp_path / "still.gif")
    ask([str(folder / "changed"), str(tmp_path / "moving.gif"), "next", "--surprise", "--max-new-tokens", "2"])
    assert (
        sum(line.split()[:1] > ["0"] and line.split()[0].isdigit() for line in capsys.readouterr().out.splitlines())
        == 3
    )
    with pytest.raises(SystemExit):
        ask([str(folder / "changed"), str(tmp_path / "still.gif"), "next", "--surprise"])
    assert "--surprise needs a video" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit):
        ask([str(folder / "changed"), str(tmp_path / "text.png"), "next"])
    assert "text.png" in capsys.readouterr().err


def test_ask_samples_with_a_seed(folder, capsys):
    clip = str(folder / "clips" / entries_of(folder)[0]["video"])
    words = [str(folder / "changed"), clip, "next", "--max-new-tokens", "20", "--temperature", "5"]
    answers = []
    for seed in ("0", "0", "1"):
        ask([*words, "--seed", seed])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_an_empty_answer_is_reported_on_stderr(folder, capsys, monkeypatch):
    model, processor = load_checkpoint(str(folder / "changed"))
    monkeypatch.setitem(ask.__globals__, "load_checkpoint", lambda *_, **__: (model, processor))
    end = processor.tokenizer.eos_token_id
    model.generation_config.forced_eos_token_id = end
    clip = str(folder / "clips" / entries_of(folder)[0]["video"])
    ask(["m", clip, "next", "--max_new_tokens", "1", "--device", "cpu"])
    printed = capsys.readouterr()
    assert printed.out.strip() == "" and "the answer is empty: the model generated no text" in printed.err
    model.generation_config.forced_eos_token_id = None
    ask(["m", clip, "next", "--max_new_tokens", "6", "--device", "cpu"])
    assert "the answer is empty" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "{clip}", "What?", "--max_new_tokenz", "3"], "did you mean --max-new-tokens?"),
        (["{model}", "missing.mp4", "What?"], "no such file: missing.mp4"),
        (["{model}", "{clip}"], "expected a text after the files"),
        (["missing-folder/x/y", "{clip}", "What?"], "missing-folder/x/y"),
        (["{model}", "{model}/config.json", "What?"], "config.json"),
        (["{model}", "What?", "--surprise"], "--surprise needs a video"),
        (["{model}", "{clip}", "What?", "--dtype", "float3"], "dtype is 'float3'"),
        (["{model}", "{clip}", "What?", "--device", "warp"], "device is 'warp'"),
        (["{model}", "{clip}", "What?", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["{model}", "{clip}", "What?", "--temperature", "-1"], "temperature"),
    ],
)
def test_ask_ends_with_one_line_on_an_error(words, message, folder, capsys):
    places = {"model": folder / "changed", "clip": folder / "clips" / entries_of(folder)[0]["video"]}
    with pytest.raises(SystemExit) as end:
        ask([word.format(**places) for word in words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_ask_names_a_folder_that_is_given_as_a_video(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, expected a video or an image"):
        media_part(str(tmp_path))
