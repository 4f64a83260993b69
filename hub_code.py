# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Keeps every save complete: all code files and the full `auto_map` travel with a checkpoint.

With `_auto_class` set, transformers copies the file of a saved class and, recursively, whatever its text imports
relatively. A model saved alone would so lose its processor, and a processor its model. This module names every sibling in
one block that is never executed, and every class that can be saved imports it: the copy is always the whole package, also
when the class itself came from the Hub. A file of the user's own beside these, with a subclass of the model, travels in the
same way, since it imports them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstructionModule  # noqa: F401
    from .bad_samples import BadSampleLedger  # noqa: F401
    from .configuration_llava_next_ar import LlavaNextARConfig  # noqa: F401
    from .frame_masks import FrameLevelMaskGenerator  # noqa: F401
    from .frame_predictor import FramePredictorBlock  # noqa: F401
    from .frame_rollout import imagine_videos  # noqa: F401
    from .frame_sampling import FrameSampling  # noqa: F401
    from .frame_stream import FrameStream  # noqa: F401
    from .frame_surprise import SurpriseStream  # noqa: F401
    from .frame_token_layout import FrameTokenLayout  # noqa: F401
    from .hub_files import commit_files  # noqa: F401
    from .image_token_layout import ImageTokenLayout  # noqa: F401
    from .llava_conversation import llava_conversation_to_messages  # noqa: F401
    from .loss_functions import summed_cross_entropy  # noqa: F401
    from .media_paths import path_below  # noqa: F401
    from .modeling_llava_next_ar import LlavaNextARForConditionalGeneration  # noqa: F401
    from .option_checks import check_pixel_options  # noqa: F401
    from .processing_llava_next_ar import LlavaNextARProcessor  # noqa: F401
    from .reconstruction_metrics import Reconstruction  # noqa: F401
    from .training_checkpoints import ResumableTrainer  # noqa: F401
    from .training_collator import LlavaVideoCollator  # noqa: F401
    from .training_data import LlavaVideoDataset  # noqa: F401
    from .training_entries import entry_to_messages  # noqa: F401
    from .training_guards import BadStepPolicy  # noqa: F401
    from .training_hub import HubTrainer  # noqa: F401
    from .training_llava_next_ar import AutoregressiveTrainer  # noqa: F401
    from .training_mixture import LlavaVideoMixture  # noqa: F401
    from .training_samples import SampleReader  # noqa: F401
    from .training_sft import AutoregressiveSFTTrainer  # noqa: F401
    from .training_sources import DataSource  # noqa: F401
    from .training_stream import LlavaVideoStream  # noqa: F401
    from .transformers_compat import hidden_states_to_keep  # noqa: F401
    from .video_decoding import VideoReadError  # noqa: F401
    from .video_frames import MultiScaleVideoFrameLoader  # noqa: F401
    from .video_inputs import flatten_videos  # noqa: F401
    from .video_language_model import LlavaNextARModel  # noqa: F401
    from .video_processing_llava_next_ar import LlavaNextARVideoProcessor  # noqa: F401
    from .vision_teacher import select_vision_features  # noqa: F401

MODEL_AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
AUTO_MAP = {
    "AutoConfig": "configuration_llava_next_ar.LlavaNextARConfig",
    **dict.fromkeys(MODEL_AUTO_CLASSES, "modeling_llava_next_ar.LlavaNextARForConditionalGeneration"),
    "AutoProcessor": "processing_llava_next_ar.LlavaNextARProcessor",
    "AutoVideoProcessor": "video_processing_llava_next_ar.LlavaNextARVideoProcessor",
}
