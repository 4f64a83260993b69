"""Experiments of the study. An experiment is a set of variants, and a variant changes some of the common settings.

Nothing else differs between two arms: they share clips, and for each seed the first weights and the order of the samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from .data import DataSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One training run, but for its seed."""

    data: DataSettings = DataSettings()
    hidden_size: int = 96
    """Of the language model, a Qwen2 that starts from random weights."""
    intermediate_size: int = 256
    num_layers: int = 3
    num_attention_heads: int = 4
    initializer_range: float = 0.05
    """More than the 0.02 of wide models, which leaves narrow ones silent for long."""
    rope_theta: float = 100.0
    """For short sequences and few dimensions a head: wavelengths of 6 to 400 tokens, not of 6 to 30,000."""
    head: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `autoregressive_config` beside those of `HEAD`."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the configuration about video tokens beside those of `LAYOUT`."""
    train_share: float = 1.0
    """Of the training set, drawn by the seed."""
    batch_size: int = 8
    """Samples of a step, drawn from that share."""
    unlabeled_batch_size: int = 0
    """Clips of a step without a question, of the whole training set."""
    num_steps: int = 2400
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    curve_points: int = 8
    """How often the development split is measured during training."""


# The head is as wide as the language model, and the layout keeps all patches: there are few.
# Targets are standardized over all patches already; each brought to unit variance by itself, the ground, in which nothing
# happens, would count as much as the shapes.
HEAD = MappingProxyType({"embedding_dim": 96, "num_heads": 4, "num_layers": 1, "target_norm": False})
LAYOUT = MappingProxyType(
    {"mm_spatial_pool_stride": 1, "mm_spatial_pool_mode": "average", "mm_newline_position": "no_token"}
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    table: str
    """Whose runs it is stored with; other tables may show it too."""
    name: str
    title: str
    changes: Mapping[str, Any]
    """Fields of `RunSettings` that differ from the defaults; keys of `head` and `layout` are added to them."""

    def settings(self, common: RunSettings) -> RunSettings:
        merged = {
            name: {**getattr(common, name), **value} if isinstance(value, Mapping) else value
            for name, value in self.changes.items()
        }
        return replace(common, **merged)


@dataclass(frozen=True, kw_only=True)
class Table:
    name: str
    title: str
    arms: tuple[Arm, ...]
    """The first one is what the others are compared with."""
    num_seeds: int


def _arm(table: str, name: str, title: str, *, head: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> Arm:
    """An arm with the objective in full unless `head` says otherwise; what is about the head shows most there."""
    return Arm(table=table, name=name, title=title, changes={"head": {"loss_weight": 1.0, **head}, **changes})


def _weight(table: str, name: str, title: str, weight: float, **changes: Any) -> Arm:
    return _arm(table, name, title, head={"loss_weight": weight}, **changes)


_WITHOUT = _weight("main", "weight-0", "loss weight 0", 0.0)
_PROTOTYPE = _weight("main", "weight-0.1", "loss weight 0.1", 0.1)
_FULL = _weight("main", "weight-1", "loss weight 1.0", 1.0)


def _few(name: str, title: str, weight: float, unlabeled: int = 0) -> Arm:
    return _weight("few-labels", name, title, weight, train_share=0.1, unlabeled_batch_size=unlabeled, num_steps=1600)


_GRID = {"mm_newline_position": "grid"}

TABLES: Mapping[str, Table] = MappingProxyType(
    {
        table.name: table
        for table in (
            Table(name="main", title="Weight of the loss", arms=(_WITHOUT, _PROTOTYPE, _FULL), num_seeds=5),
            Table(
                name="few-labels",
                title="A tenth of the labels",
                arms=(
                    _few("labels-alone", "labels alone", 0.0),
                    _few("objective-on-labeled", "and the objective on the same clips, weight 1.0", 1.0),
                    _few("objective-on-all", "and the objective on ten times as many clips, weight 1.0", 1.0, 8),
                ),
                num_seeds=5,
            ),
            Table(
                name="causal",
                title="Frame-causal mask",
                arms=(
                    _FULL,
                    _arm("causal", "leaky", "mask off: the target is seen", head={"use_frame_causal_mask": False}),
                ),
                num_seeds=3,
            ),
            Table(
                name="patience",
                title="Without the objective, but twice as long",
                arms=(
                    _WITHOUT,
                    _weight(
                        "patience",
                        "twice-the-steps",
                        "loss weight 0, twice the steps",
                        0.0,
                        num_steps=2 * RunSettings.num_steps,
                    ),
                    _FULL,
                ),
                num_seeds=3,
            ),
            Table(
                name="history",
                title="Frames that the head sees",
                arms=(
                    _FULL,
                    _arm("history", "hist-1", "num_hist 1", head={"num_hist": 1}),
                    _arm("history", "hist-8", "num_hist 8", head={"num_hist": 8}),
                ),
                num_seeds=3,
            ),
            Table(
                name="targets",
                title="Normalization of the targets",
                arms=(
                    _FULL,
                    _arm("targets", "by-patch", "each patch by itself, as by default", head={"target_norm": True}),
                ),
                num_seeds=3,
            ),
            Table(
                name="layout",
                title="Slow and fast frames, several scales",
                arms=(
                    _arm("layout", "grid", "all frames alike, newline after each row", layout=_GRID),
                    _arm(
                        "layout",
                        "slow-fast",
                        "slow and fast frames (every third is slow)",
                        layout={**_GRID, "add_faster_video": True, "faster_token_stride": 3},
                    ),
                    _arm(
                        "layout",
                        "multi-scale",
                        "loss on coarser grids too",
                        layout=_GRID,
                        # Without the last two, several scales would also pool the finest one, by 2.
                        head={
                            "enable_multiscale_pooling": True,
                            "mm_spatial_pool_stride": 1,
                            "add_faster_video": False,
                        },
                    ),
                ),
                num_seeds=3,
            ),
            Table(
                name="weights",
                title="Other weights",
                arms=(
                    _WITHOUT,
                    _weight("weights", "weight-0.03", "loss weight 0.03", 0.03),
                    _PROTOTYPE,
                    _weight("weights", "weight-0.3", "loss weight 0.3", 0.3),
                    _FULL,
                    _weight("weights", "weight-3", "loss weight 3.0", 3.0),
                ),
                num_seeds=5,
            ),
        )
    }
)
