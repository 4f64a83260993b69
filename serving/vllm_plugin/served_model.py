# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""The model as vLLM serves it: vLLM's Transformers backend, with videos read by the checkpoint's own processor.

The backend (https://docs.vllm.ai, "Transformers modeling backend") puts vLLM's attention and linear layers into the model of
this package and has an lm_head of its own. What it lacks is here: several images in one prompt, videos of different
length in one batch, files that the processor decodes, and a memory profile by the checkpoint's sampling. The
reconstruction head is not loaded. Imports vLLM; see registration.py.
"""

import bisect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModel
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
from ...modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from ...modeling.video_language_model import MEDIA_INPUTS
from .joined_text import join_texts
from .video_file import open_array

AutoModel.register(LlavaNextARConfig, LlavaNextARForConditionalGeneration, exist_ok=True)

# More than an hour, at a frame rate of which every policy can take its own.
_LONG_CLIP = {"total_frames": 1_000_000, "native_fps": 240.0}


class LlavaNextARProcessingInfo(MultiModalProcessingInfo):
    """The processor, and sizes for vLLM's memory profile."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """The processor of the checkpoint. Options of a request are given in its call alone, which validates them: vLLM
        would load the processor once more for each set of options."""
        return super().get_hf_processor()

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Frames of the longest video that the checkpoint's sampling gives and `seq_len` tokens hold."""
        share = seq_len // max(mm_counts.get("video", 0), 1)
        layout = self.get_hf_processor().frame_token_layout
        most_frames = len(self._sample_long_clip()[0])
        return max(1, bisect.bisect_right(range(1, most_frames + 1), share, key=layout.num_tokens))

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Tokens of that video, with the frame types of the sampling."""
        num_frames, (_, types) = self.get_num_frames_with_most_features(seq_len, mm_counts), self._sample_long_clip()
        layout = self.get_hf_processor().frame_token_layout
        if types is None or num_frames < len(types):
            return layout.num_tokens(num_frames)
        return min(layout.num_tokens(num_frames, list(types)), seq_len)

    def _sample_long_clip(self) -> tuple[Any, Any]:
        """(frame indices, frame types) that the sampling takes from a very long clip."""
        options = self.ctx.get_merged_mm_kwargs({}, supported_mm_processor_kwargs=self.supported_mm_processor_kwargs)
        sampling = self.get_hf_processor().video_processor.sampling_for(**options.get("videos_kwargs", {}))
        if sampling is None:
            return range(_LONG_CLIP["total_frames"]), None
        sampled = sampling.select(**_LONG_CLIP)
        return sampled.indices, sampled.frame_types


class LlavaNextARServedProcessor(MultiModalProcessor):
    """Prompts with files to the inputs of the model, by `LlavaNextARProcessor`."""

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        hf_inputs = super()._get_hf_mm_inputs(mm_items, hf_kwargs)
        data = hf_inputs.hf_data
        if "videos" in data:
            data["videos"] = [open_array(video) for video in data["videos"]]
        if "images" in data:
            data["images"] = [data["images"]]  # of one prompt: images that share a prompt are not tiled
        return hf_inputs

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        try:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        except ValueError as error:
            if error.__cause__ is None:
                raise
            # vLLM's message shows all arguments of the processor; that of the processor is meant for the user.
            raise ValueError(str(error.__cause__)) from None

    def _postprocess_hf_mm_data(self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any) -> Any:
        """Makes each field one entry for each image or video, which depends on nothing but that one."""
        counts = processed_data.get("batch_num_images")
        if counts is not None:
            processed_data["batch_num_images"] = torch.tensor([int(count) for count in counts for _ in range(count)])
        mask = processed_data.get("video_frame_mask")
        if mask is not None and not mask.all():
            lengths = mask.sum(dim=1).tolist()
            for name in ("pixel_values_videos", "video_frame_mask", "video_frame_types", "video_timestamps"):
                if name in processed_data:
                    videos = zip(processed_data[name], lengths, strict=True)
                    processed_data[name] = [video[:length] for video, length in videos]
        return processed_data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        fields = {}
        for modality, names in MEDIA_INPUTS.items():
            if names[0] not in hf_inputs:
                continue
            fields |= {name: MultiModalFieldConfig.batched(modality) for name in names if name in hf_inputs}
            sizes = hf_inputs[f"{modality}_replacement_sizes"]
            fields[f"{modality}_replacement_ids"] = MultiModalFieldConfig.flat_from_sizes(
                modality, sizes, keep_on_cpu=True
            )
        return fields

    # -- Caches

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(inputs)
        images = hashes.get("image", [])
        if len(images) > 1:  # not tiled, other than the same image alone
            hashes["image"] = [f"{image}-shared" for image in images]
        return hashes

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> tuple[Any, Any]:
        is_cached, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)
        images = is_cached.get("image", [])
        if any(images) and not all(images):
            # One alone would be tiled: all images of a prompt are processed together, or none.
            if any(image is None for image in mm_data_items["image"].get_all()):
                raise ValueError("an image of the prompt is given by its UUID alone, but another one is not cached")
            is_cached["image"] = [False] * len(images)
            missing["image"] = mm_data_items["image"]
        return is_cached, missing

    # -- The prompt

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [
            replace(update, replacement=_marking(update.content, getattr(processor, f"{update.modality}_token_id")))
            for update in updates
        ]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> tuple[list[int], Any]:
        prompt, placeholders = super()._apply_prompt_updates(token_ids, mm_prompt_updates)
        if not self.info.get_hf_processor().add_time_instruction or not placeholders.get("video"):
            return prompt, placeholders
        found = sorted((one for items in placeholders.values() for one in items), key=lambda one: one.start_idx)
        return join_texts(prompt, found, self.info.get_tokenizer()), placeholders


def _marking(content: Any, placeholder_id: int) -> Any:
    """A replacement of a prompt in which the placeholder takes the features.

    vLLM takes the most frequent token for it, which is one of the time instruction's if a video has few tokens.
    """
    return lambda index: PromptUpdateDetails.select_token_id(content(index).full, placeholder_id)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextARServedProcessor, info=LlavaNextARProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class LlavaNextARForVLLM(TransformersMultiModalForCausalLM):
    """Vision tower, projector and language model of a checkpoint, served by vLLM."""

    def _process_image_input(self, **kwargs: Any) -> Any:
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return super()._process_image_input(**kwargs)
        features = []
        for image, size, count in zip(pixels, kwargs["image_sizes"], kwargs["batch_num_images"], strict=True):
            # `[P, 3, H, W]`, the tiles of one image. `count` images share its prompt: 1 if it is tiled.
            features += self._get_features("image", image[None], image_sizes=size[None], batch_num_images=[int(count)])
        return features

    def _process_video_input(self, **kwargs: Any) -> Any:
        inputs = {name: kwargs[name] for name in MEDIA_INPUTS["video"] if kwargs.get(name) is not None}
        pixels = inputs.pop("pixel_values_videos", None)
        if pixels is None:
            return None
        if isinstance(pixels, torch.Tensor):
            return list(self._get_features("video", pixels, **inputs))
        # Videos of different length, without padding.
        features = []
        for index, video in enumerate(pixels):
            own = {name: values[index][None] for name, values in inputs.items()}
            features += self._get_features("video", video[None], **own)
        return features
