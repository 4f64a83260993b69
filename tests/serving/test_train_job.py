"""The job that trains on the Hub: its header, its command lines, and a run on the local Hub."""

import re
import sys
from pathlib import Path

import processes
import pytest
from demo_folder import make_demo_folder
from hub_server import HubServer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llava_next_ar.serving.jobs import train_job

SCRIPT, ROOT = Path(train_job.__file__), Path(train_job.__file__).parents[2]
TRAIN = ("--config", "demo", "--model", "base", "--train_data", "clips/test.json", "--max_steps", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("job")
    make_demo_folder(path)
    return path


def planned(*words: str) -> tuple[list[str], list[str]]:
    options, rest = train_job.make_parser().parse_known_args(["--repo-id", "ann/model", *words])
    return train_job.plan(options, rest)


def test_the_header_is_that_of_the_package():
    """By the pattern of PEP 723."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = re.finditer(pattern, SCRIPT.read_text())
    assert block["type"] == "script"
    lines = (line[2:] if line.startswith("# ") else line[1:] for line in block["content"].splitlines(keepends=True))
    header = tomllib.loads("".join(lines))
    (needed,) = map(Requirement, header["dependencies"])
    assert needed.name == project["name"] and needed.extras <= project["optional-dependencies"].keys()
    assert SpecifierSet(header["requires-python"]) == SpecifierSet(project["requires-python"])
    assert header["tool"]["hf-jobs"]["secrets"] == ["HF_TOKEN"]


def test_hf_reads_the_script(folder, monkeypatch):
    """Offline, and without a token: what the job would be."""
    program = Path(sys.executable).with_name("hf")
    command = [sys.executable, "-m", "huggingface_hub.cli.hf"] if not program.is_file() else [program]
    words = [
        *command,
        "jobs",
        "uv",
        "run",
        "--dry-run",
        "--flavor",
        "t4-small",
        SCRIPT,
        "--repo-id",
        "ann/model",
        *TRAIN,
    ]
    shown = processes.run(words, cwd=folder, merge=True).stdout
    assert "t4-small" in shown and "24h" in shown and "HF_TOKEN" in shown
    assert "--repo-id ann/model --config demo" in " ".join(shown.split())


def test_options_go_to_the_training_and_to_the_push():
    train, push = planned("--config", "lora", "--private", "--license", "mit", "--endpoint", "--launch", "ddp")
    assert train == ["train", "--config", "lora", "--launch", "ddp", "--output_dir", "outputs/run"]
    assert push == ["push", "outputs/run", "ann/model", "--private", "--endpoint", "--license", "mit"]
    for words in (("--output_dir", "here"), ("--output_dir=here",), ("--output_dir", "a", "--output_dir", "here")):
        train, push = planned(*words)
        assert train == ["train", *words] and push[1] == "here"


@pytest.mark.parametrize(
    "words, message",
    [
        (("--hub_token", "hf_abcdefghijk"), "--hub_token: arguments of a job are visible"),
        (("--hub-token=hf_abcdefghijk",), "--hub-token=hf_...: arguments"),
        (("--run_name", "hf_abcdefghijk"), "hf_...: arguments"),
        (("--wandb_api_key=x",), "--wandb_api_key=x: arguments"),
        (("--push_to_hub", "true"), "--push_to_hub: the job pushes to --repo-id"),
        (("--output_dir",), "--output_dir has no value"),
    ],
)
def test_secrets_and_contradictions_are_errors(words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        planned(*words)
    assert "abcdefghijk" not in str(error.value)


def test_a_dry_run_reports_and_trains_nothing(folder):
    done = processes.run(
        [sys.executable, SCRIPT, "--repo-id", "ann/model", "--dry-run", *TRAIN], cwd=folder, timeout=600
    )
    assert "memory per device" in done.stdout
    assert "dry run: after the training the job runs: llava-next-ar push outputs/run ann/model" in done.stdout
    assert not (folder / "outputs" / "run" / "model.safetensors").exists()


def test_a_run_ends_in_a_push_and_shows_its_progress(folder, monkeypatch):
    with HubServer() as hub:
        hub.add_user("ann", "hf_ann")
        for name, value in {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_ann",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }.items():
            monkeypatch.setenv(name, value)
        words = [
            "--repo-id",
            "ann/model",
            "--license",
            "mit",
            "--endpoint",
            *TRAIN,
            "--logging_steps",
            "1",
            "--output_dir",
            "trained",
        ]
        done = processes.run([sys.executable, SCRIPT, *words], cwd=folder, timeout=600)
        files = hub.repo("ann/model").files()
        assert {"model.safetensors", "handler.py", "processor_config.json"} <= files.keys()
        assert files["model.safetensors"] == (folder / "trained" / "model.safetensors").read_bytes()
        assert "license: mit" in files["README.md"].decode()
        assert "pushed: " in done.stdout and re.search(r"step 1/1 .*loss \d", done.stdout + done.stderr)
        assert "hf_ann" not in done.stdout + done.stderr

        monkeypatch.setenv("HF_TOKEN", "hf_none")
        failed = processes.run([sys.executable, SCRIPT, *words], cwd=folder, status=2)
        assert "cannot push to ann/model" in failed.stderr and "+ llava-next-ar train" not in failed.stdout


@pytest.mark.parametrize("statuses, expected", [((0, 0), 0), ((143,), 143), ((0, 1), 1)])
def test_the_status_is_that_of_the_part_that_fails(monkeypatch, statuses, expected):
    """A training that is stopped or fails is not followed by a push."""
    ran: list[str] = []
    left = iter(statuses)
    monkeypatch.setattr(train_job, "get_token", lambda: "hf_x")
    monkeypatch.setattr(train_job.HfApi, "create_repo", lambda *args, **options: ran.append("create"))
    monkeypatch.setattr(train_job, "run", lambda arguments: ran.append(arguments[0]) or next(left))
    with pytest.raises(SystemExit) as ended:
        train_job.main(["--repo-id", "ann/model", *TRAIN])
    assert ended.value.code == expected
    assert ran == ["create", "train", "push"][: 1 + len(statuses)]


def test_a_job_without_token_does_not_start(folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = processes.run([sys.executable, SCRIPT, "--repo-id", "ann/model", *TRAIN], cwd=folder, status=2)
    assert "no token: start the job with --secrets HF_TOKEN" in done.stderr
