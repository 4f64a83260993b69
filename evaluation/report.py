"""HTML report of an evaluation, with plots, in one file."""

from pathlib import Path
from typing import Any

from .html_page import Report, answers_figure, gap_figure, horizon_figure
from .tables import MAX_ROWS, answer_rows, by_frames_ahead, frame_rows, remarks, wrong_answers


def write_report(results: dict[str, Any], path: Path) -> None:
    """A self-contained HTML page."""
    report = Report(f"Evaluation of {results['settings']['model']}")
    for remark in remarks(results):
        report.text(f"Note: {remark}.")
    answering, frames = results["question_answering"], results["reconstruction"]
    report.heading("Answers")
    report.table(answer_rows(answering))
    if answering["all"].keys() & {"exact", "likelihood"}:
        by_type = answering["by_type"] if len(answering["by_type"]) > 1 else {"all": answering["all"]}
        report.figure(answers_figure(by_type), "accuracy by question type")
    report.text(
        "Exact: the generated text is the reference. Choice: it names the right choice, by letter or text; texts that name "
        "none (unparsable) are wrong. Likelihood: the right choice is the most probable one. Chance: one over the number of "
        "choices. Best guess: always the most frequent answer, or the choice at the place that is most often right. "
        "Intervals are 95% bootstrap intervals; questions that share a video are drawn together.",
        note=True,
    )
    report.heading("Predicted frames")
    if frames is None:
        report.text("Not measured: no head, or no video with two frames.")
    else:
        report.table(frame_rows(frames))
        report.figure(gap_figure(by_frames_ahead(frames)), "skill and temporal consistency by time gap")
        if frames["rollout"] and frames["rollout"]["by_horizon"]:
            report.figure(horizon_figure(frames["rollout"]["by_horizon"]), "error by horizon, of the frames held back")
        report.text(
            "Every frame: the next one, from all true ones before it. Held back: the last frames of each video, from those "
            "before them and the predictions in between; these alone compare horizons. Skill is 1 - mse / copy mse: 0 is as "
            "good as copying the last frame, 1 is perfect. Temporal consistency says how often the true frame is the nearest "
            "of its clip to the prediction; a blind guess is one over its frames. Seconds are those from the last frame that "
            "was seen to the predicted one.",
            note=True,
        )
    wrong = wrong_answers(results["answers"])
    report.heading(f"Wrong answers: {len(wrong)} of {len(results['answers'])}")
    if wrong:
        report.text(f"The first {min(len(wrong), MAX_ROWS)}.", note=True)
        rows = [["entry", "type", "choices", "truth", "generated", "most probable"]]
        report.table(rows + [_wrong_row(answer) for answer in wrong[:MAX_ROWS]])
    if results["bad_samples"]:
        report.heading(f"Entries that could not be read: {results['num_bad_samples']}")
        report.table([["entry", "why"], *([bad["id"], bad["problem"]] for bad in results["bad_samples"][:MAX_ROWS])])
    report.heading("How to repeat it")
    report.code(results["command"])
    for part in ("settings", "versions", "model", "data", "run"):
        report.table([[part, ""], *([name, str(value)] for name, value in results[part].items())])
    report.write(path)


def _wrong_row(answer: dict[str, Any]) -> list[str]:
    likely = "-"
    if "log_likelihoods" in answer:
        scores = answer["log_likelihoods"]
        likely = answer["choices"][scores.index(max(scores))]
    choices = ", ".join(answer["choices"]) or "-"
    return [answer["id"], answer["question_type"], choices, answer["answer"], answer.get("generated", "-"), likely]
