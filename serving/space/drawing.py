"""Predictions and surprise as HTML: readable at every width, in a light and a dark page.

Colours, scales and rows are those of the pictures that `llava-next-ar visualize` draws. Only their layout differs: text is text
of the page, and each picture is an `img` with its data inside. A patch has exactly the colour of its number on the colour bar.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ...pictures.strip import ColourBar, StripRow
from ...pictures.surprise import WORSE_BY, copying_surprise, is_worse, shown_frames, spread

THUMBNAIL_SIDE = 160  # pixels
NARROW_THUMBNAILS = 5  # of a timeline on a phone
MAX_MARKS = 80  # points of a line that are drawn as marks of their own
STYLE = """
.ar-expectation, .ar-live { --ar-blue: #0072B2; --ar-orange: #D55E00; --ar-grey: #737373; }
.dark .ar-expectation { --ar-blue: #56B4E9; --ar-orange: #FF8C42; --ar-grey: #A8A8A8; }
.dark .ar-live { --ar-blue: #56B4E9; --ar-orange: #FF8C42; --ar-grey: #A8A8A8; }
.ar-expectation h3 { margin: 1.6rem 0 .3rem; } .ar-expectation h3 + .ar-note { max-width: 52rem; }
.ar-hint { border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 2.4rem 1.2rem; margin: 0;
  text-align: center; color: var(--body-text-color-subdued); }
.ar-note { color: var(--body-text-color-subdued); margin: 0 0 .6rem; }
.ar-headline { font-size: 1.15rem; margin: .2rem 0 .6rem; }
.ar-headline b { font-variant-numeric: tabular-nums; }
.ar-scroll { overflow-x: auto; max-width: 100%; }
table.ar-strip { border-collapse: separate; border-spacing: 4px 6px; margin: 0 0 0 -4px; padding: 0; width: auto;
  font-size: .8rem; border: 0; }
table.ar-strip th, table.ar-strip td { padding: 0; border: 0; text-align: center; vertical-align: top; font-weight: 400;
  color: var(--body-text-color); background: none; font-variant-numeric: tabular-nums; }
table.ar-strip th[scope=row] { position: sticky; left: 0; z-index: 1; width: 6rem; min-width: 6rem; padding-right: .5rem;
  text-align: left; vertical-align: middle; white-space: pre; line-height: 1.25; background: var(--body-background-fill); }
table.ar-strip img, table.ar-strip .ar-empty { display: block; width: clamp(64px, 6.3vw, 82px); height: auto; margin: 0;
  border-radius: 2px; max-width: none; }
table.ar-strip img.ar-exact { image-rendering: pixelated; border-radius: 0; outline: 1px solid var(--border-color-primary); }
table.ar-strip .ar-empty { aspect-ratio: 1; border: 1px dashed var(--border-color-primary); }
.ar-bar { margin: .6rem 0 1.1rem; font-size: .8rem; color: var(--body-text-color); }
.ar-bar img, .ar-bar div { max-width: 26rem; }
.ar-bar img { display: block; width: 100%; height: 12px; margin: .25rem 0 0; image-rendering: pixelated; }
.ar-bar div { position: relative; height: 1.1rem; font-variant-numeric: tabular-nums; }
.ar-bar div span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.ar-bar .ar-low span:first-child { transform: none; } .ar-bar .ar-high span:last-child { transform: translateX(-100%); }
.ar-timeline { position: relative; padding: 0 1.4rem 1.5rem 2.6rem; font-size: .8rem; color: var(--body-text-color);
  font-variant-numeric: tabular-nums; }
.ar-legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 .5rem -2.2rem; }
.ar-legend span { display: inline-flex; align-items: center; gap: .4rem; }
.ar-thumbs { position: relative; height: 5.6rem; }
.ar-thumbs figure { position: absolute; bottom: 0; left: var(--wide); margin: 0; width: 8.4%; transform: translateX(-50%);
  text-align: center; }
.ar-tie.ar-narrow { display: none; }
.ar-thumbs img { display: block; width: 100%; max-height: 4.2rem; object-fit: cover; margin: 0;
  border: 2px solid var(--ar-blue); border-radius: 3px; box-sizing: border-box; }
.ar-thumbs .ar-worse img { border-color: var(--ar-orange); }
.ar-plot { position: relative; height: 13rem; }
.ar-plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.ar-plot svg * { vector-effect: non-scaling-stroke; fill: none; }
.ar-grid { stroke: var(--border-color-primary); stroke-width: 1; }
.ar-one { stroke: var(--body-text-color); stroke-width: 1; stroke-dasharray: 2 4; }
.ar-tie { stroke: var(--ar-blue); stroke-width: 1; opacity: .6; }
.ar-tie.ar-worse { stroke: var(--ar-orange); }
.ar-line { stroke: var(--ar-blue); stroke-width: 2; }
.ar-copy { stroke: var(--ar-grey); stroke-width: 1.6; stroke-dasharray: 6 4; }
.ar-mark { position: absolute; width: 9px; height: 9px; margin: -4.5px; border-radius: 50%; background: var(--ar-blue); }
.ar-mark.ar-copied { width: 6px; height: 6px; margin: -3px; border-radius: 0; background: var(--ar-grey); }
.ar-mark.ar-worse { border-radius: 0; transform: rotate(45deg); background: var(--ar-orange); }
.ar-legend .ar-mark { position: static; margin: 0; }
.ar-legend .ar-dots { width: 1.6rem; border-top: 2px dotted var(--body-text-color); }
.ar-y, .ar-x { position: absolute; }
.ar-y { right: 100%; margin-right: .5rem; transform: translateY(-50%); }
.ar-x { top: 100%; margin-top: .25rem; transform: translateX(-50%); white-space: nowrap; }
.ar-table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: 0 0 .8rem; width: auto;
  border: 0 !important; }
.ar-table tr, .ar-table tbody { border: 0 !important; }
.ar-table th, .ar-table td { padding: .25rem .8rem; text-align: right; border: 0;
  border-bottom: 1px solid var(--border-color-primary); }
.ar-live .ar-strip img { width: 128px; }
@media (max-width: 800px) {
  .ar-thumbs figure { left: var(--narrow); width: 17%; } .ar-thumbs .ar-wide { display: none; }
  .ar-tie.ar-wide { display: none; } .ar-tie.ar-narrow { display: inline; }
}
@media (max-width: 640px) {
  .ar-bar { font-size: .72rem; } table.ar-strip { font-size: .75rem; }
  table.ar-strip th[scope=row] { width: 4.7rem; min-width: 4.7rem; }
  .ar-table th, .ar-table td { padding: .25rem .4rem; }
}
"""


def data_uri(picture: np.ndarray, *, is_photo: bool = False) -> str:
    """A picture `[h, w, 3]` in 0 to 1 as the source of an `img`: exact as PNG, or a photo as a small JPEG."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    if is_photo:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(buffer, "JPEG", quality=88)
    else:
        image.save(buffer, "PNG", optimize=True)
    return f"data:image/{'jpeg' if is_photo else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def strip_html(rows: Sequence[StripRow], headings: Sequence[str], bars: Sequence[ColourBar] = ()) -> str:
    """Rows of pictures with a column for each heading, and the colour bars of their numbers.

    Args:
        rows: each with one picture for each heading; that of the name "frame" holds photos.
        headings: text above each column.
        bars: colour scales, below the pictures.
    """
    lines = ["<tr><td></td>", *(f"<th scope=col>{html.escape(heading)}</th>" for heading in headings), "</tr>"]
    for row in rows:
        name = row.name.replace("\n", " ")
        lines.append(f"<tr><th scope=row>{html.escape(row.name)}</th>")
        for number, (picture, heading) in enumerate(zip(row.pictures, headings, strict=True)):
            # The blank line below an empty place keeps it at the height of its neighbours.
            caption = (html.escape(row.captions[number]) or "&nbsp;") if row.captions else ""
            lines.append(f"<td>{_picture(picture, f'{name}, {heading}', is_photo=row.name == 'frame')}{caption}</td>")
        lines.append("</tr>")
    table = f"<div class=ar-scroll><table class=ar-strip>{''.join(lines)}</table></div>"
    return table + "".join(map(bar_html, bars))


def _picture(picture: np.ndarray | None, alt: str, *, is_photo: bool) -> str:
    if picture is None:
        return "<div class=ar-empty></div>"
    kind = "" if is_photo else " class=ar-exact"
    return f'<img{kind} alt="{html.escape(alt)}" src="{data_uri(picture, is_photo=is_photo)}">'


def bar_html(bar: ColourBar) -> str:
    """A colour bar: its label, the colours from the lowest to the highest number, and ticks."""
    norm = bar.scale.norm
    colours = bar.scale.to_rgba(norm.inverse(np.linspace(0, 1, 256)))[None, :, :3]
    ticks = bar.ticks
    if ticks is None:
        values = MaxNLocator(4).tick_values(norm.vmin, norm.vmax)
        ticks = {value: f"{value:.3g}" for value in values if norm.vmin <= value <= norm.vmax}
    texts = list(ticks.values())
    if bar.extend in ("max", "both") and float(norm(list(ticks)[-1])) > 0.99:
        texts[-1] = f"≥ {texts[-1]}"
    if bar.extend in ("min", "both") and float(norm(next(iter(ticks)))) < 0.01:
        texts[0] = f"≤ {texts[0]}"
    spans = (
        f'<span style="left:{100 * float(norm(value)):.2f}%">{text}</span>'
        for value, text in zip(ticks, texts, strict=True)
    )
    picture = f'<img alt="colour bar" src="{data_uri(colours)}">'
    places = [float(norm(value)) for value in ticks]
    ends = f"{'ar-low ' * (places[0] < 0.01)}{'ar-high' * (places[-1] > 0.99)}"
    return f"<div class=ar-bar>{html.escape(bar.label)}{picture}<div class='{ends}'>{''.join(spans)}</div></div>"


def timeline_html(thumbnails: Sequence[str], surprise: Any) -> str:
    """Surprise over time beside that of copying, with the most surprising frame of each stretch of time above.

    Args:
        thumbnails: sources of an `img`, one for each entry of the surprise.
        surprise: a `VideoSurprise`.
    """
    seconds, values, copying = surprise.seconds.tolist(), surprise.frames.tolist(), copying_surprise(surprise)
    worse = is_worse(surprise)
    highest = max(*values, *copying, 1e-6)
    reaches_one = highest > 0.5
    top = 1.08 * max(highest, 1.0 if reaches_one else 0.0)
    first, span = seconds[0], max(seconds[-1] - seconds[0], 1e-6)
    left = [50.0 if len(seconds) == 1 else 2 + 96 * (time - first) / span for time in seconds]
    down, down_copied = ([100 - 96 * value / top for value in own] for own in (values, copying))

    shown = shown_frames(surprise)
    stretches = np.array_split(shown, min(NARROW_THUMBNAILS, len(shown)))
    few = [int(max(stretch, key=lambda entry: values[entry])) for stretch in stretches]
    centers = dict(zip(shown, spread([left[entry] for entry in shown], 8.9, 4.2, 95.8), strict=True))
    narrow = dict(zip(few, spread([left[entry] for entry in few], 19.0, 8.5, 91.5), strict=True))
    figures, drawn = [], []
    for entry in shown:
        name = "ar-worse" if worse[entry] else ""
        places = f"--wide:{centers[entry]:.2f}%;--narrow:{narrow.get(entry, 0.0):.2f}%"
        figures.append(
            f'<figure class="{name} {"" if entry in narrow else "ar-wide"}" style="{places}">'
            f'<img alt="frame at {seconds[entry]:.2f} s" src="{thumbnails[entry]}">{values[entry]:.2f}</figure>'
        )
        for width, own in (("ar-wide", centers), ("ar-narrow", narrow)):
            if entry in own:
                line = f"M{own[entry]:.2f} 0L{left[entry]:.2f} {down[entry]:.2f}"
                drawn.append(f'<path class="ar-tie {name} {width}" d="{line}"/>')
    labels = []
    for value in MaxNLocator(4).tick_values(0, top):
        if value <= top:
            place = 100 - 96 * value / top
            drawn.append(f'<path class=ar-grid d="M0 {place:.2f}H100"/>')
            labels.append(f'<span class=ar-y style="top:{place:.2f}%">{value:.3g}</span>')
    for value in MaxNLocator(5).tick_values(first, seconds[-1]) if len(seconds) > 1 else seconds:
        if first <= value <= seconds[-1]:
            place = 50.0 if len(seconds) == 1 else 2 + 96 * (value - first) / span
            labels.append(f'<span class=ar-x style="left:{place:.2f}%">{value:.4g} s</span>')
    if reaches_one:
        drawn.append(f'<path class=ar-one d="M0 {100 - 96 / top:.2f}H100"/>')
    for name, heights in (("ar-copy", down_copied), ("ar-line", down)):
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in zip(left, heights, strict=True))
        drawn.append(f'<polyline class={name} points="{points}"/>')
    marks = []
    for entry, frame in enumerate(surprise.frame_index.tolist()):
        text = f"frame {frame}, {seconds[entry]:.2f} s: surprise {values[entry]:.3f}, copying {copying[entry]:.3f}"
        if len(values) <= MAX_MARKS:
            marks.append(_mark("ar-copied", left[entry], down_copied[entry], text))
        if len(values) <= MAX_MARKS or worse[entry]:
            marks.append(_mark("ar-worse" if worse[entry] else "", left[entry], down[entry], text))
    legend = [
        "<span><i class=ar-mark></i>prediction</span>",
        f'<span><i class="ar-mark ar-worse"></i>prediction, worse than copying by over {WORSE_BY:.0%}</span>',
        '<span><i class="ar-mark ar-copied"></i>copying the frame before</span>',
    ]
    legend += ["<span><i class=ar-dots></i>1 = error of copying + floor</span>"] * reaches_one
    return (
        f"<div class=ar-timeline><div class=ar-legend>{''.join(legend)}</div>"
        f"<div class=ar-thumbs>{''.join(figures)}</div><div class=ar-plot>"
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="surprise over time">'
        f"{''.join(drawn)}</svg>{''.join(marks)}{''.join(labels)}</div></div>"
    )


