"""Tables with intervals and paired differences, and a plot, from raw numbers of inference-time use."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...evaluation.metrics import interval_of_mean
from ...evaluation.settings import EvaluationSettings
from ..temporal.questions import QUESTION_TYPES

Value = tuple[float, list[float] | None]  # a mean and its 95% interval
_COLOURS = {"uniform": "#888888", "random": "#cccccc", "surprise": "#2563a8", "error": "#8ab4e8", "change": "#d2691e",
            "pixels": "#4d9078", "codec": "#8e5ea2"}  # fmt: skip
_NAMES = {
    "key_frames": {"change": "feature difference", "pixels": "pixel difference", "error": "prediction error"},
    "tokens": {"change": "EVS", "pixels": "pixel difference", "error": "prediction error", "uniform": "even steps"},
}
_COSTS = {
    "key_frames": """\
Surprise and prediction error take a pass of all frames through the language model first, and so does a model that is
simply shown all of them. The feature difference takes the vision tower on all frames, the pixel difference takes decoded
frames alone, and the codec's bytes take the packets of the file.""",
    "tokens": """\
EVS takes the embeddings alone. Surprise and prediction error take a pass of all tokens first: see the time of the prefill.
A share below one over the number of frames leaves the first frame alone, the same in every row.""",
    "prefill": """\
Seconds from the vision features to the first answer token. The scores are computed once for a video: from that many questions
on, each with its own prefill, surprise costs less than dropping nothing. Where the cache of the video is kept from one question
to the next, the scoring pass has filled that of all tokens already, and only memory is saved.""",
}
# The cheap method that is compared with each other one.
BASELINE = {"key_frames": "uniform", "tokens": "change"}


def any_frame_tells(question_type: str) -> bool:
    """True if each single frame answers a question type of the temporal benchmark; False for types of other data."""
    return question_type in QUESTION_TYPES and QUESTION_TYPES[question_type].one_frame == 1


def check_choice_matters(question_types: Sequence[str]) -> None:
    """Raises ValueError if each single frame answers all questions, so that no choice of frames matters."""
    if all(map(any_frame_tells, question_types)):
        raise ValueError(f"any frame answers each of the {len(question_types)} questions: no choice of frames matters")


def mean_over_clips(values: Sequence[float], clips: Sequence[Any], settings: EvaluationSettings) -> Value:
    """The mean, and its interval over clips: questions about the same one are drawn together."""
    sums: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for value, clip in zip(values, clips, strict=True):
        sums[clip][0] += value
        sums[clip][1] += 1
    return sum(values) / len(values), interval_of_mean(list(sums.values()), settings)


class Answers:
    """The answers of one results file.

    Args:
        results: what `key-frames` or `tokens` wrote.
        kind: `key_frames` or `tokens`.

    Raises:
        ValueError: if no question counts, or if a condition has not one answer for each question.
    """

    def __init__(self, results: dict[str, Any], kind: str) -> None:
        self.kind, self.results = kind, results
        self._settings = EvaluationSettings(**results["settings"])
        self._questions = results["questions"]
        check_choice_matters([question["question_type"] for question in self._questions])
        self._right = {(c["way"], c["budget"]): c["right"] for c in results["conditions"]}
        for (way, budget), right in self._right.items():
            if len(right) != len(self._questions):
                raise ValueError(f"{len(right)} answers by {way} at {budget}, expected {len(self._questions)}")
        # Results of before there were moments have no `hits`.
        self._hits = {(c["way"], c["budget"]): c.get("hits", []) for c in results["conditions"]}
        self.types = sorted({q["question_type"] for q in self._questions})
        self.budgets = results["budgets"]
        self.ways = list(dict.fromkeys(way for way, _ in self._right if way != "all"))

    def accuracy(self, way: str, budget: float | None = None, *, question_type: str | None = None) -> Value:
        """Over one type of question, or all but those that any frame answers."""
        return self._mean(self._right[way, budget], question_type)

    def difference(self, way: str, other: str, budget: float) -> Value:
        """Accuracy of one method less that of another at the same budget: paired, question by question."""
        pairs = zip(self._right[way, budget], self._right[other, budget], strict=True)
        return self._mean([one - two for one, two in pairs], None)

    @property
    def has_moments(self) -> bool:
        """True if each question that counts has a moment."""
        counted = {n for n, q in enumerate(self._questions) if not any_frame_tells(q["question_type"])}
        return all(
            len(hits) == len(self._questions) and None not in (hits[n] for n in counted)
            for (way, _), hits in self._hits.items()
            if way != "all"
        )

    def hit_rate(self, way: str, budget: float) -> Value:
        """Share of questions of which a shown frame lies in the moment."""
        return self._mean(self._hits[way, budget], None)

    def _mean(self, values: Sequence[float], question_type: str | None) -> Value:
        kinds = [q["question_type"] for q in self._questions]
        asked = [
            n
            for n, kind in enumerate(kinds)
            if kind == question_type or question_type is None and not any_frame_tells(kind)
        ]
        videos = [self._questions[n]["video"] for n in asked]
        return mean_over_clips([values[n] for n in asked], videos, self._settings)

    def chance(self, question_type: str) -> float:
        numbers = [q["num_choices"] for q in self._questions if q["question_type"] == question_type]
        return sum(1 / number for number in numbers) / len(numbers)

    def label(self, way: str) -> str:
        return _label(self.kind, way)


