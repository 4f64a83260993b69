"""Stand-ins for the data of public tasks of lmms-eval, in their layout, so that their own definitions run offline.

The definitions are those of lmms-eval, unchanged: prompts, paths of videos, scoring of answers. A folder with the name of a
data set in the working folder takes the place of its repository on the Hub, and videos lie in the cache where the task looks.

| task | data set | videos |
|---|---|---|
| intphys2 | facebook/IntPhys2 | the Hub's cache of that repository |
| mvbench_moving_direction | OpenGVLab/MVBench | `mvbench_video/` of the cache |
| tempcompass_yes_no | lmms-eval/TempCompass | `tempcompass/videos/` of the cache |
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PUBLIC_METRICS = {
    "intphys2": ("intphys2_accuracy", 1.0),
    "mvbench_moving_direction": ("mvbench_accuracy", 100.0),
    "tempcompass_yes_no": ("avg_accuracy", 100.0),
}
"""By task its metric, and the value for all answers right."""
_COMMIT = "0" * 40


def public_entries(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """LLaVA JSON of the questions that the tasks ask about the clips, word for word; `question_type` is the task.

    Whether a clip is possible is made up: the tiny model learns the answers by heart.
    """
    asked: list[dict[str, Any]] = []

    def ask(task: str, entry: dict[str, Any], prompt: str, choices: Sequence[str], answer: str) -> None:
        turns = [{"from": "human", "value": f"<video>\n{prompt}"}, {"from": "gpt", "value": answer}]
        number = sum(other["question_type"] == task for other in asked)
        own = {"id": f"{task}_{number}", "video": entry["video"], "conversations": turns, "choices": list(choices)}
        asked.append({**own, "question_type": task, "source": entry["id"]})

    for number, entry in enumerate({entry["video"]: entry for entry in entries}.values()):
        prompt = (
            "Is the event in this video physically possible or impossible? Condition: permanence. Camera: Fixed. "
            "Difficulty: Easy.\nAnswer with only Possible or Impossible."
        )
        ask("intphys2", entry, prompt, ("Possible", "Impossible"), ("Possible", "Impossible")[number % 2])
    for entry in entries:
        question, answer = _question(entry)
        if set(entry["choices"]) == {"yes", "no"}:
            ask("tempcompass_yes_no", entry, f"{question}\nPlease answer yes or no:", ("yes", "no"), answer)
        else:
            letters = "ABCD"[: len(entry["choices"])]
            options = "".join(f"({a}) {choice}\n" for a, choice in zip(letters, entry["choices"], strict=True))
            prompt = f"Question:{question}\nOption:\n{options}Only give the best option.\n"
            ask("mvbench_moving_direction", entry, prompt, letters, letters[entry["choices"].index(answer)])
    return asked


def _question(entry: dict[str, Any]) -> tuple[str, str]:
    question, answer = (turn["value"] for turn in entry["conversations"])
    return question.removeprefix("<video>\n"), answer


def write_public_data(folder: Path, clips: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Data sets under `folder`, the working folder of the runs, and videos in its cache `huggingface/`.

    Args:
        clips: folder of the clips.
        entries: those of `public_entries`, and the entries of the clips that they name as `source`.
    """
    cache, by_id = folder / "huggingface", {entry["id"]: entry for entry in entries}
    asked = {task: [entry for entry in entries if entry.get("question_type") == task] for task in PUBLIC_METRICS}
    repository = cache / "hub" / "datasets--facebook--IntPhys2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_COMMIT)
    places = {
        "intphys2": repository / "snapshots" / _COMMIT / "Main",
        "mvbench_moving_direction": cache / "mvbench_video" / "clevrer" / "video_validation",
        "tempcompass_yes_no": cache / "tempcompass" / "videos",
    }
    for task, own in asked.items():
        places[task].mkdir(parents=True)
        for entry in own:
            shutil.copy(clips / entry["video"], places[task])
    _write(
        folder / "facebook" / "IntPhys2",
        ("default", "Main"),
        [
            {
                "file_name": Path(entry["video"]).name,
                "type": f"1_{entry['conversations'][1]['value']}",
                "condition": "permanence",
                "Camera": "Fixed",
                "Difficulty": "Easy",
            }
            for entry in asked["intphys2"]
        ],
    )
    sources = [(entry, by_id[entry["source"]]) for entry in asked["mvbench_moving_direction"]]
    _write(
        folder / "OpenGVLab" / "MVBench",
        ("moving_direction", "train"),
        [
            {
                "video": Path(entry["video"]).name,
                "question": _question(source)[0],
                "candidates": source["choices"],
                "answer": _question(source)[1],
            }
            for entry, source in sources
        ],
    )
    sources = [(entry, by_id[entry["source"]]) for entry in asked["tempcompass_yes_no"]]
    _write(
        folder / "lmms-eval" / "TempCompass",
        ("yes_no", "test"),
        [
            {
                "video_id": Path(entry["video"]).stem,
                "question": _question(source)[0],
                "answer": _question(source)[1],
                "dim": "direction",
            }
            for entry, source in sources
        ],
    )


def _write(folder: Path, name: tuple[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """A data set as `datasets.load_dataset` reads it from a folder: configuration and split by name."""
    folder.mkdir(parents=True)
    configuration, split = name
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n  - split: {split}\n    path: {split}.jsonl\n---\n"
    )
