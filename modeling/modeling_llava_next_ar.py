# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""LLaVA-OneVision with LLaVA-NeXT's video token layouts and a head that predicts the next frame.

Images, any-resolution tiles, caching, generation and the attention back ends are those of transformers' LlavaOnevision.
New are videos of different length in one batch, every layout of `FrameTokenLayout`, the reconstruction head and its loss, and
a loss over the supervised positions alone.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin, LlavaOnevisionForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionCausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..configuration.frame_token_layout import check_num_placeholders, tensor_on
from ..configuration.transformers_compat import check_prefill, slice_logits_to_keep
from ..hub.hub_code import AUTO_MAP, class_reference
from ..hub.pushed_model import MODEL_TAGS, PushableModel, travels_with_code
from .autoregressive_reconstruction import AutoregressiveReconstructionModule
from .frame_rollout import ImaginedFrames, imagine_videos
from .frame_surprise import SURPRISE_FLOOR, SurpriseStream, VideoSurprise, surprise_of_videos
from .loss_functions import reduce_video_losses, shares_of_videos, summed_cross_entropy, zero_through
from .reconstruction_metrics import NextFramePrediction, Reconstruction
from .stream_cache import KeepRule
from .video_language_model import (
    LlavaNextARModel,
    VideoFeatures,
    check_length,
    check_media,
    find_placeholders,
    init_added_weights,
    to_host,
    with_frames_first,
    without_heads,
)
from .vision_teacher import has_several_ranks

logger = logging.get_logger(__name__)

_CACHE_ARGUMENTS = ("past_key_values", "cache")  # the latter since transformers 5.24


@dataclass
class LlavaNextAROutput(LlavaOnevisionCausalLMOutputWithPast):
    """Output of `LlavaNextARForConditionalGeneration`.

    Args:
        loss (`torch.FloatTensor`, *optional*): `main_loss + loss_weight * autoregressive_loss`.
        main_loss (`torch.FloatTensor`, *optional*): language modeling loss; zero where no label is set.
        autoregressive_loss (`torch.FloatTensor`, *optional*): unweighted reconstruction loss; None where no video has two
            frames or the head is off.
        reconstruction (`Reconstruction`, *optional*): under `return_reconstruction=True`, the predictions, targets and copy
            baseline.
    """

    main_loss: torch.FloatTensor | None = None
    autoregressive_loss: torch.FloatTensor | None = None
    reconstruction: Reconstruction | None = None


