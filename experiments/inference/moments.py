"""Key frames by methods that need neither a vision tower nor a language model, and the time that each takes."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...evaluation.questions import Question
from ...evaluation.settings import EvaluationSettings, entries_sha256, hardware, versions
from ...processing.video_frames import FrameSampling, load_video
from .measures import choose_frames, key_of, shows_moment
from .selection import codec_scores, pixel_changes


def measure_moments(
    data: Path,
    budgets: Sequence[int],
    *,
    num_frames: int = 32,
    name: str = "test",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """The frames that each method chooses, and whether they show the moment of the question.

    Args:
        data: LLaVA JSON with one video for each entry, relative to its folder.
        budgets: numbers of frames.
        num_frames: of the dense sampling, at even steps.
        name: of the data.
        seed: of the frames that are drawn.

    Returns:
        `questions`; `hits`: by method and budget a digit for each question, 1 if a chosen frame shows its moment; and
        `cpu_seconds` of one video: `decode` (of all frames, which `codec` and `uniform` do not need), `pixels` and `codec`.

    Raises:
        ValueError: for an entry without one video or without a moment.
    """
    entries = json.loads(Path(data).read_text(encoding="utf-8"))
    settings = EvaluationSettings(model="", data=str(data), seed=seed)
    hits: dict[str, dict[str, str]] = {}
    spent = dict.fromkeys(("decode", "pixels", "codec"), 0.0)
    questions = [_question(entry, number, Path(data).parent) for number, entry in enumerate(entries)]
    for question in tqdm(questions, desc="moments", unit="question", disable=not progress):
        start = time.process_time()
        video = load_video(question.media[0], FrameSampling(policy="uniform", num_frames=num_frames), num_threads=1)
        decoded = time.process_time()
        pixels = [0.0, *pixel_changes(video.frames).flatten().tolist()]
        compared = time.process_time()
        costs = codec_scores(question.media[0], video.timestamps.tolist())
        done = time.process_time()
        for part, seconds in zip(spent, (decoded - start, compared - decoded, done - compared), strict=True):
            spent[part] += seconds
        for number in budgets:
            chosen = choose_frames({"pixels": pixels, "codec": costs}, number, key_of(question, settings))
            for way, frames in chosen.items():
                own = hits.setdefault(way, {})
                own[str(number)] = own.get(str(number), "") + str(shows_moment(question, video.timestamps, frames))
    return {
        "settings": asdict(settings),
        "budgets": list(budgets),
        "num_frames": num_frames,
        "versions": versions(),
        "data": {"path": str(data), "sha256": entries_sha256(entries)},
        "hardware": hardware("cpu"),
        "cpu_seconds": {part: seconds / len(questions) for part, seconds in spent.items()},
        "questions": [
            {
                "id": q.id,
                "question_type": q.question_type,
                "video": Path(q.media[0]).name,
                "num_choices": len(q.choices),
            }
            for q in questions
        ],
        "hits": hits,
    }


def _question(entry: dict[str, Any], index: int, folder: Path) -> Question:
    if not isinstance(entry.get("video"), str):
        raise ValueError(
            f"entry {entry.get('id', index)} has the video {entry.get('video')!r}, expected the path of one file"
        )
    if "moment" not in entry:
        raise ValueError(f"entry {entry.get('id', index)} has no `moment`, the seconds at which its answer is seen")
    return Question(
        index=index,
        id=str(entry.get("id", index)),
        question_type=entry.get("question_type", ""),
        messages=[],
        answer=entry["conversations"][-1]["value"],
        choices=tuple(entry.get("choices", ())),
        media=(str(folder / entry["video"]),),
        moment=tuple(entry["moment"]),
    )