def _text(value: Value, sign: str = "") -> str:
    mean, interval = value
    numbers = [f"{number:{sign}.3f}" for number in (mean, *(interval or ()))]
    return numbers[0] + (f" [{', '.join(numbers[1:])}]" if interval else "")


def knowledge_rows(answers: Answers) -> list[list[str]]:
    """Accuracy with everything shown, beside chance."""
    rows = [["question type", "any frame tells", "accuracy", "chance"]]
    for name in answers.types:
        asked = "yes, so not counted below" if any_frame_tells(name) else "no"
        rows.append([name, asked, _text(answers.accuracy("all", question_type=name)), f"{answers.chance(name):.2f}"])
    return rows


def accuracy_rows(answers: Answers) -> list[list[str]]:
    """Accuracy by method and budget, and the paired difference to the cheap method."""
    baseline = BASELINE[answers.kind]
    unit = "frames" if answers.kind == "key_frames" else "of the tokens"
    heads = [
        f"{budget:g} {unit}{extra}" for budget in answers.budgets for extra in ("", f" - {answers.label(baseline)}")
    ]
    rows = [["chosen by", *heads]]
    for way in answers.ways:
        row = [answers.label(way)]
        for budget in answers.budgets:
            row.append(_text(answers.accuracy(way, budget)))
            row.append("" if way == baseline else _text(answers.difference(way, baseline, budget), "+"))
        rows.append(row)
    full = _text(answers.accuracy("all"))
    rows.append(["everything shown", *[full, ""] * len(answers.budgets)])
    return rows


def gain_rows(answers: Answers, other: str) -> list[list[str]]:
    """Accuracy that the head's scores gain over another score (`change`, `pixels` or `codec`) by the same rule and budget."""
    rows = [[f"accuracy gained over {answers.label(other)}", *(f"{budget:g} frames" for budget in answers.budgets)]]
    for way in answers.ways:
        score, _, rule = way.partition(" ")
        if score in ("surprise", "error"):
            pairs = (answers.difference(way, f"{other} {rule}", budget) for budget in answers.budgets)
            rows.append([answers.label(way), *(_text(pair, "+") for pair in pairs)])
    return rows


def hit_rows(answers: Answers) -> list[list[str]]:
    """Share of questions of which the moment is shown, by method and budget."""
    rows = [["moment is shown, chosen by", *(f"{budget:g} frames" for budget in answers.budgets)]]
    for way in answers.ways:
        rows.append([answers.label(way), *(_text(answers.hit_rate(way, budget)) for budget in answers.budgets)])
    return rows


