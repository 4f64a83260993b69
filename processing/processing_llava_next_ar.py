# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Processor: model inputs of chat messages with text, images and videos.

LLaVA-OneVision's processor, with every video layout of `FrameTokenLayout` (which alone determines the number of
placeholders of a video), LLaVA-NeXT's conversation format with the assistant's turns marked for training, and errors
for mistakes that would reach the model: a placeholder without a video, a visual token cut off by `max_length`, an
unknown option.
"""

import bisect
import inspect
import os
import re
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import AutoImageProcessor, LlavaOnevisionProcessor, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.utils import logging
from transformers.video_processing_utils import VideoProcessorMixin

from ..configuration.frame_token_layout import FrameTokenLayout
from ..configuration.image_token_layout import ImageTokenLayout
from ..configuration.key_names import refuse_misspelt, refuse_unknown, warn_unknown
from ..configuration.transformers_compat import MARKED_CONTROL_TOKEN
from ..hub.hub_code import AUTO_MAP
from ..hub.pushed_model import travels_with_code
from .frame_sampling import head_sampling, llava_video_times, time_instruction
from .llava_conversation import DEFAULT_CHAT_TEMPLATE, IMAGE_TOKEN, VIDEO_TOKEN, check_placeholders, prepare_messages
from .option_checks import (
    SETTINGS,
    check_image_processor,
    check_processor_file,
    check_processor_settings,
    refuse_generation_options,
    resolve_layout,
    served_error,
    served_options,
)
from .video_inputs import flatten_videos, load_images
from .video_processing_llava_next_ar import (
    LlavaNextARVideoProcessor,
    LlavaNextARVideoProcessorKwargs,
)

logger = logging.get_logger(__name__)


class LlavaNextARProcessorKwargs(ProcessingKwargs, total=False):
    """Options of `LlavaNextARProcessor.__call__`."""

    _defaults = {}  # a TypedDict does not inherit them, and transformers reads them

    videos_kwargs: LlavaNextARVideoProcessorKwargs


@travels_with_code
class LlavaNextARProcessor(LlavaOnevisionProcessor):
    r"""Processor of prompts with images and videos: model inputs, padded on the left unless the tokenizer has a `padding_side`.

    Args:
        image_processor, tokenizer: as in `LlavaOnevisionProcessor`.
        video_processor (`LlavaNextARVideoProcessor`): reads, samples and resizes videos.
        num_image_tokens (`int`, *optional*): patches of one image of the tower; the layout's if unset.
        vision_feature_select_strategy (`str`, *optional*): as in the model's configuration.
        chat_template (`str`, *optional*): LLaVA-NeXT's `qwen_1_5` conversation if unset.
        image_token, video_token (`str`): placeholders, unless the tokenizer has placeholders.
        vision_aspect_ratio (`str`): as in the model's configuration.
        frame_token_layout (`FrameTokenLayout` or `dict`, *optional*): mapping from frames of a video to tokens, the
            same as in the model. If unset (a LLaVA-OneVision processor), OneVision's layout over a square of
            `num_image_tokens`.
        add_time_instruction (`bool`, defaults to `False`): write LLaVA-Video's time instruction (duration, frame times) behind
            each video.
        mm_patch_merge_type, unpad_rounding (`str`): token layout of images, as in the model's configuration.

    Raises:
        ValueError: if a setting of this or the image processor has a wrong type or value, `num_image_tokens` is not a
            square number without a layout, they contradict each other, or the tokenizer lacks a placeholder
            token.
        TypeError: if a part is not a processor or tokenizer.
    """

    _auto_class = "AutoProcessor"
    valid_processor_kwargs = LlavaNextARProcessorKwargs
    skip_tensor_conversion = [*LlavaOnevisionProcessor.skip_tensor_conversion, "pixel_values_videos_scales"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        video_processor: VideoProcessorMixin | None = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = IMAGE_TOKEN,
        video_token: str = VIDEO_TOKEN,
        vision_aspect_ratio: str = "anyres_max_9",
        frame_token_layout: FrameTokenLayout | dict[str, Any] | None = None,
        add_time_instruction: bool = False,
        mm_patch_merge_type: str = "spatial_unpad",
        unpad_rounding: str = "round",
    ) -> None:
        check_processor_settings(
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            add_time_instruction=add_time_instruction,
            mm_patch_merge_type=mm_patch_merge_type,
            unpad_rounding=unpad_rounding,
        )
        self.frame_token_layout = resolve_layout(frame_token_layout, num_image_tokens, vision_feature_select_strategy)
        self.add_time_instruction = add_time_instruction
        self.mm_patch_merge_type = mm_patch_merge_type
        self.unpad_rounding = unpad_rounding
        self.auto_map = dict(AUTO_MAP)
        self.unknown_keys: dict[str, Any] = {}
        if num_image_tokens is None and self.frame_token_layout is not None:
            num_image_tokens = self.frame_token_layout.patches_height * self.frame_token_layout.patches_width
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
        )
        if chat_template is None:
            template = DEFAULT_CHAT_TEMPLATE.replace(IMAGE_TOKEN, self.image_token)
            self.chat_template = template.replace(VIDEO_TOKEN, self.video_token)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        check_image_processor(self.image_processor)
        if self.frame_token_layout is not None:
            self._image_layout(tile_size=1)  # validates itself for every size
        for name, token_id in (("image_token", self.image_token_id), ("video_token", self.video_token_id)):
            token = getattr(self, name)
            if token_id is None or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
                raise ValueError(
                    f"the tokenizer has no token {token!r}, the {name}: add it as a special token, or build the processor with "
                    f"{type(self).__name__}.for_config"
                )

    @classmethod
    def for_config(
        cls,
        config: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        add_time_instruction: bool = False,
        **video_kwargs: Any,
    ) -> "LlavaNextARProcessor":
        """Build a complete processor for a model configuration.

        Placeholder tokens that the tokenizer lacks are added to it, and their ids written into `config` (resize the
        model's embeddings if they lie beyond its vocabulary). Slow and fast sampling follows
        `config.autoregressive_config`.

        Args:
            config: a `LlavaNextARConfig`.
            tokenizer: of the language model.
            chat_template: other than LLaVA-NeXT's `qwen_1_5`.
            add_time_instruction: see the class.
            video_kwargs: options of `LlavaNextARVideoProcessor`; size, mean and std apply to images too.

        Raises:
            ValueError: if the placeholder ids of tokenizer and configuration differ, or a video option is unknown.
        """
        side = config.vision_config.image_size
        video_kwargs = {**head_sampling(config), **video_kwargs}
        video_processor = LlavaNextARVideoProcessor(**{"size": {"height": side, "width": side}, **video_kwargs})
        image_processor = LlavaOnevisionImageProcessorPil(
            size=dict(video_processor.size),
            image_grid_pinpoints=config.image_grid_pinpoints,
            image_mean=list(video_processor.image_mean),
            image_std=list(video_processor.image_std),
        )
        tokenizer.init_kwargs.pop("padding_side", None)
        for name, default in (("image", IMAGE_TOKEN), ("video", VIDEO_TOKEN)):
            token = getattr(tokenizer, f"{name}_token", None) or default
            if token not in tokenizer.get_vocab():
                tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
                setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        if chat_template is None and "<|im_start|>" not in tokenizer.get_vocab():
            logger.warning(
                "the default chat template is Qwen's, but the tokenizer has no <|im_start|> token; give the "
                "chat_template of your language model"
            )
        processor = cls(
            image_processor,
            tokenizer,
            video_processor,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=chat_template,
            add_time_instruction=add_time_instruction,
            **layout_options(config),
        )
        processor.check_layout(config)
        return processor

    def check_layout(self, config: Any) -> None:
        """Validate that this processor fits a model configuration.

        Raises:
            ValueError: with each key of the token layout that differs, or the placeholder with another id.
        """
        config.frame_token_layout.check_same(self._layout)
        for name, value in layout_options(config).items():
            if name != "frame_token_layout" and value != getattr(self, name):
                raise ValueError(f"{name} is {value!r} in the model, but {getattr(self, name)!r} in the processor")
        for name in ("image_token_id", "video_token_id"):
            if getattr(config, name) != getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(config, name)} in the model, but {getattr(self, name)} in the tokenizer"
                )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # transformers would look up the video processor's class in a registry that is empty without torchvision, and
        # ask the user to trust the code that is already running.
        check_processor_file(processor_dict or {})
        parameters = inspect.signature(cls).parameters
        video_options = LlavaNextARVideoProcessorKwargs.__annotations__.keys()
        image_options = LlavaOnevisionImageProcessorPil.valid_kwargs.__annotations__.keys()
        refuse_misspelt(kwargs, {*parameters, *video_options, *image_options}, cls.__name__)
        kwargs = {name: value for name, value in kwargs.items() if name not in parameters}
        text_kwargs = {k: v for k, v in kwargs.items() if k not in {*video_options, *image_options}}
        image_kwargs = {k: v for k, v in kwargs.items() if k in text_kwargs or k in image_options}
        saved_type = ((processor_dict or {}).get("image_processor") or {}).get("image_processor_type", "")
        if saved_type.endswith("Pil"):
            image_kwargs.setdefault("backend", "pil")  # same pixels and same file with and without torchvision
        tokenizer_kwargs = {"padding_side": "left", **text_kwargs}  # see the class
        if "auto_map" in (processor_dict or {}) and not text_kwargs.get("trust_remote_code"):
            # AutoTokenizer would read the model's configuration, which has custom code, and ask to trust it.
            tokenizer_kwargs = {"config": PreTrainedConfig(), **tokenizer_kwargs}
        return [
            AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **image_kwargs),
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **tokenizer_kwargs),
            LlavaNextARVideoProcessor.from_pretrained(
                pretrained_model_name_or_path,
                **{k: v for k, v in kwargs.items() if k in text_kwargs or k in video_options},
            ),
        ]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor as in transformers, but keep unknown keys of the file, with a warning."""
        known = {*inspect.signature(cls).parameters, "auto_map", "processor_class"}
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor.unknown_keys = {name: value for name, value in processor_dict.items() if name not in known}
        warn_unknown(processor.unknown_keys, known, "processor_config.json")
        return loaded

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type | tuple[type, ...]:
        """Validate a part as in transformers, which crashes on any video processor when torchvision is absent."""
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, VideoProcessorMixin):
            raise TypeError(f"video_processor must be a video processor, got {type(argument).__name__}")
        return VideoProcessorMixin

    def check(self) -> None:
        """Validate the settings, also those that were assigned after construction.

        Raises:
            ValueError: on an invalid setting.
            TypeError: if a setting cannot be written as JSON.
        """
        check_processor_settings(**{name: getattr(self, name) for name in SETTINGS})
        check_image_processor(self.image_processor)
        self.video_processor.check()
        self.to_json_string()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save all parts of the processor, the chat template and the code; raises as `check`."""
        # Padding and truncation of the last call and the source of the tokenizer are not its settings. Both would be
        # saved as such, and the former would return as options of every call.
        if getattr(self.tokenizer, "backend_tokenizer", None) is not None:
            self.tokenizer.backend_tokenizer.no_padding()
            self.tokenizer.backend_tokenizer.no_truncation()
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `processor_config.json`."""
        layout = None if self.frame_token_layout is None else self.frame_token_layout.to_dict()
        return {**self.unknown_keys, **super().to_dict(), "frame_token_layout": layout}

    @property
    def _layout(self) -> FrameTokenLayout:
        if self.frame_token_layout is None:
            raise ValueError(
                "the processor has no layout of visual tokens: give it the frame_token_layout of the model's "
                "configuration, or num_image_tokens"
            )
        return self.frame_token_layout

    @property
    def model_input_names(self) -> list[str]:
        """Keys of the output of a call."""
        return [*super().model_input_names, "video_layout"]

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature:
        """Convert messages to a prompt, or with `tokenize=True, return_dict=True` to model inputs, as in transformers.

        A message's content is a string or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", ...}`
        and `{"type": "video", "path" | "url" | "video": ...}`. Options of a part win over those of the call: `fps` (the rate
            of frames without times), `num_frames` (`nframes`), `max_frames`, `sample_rate`, `sampling`,
        `video_start`, `video_end` (`start`, `end`; seconds, both included), `min_pixels` and `max_pixels`.

        Raises:
            ValueError: if the conversation is malformed (with the position), the template rejects it or does not read all of
                it, assistant masks are requested from a template without `{% generation %}`, or an option is unknown.
        """
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(chat_template or "default", chat_template)
        if return_assistant_tokens_mask and template and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise ValueError(
                "return_assistant_tokens_mask=True needs a chat template with {% generation %} around the assistant's "
                "turns, which this one lacks; DEFAULT_CHAT_TEMPLATE has it"
            )
        kwargs = served_options(self.video_processor, kwargs)
        try:
            conversation = prepare_messages(conversation, template or "", kwargs)
            return super().apply_chat_template(
                conversation,
                template,
                processor_kwargs=dict(processor_kwargs or {}),  # transformers writes into it
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                **kwargs,
            )
        except (TemplateError, OverflowError) as error:  # the latter from the sandbox, of huge ranges
            raise served_error(f"the chat template rejects the conversation: {error}", kwargs) from error
        except ValueError as error:
            if type(reply := served_error(str(error), kwargs)) is ValueError:
                raise
            raise reply from error

    def __call__(
        self,
        images: ImageInput | None = None,
        text: "str | list[str] | None" = None,
        videos: Any = None,
        **kwargs: Unpack[LlavaNextARProcessorKwargs],
    ) -> BatchFeature:
        """Convert prompts with a placeholder for each image and video, and these, to model inputs.

        Args:
            images: as in `LlavaOnevisionProcessor`, or nested by prompt.
            text: one prompt or several.
            videos: see `flatten_videos`.
            kwargs: options of tokenizer, image processor and video processor.

        Raises:
            ValueError: if placeholders and media do not match, `max_length` would cut off visual tokens (with the excess in
                tokens), or an option is unknown.
        """
        if kwargs.pop("audio", None) is not None:
            raise ValueError(f"{type(self).__name__} takes no audio")
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def prepare_inputs_layout(
        self,
        images: ImageInput | None = None,
        text: "str | list[str] | None" = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Prepare inputs as in transformers, with image paths as `Path` too, and files opened in the usual formats alone.

        Raises:
            ValueError: if an image cannot be loaded, with its name and the cause.
        """
        images = load_images(images)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(
        self,
        images: ImageInput | None = None,
        text: "str | list[str] | None" = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare the numbers of placeholders and media, for each prompt if media are nested by prompt.

        Raises:
            ValueError: without input, or if placeholders and media do not match.
        """
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} needs at least one of text, images and videos")
        image_counts = None if images is None else _count_images(images)
        video_counts = None if videos is None else flatten_videos(videos)[1]
        if text is None:
            return
        if not (isinstance(text, list) and all(isinstance(prompt, str) for prompt in text)):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        for medium, token, counts in (
            ("image", self.image_token, image_counts),
            ("video", self.video_token, video_counts),
        ):
            check_placeholders(medium, token, [prompt.count(token) for prompt in text], counts)

    def _merge_kwargs(self, ModelProcessorKwargs=None, tokenizer_init_kwargs=None, **kwargs):
        modalities = {
            "text_kwargs": self.tokenizer,
            "images_kwargs": self.image_processor,
            "videos_kwargs": self.video_processor,
            "audio_kwargs": None,
        }
        known = {
            modality: {
                *self.valid_processor_kwargs.__annotations__[modality].__annotations__,
                *getattr(getattr(component, "valid_kwargs", None), "__annotations__", ()),
            }
            for modality, component in modalities.items()
        }
        everywhere = set().union(*known.values(), self.valid_processor_kwargs.__annotations__, {"common_kwargs"})
        refuse_generation_options(kwargs, everywhere)
        refuse_unknown(kwargs, everywhere, type(self).__name__)
        for modality, options in known.items():
            refuse_unknown(kwargs.get(modality) or {}, options, modality)
        return super()._merge_kwargs(ModelProcessorKwargs, tokenizer_init_kwargs, **kwargs)

    def _process_videos(self, videos, **kwargs):
        processed = self.video_processor(videos, **{**kwargs, "return_metadata": True})
        layouts = [self._layout.as_tensor() for _ in processed["video_metadata"]]
        processed["video_layout"] = torch.stack(layouts) if kwargs.get("return_tensors") is not None else layouts
        replacements = [self.video_text(processed, index, kwargs) for index in range(len(processed["video_metadata"]))]
        return processed, replacements

    def video_text(self, processed: dict[str, Any], video_idx: int, kwargs: dict[str, Any]) -> str:
        """Text of one video in a prompt: its placeholders and, with `add_time_instruction`, its time instruction.

        Args:
            processed: output of the video processor; pixels are not read.
            kwargs: options of that call.
        """
        text = self.replace_video_token(processed, video_idx)
        if self.add_time_instruction:
            duration = processed["video_metadata"][video_idx].duration
            text += time_instruction(duration, self._told_times(processed, video_idx, kwargs))
        return text

    def _told_times(self, processed: dict[str, Any], video_idx: int, kwargs: dict[str, Any]) -> list[float]:
        """Seconds of each frame in the time instruction: its time, or with the `llava_video` policy LLaVA-NeXT's value."""
        mask = processed["video_frame_mask"][video_idx]
        times = processed["video_timestamps"][video_idx][mask].tolist()
        metadata, sampling = processed["video_metadata"][video_idx], self.video_processor.sampling_for(**kwargs)
        if sampling is not None and sampling.policy == "llava_video":
            settings = {name: getattr(sampling, name) for name in ("fps", "max_frames", "force_sample")}
            original = llava_video_times(metadata.total_num_frames, metadata.fps, **settings).tolist()
            return original if len(original) == len(times) else times
        return times

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        """Placeholders of one video, one for each token of the layout."""
        if "video_frame_mask" in video_inputs:
            num_frames = int(video_inputs["video_frame_mask"][video_idx].sum())
        else:
            num_frames = len(video_inputs["pixel_values_videos"][video_idx])
        frame_types = None
        if "video_frame_types" in video_inputs:
            frame_types = video_inputs["video_frame_types"][video_idx][:num_frames].tolist()
        return self.video_token * self._layout.num_tokens(num_frames, frame_types)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Placeholders of one image, one for each token of its layout."""
        layout = self._image_layout(image_inputs["pixel_values"][0][0].shape[-1])
        counts = [int(count) for count in image_inputs["batch_num_images"]]
        shares_prompt = [count != 1 for count in counts for _ in range(count)][image_idx]
        if shares_prompt:  # such images are not tiled
            return self.image_token * layout.num_base_tokens
        size = [int(side) for side in image_inputs["image_sizes"][image_idx]]
        return self.image_token * layout.num_tokens(size)

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        num_tokens = self._image_layout(width).num_tokens((orig_height, orig_width))
        # The caller in transformers subtracts a class token, which a layout never counts.
        return num_tokens + (self.vision_feature_select_strategy == "default")

    def _image_layout(self, tile_size: int) -> ImageTokenLayout:
        return ImageTokenLayout(
            patches_height=self._layout.patches_height,
            patches_width=self._layout.patches_width,
            tile_size=tile_size,
            grid_pinpoints=self.image_processor.image_grid_pinpoints,
            aspect_ratio=self.vision_aspect_ratio,
            merge_type=self.mm_patch_merge_type,
            unpad_rounding=self.unpad_rounding,
        )

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs):
        counted = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if video_sizes is None:
            return counted
        num_video_tokens = [self._layout.num_tokens(num_frames) for num_frames, _, _ in video_sizes]
        return MultiModalData(
            num_image_tokens=counted.num_image_tokens,
            num_image_patches=counted.num_image_patches,
            num_video_tokens=num_video_tokens,
        )

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        input_ids = text_inputs["input_ids"]
        input_ids = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
        if len(input_ids) != len(text):
            raise ValueError(
                f"{len(text)} prompts became {len(input_ids)} sequences; return_overflowing_tokens would spread the "
                "visual tokens of a video over several of them"
            )
        placeholders = ((self.image_token, self.image_token_id), (self.video_token, self.video_token_id))
        for index, (prompt, ids) in enumerate(zip(text, input_ids, strict=True)):
            wanted = sum(MARKED_CONTROL_TOKEN.sub("", prompt).count(token) for token, _ in placeholders)
            kept = sum(ids.count(token_id) for _, token_id in placeholders)
            if kept >= wanted:
                continue
            options = {"sanitize_control_tokens": True} if MARKED_CONTROL_TOKEN.search(prompt) else {}
            length = len(self.tokenizer(prompt, truncation=False, **options)["input_ids"])
            raise ValueError(
                f"prompt {index} has {length} tokens, {wanted} of them visual: {length - len(ids)} more than the "
                f"{len(ids)} that max_length allows, and visual tokens are never cut off ({wanted - kept} would be). "
                "Lower num_frames, fps or max_frames, or raise max_length"
            )

    def _adjust_assistant_masks_indices(self, processed_dict, generation_indices):
        # transformers compares token by token in Python, which doubles the time of a call with a long video
        offsets = processed_dict.pop("offset_mapping")
        replaced = processed_dict.pop("text_replacement_offsets", None) or [[] for _ in generation_indices]
        masks = []
        for sample_offsets, replacements, spans in zip(offsets, replaced, generation_indices, strict=True):
            begins, ends = np.asarray(sample_offsets).T  # [L] characters of the expanded prompt
            placeholder_ends = [replacement["span"][1] for replacement in replacements]
            gained = [0] + [replacement["new_span"][1] - replacement["span"][1] for replacement in replacements]
            mask = np.zeros(len(begins), dtype=np.int64)
            for span in spans:
                begin, end = (at + gained[bisect.bisect_right(placeholder_ends, at)] for at in span)
                mask |= (begins < end) & (ends > begin)
            masks.append(mask)
        as_tensors = isinstance(processed_dict["input_ids"], torch.Tensor)
        processed_dict["assistant_masks"] = (
            torch.from_numpy(np.stack(masks)) if as_tensors else [mask.tolist() for mask in masks]
        )
        return processed_dict


# -- Helpers


def layout_options(config: Any) -> dict[str, Any]:
    """Settings of the processor that come from the model: token layouts of images and videos.

    Args:
        config: a `LlavaNextARConfig`.
    """
    names = ("frame_token_layout", "vision_aspect_ratio", "mm_patch_merge_type", "unpad_rounding")
    return {name: getattr(config, name) for name in names}


def _count_images(images: Any) -> list[int] | int:
    """Number of images of each prompt if they are nested by prompt, else their total."""
    if isinstance(images, (list, tuple)) and images and all(isinstance(item, (list, tuple)) for item in images):
        return [len(item) for item in images]
    return len(make_flat_list_of_images(images))


__all__ = ["LlavaNextARProcessor"]
