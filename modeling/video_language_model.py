# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Vision tower, projector and language model: LLaVA-OneVision with every video layout of `FrameTokenLayout`, and videos of
different length in one batch. The heads are in `modeling_llava_next_ar`.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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
from ..configuration.frame_token_layout import FrameTokenLayout, VideoTokens, tensor_on
from .frame_predictor import ZeroInitializedLinear
from .vision_teacher import encode_frames, no_graph_below, no_graph_of_frozen, trains

logger = logging.get_logger(__name__)

# Released OneVision checkpoints carry legacy key names. transformers renames them by class name only, so without this a
# OneVision checkpoint would load with a random lm_head.
for _name, _origin in (
    ("LlavaNextARForConditionalGeneration", "llava_onevision"),
    ("LlavaNextARModel", "LlavaOnevisionModel"),
):
    register_checkpoint_conversion_mapping(_name, get_checkpoint_conversion_mapping(_origin), overwrite=True)


# Parts that are small beside the language model: the targets of the head are features of the tower.
_NOT_QUANTIZED = ("lm_head", "autoregressive_module", "model.vision_tower")

# Inputs of `generate` for each modality of media, the pixels first.
MEDIA_INPUTS = {
    "image": ("pixel_values", "image_sizes", "batch_num_images"),
    "video": (
        *("pixel_values_videos", "video_frame_mask", "video_frame_types", "video_timestamps"),
        *("video_layout", "video_pixel_norm"),
    ),
}


@dataclass
class VideoFeatures(BaseModelOutputWithPooling):
    """Encoded videos of a batch.

    Args:
        pooler_output (`list` of `torch.FloatTensor` of shape `(num_tokens, hidden_size)`): for each video its features in
            sequence order, newline and faster tokens included.
        vision_features (`torch.FloatTensor` of shape `(num_frames, num_patches, vision_dim)`): input of the projector,
            unpooled, all real frames of all videos.
        pixel_values (`torch.FloatTensor` of shape `(num_frames, 3, height, width)`): the real frames of all videos.
        num_frames (`tuple` of `int`): real frames of each video.
        timestamps (`tuple` of `torch.Tensor`, *optional*): for each video the times of its frames, as they were given.
        frame_types (`tuple` of `list[int]`, *optional*): for each video the types that the video processor chose.
    """

    vision_features: torch.FloatTensor | None = None
    pixel_values: torch.FloatTensor | None = None
    num_frames: tuple[int, ...] | None = None
    timestamps: tuple[torch.Tensor, ...] | None = None
    frame_types: tuple[list[int], ...] | None = None


