# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Vision tower, projector and language model: LLaVA-OneVision with every video layout of `FrameTokenLayout`, and videos of
different length in one batch. The heads are in `modeling_llava_next_ar`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import LlavaOnevisionModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..configuration.frame_token_layout import FrameTokenLayout, VideoTokens
from ..configuration.transformers_compat import hidden_states_to_keep
from .frame_predictor import ZeroInitializedLinear
from .vision_teacher import select_vision_features

logger = logging.get_logger(__name__)

# Released OneVision checkpoints carry legacy key names. transformers renames them by class name only, so without this a
# OneVision checkpoint would load with a random lm_head.
for _name, _origin in (
    ("LlavaNextARForConditionalGeneration", "llava_onevision"),
    ("LlavaNextARModel", "LlavaOnevisionModel"),
):
    register_checkpoint_conversion_mapping(_name, get_checkpoint_conversion_mapping(_origin), overwrite=True)


# Inputs of `generate` for each kind of media, the pixels first.
MEDIA_INPUTS = {
    "image": ("pixel_values", "image_sizes", "batch_num_images"),
    "video": ("pixel_values_videos", "video_frame_mask", "video_frame_types", "video_timestamps", "video_layout"),
}


@dataclass
class VideoFeatures(BaseModelOutputWithPooling):
    """What the model knows of the videos of a batch before the language model.

    Args:
        pooler_output (`list` of `torch.FloatTensor` of shape `(num_tokens, hidden_size)`): for each video its features in
            sequence order, newline and faster tokens included.
        vision_features (`torch.FloatTensor` of shape `(num_frames, num_patches, vision_dim)`): what the projector read,
            unpooled, all real frames of all videos.
        video_tokens (`tuple` of `VideoTokens`): the token map of each video.
        pixel_values (`torch.FloatTensor` of shape `(num_frames, 3, height, width)`): the real frames of all videos.
        timestamps (`tuple` of `torch.Tensor`, *optional*): for each video the times of its frames, as they were given.
        frame_types (`tuple` of `list[int]`, *optional*): for each video what the video processor chose its frames as.
    """

    vision_features: torch.FloatTensor | None = None
    video_tokens: tuple[VideoTokens, ...] | None = None
    pixel_values: torch.FloatTensor | None = None
    timestamps: tuple[torch.Tensor, ...] | None = None
    frame_types: tuple[list[int], ...] | None = None