class MomentHits:
    """Shown moments of the methods without a model, and of those with one on the same clips.

    Args:
        moments: raw numbers of `moments`.
        key_frames: raw numbers of `key-frames` on the same clips, if there are any.

    Raises:
        ValueError: if the questions differ.
    """

    def __init__(self, moments: dict[str, Any], key_frames: dict[str, Any] | None) -> None:
        self.moments = moments
        self._settings = EvaluationSettings(**moments["settings"])
        self._videos = [question["video"] for question in moments["questions"]]
        self.hits = {
            (way, int(budget)): list(map(int, digits))
            for way, own in moments["hits"].items()
            for budget, digits in own.items()
        }
        if key_frames is not None:
            if moments["data"]["sha256"] != key_frames["data"]["sha256"]:
                raise ValueError(
                    "the entries of `moments` are not those of `key-frames`: give the results other names"
                )
            for condition in key_frames["conditions"]:
                if condition["way"] != "all":
                    self.hits[condition["way"], condition["budget"]] = condition["hits"]

    def rows(self) -> list[list[str]]:
        """Share of questions of which the moment is shown, by method and budget."""
        budgets = self.moments["budgets"]
        rows = [["moment is shown, chosen by", *(f"{budget} frames" for budget in budgets)]]
        for way in sorted({way for way, _ in self.hits}):
            cells = [self._text(self.hits.get((way, budget))) for budget in budgets]
            rows.append([_label("key_frames", way), *cells])
        return rows

    def difference_rows(self, way: str = "codec top") -> list[list[str]]:
        """A method less each other one by the same rule: paired, question by question."""
        budgets, rule = self.moments["budgets"], way.partition(" ")[2]
        rows = [[f"{_label('key_frames', way)}, less", *(f"{budget} frames" for budget in budgets)]]
        others = sorted({other for other, _ in self.hits if other != way and other.partition(" ")[2] in ("", rule)})
        for other in others:
            cells = []
            for budget in budgets:
                pair = self.hits.get((way, budget)), self.hits.get((other, budget))
                values = None if None in pair else [a - b for a, b in zip(*pair, strict=True)]
                cells.append(self._text(values, "+"))
            rows.append([_label("key_frames", other), *cells])
        return rows

    def _text(self, values: Sequence[int] | None, sign: str = "") -> str:
        return "-" if values is None else _text(mean_over_clips(values, self._videos, self._settings), sign)

    def cost_rows(self) -> list[list[str]]:
        """CPU time of one video."""
        spent = self.moments["cpu_seconds"]
        both = spent["decode"] + spent["pixels"]
        return [
            ["CPU milliseconds a video", "time"],
            ["codec: pass over packets", f"{1000 * spent['codec']:.1f}"],
            ["pixel difference: decode all frames, compare", f"{1000 * both:.1f}"],
        ]


def _label(kind: str, way: str) -> str:
    score, _, rule = way.partition(" ")
    return f"{_NAMES[kind].get(score, score)}{', ' if rule else ''}{rule}"