@travels_with_code
class LlavaNextARForConditionalGeneration(PushableModel, LlavaOnevisionForConditionalGeneration, GenerationMixin):
    """LLaVA-OneVision for chat over images and videos, with next-frame prediction as a second objective.

    Loads LLaVA-OneVision checkpoints: only the head is new. With the default configuration, logits equal those of
    `LlavaOnevisionForConditionalGeneration` on the same weights, head on or off.

    A subclass may name another head as `head_class`. If its file lies beside this one, a save carries it along, and every
    auto class loads the subclass.
    """

    config: LlavaNextARConfig
    config_class = LlavaNextARConfig
    head_class: type[AutoregressiveReconstructionModule] = AutoregressiveReconstructionModule
    _auto_class = "AutoModelForImageTextToText"
    _can_compile_fullgraph = False  # as in `LlavaNextARModel`
    _supports_context_parallel = False
    _no_split_modules = ["FramePredictorBlock"]  # transformers adds the layers of the tower and the language model

    def __init__(self, config: LlavaNextARConfig) -> None:
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        saved_as, loaded_as = config.auto_map["AutoModelForImageTextToText"], class_reference(type(self))
        if saved_as not in (AUTO_MAP["AutoModelForImageTextToText"], loaded_as):
            logger.warning(
                f"the checkpoint is one of {saved_as}, but is loaded as {loaded_as}: its head may be another"
            )
        self.model_tags = list(MODEL_TAGS)
        self.model = LlavaNextARModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.autoregressive_module = None
        if config.enable_autoregressive:
            self.autoregressive_module = self.head_class(
                config.autoregressive_config,
                hidden_size=config.text_config.hidden_size,
                vision_dim=config.vision_feature_dim,
                token_layout=config.frame_token_layout,
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                vision_tower=self.model.vision_tower,
            )
            if config.autoregressive_config.separate_teacher:
                teacher = type(self.model.vision_tower)._from_config(config.vision_config)
                self.autoregressive_module.teacher = teacher.requires_grad_(False).eval()
        self.post_init()
        # accelerate wraps these one by one under FSDP, and fails on names of absent classes (Siglip's text parts).
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_added_weights(module)

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> "LlavaNextARForConditionalGeneration":
        """As in transformers. A `quantization_config` that names no modules to leave out (`llm_int8_skip_modules`,
        `modules_to_not_convert`) leaves out the heads and the vision tower, which is the head's teacher.

        Raises:
            ValueError: if the checkpoint lacks the separate teacher of its configuration, which would then be random.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = without_heads(kwargs["quantization_config"])
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model.freeze_unused_parts()  # transformers makes every parameter trainable
        missing = [key for key in loading_info["missing_keys"] if key.startswith("autoregressive_module.teacher.")]
        if missing:
            raise ValueError(
                f"autoregressive_config.separate_teacher=True, but the checkpoint holds no teacher ({missing[0]} and "
                f"{len(missing) - 1} more are missing): load with autoregressive_config={{'separate_teacher': False}}"
            )
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: LlavaNextARConfig, **kwargs: Any) -> Any:
        """As in transformers; the base model for vLLM, which has heads of its own and builds models by `AutoModel`."""
        base = config.text_config._attn_implementation in ("vllm", "vllm_mla")
        return LlavaNextARModel._from_config(config, **kwargs) if base else super()._from_config(config, **kwargs)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. With a cache of the beginning of the prompts, images and videos are those of the whole prompts
        or of the rest; cached ones are not encoded again.

        Raises:
            ValueError: if placeholders have no image or video, or the cache leaves no token of the prompts to read.
        """
        kwargs = with_frames_first(kwargs)
        cache = next((kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        config = args[0] if args else kwargs.get("generation_config")
        if getattr(config, "is_assistant", False):  # drafts for another model, which transformers gives no media
            return super().generate(inputs, *args, **kwargs)
        if not num_cached:
            found = {} if ids is None or not ids.numel() else find_placeholders(self.config, ids.cpu())
            check_media(self.model, found, {**kwargs, **(kwargs.get("mm_encoder_outputs") or {})})
        elif ids is not None:
            is_whole = mask is None or mask.shape[1] == ids.shape[1]  # else the mask alone has the cached part too
            if is_whole and num_cached >= ids.shape[1]:
                raise ValueError(
                    f"the cache holds {num_cached} tokens and the prompts {ids.shape[1]}: at least one must not be cached"
                )
            kwargs = self.model.drop_cached_media(ids, num_cached if is_whole else 0, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def check(self) -> None:
        """Validates both configurations, also values that were assigned after construction.

        Raises:
            ValueError: if either could not be loaded again.
        """
        self.config.check()
        self.generation_config.validate(strict=True)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, but under the names of the model's own `state_dict`.

        transformers would write the legacy names of LLaVA-OneVision. `Trainer` does not translate them when it resumes, and
        would skip nearly all weights of the checkpoint with one warning.

        Raises:
            ValueError: if a configuration has become invalid (see `check`), or the class has no file that could travel along;
                nothing is written then.
        """
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    def freeze_unused_parts(self) -> None:
        """Freezes the unused parts of the vision tower, and the teacher.

        The constructor and `from_pretrained` do so; call it again after making parameters trainable.
        """
        self.model.freeze_unused_parts()
        teacher = getattr(self.autoregressive_module, "teacher", None)
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    def create_teacher(self) -> None:
        """Keeps a frozen copy of the vision tower as the head's teacher if the tower trains; otherwise does nothing.

        `AutoregressiveTrainer` calls it. In a custom loop call it after choosing the trainable parameters and before wrapping
        the model (DDP, FSDP); else the first training step calls it.

        Raises:
            RuntimeError: if the tower's weights are sharded already.
        """
        if self.autoregressive_module is not None:
            self.autoregressive_module.create_teacher(self.model.vision_tower)

    def keep_teacher(self) -> None:
        """Keeps the teacher of the head as it is; call before adapters are merged into the model.

            peft_model.get_base_model().keep_teacher()
            model = peft_model.merge_and_unload()

        With adapters on the vision tower the teacher is the tower without them, which a merge would change. It becomes a
        module of the head, and is saved with the model. Without such adapters nothing is done.

        Raises:
            RuntimeError: if adapters are merged into the tower already.
        """
        if self.autoregressive_module is None:
            return
        # PEFT's `modules_to_save` holds two of them: the original one, and the one that trains.
        for head in self.autoregressive_module.modules():
            if isinstance(head, AutoregressiveReconstructionModule):
                head.keep_teacher(self.model.vision_tower)
                self.config.autoregressive_config.separate_teacher = head.teacher is not None

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        check_prefill(generation_config)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs: Any) -> VideoFeatures:
        """See `LlavaNextARModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_sizes_videos: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: torch.LongTensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        video_frame_types: torch.Tensor | None = None,
        video_timestamps: torch.Tensor | None = None,
        video_layout: torch.Tensor | None = None,
        video_pixel_norm: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        skip_logits: bool = False,
        skip_reconstruction: bool = False,
        return_reconstruction: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        num_videos_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaNextAROutput:
        r"""Runs the model; with `labels`, computes both losses.

        Args:
            pixel_values_videos, video_frame_mask, video_frame_types, video_timestamps, video_layout, video_pixel_norm: the
                videos, as `LlavaNextARVideoProcessor` and `LlavaNextARProcessor` give them (see `get_video_features`);
                `video_timestamps` `[N, T]` in seconds or integers of nanoseconds, one second apart if None.
            labels: `[B, S]`, -100 at positions without a target.
            position_ids: `[B, S]`; in a packed batch (`LlavaVideoCollator(packing=True)`) they restart at every sample, and
                `attention_mask` is None.
            skip_logits: with labels, project only supervised positions to the vocabulary, in chunks; `logits` is then None.
            skip_reconstruction: do not run the head; `loss` is then `main_loss` alone.
            return_reconstruction: run the head without labels too and return its predictions, also of videos that are given
                as `VideoFeatures` in `mm_encoder_outputs`.
            num_items_in_batch: labels in the whole optimizer step (all micro-batches, all ranks), as `Trainer` passes it;
                `main_loss` is then a sum divided by it.
            num_videos_in_batch: videos with two frames or more in the whole optimizer step, as `AutoregressiveTrainer`
                passes it; `autoregressive_loss` is then a sum over videos divided by it. With `num_items_in_batch` alone (a
                plain `Trainer`), each sample's reconstruction counts by its share of the labels, the one weighting that
                is invariant to how the step is split.
            kwargs: `shift_labels` `[B, S]`, labels that are aligned with the logits already, takes the place of `labels` in
                the loss. The cache goes to OneVision's forward under its name there: `past_key_values`, since
                transformers 5.24 `cache`.

        Raises:
            ValueError: if placeholders and video tokens differ in number, processor and model in layout, or both pixels and
                encoded features of the videos are given.
        """
        # No argument of its own: Trainer evaluates no loss unless it is given every argument whose name holds "label".
        shift_labels = kwargs.pop("shift_labels", None)
        encoded = dict(mm_encoder_outputs or {})
        if pixel_values_videos is not None and encoded.get("video") is not None:
            raise ValueError("both pixels and encoded features of the videos were given")
        cache = next((kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
        has_cache = cache is not None
        has_pixels = pixel_values is not None or pixel_values_videos is not None
        # `generate` encodes videos before it calls the model, and may ask for predictions, too.
        predicts_encoded = return_reconstruction and isinstance(encoded.get("video"), VideoFeatures)
        may_be_packed = position_ids is not None and attention_mask is None and not has_cache
        # One transfer to the host before anything is computed, so that no later step waits.
        host_ids, host_labels, host_positions, *host = to_host(
            input_ids if has_pixels or predicts_encoded or not (has_cache or torch.compiler.is_compiling()) else None,
            labels if shift_labels is None else shift_labels,
            position_ids if may_be_packed else None,
            *(video_frame_mask, video_frame_types, video_layout, image_sizes, batch_num_images),
        )
        video_frame_mask, video_frame_types, video_layout, image_sizes, batch_num_images = host
        is_packed = may_be_packed and bool((host_positions.diff() != 1).any())
        if is_packed:
            # With a cache, transformers takes the samples of a row for one sequence and lets them see each other.
            use_cache = False
        found = {} if host_ids is None else find_placeholders(self.config, host_ids)
        layer, strategy = vision_feature_layer, vision_feature_select_strategy
        vision = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy, "return_dict": True}
        if pixel_values_videos is not None:
            encoded["video"] = self.model.get_video_features(
                pixel_values_videos,
                video_frame_mask=video_frame_mask,
                video_frame_types=video_frame_types,
                video_timestamps=video_timestamps,
                video_layout=video_layout,
                video_pixel_norm=video_pixel_norm,
                **vision,
            )
            if found:  # an early error for the likeliest mistake
                check_num_placeholders(len(found["video"]), list(map(len, encoded["video"].pooler_output)))
        if not has_cache:
            check_media(self.model, found, {"pixel_values": pixel_values, "inputs_embeds": inputs_embeds, **encoded})
        if labels is None:
            check_length(self.config, inputs_embeds if input_ids is None else input_ids, cache, position_ids)
        runs_head = (labels is not None or return_reconstruction) and not skip_reconstruction
        trains = labels is not None and self.training
        zero = None
        if trains or (labels is not None and has_several_ranks()):
            has_images = pixel_values is not None or encoded.get("image") is not None
            zero = self._touch_vision(has_videos=encoded.get("video") is not None, has_images=has_images)
        if trains and runs_head:
            self.create_teacher()
        if pixel_values is not None and encoded.get("image") is None:  # ZeRO-3 needs one order of modules on all ranks
            encoded["image"] = self.model.get_image_features(
                pixel_values,
                image_sizes,
                vision_aspect_ratio=vision_aspect_ratio,
                batch_num_images=batch_num_images,
                **vision,
            )
            pixel_values = None
        placeholders = {n: tensor_on(where, self.device) for n, where in found.items()} if has_pixels else None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,  # beside encoded images an error
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=encoded,
            placeholders=placeholders or None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        logits = main_loss = None
        if labels is None or not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        if labels is not None:
            main_loss = self._main_loss(hidden_states, logits, labels, host_labels, num_items_in_batch, shift_labels)

        reconstruction = autoregressive_loss = None
        has_frames = pixel_values_videos is not None or predicts_encoded
        if runs_head and self.autoregressive_module is not None and has_frames:
            positions = found.get("video")
            if positions is None:  # without ids, the placeholders are the positions that were given as their embedding
                _, mask = self.model.get_placeholder_mask(None, inputs_embeds)
                positions = np.flatnonzero(mask[..., 0].cpu().numpy())
            reconstruction, shares = self._reconstruct(
                hidden_states, positions, encoded["video"], host_labels, host_positions if is_packed else None
            )
        if reconstruction is not None:
            autoregressive_loss = reduce_video_losses(
                reconstruction.loss_per_video, shares, num_items_in_batch, num_videos_in_batch
            )

        loss = main_loss
        if main_loss is not None and autoregressive_loss is not None:
            loss = main_loss + self.config.autoregressive_config.loss_weight * autoregressive_loss
        if zero is not None:
            if autoregressive_loss is None:
                zero = zero + self._touch_head(hidden_states, runs_head)
            loss = loss + zero

        return LlavaNextAROutput(
            loss=loss,
            main_loss=main_loss,
            autoregressive_loss=autoregressive_loss,
            logits=logits,
            reconstruction=reconstruction if return_reconstruction else None,
            **{name: value for name, value in outputs.items() if name != "last_hidden_state"},
        )

    def _touch_vision(self, has_videos: bool, has_images: bool) -> torch.Tensor:
        """Computes a zero from the vision parts that a batch does not use.

        The ranks of distributed training may hold different media, but wait for each other's gradients. Sharded modules must
        be called equally often and in the same order. So with several ranks the tower runs once for videos and once for
        images, on one blank frame if the batch has none, before the language model.
        """
        several_ranks = has_several_ranks()
        misses = (not has_videos and (several_ranks or not has_images), not has_images and several_ranks)
        vision = self.config.vision_config
        shape = (1, 1, vision.num_channels, vision.image_size, vision.image_size)
        zero = 0
        # The tokens, of which no layout uses both always, are read between the two: ZeRO-3 gathers a parameter when it is read,
        # and gradients must become ready in one order on all ranks.
        for is_missing, names in zip(misses, (("image_newline", "faster_token"), ()), strict=True):
            if is_missing:
                blank = torch.zeros(shape, device=self.device, dtype=self.dtype)
                zero = zero + zero_through(*self.model.get_video_features(blank, return_dict=True).pooler_output)
            zero = zero + zero_through(*filter(torch.is_tensor, (getattr(self.model, name) for name in names)))
        return zero

    def _touch_head(self, hidden_states: torch.Tensor, runs_head: bool) -> torch.Tensor | float:
        """Computes a zero from a head that a batch does not use, after the language model."""
        head = self.autoregressive_module
        if head is None or not (runs_head or any(p.requires_grad for p in head.parameters())):
            return 0.0
        tower = self.model.vision_tower if has_several_ranks() else None
        return head.zero_touch(zero_through(hidden_states), tower, wrapper=head)

    def _main_loss(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor | None,
        labels: torch.Tensor,
        host_labels: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None,
        shift_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Next-token cross-entropy; without logits, over the supervised positions alone.

        `host_labels` are the labels, or `shift_labels` if given, on the CPU.
        """
        shifted = nn.functional.pad(host_labels[:, 1:], (0, 1), value=-100) if shift_labels is None else host_labels
        supervised = np.flatnonzero(shifted.numpy().ravel() != -100)
        if logits is not None:
            if not len(supervised):
                return zero_through(logits)
            return self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        device = hidden_states.device
        targets = tensor_on(shifted.numpy().ravel()[supervised], device)
        selected = hidden_states.flatten(0, 1).index_select(0, tensor_on(supervised, device))
        loss = summed_cross_entropy(self.lm_head, selected, targets)
        if not len(supervised):
            return loss  # zero, also where the whole step has no target
        count = num_items_in_batch if num_items_in_batch is not None else len(supervised)
        return loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)

    def _reconstruct(
        self,
        hidden_states: torch.Tensor,
        positions: np.ndarray,
        video: VideoFeatures,
        labels: torch.Tensor | None,
        packed_position_ids: torch.Tensor | None,
    ) -> tuple[Reconstruction | None, torch.Tensor | None]:
        """Runs the head on the videos of the batch; with labels, returns the weight `[N]` of each loss, too.

        `positions` are those of the video tokens in the flattened batch; labels and position ids lie on the CPU.
        """
        batch, device = self.config.frame_token_layout.batch(video.num_frames, video.frame_types), hidden_states.device
        check_num_placeholders(len(positions), batch.num_tokens)
        if max(video.num_frames) < 2:
            return None, None  # nothing to predict, and no need for the teacher
        patches, first_token = batch.tokens.arrays[1:]
        head, shares = self.autoregressive_module, None
        teacher_features = head.teacher_features(self.model.vision_tower, video.pixel_values, video.vision_features)
        reconstruction = head(
            hidden_states.flatten(0, 1).index_select(0, tensor_on(positions[patches], device)),
            batch.videos,
            teacher_features.to(device),
            None if video.timestamps is None else [times.to(device) for times in video.timestamps],
            video.frame_types,
        )
        if labels is not None:
            first_token = positions[first_token[np.array(video.num_frames) > 1]]
            shares = tensor_on(shares_of_videos(labels, packed_position_ids, first_token), device)
        return reconstruction, shares

    @torch.no_grad()
    def predict_next_frames(self, **inputs: Any) -> list[NextFramePrediction]:
        """Predicts every frame of every video from the frames before it, and measures the predictions.

        Args:
            inputs: output of the processor for prompts with videos.

        Returns:
            One `NextFramePrediction` for each video with two frames or more, in the order of the batch; `video_index` is the
            number of the video.

        Raises:
            ValueError: if the head is off or no video has two frames.
        """
        return self._predict_videos(inputs).per_video()

    @torch.no_grad()
    def surprise(self, *, floor: float = SURPRISE_FLOOR, **inputs: Any) -> list[VideoSurprise]:
        """Measures the surprise of every frame and patch of every video: see `frame_surprise`.

        Args:
            floor: a share of the features' variance that is added to the copy baseline's error.
            inputs: output of the processor for prompts with videos.

        Returns:
            One `VideoSurprise` for each video with two frames or more, in the order of the batch; `video_index` is the
            number of the video.

        Raises:
            ValueError: if the head is off, no video has two frames, or the floor is not a positive number.
        """
        return surprise_of_videos(self._predict_videos(inputs), inputs.get("video_timestamps"), floor)

    def surprise_stream(
        self,
        prompt_ids: torch.Tensor | None = None,
        *,
        floor: float = SURPRISE_FLOOR,
        max_tokens: int | None = None,
        keep: KeepRule = "recent",
        **cache_options: int,
    ) -> SurpriseStream:
        """Surprise frame by frame, of a video without end: see `SurpriseStream` for the arguments."""
        return SurpriseStream(self, prompt_ids, floor=floor, max_tokens=max_tokens, keep=keep, **cache_options)

    @torch.no_grad()
    def imagine(self, num_frames: int, *, hold_back: bool = False, **inputs: Any) -> list[ImaginedFrames]:
        """Predicts several frames ahead, each from the predictions before it: see `frame_rollout`.

        Args:
            num_frames: number of frames to predict.
            hold_back: hide the last `num_frames` frames of each video from the model, and predict them at their own times for
                comparison; without it, frames go on after the last one, as far apart as the last two are.
            inputs: output of the processor for prompts of text and one video each.

        Returns:
            One `ImaginedFrames` for each video.

        Raises:
            ValueError: if the head is off, looks ahead or has a teacher other than the tower, a prompt holds anything else
                than text and one video, an input is unknown, a video is too short, or the times of its last two frames do not
                increase.
        """
        return imagine_videos(self, num_frames, hold_back, inputs)

    def _predict_videos(self, inputs: dict[str, Any]) -> Reconstruction:
        if self.autoregressive_module is None:
            raise ValueError("this model was built with enable_autoregressive=False and has no head to predict with")
        if not self.config.autoregressive_config.use_frame_causal_mask:
            logger.warning_once(
                "use_frame_causal_mask is off: the head sees the frames that it predicts, so that its predictions and their "
                "surprise do not measure foresight"
            )
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        # The logits of one position are the least that can be asked for.
        outputs = self(**inputs, return_reconstruction=True, logits_to_keep=1, use_cache=False)
        if outputs.reconstruction is None:
            raise ValueError("there is nothing to predict: this takes at least one video with two frames or more")
        return outputs.reconstruction