class LlavaNextARModel(LlavaOnevisionModel):
    """Vision tower, projector and language model, without the heads."""

    config: LlavaNextARConfig
    config_class = LlavaNextARConfig
    # Of a checkpoint with heads. vLLM has an lm_head of its own, which must not be named here: it would be left out.
    _keys_to_ignore_on_load_unexpected = [r"^autoregressive_module\."]
    # All other flags are OneVision's, and tests/test_generation.py shows each of them on videos. These two do not hold: a
    # forward with pixels has graph breaks (one that decodes has none), and a part of the sequence has not all of a video.
    _can_compile_fullgraph = False
    _supports_context_parallel = False

    def __init__(self, config: LlavaNextARConfig) -> None:
        super().__init__(config)
        self.token_layout = config.frame_token_layout
        self.image_layout = config.image_token_layout
        self.faster_token = None
        if self.token_layout.is_slow_fast:
            self.faster_token = nn.Parameter(torch.randn_like(self.image_newline) * _embedding_std(config))
        self.post_init()

    def train(self, mode: bool = True) -> "LlavaNextARModel":
        """As in torch, and freezes what the vision features never pass through.

        Were those parts trainable, distributed training would wait for gradients that never come. Here, because
        `from_pretrained` makes every parameter trainable and then calls `eval()`, which is `train(False)`.
        """
        super().train(mode)
        unused = [getattr(self.vision_tower, name, None) for name in ("post_layernorm", "head")]
        layers = getattr(getattr(self.vision_tower, "encoder", None), "layers", ())
        last = self.config.vision_feature_layer
        last = max(
            index % (len(layers) + 1) for index in ([last] if isinstance(last, int) else last)
        )  # hidden state 0 is the input of the first layer
        for module in (*unused, *layers[last:]):
            if isinstance(module, nn.Module):
                module.requires_grad_(False)
        return self

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_own_weights(module)

    def pack_image_features(
        self,
        image_features: Sequence[torch.Tensor],
        image_sizes: torch.Tensor | Sequence[Sequence[int]],
        image_newline: torch.Tensor | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As in `LlavaOnevisionModel`: projected views `[C, P, D]` of each image to its tokens `[L, D]`, and all L."""
        layout = replace(self.image_layout, aspect_ratio=vision_aspect_ratio)
        packed = [
            layout.assemble(features, [int(side) for side in size], image_newline)
            for features, size in zip(image_features, image_sizes, strict=True)
        ]
        return packed, torch.tensor([len(tokens) for tokens in packed], device=image_features[0].device)

    @merge_with_config_defaults
    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_frame_mask: torch.Tensor | None = None,
        video_frame_types: torch.Tensor | None = None,
        video_timestamps: torch.Tensor | None = None,
        video_layout: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> VideoFeatures:
        """Encodes, projects, pools and lays out videos.

        Args:
            pixel_values_videos: `[N, T, 3, H, W]`, shorter videos padded at the end.
            video_frame_mask: `[N, T]` bool, True at real frames; all are real if None. Padding costs no tower time.
            video_frame_types: `[N, T]` slow (0) or fast (1), where the video processor chose them.
            video_timestamps: `[N, T]` seconds, or integers of nanoseconds; kept for the head.
            video_layout: `[N, 7]`, the layout that the processor wrote placeholders for.

        Raises:
            ValueError: if the processor's layout is another (naming the key), a video has no real frame, or its padding is
                not at the end.
        """
        if video_layout is not None:
            for row in video_layout.unique(dim=0).cpu():
                self.token_layout.check_same(FrameTokenLayout.from_tensor(row))
        lengths = video_lengths(pixel_values_videos, video_frame_mask)
        whole = video_frame_mask is None
        frames = pixel_values_videos.flatten(0, 1) if whole else pixel_values_videos[video_frame_mask.bool()]

        def of_each_video(values: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
            if values is None:
                return None
            return tuple(row[:length] for row, length in zip(values, lengths, strict=True))

        timestamps, frame_types = of_each_video(video_timestamps), of_each_video(video_frame_types)
        frame_types = None if frame_types is None else tuple(types.tolist() for types in frame_types)

        kept = kwargs.pop("output_hidden_states", None) or hidden_states_to_keep(vision_feature_layer)
        outputs = self.vision_tower(frames, output_hidden_states=kept, return_dict=True, **kwargs)
        vision_features = select_vision_features(
            outputs.hidden_states, vision_feature_layer, vision_feature_select_strategy
        )
        projected = self.multi_modal_projector(vision_features)
        assembled, video_tokens = [], []
        for video, features in enumerate(projected.split(lengths)):
            types = None if frame_types is None else frame_types[video]
            assembled.append(self.token_layout.assemble(features, self.image_newline, self.faster_token, types))
            video_tokens.append(self.token_layout.video(lengths[video], types))
        return VideoFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=assembled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            vision_features=vision_features,
            video_tokens=tuple(video_tokens),
            pixel_values=frames,
            timestamps=timestamps,
            frame_types=frame_types,
        )

    @torch.no_grad()
    def drop_cached_media(
        self, input_ids: torch.LongTensor, num_cached: int, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Inputs of `generate` without the images and videos whose placeholders are among the first `num_cached` positions of
        `input_ids` `[B, S]`. Of a medium that is cached in part, the features of the rest remain, as `mm_encoder_outputs`.
        With 0, the ids are those behind the cached part, and media without placeholders among them belong to that part.

        Raises:
            ValueError: if there are placeholders behind the cached part, but no medium of their kind.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        encoded = dict(inputs.pop("mm_encoder_outputs", {}))
        for kind, names in MEDIA_INPUTS.items():
            is_placeholder = input_ids == getattr(self.config, f"{kind}_token_id")
            is_new = is_placeholder.nonzero()[:, 1] >= num_cached  # of each placeholder of the batch
            media = {name: inputs.pop(name) for name in names if name in inputs}
            features = encoded.pop(kind, None)
            if names[0] not in media and features is None:
                check_media_given(kind, int(is_new.sum()))
            if kind == "video" and features is None and is_new.any():
                media, is_new = self._with_new_videos(media, is_new)
            if features is None and is_new.all():  # also where there is none: `forward` then raises
                inputs |= media if len(is_new) or num_cached else {}
            elif is_new.any():
                features = features or getattr(self, f"get_{kind}_features")(**media, return_dict=True)
                rows = torch.cat(list(features.pooler_output))
                rows = rows[is_new.to(rows.device)] if len(rows) == len(is_new) else rows
                encoded[kind] = BaseModelOutputWithPooling(pooler_output=[rows])
        return {**inputs, "mm_encoder_outputs": encoded} if encoded else inputs

    def _with_new_videos(
        self, videos: dict[str, torch.Tensor], is_new: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Of the videos of a batch those with a placeholder that `is_new` `[L]`, and `is_new` of their placeholders; all,
        where they are the videos of the new placeholders alone."""
        types = videos.get("video_frame_types")
        lengths = video_lengths(videos["pixel_values_videos"], videos.get("video_frame_mask"))
        num_tokens = [
            self.token_layout.num_tokens(length, None if types is None else types[video, :length].tolist())
            for video, length in enumerate(lengths)
        ]
        if sum(num_tokens) != len(is_new):
            return videos, is_new[is_new]
        parts = is_new.split(num_tokens)
        kept = [video for video, part in enumerate(parts) if part.any()]
        return {name: values[kept] for name, values in videos.items()}, torch.cat([parts[video] for video in kept])

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
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaOnevisionModelOutputWithPast:
        """As `LlavaOnevisionModel.forward`, with the video inputs of `get_video_features`.

        The cache is among `kwargs`: `past_key_values`, since transformers 5.24 `cache`.
        """
        encoded = dict(mm_encoder_outputs or {})
        for name, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if pixels is not None and encoded.get(name) is not None:
                raise ValueError(f"both pixels and encoded features of the {name}s were given")
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(
                pixel_values,
                image_sizes,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                vision_aspect_ratio=vision_aspect_ratio,
                batch_num_images=batch_num_images,
                return_dict=True,
            )
        if pixel_values_videos is not None:
            if self.training and self.config.enable_autoregressive:  # the model with the head encodes videos itself
                logger.warning_once(
                    "this training step goes past the model's losses, so that its reconstruction head does not train: "
                    "TRL's SFTTrainer does so, AutoregressiveSFTTrainer (training_sft.py) does not"
                )
            encoded["video"] = self.get_video_features(
                pixel_values_videos,
                video_frame_mask=video_frame_mask,
                video_frame_types=video_frame_types,
                video_timestamps=video_timestamps,
                video_layout=video_layout,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
            )
        if encoded.get("video") is not None:
            # OneVision's forward wants one tensor; videos of different length only concatenate.
            encoded["video"] = BaseModelOutputWithPooling(
                pooler_output=torch.cat(list(encoded["video"].pooler_output))[None]
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=encoded,
            **kwargs,
        )


def check_media_given(kind: str, num_placeholders: int) -> None:
    """Raises ValueError for placeholders without images or videos: the answer would not be about them."""
    if num_placeholders:
        raise ValueError(
            f"the prompts hold {num_placeholders} {kind} placeholders, but no {kind} was given. Pass on all that the "
            "processor returns: inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, "
            'return_tensors="pt", ...), then model.generate(**inputs)'
        )


def warn_beyond_positions(config: LlavaNextARConfig, before: int, after: int) -> None:
    """Warns where a sequence that grows from `before` to `after` tokens leaves the positions of the language model."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and before <= limit < after:
        logger.warning(
            f"the sequence has {after} tokens, but the language model was made for {limit} (max_position_embeddings): "
            "what it answers beyond is unreliable. Sample fewer frames"
        )


def with_frames_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the padding of their videos at the end: transformers' pipelines pad all on the side of the text."""
    mask = inputs.get("video_frame_mask")
    if mask is None or not (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
        return inputs
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    names = [name for name in MEDIA_INPUTS["video"][:4] if inputs.get(name) is not None]
    return {**inputs, **{name: inputs[name][torch.arange(len(mask))[:, None], order] for name in names}}


def video_lengths(pixel_values_videos: torch.Tensor, video_frame_mask: torch.Tensor | None) -> list[int]:
    """How many real frames each of the videos `[N, T, 3, H, W]` has; `video_frame_mask` as in `get_video_features`.

    Raises:
        ValueError: if a video has no real frame, or its padding is not at the end.
    """
    num_videos, num_frames = pixel_values_videos.shape[:2]
    if video_frame_mask is None:
        return [num_frames] * num_videos
    if (video_frame_mask[:, 1:].bool() & ~video_frame_mask[:, :-1].bool()).any():
        raise ValueError("video_frame_mask must be True for the first frames of a video and False for the rest")
    lengths = video_frame_mask.sum(1).tolist()
    if 0 in lengths:
        raise ValueError(f"video {lengths.index(0)} of the batch has no real frame in video_frame_mask")
    return lengths


def _embedding_std(config: LlavaNextARConfig) -> float:
    return 1 / math.sqrt(config.text_config.hidden_size)


def init_own_weights(module: nn.Module) -> None:
    if isinstance(module, ZeroInitializedLinear):
        module.reset_parameters()
    elif isinstance(module, LlavaNextARModel) and getattr(module, "faster_token", None) is not None:
        init.normal_(module.faster_token, mean=0.0, std=_embedding_std(module.config))
