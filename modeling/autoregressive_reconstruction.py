# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""The reconstruction head: from the frames read so far, predict the frozen vision features of the next frame.

Decisions behind the objective:
- the predictor reads the language model's hidden states at the video positions (never the target's features), attends
  frame-causally, and sees time in seconds, since sampling is not uniform;
- prediction = this frame's features + a learned change that starts at zero, so training starts exactly at the
  copy-last-frame baseline and every gain is a gain over it;
- the target comes from a frozen teacher, without gradient.

Related work: frame-causal prediction of frozen patch features in DINO-WM (arXiv 2411.04983), a latent next-frame head in
Cambrian-S (arXiv 2511.04670), reconstruction of latents in ROSS (arXiv 2410.09575).

Shape letters: V clips, F frames of all clips together, T frames of one clip, M predicted frames (all but the first of
each clip), P patches of a frame, E predictor width, Dv width of the vision features, K frames visible to a frame.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..configuration.configuration_llava_next_ar import LlavaNextARAutoregressiveConfig
from ..configuration.frame_token_layout import FrameTokenLayout, FrameType, VideoBatch, VideoTokens
from .frame_predictor import (
    FramePredictorBlock,
    PredictionPlan,
    PredictorMemory,
    ZeroInitializedLinear,
    in_order,
    plan_predictions,
    resample_states,
    sinusoids,
)
from .loss_functions import zero_through
from .reconstruction_metrics import Reconstruction
from .vision_teacher import (
    Unregistered,
    adapter_layers,
    adapters_off,
    copy_without_adapters,
    encode_frames,
    tower_trains,
)

logger = logging.get_logger(__name__)


