"""transformers' own common tests, run against our classes: once with image inputs, once with video inputs.

The test files are not part of the installed package; tests/environments/fetch_transformers_tests.py gets what it can.
Where nothing can be had (offline), all of this is skipped and says so. Most of it is marked `slow`. The end of the
output counts what passed, failed and was skipped, with every reason, and names the files that were not to be had.
"""

import copy
import functools
import unittest
from unittest import mock

import pytest
import torch
from environments import fetch_transformers_tests
from tiny import GRID, ONEVISION, tiny_config, tiny_onevision
from tiny_processor import tiny_processor
from tiny_tokenizer import character_tokenizer
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto, video_processing_auto

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARAutoregressiveConfig, LlavaNextARConfig
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration, LlavaNextARModel
from llava_next_ar.processing.processing_llava_next_ar import LlavaNextARProcessor
from llava_next_ar.processing.video_processing_llava_next_ar import LlavaNextARVideoProcessor

pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
try:
    FOLDER = fetch_transformers_tests.fetch()
except fetch_transformers_tests.TestsUnavailableError as error:
    pytest.skip(f"transformers' own tests cannot be had: {error}", allow_module_level=True)

import upstream_tests  # noqa: E402

UPSTREAM = upstream_tests.load(FOLDER)

IMAGE_TOKEN, VIDEO_TOKEN, PAD_TOKEN = 1, 2, 0  # low, as the tests cut the vocabulary at its end


@pytest.fixture(scope="module", autouse=True)
def known_to_transformers():
    """Our classes in transformers' registries while these tests run; the tests look classes up there by name."""
    patch = pytest.MonkeyPatch()
    name = LlavaNextARConfig.model_type
    patch.setitem(configuration_auto.CONFIG_MAPPING._extra_content, name, LlavaNextARConfig)
    for mapping, names, model_class in (
        (AutoModel._model_mapping, modeling_auto.MODEL_MAPPING_NAMES, LlavaNextARModel),
        (
            AutoModelForImageTextToText._model_mapping,
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            LlavaNextARForConditionalGeneration,
        ),
    ):
        patch.setitem(mapping._extra_content, LlavaNextARConfig, model_class)
        patch.setitem(names, name, model_class.__name__)
    # Who loads with an auto class has to trust the code; these tests have no place to say so.
    patch.setattr(video_processing_auto, "resolve_trust_remote_code", lambda *args, **kwargs: True)
    # Tests that ask for a process of their own do so for the sake of a GPU's memory.
    patch.setenv("_INSIDE_SUB_PROCESS", "1")
    yield
    patch.undo()


# ---- models ------------------------------------------------------------------------------------------------------------


class ModelTester:
    """The model tester that the tests of transformers require; `add_media` adds images or videos."""

    batch_size = 7  # smaller ones the tests fill up with random rows, whose placeholders have no videos
    is_training = True
    num_hidden_layers = ONEVISION["text_config"]["num_hidden_layers"]
    num_attention_heads = ONEVISION["text_config"]["num_attention_heads"]
    hidden_size = ONEVISION["text_config"]["hidden_size"]
    vocab_size = ONEVISION["text_config"]["vocab_size"]
    image_size = ONEVISION["vision_config"]["image_size"]
    pad_token_id = PAD_TOKEN

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.vision_config = copy.deepcopy(ONEVISION["vision_config"])
        self.text_config = copy.deepcopy(ONEVISION["text_config"])
        # The length that the tests expect of hidden states and attention maps.
        self.seq_length = self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]

    def get_config(self) -> LlavaNextARConfig:
        return tiny_config(image_token_index=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN)

    def prepare_config_and_inputs_for_common(self) -> tuple[LlavaNextARConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        media, num_tokens = self.add_media(config)
        placeholder = VIDEO_TOKEN if "pixel_values_videos" in media else IMAGE_TOKEN
        width = max(num_tokens) + 7
        input_ids = torch.full((self.batch_size, width), PAD_TOKEN)
        attention_mask = torch.zeros_like(input_ids)
        for row, count in enumerate(num_tokens):
            words = torch.randint(3, self.vocab_size, (7,))
            sequence = torch.cat([words[:3], torch.full((count,), placeholder), words[3:]])
            input_ids[row, -len(sequence) :] = sequence
            attention_mask[row, -len(sequence) :] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **media}
        return config, {name: value.to(UPSTREAM["modeling"].torch_device) for name, value in inputs.items()}


