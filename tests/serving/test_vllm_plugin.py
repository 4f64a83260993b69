"""The parts of the vLLM plugin that need no vLLM; `make test-vllm` runs vLLM itself."""

import importlib
import logging
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python
from tiny import tiny_config
from tiny_processor import tiny_processor
from video_clips import write_clip

from llava_next_ar.serving.vllm_plugin import registration
from llava_next_ar.serving.vllm_plugin.joined_text import join_texts
from llava_next_ar.serving.vllm_plugin.video_file import array_of_file, open_array

sys.path.insert(0, str(Path(__file__).parents[1] / "environments"))
from vllm_cases import bpe_tokenizer  # noqa: E402

ROOT = Path(__file__).parents[2]
INSTRUCTION = "These frames are located at 0.00s,0.50s.Please answer the following questions related to this video."


def test_the_entry_point_imports_nothing_heavy():
    """Every process of vLLM imports it, for the models of other packages too; and nothing else may import vLLM."""
    entry_point = 'llava_next_ar = "llava_next_ar.serving.vllm_plugin.registration:register"'
    assert f'[project.entry-points."vllm.general_plugins"]\n{entry_point}' in (ROOT / "pyproject.toml").read_text()
    code = (
        "import sys; from llava_next_ar.serving.vllm_plugin.registration import register; "
        "print(callable(register), sorted({'vllm', 'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert run_python("-c", code).strip() == "True []"


def test_without_vllm_the_plugin_is_off_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        registration.register()
    assert "vLLM will not serve LLaVA-NeXT-AR checkpoints" in caplog.text


def test_the_registered_names_are_those_of_the_package():
    path, _, name = registration.SERVED_MODEL.partition(":")
    source = ROOT.joinpath(*path.split(".")[1:]).with_suffix(".py").read_text()
    assert f"class {name}(TransformersMultiModalForCausalLM)" in source
    from llava_next_ar.modeling import modeling_llava_next_ar

    assert hasattr(modeling_llava_next_ar, registration.ARCHITECTURE)


@pytest.mark.parametrize("content", [b"", b"SECRET", b"SECRET" * 1000])
def test_a_file_never_shows_its_content(content):
    array = array_of_file(content)
    assert array.shape == (len(content),) and array.tobytes() == content
    file = open_array(array)
    for text in (repr(file), str(file), f"{file}", repr({"videos": [file]}), f"{[file]!r}"):
        assert "SECRET" not in text and "83, 69" not in text
    assert repr(file) == f"<video file of {len(content)} bytes>"
    assert file.read() == content and repr(file) == f"<video file of {len(content)} bytes>"
    assert pickle.loads(pickle.dumps(file)).getvalue() == content


def test_decoded_frames_stay_as_they_are():
    frames = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    assert open_array(frames) is frames
    assert open_array(frames.numpy()).shape == (2, 4, 4, 3)


def test_the_processor_reads_a_file_as_it_reads_its_path(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", num_frames=30)
    processor = tiny_processor(tiny_config(), num_frames=4)
    inputs = processor(text="<video>", videos=[open_array(array_of_file(path.read_bytes()))], return_tensors="pt")
    expected = processor(text="<video>", videos=[str(path)], return_tensors="pt")
    assert inputs.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(inputs[name], values), name


def test_the_error_of_a_damaged_file_names_the_cause_and_shows_no_content():
    processor = tiny_processor(tiny_config(), num_frames=4)
    with pytest.raises(ValueError, match="cannot") as caught:
        processor(text="<video>", videos=[open_array(array_of_file(b"SECRET" * 50))], return_tensors="pt")
    assert "SECRET" not in str(caught.value)


@pytest.fixture
def loader(monkeypatch):
    """The loader, on a stand-in for the class of vLLM that it inherits from."""
    for name in ("vllm", "vllm.multimodal", "vllm.multimodal.video"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.multimodal.video"].VideoLoader = object
    monkeypatch.delitem(sys.modules, "llava_next_ar.serving.vllm_plugin.file_loader", raising=False)
    yield importlib.import_module("llava_next_ar.serving.vllm_plugin.file_loader").WholeFileLoader
    sys.modules.pop("llava_next_ar.serving.vllm_plugin.file_loader")


def test_the_loader_hands_on_the_whole_file_for_the_processor_to_sample(loader):
    array, metadata = loader.load_bytes(b"content", num_frames=32)  # what vLLM passes where nothing is given
    assert array.tobytes() == b"content" and metadata == {"do_sample_frames": True}


@pytest.mark.parametrize(
    "options", [{"num_frames": 4}, {"num_frames": -1}, {"fps": 2}, {"num_frames": 32, "backend": "x"}]
)
def test_a_sampling_by_vllm_is_an_error_that_names_the_other_option(loader, options):
    wrong = next(name for name, value in options.items() if value != 32)
    with pytest.raises(ValueError, match=rf"'{wrong}'.*mm_processor_kwargs"):
        loader.load_bytes(b"content", **options)


# -- The prompt


@dataclass
class Placeholder:
    """As vLLM's `PlaceholderFeaturesInfo`."""

    start_idx: int
    tokens: list[int]
    is_embed: Any


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer([f"{INSTRUCTION}\nWhat happens in the video?\nCompare them.\n" * 9])


def _put_in(tokenizer, pieces: list[str], num_tokens: list[int]) -> tuple[list[int], list[Placeholder]]:
    """The prompt as vLLM makes it: each piece encoded alone, and between them a video with its instruction."""
    prompt, placeholders = tokenizer.encode(pieces[0]), []
    video = tokenizer.convert_tokens_to_ids("<video>")
    for number, piece in zip(num_tokens, pieces[1:], strict=True):
        tokens = [video] * number + tokenizer.encode(INSTRUCTION)
        placeholders.append(Placeholder(len(prompt), tokens, torch.tensor(tokens) == video))
        prompt = [*prompt, *tokens, *tokenizer.encode(piece)]
    return prompt, placeholders


@pytest.mark.parametrize(
    "pieces",
    [
        ["<|im_start|>user\n", "\nWhat happens in the video?<|im_end|>\n<|im_start|>assistant\n"],
        ["<|im_start|>user\n", "\n", "\nCompare them.<|im_end|>\n"],  # two videos
        ["<|im_start|>user\nLook: ", "<|im_end|>\n"],  # nothing behind it
        ["<|im_start|>user\n", "\n\n\nWhat?<|im_end|>\n"],
        ["", ""],
    ],
)
def test_the_text_behind_a_video_is_encoded_as_in_training(tokenizer, pieces):
    num_tokens = list(range(3, 2 + len(pieces)))
    prompt, placeholders = _put_in(tokenizer, pieces, num_tokens)
    whole = pieces[0] + "".join(
        "<video>" * number + INSTRUCTION + piece for number, piece in zip(num_tokens, pieces[1:], strict=True)
    )
    expected = tokenizer.encode(whole)
    if pieces[1].startswith("\n"):
        assert prompt != expected, "the case shows nothing"
    assert join_texts(prompt, placeholders, tokenizer) == expected
    video = tokenizer.convert_tokens_to_ids("<video>")
    for number, placeholder in zip(num_tokens, placeholders, strict=True):
        assert placeholder.tokens == [video] * number and placeholder.is_embed is None
        assert expected[placeholder.start_idx : placeholder.start_idx + number] == placeholder.tokens
        assert expected[placeholder.start_idx - 1 : placeholder.start_idx] != [video]


def test_images_between_videos_keep_their_places(tokenizer):
    image, video = (tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<video>"))
    prompt, (first,) = _put_in(tokenizer, ["a", "\nb"], [2])
    picture = Placeholder(len(prompt), [image] * 4, None)
    prompt = [*prompt, *picture.tokens, *tokenizer.encode("\nend")]
    joined = join_texts(prompt, [first, picture], tokenizer)
    assert joined == tokenizer.encode("a" + "<video>" * 2 + INSTRUCTION + "\nb" + "<image>" * 4 + "\nend")
    assert joined[picture.start_idx : picture.start_idx + 4] == [image] * 4
    assert joined[first.start_idx : first.start_idx + 2] == [video] * 2