def prefill_rows(results: dict[str, Any]) -> list[list[str]]:
    """Time and memory by share, with the cost of the scores for one question, and the questions until they pay."""
    rows = [["share", "tokens", "prefill, s", "of all", "cache, MB", "of all", "with EVS scores, of all",
             "with surprise scores, of all", "questions until surprise pays"]]  # fmt: skip
    full = next(row for row in results["by_share"] if row["share"] == 1)
    change, surprise = results["change_seconds"], results["surprise_seconds"]
    for row in results["by_share"]:
        saved = full["seconds"] - row["seconds"]
        is_full = row is full
        rows.append(
            [
                f"{row['share']:g}",
                str(row["num_tokens"]),
                f"{row['seconds']:.2f}",
                f"{row['seconds'] / full['seconds']:.2f}",
                f"{row['cache_bytes'] / 1e6:.1f}",
                f"{row['cache_bytes'] / full['cache_bytes']:.2f}",
                "-" if is_full else f"{(row['seconds'] + change) / full['seconds']:.2f}",
                "-" if is_full else f"{(row['seconds'] + surprise) / full['seconds']:.2f}",
                "-" if is_full or saved <= 0 else f"{surprise / saved:.1f}",
            ]
        )
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def accuracy_figure(answers: dict[str, Sequence[Answers]]) -> Figure:
    """Accuracy over the budget, a line for each way of choosing: a row for each data set, by name, a panel for each kind."""
    columns = max(len(row) for row in answers.values())
    figure = Figure(figsize=(6.5 * columns, 4 * len(answers)), layout="constrained")
    axes = figure.subplots(len(answers), columns, squeeze=False)
    panels = [(axes[row, column], name, own) for row, (name, some) in enumerate(answers.items())
              for column, own in enumerate(some)]  # fmt: skip
    for ax in set(axes.flat) - {ax for ax, _, _ in panels}:
        ax.set_axis_off()
    for ax, name, own in panels:
        if len(answers) > 1:
            ax.set_title(name)
        full, _ = own.accuracy("all")
        ax.axhline(full, color="#333333", linewidth=1, linestyle="--", label="everything shown")
        for number, way in enumerate(own.ways):
            values = [own.accuracy(way, budget) for budget in own.budgets]
            score, _, rule = way.partition(" ")
            x = [place + 0.03 * (number - len(own.ways) / 2) for place in range(len(own.budgets))]
            y = [mean for mean, _ in values]
            error = [
                [mean - (i or [mean])[0] for mean, i in values],
                [(i or [0, mean])[1] - mean for mean, i in values],
            ]
            ax.errorbar(x, y, yerr=error, color=_COLOURS[score], linestyle=":" if rule == "spread" else "-", marker="o",
                        markersize=3, linewidth=1.4, elinewidth=0.6, label=own.label(way))  # fmt: skip
        ax.set_xticks(range(len(own.budgets)), [f"{budget:g}" for budget in own.budgets])
        ax.set_xlabel("frames shown" if own.kind == "key_frames" else "share of the visual tokens")
        ax.set_ylabel("accuracy")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write_tables(results: Path, shown: Sequence[str] = ("test",)) -> str:
    """Writes `tables.md` and `accuracy.png` beside the raw numbers; returns the text.

    Args:
        results: folder with `key_frames_<name>.json`, `tokens_<name>.json`, `moments_<name>.json` and `prefill.json`, or some
            of them.
        shown: names of the data whose numbers go into the plot; tables are made of all.

    Raises:
        FileNotFoundError: if there is none of them.
    """
    parts, drawn = [], {}
    titles = {"key_frames": "Key frames", "tokens": "Fewer visual tokens"}
    for kind, title in titles.items():
        for path in sorted(results.glob(f"{kind}_*.json")):
            try:
                answers = Answers(json.loads(path.read_text(encoding="utf-8")), kind)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            name = path.stem.removeprefix(f"{kind}_")
            if name in shown:
                drawn.setdefault(name, []).append(answers)
            parts += [f"## {title}, data `{name}`", f"`{answers.results['command']}`"]
            parts += [as_markdown(knowledge_rows(answers)), as_markdown(accuracy_rows(answers))]
            if kind == "key_frames":
                others = [other for other in ("change", "pixels", "codec") if f"{other} top" in answers.ways]
                parts += [as_markdown(gain_rows(answers, other)) for other in others]
                parts += [as_markdown(hit_rows(answers))] if answers.has_moments else []
            parts += [_COSTS[kind]]
    for path in sorted(results.glob("moments_*.json")):
        name = path.stem.removeprefix("moments_")
        beside = results / f"key_frames_{name}.json"
        key_frames = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else None
        hits = MomentHits(json.loads(path.read_text(encoding="utf-8")), key_frames)
        parts += [f"## Key frames without a model, data `{name}`", f"`{hits.moments['command']}`"]
        parts += [as_markdown(rows) for rows in (hits.rows(), hits.difference_rows(), hits.cost_rows())]
    prefill = results / "prefill.json"
    if prefill.exists():
        raw = json.loads(prefill.read_text(encoding="utf-8"))
        parts += ["## Time and memory of the prefill", f"`{raw['command']}`", as_markdown(prefill_rows(raw))]
        parts += [_COSTS["prefill"]]
    if not parts:
        raise FileNotFoundError(f"{results} holds no results: run key-frames, tokens or prefill first")
    text = "\n\n".join(["# Inference-time use of the head", *parts]) + "\n"
    (results / "tables.md").write_text(text, encoding="utf-8")
    if drawn:
        accuracy_figure(drawn).savefig(results / "accuracy.png", dpi=110, metadata={"Software": None})
    return text