class ImageModelTester(ModelTester):
    @functools.cached_property
    def num_tokens(self) -> int:
        """As many as OneVision makes of such an image."""
        model = tiny_onevision()
        pixels = torch.zeros(1, 5, 3, self.image_size, self.image_size)
        with torch.no_grad():
            features = model.get_image_features(pixels, torch.tensor([[40, 70]]), return_dict=True).pooler_output
        return len(features[0])

    def add_media(self, config):
        pixels = torch.randn(self.batch_size, 5, 3, self.image_size, self.image_size)  # the whole and up to four tiles
        sizes = torch.tensor([[40, 70]] * self.batch_size)
        return {"pixel_values": pixels, "image_sizes": sizes}, [self.num_tokens] * self.batch_size


class VideoModelTester(ModelTester):
    """Videos of unequal length; the longest comes first, as batching is tested with the first row."""

    num_frames = (4, 2, 3, 1, 4, 2, 3)

    def add_media(self, config):
        lengths = torch.tensor(self.num_frames)
        mask = torch.arange(max(self.num_frames)) < lengths[:, None]
        frames = torch.randn(*mask.shape, 3, self.image_size, self.image_size)
        media = {
            "pixel_values_videos": frames * mask[..., None, None, None],
            "video_frame_mask": mask,
            "video_timestamps": torch.rand(mask.shape).cumsum(1) * mask,
            "video_layout": config.frame_token_layout.as_tensor().expand(len(lengths), -1).clone(),
        }
        return media, [config.frame_token_layout.num_tokens(length) for length in self.num_frames]


class CommonModelTests:
    all_model_classes = (LlavaNextARForConditionalGeneration, LlavaNextARModel)
    _is_composite = True
    fast_tests = (  # all others are marked slow
        "test_attention_outputs",
        "test_batching_equivalence",
        "test_can_init_all_missing_weights",
        "test_causal_lm_loss_honors_shift_labels",
        "test_determinism",
        "test_get_image_features_pooler_output",
        "test_get_video_features_pooler_output",
        "test_hidden_states_output",
        "test_inputs_embeds_matches_input_ids",
        "test_model_forward_default_config_values",
        "test_model_outputs_equivalence",
        "test_resize_tokens_embeddings",
        "test_retain_grad_hidden_states_attentions",
        "test_save_load",
        "test_tp_plan_matches_params",
        "test_training",
        "test_training_gradient_checkpointing",
    )
    # Tiles and frames are encoded as a batch of their own: `last_hidden_state` has one row for each of them.
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = ImageModelTester(self).prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in ("pixel_values", "image_sizes")}

    def _video_features_prepare_config_and_inputs(self):
        config, inputs = VideoModelTester(self).prepare_config_and_inputs_for_common()
        return config, {name: value for name, value in inputs.items() if "video" in name}

    def _check_features_ignore_output_hidden_states(self, model_class, config, inputs_dict, method_name):
        """As it is, on the features alone: it compares tensors, and num_frames are numbers."""
        method = getattr(model_class, method_name)

        def features_alone(model, **kwargs):
            output = method(model, **kwargs)
            return type(output)(**{name: value for name, value in output.items() if name != "num_frames"})

        with mock.patch.object(model_class, method_name, features_alone):
            super()._check_features_ignore_output_hidden_states(model_class, config, inputs_dict, method_name)

    def test_can_init_all_missing_weights(self):
        """As it is, but not as custom code: of modules without parameters of their own, transformers skips
        `_init_weights` in custom code, with which SigLIP initialises its attention and MLP. That concerns a checkpoint
        without a vision tower; the head's weights are initialised by the modules that own them."""
        with mock.patch.object(PreTrainedModel, "is_custom_code", lambda model: False):
            super().test_can_init_all_missing_weights()

    def test_reverse_loading_mapping(self):
        """As it is, with OneVision's names in the file, which a save writes only when asked to."""
        save = functools.partialmethod(LlavaNextARForConditionalGeneration.save_pretrained, save_original_format=True)
        with mock.patch.object(LlavaNextARForConditionalGeneration, "save_pretrained", save):
            super().test_reverse_loading_mapping()