def _mark(name: str, left: float, top: float, text: str) -> str:
    return f'<i class="ar-mark {name}" style="left:{left:.2f}%;top:{top:.2f}%" title="{text}"></i>'


def compared(error: float, baseline: float) -> str:
    """Two errors in words: "44% less than", "12% more than", or "as much as"."""
    if not baseline > 0:
        return "more than" if error > 0 else "as much as"
    share = 1 - error / baseline
    if abs(share) < 0.005:
        return "as much as"
    return f"{abs(share):.0%} {'less' if share > 0 else 'more'} than"


def skill_html(metrics: dict[str, float], notes: Sequence[str] = ()) -> str:
    """The skill of the predictions of a clip, and its meaning in one sentence."""
    skill = metrics["skill"]
    if math.isnan(skill):
        text = (
            "<b>Skill is not defined</b>: nothing in the clip changes, so that copying the frame before has no error."
        )
    else:
        text = (
            f"<b>Skill {skill:+.2f}</b>: the predictions miss by {compared(metrics['mse'], metrics['copy_mse'])} copying the "
            "frame before (0 is as good as copying, 1 is perfect)."
        )
    return f"<p class=ar-headline>{text}</p>" + "".join(f"<p class=ar-note>{html.escape(note)}</p>" for note in notes)


def note_html(text: str) -> str:
    """The note of an area without content yet."""
    return f"<p class=ar-hint>{html.escape(text)}</p>"


def section(title: str, note: str, content: str) -> str:
    """A heading, a sentence that explains it, and its pictures."""
    return f"<h3>{html.escape(title)}</h3><p class=ar-note>{html.escape(note)}</p>{content}"


def table_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers."""
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in columns)
    body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<div class=ar-scroll><table class=ar-table><tr>{head}</tr>{lines}</table></div>"