class LlavaNextARModel(LlavaOnevisionModel):
    """Vision tower, projector and language model, without the heads."""

    config: LlavaNextARConfig
    config_class = LlavaNextARConfig
    # Keys of a checkpoint with heads. vLLM has an lm_head of its own, which would be skipped if it were named here.
    _keys_to_ignore_on_load_unexpected = [r"^autoregressive_module\."]
    # All other flags are those of OneVision, each tested on videos. These two are False: a forward with pixels has graph breaks
    # (one that decodes has none), and a part of the sequence may hold a part of a video.
    _can_compile_fullgraph = False
    _supports_context_parallel = False

    def __init__(self, config: LlavaNextARConfig) -> None:
        super().__init__(config)
        self.token_layout = config.frame_token_layout
        self.image_layout = config.image_token_layout
        self.faster_token = None
        if self.token_layout.is_slow_fast:
            self.faster_token = nn.Parameter(torch.randn_like(self.image_newline) * _embedding_std(config))
        self.freeze_unused_parts()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LlavaNextARModel":
        """As in transformers, which makes every parameter trainable; unused parts are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_unused_parts()
        return loaded

    def freeze_unused_parts(self) -> None:
        """Freezes the parts of the vision tower behind the layer that the projector reads.

        If they were trainable, distributed training would wait forever for their gradients.
        """
        unused = [getattr(self.vision_tower, name, None) for name in ("post_layernorm", "head")]
        layers = getattr(getattr(self.vision_tower, "encoder", None), "layers", ())
        read = self.config.vision_feature_layer
        # Hidden state 0 is the input of the first layer.
        num_used = max(index % (len(layers) + 1) for index in ([read] if isinstance(read, int) else read))
        for module in (*unused, *layers[num_used:]):
            if isinstance(module, nn.Module):
                module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_added_weights(module)

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

    @functools.wraps(LlavaOnevisionModel.get_image_features)  # `generate` reads the names of its arguments
    def get_image_features(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        with no_graph_of_frozen(self.vision_tower, pixel_values):
            return super().get_image_features(pixel_values, *args, **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_frame_mask: torch.Tensor | None = None,
        video_frame_types: torch.Tensor | None = None,
        video_timestamps: torch.Tensor | None = None,
        video_layout: torch.Tensor | None = None,
        video_pixel_norm: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> VideoFeatures:
        """Encodes, projects, pools and lays out videos.

        Args:
            pixel_values_videos: `[N, T, 3, H, W]`, shorter videos padded at the end; uint8 with `video_pixel_norm`.
            video_frame_mask: `[N, T]` bool, True at real frames; all are real if None. Padding costs no tower time.
            video_frame_types: `[N, T]` slow (0) or fast (1), where the video processor chose them.
            video_timestamps: `[N, T]` seconds, or integers of nanoseconds; kept for the head.
            video_layout: `[N, 7]`, the layout of the processor.
            video_pixel_norm: `[N, 2, 3]` int64, divisor and offset of each channel in billionths: pixels are `x / divisor -
                offset`.

        Raises:
            ValueError: if the processor's layout differs (naming the key), a video has no real frame, its padding is not at
                the end, or pixels are integers without `video_pixel_norm`.
        """
        # All values that shapes depend on, in one transfer: no later step waits for the device.
        video_frame_mask, video_frame_types, video_layout = to_host(video_frame_mask, video_frame_types, video_layout)
        if video_layout is not None:
            check_layout(self.token_layout, video_layout)
        lengths = video_lengths(pixel_values_videos, video_frame_mask)
        frame_types = None
        if video_frame_types is not None:
            frame_types = tuple(row[:length] for row, length in zip(video_frame_types.tolist(), lengths, strict=True))
        batch = self.token_layout.batch(lengths, frame_types)

        frames, device = pixel_values_videos.flatten(0, 1), pixel_values_videos.device
        is_padded = sum(lengths) < len(frames)
        real = None
        if is_padded:
            real = tensor_on(np.flatnonzero(video_frame_mask.numpy()), device)
            frames = frames.index_select(0, real)
        if not frames.is_floating_point():
            frames = normalise_pixels(frames, video_pixel_norm, lengths)
        timestamps = video_timestamps
        if timestamps is not None:
            timestamps = timestamps.flatten()
            if is_padded:
                timestamps = timestamps.index_select(0, real.to(timestamps.device))
            timestamps = timestamps.split(lengths)

        outputs, vision_features = encode_frames(
            self.vision_tower, frames, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        projected = self.multi_modal_projector(vision_features)
        assembled = batch.assemble(projected, self.image_newline, self.faster_token)
        return VideoFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(assembled.split(batch.num_tokens)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            vision_features=vision_features,
            pixel_values=frames,
            num_frames=tuple(lengths),
            timestamps=timestamps,
            frame_types=frame_types,
        )

    @torch.no_grad()
    def drop_cached_media(
        self, input_ids: torch.LongTensor, num_cached: int, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Removes cached images and videos from the inputs of `generate`: those with placeholders among the first `num_cached`
        positions of `input_ids` `[B, S]`. Of a partly cached medium, the features of the rest remain in `mm_encoder_outputs`.
        With 0, the ids are those behind the cached part, and media without placeholders among them belong to that part.

        Raises:
            ValueError: if placeholders behind the cached part have no image or video.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        encoded = dict(inputs.pop("mm_encoder_outputs", {}))
        for modality, names in MEDIA_INPUTS.items():
            is_placeholder = input_ids == getattr(self.config, f"{modality}_token_id")
            is_new = is_placeholder.nonzero()[:, 1] >= num_cached  # of each placeholder of the batch
            media = {name: inputs.pop(name) for name in names if name in inputs}
            features = encoded.pop(modality, None)
            if names[0] not in media and features is None:
                check_media_given(modality, int(is_new.sum()))
            if modality == "video" and features is None and is_new.any():
                media, is_new = self._with_new_videos(media, is_new)
            if features is None and is_new.all():  # also without placeholders: `forward` then raises
                inputs |= media if len(is_new) or num_cached else {}
            elif is_new.any():
                features = features or getattr(self, f"get_{modality}_features")(**media, return_dict=True)
                rows = torch.cat(list(features.pooler_output))
                rows = rows[is_new.to(rows.device)] if len(rows) == len(is_new) else rows
                encoded[modality] = BaseModelOutputWithPooling(pooler_output=[rows])
        return {**inputs, "mm_encoder_outputs": encoded} if encoded else inputs

    def _with_new_videos(
        self, videos: dict[str, torch.Tensor], is_new: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Selects the videos with new placeholders (`is_new` `[L]`), and returns them with `is_new` of their placeholders; all
        videos if the placeholders do not cover them."""
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

    def video_tokens(self, features: VideoFeatures) -> tuple[VideoTokens, ...]:
        """The token map of each encoded video."""
        return self.token_layout.batch(features.num_frames, features.frame_types).videos

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
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        placeholders: dict[str, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaOnevisionModelOutputWithPast:
        """As `LlavaOnevisionModel.forward`, with the video inputs of `get_video_features`.

        The cache is among `kwargs`: `past_key_values`, since transformers 5.24 `cache`. `placeholders` holds for `image` and
        `video` the int64 positions of their placeholders in the flattened `input_ids`, if they are known.
        """
        encoded = dict(mm_encoder_outputs or {})
        needs_graph, below_trains = self._needs_graph(inputs_embeds, encoded, kwargs)
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
                video_pixel_norm=video_pixel_norm,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
            )
        if placeholders is not None:
            # OneVision's forward would look for them once more, and wait for the device to compare their number.
            inputs_embeds, input_ids = self._embed(input_ids, encoded, placeholders), None
            encoded = {}
        elif encoded.get("video") is not None:
            # OneVision's forward takes one tensor; videos of different length only concatenate.
            features = torch.cat(list(encoded["video"].pooler_output))
            encoded["video"] = BaseModelOutputWithPooling(pooler_output=features[None])
        layers = getattr(self.language_model, "layers", ())
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph), no_graph_below(layers, below_trains):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                mm_encoder_outputs=encoded,
                **kwargs,
            )

    def _needs_graph(
        self, inputs_embeds: torch.Tensor | None, encoded: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[bool, bool]:
        """Two flags: the language model needs a gradient, and its input needs one.

        With a head that trains alone, neither does. Activation checkpointing makes the embeddings require a gradient all the
        same, and the frozen language model would run twice and be back-propagated for nothing.
        """
        if not self.training:
            return True, True
        inputs = [inputs_embeds, *(rows for output in encoded.values() if output for rows in output.pooler_output)]
        has_cache = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
        modules = (self.get_input_embeddings(), self.vision_tower, self.multi_modal_projector)
        below_trains = (
            has_cache
            or trains(*modules, self.image_newline, self.faster_token)
            or any(tensor is not None and tensor.requires_grad for tensor in inputs)
        )
        return below_trains or trains(self.language_model), below_trains

    def _embed(
        self,
        input_ids: torch.LongTensor,
        encoded: dict[str, BaseModelOutputWithPooling],
        placeholders: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Embeddings `[B, S, hidden_size]` with the features of images and videos in place of their placeholders."""
        embeddings = self.get_input_embeddings()(input_ids)
        flat = embeddings.flatten(0, 1)
        for name, output in encoded.items():
            if output is None:
                continue
            features = torch.cat(list(output.pooler_output))
            if len(features) != len(placeholders[name]):
                raise ValueError(
                    f"{name} features and {name} tokens do not match, tokens: {len(placeholders[name])}, "
                    f"features: {len(features)}"
                )
            flat = flat.index_copy(0, placeholders[name].to(flat.device), features.to(flat))
        return flat.view_as(embeddings)


def to_host(*tensors: Any) -> list[Any]:
    """Copies integer and bool tensors to the CPU in one transfer; other values stay as they are."""
    away = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu"]
    if not away:
        return list(tensors)
    values = torch.cat([tensor.to(away[0].device).flatten().long() for tensor in away]).cpu()
    pieces = iter(values.split([tensor.numel() for tensor in away]))
    is_away = {id(tensor) for tensor in away}
    return [next(pieces).view(value.shape).to(value.dtype) if id(value) in is_away else value for value in tensors]


def check_layout(layout: FrameTokenLayout, given: torch.Tensor) -> None:
    """Raises ValueError where one of the rows `[N, 7]` on the CPU (`FrameTokenLayout.as_tensor`) is not the layout."""
    for row in sorted(set(map(tuple, given.tolist()))):
        layout.check_same(FrameTokenLayout.from_tensor(torch.tensor(row)))


def normalise_pixels(
    frames: torch.Tensor, video_pixel_norm: torch.Tensor | None, num_frames: Sequence[int]
) -> torch.Tensor:
    """Normalises uint8 frames `[F, 3, H, W]` of videos to float32, as the video processor does.

    Raises:
        ValueError: if `video_pixel_norm` is missing.
    """
    if video_pixel_norm is None:
        raise ValueError(
            f"pixel_values_videos holds {frames.dtype}, which needs the video_pixel_norm that the video processor returns "
            "with it"
        )
    norms = (video_pixel_norm.to(frames.device).double() * 1e-9).float()[..., None, None]
    frames = frames.float().split(list(num_frames))
    return torch.cat([video.div(divisor).sub_(offset) for video, (divisor, offset) in zip(frames, norms, strict=True)])


@torch.compiler.disable  # numbers of the host, not of the graph
def find_placeholders(config: LlavaNextARConfig, input_ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Positions of images and videos in the flattened ids `[B, S]`, which are on the CPU."""
    flat = input_ids.numpy().ravel()
    return {modality: np.flatnonzero(flat == getattr(config, f"{modality}_token_id")) for modality in MEDIA_INPUTS}


def check_media(model: LlavaNextARModel, found: dict[str, np.ndarray], inputs: dict[str, Any]) -> None:
    """Raises ValueError for placeholders without pixels or features (in `inputs` under `image` and `video`).

    Args:
        model: the base model.
        found: see `find_placeholders`; empty with `inputs_embeds` in the place of ids.
        inputs: arguments of the call.
    """
    missing = [
        modality
        for modality, names in MEDIA_INPUTS.items()
        if inputs.get(names[0]) is None and inputs.get(modality) is None
    ]
    if not missing or torch.compiler.is_compiling():
        return
    counts = {modality: len(positions) for modality, positions in found.items()}
    if not found and inputs.get("inputs_embeds") is not None:
        masks = model.get_placeholder_mask(None, inputs["inputs_embeds"])
        counts = {modality: int(mask[..., 0].sum()) for modality, mask in zip(MEDIA_INPUTS, masks, strict=True)}
    for modality in missing:
        check_media_given(modality, counts.get(modality, 0))


def check_media_given(modality: str, num_placeholders: int) -> None:
    """Raises ValueError for placeholders without images or videos."""
    if num_placeholders:
        raise ValueError(
            f"the prompts hold {num_placeholders} {modality} placeholders, but no {modality} was given. Pass on all that the "
            "processor returns: inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, "
            'return_tensors="pt", ...), then model.generate(**inputs)'
        )


def check_length(
    config: LlavaNextARConfig, prompts: torch.Tensor, cache: Any, position_ids: torch.LongTensor | None
) -> None:
    """Warns of prompts `[B, S]` or `[B, S, hidden_size]` beyond the positions of the language model."""
    if prompts.shape[1] == 1 or torch.compiler.is_compiling():  # one token is decoded
        return
    num_cached = 0 if cache is None else int(cache.get_seq_length())
    length = num_cached + prompts.shape[1]
    if length > getattr(config.text_config, "max_position_embeddings", math.inf):
        length = length if position_ids is None else int(position_ids.max()) + 1  # without padding
        warn_beyond_positions(config, num_cached, length)


def warn_beyond_positions(config: LlavaNextARConfig, before: int, after: int) -> None:
    """Warns where a sequence that grows from `before` to `after` tokens leaves the positions of the language model."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and before <= limit < after:
        logger.warning(
            f"the sequence has {after} tokens, but the language model was made for {limit} (max_position_embeddings): "
            "what it answers beyond is unreliable. Sample fewer frames"
        )


def with_frames_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """Moves the padding of videos to the end: the pipelines of transformers pad all inputs on the side of the text."""
    mask = inputs.get("video_frame_mask")
    if mask is None or not (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
        return inputs
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    names = [name for name in MEDIA_INPUTS["video"][:4] if inputs.get(name) is not None]
    return {**inputs, **{name: inputs[name][torch.arange(len(mask))[:, None], order] for name in names}}


def video_lengths(pixel_values_videos: torch.Tensor, video_frame_mask: torch.Tensor | None) -> list[int]:
    """Numbers of real frames of the videos `[N, T, 3, H, W]`; `video_frame_mask` as in `get_video_features`.

    Raises:
        ValueError: if a video has no real frame, or its padding is not at the end.
    """
    num_videos, num_frames = pixel_values_videos.shape[:2]
    if video_frame_mask is None:
        return [num_frames] * num_videos
    lengths = [sum(map(bool, row)) for row in video_frame_mask.tolist()]
    if any(not all(row[:length]) for row, length in zip(video_frame_mask.tolist(), lengths, strict=True)):
        raise ValueError("video_frame_mask must be True for the first frames of a video and False for the rest")
    if 0 in lengths:
        raise ValueError(f"video {lengths.index(0)} of the batch has no real frame in video_frame_mask")
    return lengths


def without_heads(quantization_config: Any) -> Any:
    """Copies the configuration, and excludes `_NOT_QUANTIZED` from quantization unless it excludes modules itself."""
    config = copy.deepcopy(quantization_config)
    values = config if isinstance(config, dict) else vars(config)
    by_bitsandbytes = "llm_int8_skip_modules" in values or values.keys() & {"load_in_8bit", "load_in_4bit"}
    name = "llm_int8_skip_modules" if by_bitsandbytes else "modules_to_not_convert"
    if values.get(name) is None:
        values[name] = list(_NOT_QUANTIZED)
    return config


def _embedding_std(config: LlavaNextARConfig) -> float:
    return 1 / math.sqrt(config.text_config.hidden_size)


def init_added_weights(module: nn.Module) -> None:
    if isinstance(module, ZeroInitializedLinear):
        module.reset_parameters()
    elif isinstance(module, LlavaNextARModel) and getattr(module, "faster_token", None) is not None:
        init.normal_(module.faster_token, mean=0.0, std=_embedding_std(module.config))