def seconds_since(first: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Seconds, or integers of nanoseconds, as float32 seconds since the first frame of the clip."""
    if not times.is_floating_point():
        return (times - first).float() * 1e-9
    if times.dtype in (torch.bfloat16, torch.float16):
        logger.warning_once(
            f"frame times came as {times.dtype}, which is too coarse for seconds: keep video_timestamps in float32, or "
            "give them as int64 nanoseconds, which nothing casts"
        )
        times, first = times.float(), first.float()
    return (times - first).float()  # float64 may hold seconds since 1970, float32 does not


class AutoregressiveReconstructionModule(nn.Module):
    """Predicts the next frame's frozen vision features from the language model's hidden states.

    **Teacher.** As long as the vision tower is frozen, it is its own teacher: no memory, no time, nothing extra saved.
    With adapters on the tower (PEFT), the teacher is the tower with the adapters off: one more tower pass, nothing extra
    saved; before they are merged, `keep_teacher` copies the tower without them. When the tower itself trains,
    `create_teacher` makes a frozen copy before the first step. A copy is a submodule (`teacher`), follows `.to()`, is
    saved with the checkpoint under `autoregressive_module.teacher.*`, and `autoregressive_config.separate_teacher` is set
    so that it is found again on reload.

    **Extending.** A subclass may replace the loss (`patch_loss`) and the predictor (`block_class`). A subclass of the model
    names it as its `head_class`. Targets, copy baseline, zero start and the visibility of frames stay the same.

    Args:
        config: the head's configuration, `embedding_dim` resolved.
        hidden_size: width of the language model's hidden states.
        vision_dim: width of the vision features (Dv).
        token_layout: layout of the tokens of a video.
        vision_feature_layer, vision_feature_select_strategy: the features that the projector reads.
        vision_tower: the tower for `compute_autoregressive_loss`, which is given frames; not a submodule of this one.
    """

    # Built `config.num_layers` times as `block_class(embedding_dim, num_heads)`, with the `forward` of
    # `FramePredictorBlock`. Its output for a frame may depend on the frames in `visible` alone.
    block_class: type[nn.Module] = FramePredictorBlock

    # First and last power of ten, and number of wavelengths. In seconds, from faster than any frame rate to longer than most
    # clips; and in units of the frame's side.
    TIME_WAVELENGTHS = (math.log10(0.1), math.log10(1000.0), 16)
    POSITION_WAVELENGTHS = (math.log10(2.0), math.log10(0.0625), 8)

    def __init__(
        self,
        config: LlavaNextARAutoregressiveConfig,
        hidden_size: int,
        vision_dim: int,
        token_layout: FrameTokenLayout,
        vision_feature_layer: int | list[int] = -1,
        vision_feature_select_strategy: str = "full",
        vision_tower: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.token_layout = token_layout
        self.target_layout = config.target_layout(token_layout)
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        dim = config.embedding_dim
        self.input_norm = nn.LayerNorm(hidden_size)
        self.input_projection = nn.Linear(hidden_size, dim)
        num_position_features = 4 * self.POSITION_WAVELENGTHS[-1] + 4 * self.TIME_WAVELENGTHS[-1]
        self.place_projection = nn.Linear(num_position_features, dim)
        self.blocks = nn.ModuleList(self.block_class(dim, config.num_heads) for _ in range(config.num_layers))
        self.output_norm = nn.LayerNorm(dim)
        self.change = ZeroInitializedLinear(dim, vision_dim)
        self.teacher: nn.Module | None = None
        self._vision_tower = Unregistered(vision_tower)

    def train(self, mode: bool = True) -> "AutoregressiveReconstructionModule":
        """As in torch, but the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    # ---- teacher ---------------------------------------------------------------------------------------------------

    def is_own_teacher(self, vision_tower: nn.Module) -> bool:
        """True if the targets are the very features that the projector reads."""
        return self.teacher is None and not adapter_layers(vision_tower)

    def create_teacher(self, vision_tower: nn.Module) -> None:
        """Keeps a frozen copy of the tower if it trains and there is none yet. Call before wrapping the model (DDP, FSDP).

        Raises:
            RuntimeError: if DeepSpeed's ZeRO-3 or FSDP has sharded the tower.
        """
        if self.teacher is not None or adapter_layers(vision_tower) or not tower_trains(vision_tower, []):
            return
        # Of ZeRO-3, of FSDP2's DTensor.
        if any(
            hasattr(parameter, name) for parameter in vision_tower.parameters() for name in ("ds_id", "placements")
        ):
            raise RuntimeError(
                "the vision tower is sharded (ZeRO-3, FSDP), and the head needs a frozen copy of it to train: unfreeze the "
                "tower and call model.create_teacher() before the model is sharded, or save the model then and train from "
                "that folder"
            )
        self.teacher = copy.deepcopy(vision_tower).requires_grad_(False).eval()
        self.config.separate_teacher = True
        logger.info("the vision tower trains: a frozen copy of it is kept as the teacher of the reconstruction head")

    def keep_teacher(self, vision_tower: nn.Module) -> None:
        """Makes a frozen copy of the tower without its adapters the teacher. Call before they are merged into it.

        Raises:
            RuntimeError: if adapters are merged already.
        """
        if self.teacher is None and adapter_layers(vision_tower):
            self.teacher = copy_without_adapters(vision_tower).requires_grad_(False).eval()
            self.config.separate_teacher = True

    def run_tower(self, tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of frames `[F, 3, H, W]` at the layer that the projector reads: `[F, P, Dv]`."""
        # Quantized weights are integers, but never those of all layers.
        dtype = next(parameter.dtype for parameter in tower.parameters() if parameter.is_floating_point())
        layer, strategy = self.vision_feature_layer, self.vision_feature_select_strategy
        return encode_frames(tower, pixel_values.to(dtype), layer, strategy)[1]

    @torch.no_grad()
    def teacher_features(
        self,
        vision_tower: nn.Module,
        pixel_values: torch.Tensor | None,
        tower_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features of the frozen teacher, `[F, P, Dv]`, without gradient.

        Args:
            vision_tower: the model's own tower.
            pixel_values: `[F, 3, H, W]`.
            tower_features: output of the tower for these frames; saves the shared teacher its pass.

        Raises:
            RuntimeError: if the tower trains but no copy was made before, or trains beside its adapters.
        """
        if self.teacher is not None:
            return self.run_tower(self.teacher, pixel_values)
        adapters = adapter_layers(vision_tower)
        if self.training and tower_trains(vision_tower, adapters):
            raise RuntimeError(
                "the vision tower has adapters, and weights of its own train as well (bias='all' is a usual cause): with "
                "the adapters off it would not be a fixed teacher"
                if adapters
                else "the vision tower trains, but its frozen copy, the teacher, was not made: call create_teacher after "
                "unfreezing the tower and before the first step"
            )
        if adapters:
            with adapters_off(adapters):
                return self.run_tower(vision_tower, pixel_values)
        if tower_features is not None:
            return tower_features.detach()
        return self.run_tower(vision_tower, pixel_values)

    # ---- prediction ------------------------------------------------------------------------------------------------

    def _position_features(self, batch: VideoBatch, seconds: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
        """Position and time of each patch: `[num_patches, features]` float32, in the order of the hidden states.

        `seconds` `[F]` since the first frame of the clip, and `gaps` `[F]` to the frame after, which is to be predicted.
        """
        frame, center = batch.places.on(seconds.device)
        position_waves, time_waves = (
            torch.logspace(*powers, device=seconds.device)
            for powers in (self.POSITION_WAVELENGTHS, self.TIME_WAVELENGTHS)
        )
        times = sinusoids(torch.stack([seconds, gaps], dim=1), time_waves).flatten(1)
        return torch.cat([sinusoids(center, position_waves).flatten(1), times.index_select(0, frame)], dim=1)

    def _embed(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[num_patches, hidden]` and their `_position_features` -> input of the first block, `[num_patches, E]`."""
        dtype = self.input_norm.weight.dtype  # of a quantized projection, the weights have another one
        x = self.input_projection(self.input_norm(hidden_states.to(dtype)))
        return x + self.place_projection(positions.to(dtype))

    @torch.compiler.disable  # numbers of the host, not of the graph
    def _plan(self, batch: VideoBatch, frame_types: Sequence[Sequence[int] | None] | None) -> PredictionPlan:
        if self.token_layout.is_slow_fast:
            frame_types = [clip.frame_types for clip in batch.videos]
        elif frame_types is None:
            frame_types = [None] * len(batch)
        return plan_predictions(
            batch.frame_grids,
            batch.num_frames,
            tuple(None if types is None else tuple(map(int, types)) for types in frame_types),
            self.target_layout,
            self.config.num_hist,
            self.config.use_fast_slow_frames,
            self.config.use_frame_causal_mask,
        )

    def _predictor_states(
        self, hidden_states: torch.Tensor, batch: VideoBatch, plan: PredictionPlan, times: torch.Tensor
    ) -> torch.Tensor:
        """Runs the predictor: hidden states `[num_patches, hidden]`, times `[F]` -> `[F, P, E]`, padded at the end."""
        device = hidden_states.device
        first, gap_from, gap_to, is_alone = plan.times.on(device)
        seconds = seconds_since(times.index_select(0, first), times)
        gaps = seconds.index_select(0, gap_to) - seconds.index_select(0, gap_from)
        if plan.has_lone_frames:
            gaps = gaps.masked_fill(is_alone, 1.0)
        x = self._embed(hidden_states, self._position_features(batch, seconds, gaps))
        visible, key_mask, slots = plan.attention.on(device)
        if plan.is_ragged:
            x = x.new_zeros(plan.num_frames * plan.num_patches, x.shape[-1]).index_copy(0, slots, x)
        x = x.view(plan.num_frames, plan.num_patches, -1)
        for block in self.blocks:
            x = block(x, visible, key_mask if plan.is_masked else None)
        return self.output_norm(x)

    def open_memory(self) -> PredictorMemory:
        """Creates the state of `step` for one clip.

        Raises:
            ValueError: if frames attend to later ones (`use_frame_causal_mask` off): a stream cannot be predicted then.
        """
        if not self.config.use_frame_causal_mask:
            raise ValueError("use_frame_causal_mask is off: this head reads the frames that it should predict")
        return PredictorMemory(len(self.blocks), self.config.num_hist)

    def step(
        self,
        hidden_states: torch.Tensor,
        frame: VideoTokens,
        seconds: torch.Tensor,
        gap: torch.Tensor,
        frame_type: int | None,
        memory: PredictorMemory,
    ) -> torch.Tensor:
        """Predictor states of the frame after those in `memory`, equal to the states in `forward`.

        Args:
            hidden_states: `[h * w, hidden_size]` of the frame.
            frame: its token map, as a clip of one frame.
            seconds, gap: float32 scalars: seconds since the first frame, and until the frame that is to be predicted.
            frame_type: entry of `frame_types` in `forward`.

        Returns:
            `[h * w, E]`, for `predict`.
        """
        batch = self.token_layout.batch([1], [frame.frame_types])
        x = self._embed(hidden_states, self._position_features(batch, seconds[None], gap[None]))
        return self.output_norm(memory.run(self.blocks, x, frame_type if self.config.use_fast_slow_frames else None))

    def predict(self, states: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        """This frame's features `copies` `[..., P, Dv]` plus a learned change, float32; `states` `[..., P, E]`, same grid."""
        return copies + self.change(states).float()

    def targets(self, features: torch.Tensor, frame_type: FrameType) -> torch.Tensor:
        """Teacher features `[T, P, Dv]` -> pooled and normalised targets `[T, h * w, Dv]`, float32."""
        pooled = self.target_layout.pool(features.float(), frame_type)
        return nn.functional.layer_norm(pooled, pooled.shape[-1:]) if self.config.target_norm else pooled

    def forward(
        self,
        hidden_states: torch.Tensor,
        clips: Sequence[VideoTokens],
        vision_features: torch.Tensor,
        timestamps: Sequence[torch.Tensor] | None = None,
        frame_types: Sequence[Sequence[int]] | None = None,
    ) -> Reconstruction | None:
        """Predicts every frame but the first of every clip.

        Args:
            hidden_states: `[num_patches, hidden_size]`, the language model's last hidden states at the patch tokens of
                all clips, by clip, frame, row and column (`VideoTokens.patch_offsets`).
            clips: the token map of each clip.
            vision_features: `[F, P, Dv]` unpooled teacher features of all frames of all clips.
            timestamps: for each clip `[T]` seconds, or integers of nanoseconds; frames are taken to be one second apart if
                None.
            frame_types: for each clip slow (0) or fast (1) for each frame, where the video processor chose them. A layout
                with slow and fast tokens has its own; without either, all frames have one type.

        Returns:
            The predictions with the loss of each clip, or None if no clip has two frames.
        """
        lengths = [len(clip.frame_types) for clip in clips]
        if max(lengths, default=0) < 2:
            return None
        device = hidden_states.device
        batch = self.token_layout.batch(lengths, [clip.frame_types for clip in clips])
        plan = self._plan(batch, frame_types)
        times = (
            torch.arange(plan.num_frames, device=device).float() if timestamps is None else torch.cat(list(timestamps))
        )
        states = self._predictor_states(hidden_states, batch, plan, times)
        on_grid = {
            frame_type: self.targets(vision_features, frame_type)
            for frame_type in {group.frame_type for group in plan.groups}
        }

        predictions, targets, copies, losses = [], [], [], []
        for group, sources in zip(plan.groups, plan.sources.on(device), strict=True):
            copies.append(on_grid[group.frame_type].index_select(0, sources))
            targets.append(on_grid[group.frame_type].index_select(0, sources + 1))
            source_states = states.index_select(0, sources)[:, : math.prod(group.source)]
            predictions.append(self.predict(resample_states(source_states, group.source, group.target), copies[-1]))
            losses.append(self._frame_loss(predictions[-1], targets[-1], group.target))

        order, patch_mask, frame_video, frame_index, grids, slots, video_index, num_predicted = plan.frames.on(device)
        predictions, targets, copies, frame_loss = (
            in_order(values, order) for values in (predictions, targets, copies, losses)
        )
        video_losses = frame_loss.new_zeros(len(plan.num_predicted) * max(plan.num_predicted)).index_copy(
            0, slots, frame_loss
        )
        clip_targets = {frame_type: frames.split(lengths) for frame_type, frames in on_grid.items()}
        return Reconstruction(
            loss_per_video=video_losses.view(len(plan.num_predicted), -1).sum(1) / num_predicted,
            video_index=video_index,
            predictions=predictions,
            targets=targets,
            copies=copies,
            patch_mask=patch_mask,
            frame_video=frame_video,
            frame_index=frame_index,
            candidates=tuple(clip_targets[frame_type][clip] for clip, frame_type in plan.videos),
            grids=grids,
        )

    def _frame_loss(self, predictions: torch.Tensor, targets: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[M, P', Dv]` twice -> `[M]`: mean over patches, and over coarser grids with `enable_multiscale_pooling`."""
        loss = self.patch_loss(predictions, targets).mean(1)
        if not self.config.enable_multiscale_pooling:
            return loss
        levels = [loss]
        pair = torch.cat([predictions, targets]).transpose(1, 2).unflatten(2, grid)  # [2 * M, Dv, h, w]
        while min(pair.shape[2:]) >= 2:
            pair = nn.functional.avg_pool2d(pair, 2)
            coarse = pair.flatten(2).transpose(1, 2)
            levels.append(self.patch_loss(*coarse.chunk(2)).mean(1))
        return torch.stack(levels).mean(0)

    def patch_loss(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each patch, `[M, P, Dv]` float32 twice -> `[M, P]`; by default `config.loss_type`.

        Means over patches, frames and videos are taken elsewhere, and so are the coarser grids of
        `enable_multiscale_pooling`, which come through here as well.
        """
        if self.config.loss_type == "mse":
            return (predictions - targets).square().mean(-1)
        if self.config.loss_type == "smooth_l1":
            return nn.functional.smooth_l1_loss(predictions, targets, reduction="none").mean(-1)
        return 1 - nn.functional.cosine_similarity(predictions, targets, dim=-1)

    def zero_touch(
        self,
        zero: torch.Tensor | None = None,
        vision_tower: nn.Module | None = None,
        wrapper: nn.Module | None = None,
    ) -> torch.Tensor:
        """Computes a zero whose gradient reaches the whole head, for batches without video.

        Distributed training waits for the gradient of every parameter, and sharded training for every rank to run the
        same modules, forward and backward; so the head runs, on a clip of two empty frames.

        Args:
            zero: a zero from the language model; a frozen head too then passes a gradient on to it.
            vision_tower: given, a teacher with a pass of its own runs before the head, as it does for a video.
            wrapper: the module to call in place of this one, as PEFT's around it: ZeRO-3 compares its calls over ranks too.
        """
        clip = self.token_layout.video(2)
        device = next(self.parameters()).device
        num_patches = self.token_layout.patches_height * self.token_layout.patches_width
        features = torch.zeros(2, num_patches, self.change.out_features, device=device)
        if vision_tower is not None and (self.teacher is not None or adapter_layers(vision_tower)):
            vision = vision_tower.config
            pixels = torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size, device=device)
            features = self.teacher_features(vision_tower, pixels)
        hidden_states = torch.zeros(len(clip.patch_offsets), self.input_projection.in_features, device=device)
        if zero is not None:
            hidden_states = hidden_states + zero
        head = self if wrapper is None else wrapper
        return zero_through(head(hidden_states, [clip], features).loss_per_video)

    def compute_autoregressive_loss(
        self,
        hidden_states: torch.Tensor,
        video_frames: torch.Tensor,
        position_map: torch.Tensor | None = None,
        timestamps: torch.Tensor | None = None,
        frame_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted reconstruction loss of one video per sample.

        Args:
            hidden_states: `[B, L, hidden_size]` of the language model.
            video_frames: `[B, T, 3, H, W]`, as the vision tower takes them.
            position_map: `[B, num_tokens]` int64, positions of the video's tokens in the sequence. Needed unless the
                sequence is exactly the video.
            timestamps: `[B, T]` seconds, or integers of nanoseconds; one second apart if None.
            frame_types: `[B, T]` slow (0) or fast (1), where the video processor chose them.

        Returns:
            A scalar, `loss_weight` times the mean over patches, frames and videos; zero for videos of one frame.

        Raises:
            ValueError: if the hidden states cannot be aligned with the frames' tokens.
            RuntimeError: if the module was built without a vision tower.
        """
        vision_tower = self._vision_tower.module
        if vision_tower is None:
            raise RuntimeError("this module was built without a vision tower and cannot read frames")
        batch_size, num_frames = video_frames.shape[:2]
        if hidden_states.shape[0] != batch_size:
            raise ValueError(f"hidden_states holds {hidden_states.shape[0]} samples, video_frames {batch_size} videos")
        types = None if frame_types is None else frame_types.tolist()
        clips = [
            self.token_layout.video(num_frames, None if types is None else types[sample])
            for sample in range(batch_size)
        ]
        selected = []
        for sample, clip in enumerate(clips):
            if position_map is not None:
                if position_map.shape[1] != len(clip):
                    raise ValueError(
                        f"position_map has {position_map.shape[1]} positions, {num_frames} frames take {len(clip)} tokens"
                    )
                positions = position_map[sample]
            elif hidden_states.shape[1] == len(clip):
                positions = torch.arange(len(clip), device=hidden_states.device)
            else:
                raise ValueError(
                    f"hidden_states has {hidden_states.shape[1]} positions, but {num_frames} frames take {len(clip)} tokens: "
                    "pass position_map to say where in the sequence they are"
                )
            selected.append(hidden_states[sample, positions[clip.patch_offsets.to(positions.device)]])
        features = self.teacher_features(vision_tower, video_frames.flatten(0, 1))
        times = None if timestamps is None else list(timestamps.to(hidden_states.device))
        reconstruction = self(torch.cat(selected), clips, features, times, types)
        if reconstruction is None:
            return self.zero_touch()
        return self.config.loss_weight * reconstruction.loss_per_video.mean()


def create_autoregressive_reconstruction_module(
    vision_tower: nn.Module, hidden_size: int, config: "LlavaNextARAutoregressiveConfig | dict[str, Any] | Any"
) -> AutoregressiveReconstructionModule:
    """Builds the head for a vision tower and a language model.

    Args:
        vision_tower: a transformers vision model (`config.hidden_size`, `image_size`, `patch_size`).
        hidden_size: width of the language model.
        config: a `LlavaNextARConfig`, whose layout is used, or the head's configuration alone (object or dict), with the
            default token layout.

    Returns:
        The module, with its teacher prepared.

    Raises:
        ValueError: on an invalid configuration.
    """
    layer, strategy = -1, "full"
    vision_config = vision_tower.config
    vision_dim = vision_config.hidden_size
    if hasattr(config, "frame_token_layout"):
        layout, vision_dim = config.frame_token_layout, config.vision_feature_dim
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        config = config.autoregressive_config
    else:
        layout = FrameTokenLayout.for_vision_config(vision_config)
    if isinstance(config, dict):
        config = LlavaNextARAutoregressiveConfig(**{"embedding_dim": vision_dim, **config})
    if config.embedding_dim is None:
        config = copy.copy(config)  # the caller's object may serve a head for another tower too
        config.embedding_dim = vision_dim
    config.check_ranges()
    module = AutoregressiveReconstructionModule(
        config, hidden_size, vision_dim, layout, layer, strategy, vision_tower=vision_tower
    )
    module.create_teacher(vision_tower)
    return module