class TestModelsWithImages(
    CommonModelTests,
    UPSTREAM["modeling"].ModelTesterMixin,
    UPSTREAM["modeling"].GenerationTesterMixin,
    unittest.TestCase,
):
    model_tester_class = ImageModelTester
    additional_model_inputs = ["pixel_values", "image_sizes"]


class TestModelsWithVideos(
    CommonModelTests,
    UPSTREAM["modeling"].ModelTesterMixin,
    UPSTREAM["modeling"].GenerationTesterMixin,
    unittest.TestCase,
):
    model_tester_class = VideoModelTester
    additional_model_inputs = ["pixel_values_videos", "video_frame_mask", "video_timestamps", "video_layout"]


# ---- configuration -----------------------------------------------------------------------------------------------------


class TestConfiguration(unittest.TestCase):
    def test_model_configuration(self):
        self.model_tester = VideoModelTester(self)
        tester = UPSTREAM["configuration"].ConfigTester(
            self,
            config_class=LlavaNextARConfig,
            has_text_modality=False,
            common_properties=["mm_spatial_pool_mode", "autoregressive_config"],
            mm_newline_position="grid",
            image_token_index=IMAGE_TOKEN,
        )
        tester.run_common_tests()

    def test_head_configuration(self):
        self.model_tester = None
        tester = UPSTREAM["configuration"].ConfigTester(
            self,
            config_class=LlavaNextARAutoregressiveConfig,
            has_text_modality=False,
            common_properties=["num_heads", "num_layers"],
            num_hist=5,
            loss_type="cosine",
        )
        tester.run_common_tests()


# ---- video processor ---------------------------------------------------------------------------------------------------


class VideoProcessorTester:
    """The tester of video processors that the tests of transformers require."""

    batch_size = 5
    num_frames = 8
    num_channels = 3
    size = {"shortest_edge": 20}
    crop_size = {"height": 18, "width": 18}

    def prepare_video_processor_dict(self) -> dict:
        return {
            "do_resize": True,
            "size": self.size,
            "default_to_square": False,
            "do_center_crop": True,
            "crop_size": self.crop_size,
            "do_normalize": True,
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
            "do_convert_rgb": True,
            "sampling": "num_frames",  # refuses clips with fewer frames, as transformers does
            "num_frames": self.num_frames,
        }

    def expected_output_video_shape(self, videos) -> tuple[int, ...]:
        return self.num_frames, self.num_channels, self.crop_size["height"], self.crop_size["width"]

    def prepare_video_inputs(self, equal_resolution: bool = False, return_tensors: str = "pil"):
        return UPSTREAM["video_processing"].prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class TestVideoProcessor(UPSTREAM["video_processing"].VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = LlavaNextARVideoProcessor
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()

    @property
    def video_processor_dict(self) -> dict:
        return self.video_processor_tester.prepare_video_processor_dict()


# ---- processor ---------------------------------------------------------------------------------------------------------


class TestProcessor(UPSTREAM["processing"].ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaNextARProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return character_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor(tiny_config()).image_processor

    @classmethod
    def _setup_video_processor(cls):
        return tiny_processor(tiny_config()).video_processor

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": GRID**2, "vision_feature_select_strategy": "full"}

    def test_apply_chat_template_video_frame_sampling(self):
        """As it is up to the last lines: transformers refuses to sample from a list of images, here it is possible."""
        with self.assertRaisesRegex(AssertionError, "^ValueError not raised$"):
            super().test_apply_chat_template_video_frame_sampling()
