"""One reading of each batch of prompts for all that is measured of it, and per-frame numbers in few transfers."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from demo_folder import make_changed_checkpoint, make_demo_folder
from torch.utils._python_dispatch import TorchDispatchMode
from video_clips import write_clip

from llava_next_ar.evaluation import evaluate, measures
from llava_next_ar.evaluation.questions import PromptCollator, Prompts, read_questions
from llava_next_ar.evaluation.settings import EvaluationSettings
from llava_next_ar.training.data import LlavaVideoDataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_demo_folder(tmp_path_factory.mktemp("prefill"))
    make_changed_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return evaluate.load_checkpoint(str(folder / "changed"))


def settings_for(folder, **options):
    options = {"data": str(folder / "clips" / "test.json"), "max_new_tokens": 3, "bootstrap_samples": 0, **options}
    return EvaluationSettings(model=str(folder / "changed"), **options)


class Calls:
    """Counts forward passes of a model: all, those over media, and those of its vision tower."""

    def __init__(self, model):
        self.all = self.over_media = self.of_tower = 0
        self.hooks = [
            model.register_forward_pre_hook(self._count, with_kwargs=True),
            model.model.vision_tower.register_forward_pre_hook(self._count_tower),
        ]

    def _count(self, module, args, kwargs):
        self.all += 1
        media = ("pixel_values_videos", "mm_encoder_outputs")  # `generate` encodes before
        self.over_media += any(kwargs.get(name) is not None for name in media)

    def _count_tower(self, module, args):
        self.of_tower += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


class Items(TorchDispatchMode):
    """Counts numbers that are read one at a time: on a GPU, each waits for it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("horizons", [1, 2])
def test_numbers_are_those_of_separate_passes(folder, checkpoint, batch_size, horizons):
    """Bit for bit: in the three alone, nothing is shared."""
    settings = settings_for(folder, batch_size=batch_size, max_samples=10, horizons=horizons)
    none = {"generation": False, "likelihood": False, "reconstruction": False}
    together = evaluate.evaluate(settings, *checkpoint, progress=False)
    alone = {
        name: evaluate.evaluate(replace(settings, **{**none, name: True}), *checkpoint, progress=False)
        for name in none
    }
    answers = [
        {**said, **scored}
        for said, scored in zip(*(alone[n]["answers"] for n in ("generation", "likelihood")), strict=True)
    ]
    assert together["answers"] == answers
    assert together["videos"] == alone["reconstruction"]["videos"]
    assert any("log_likelihoods" in answer for answer in answers) and any(v["next_frame"] for v in together["videos"])
    assert len({answer["generated"] for answer in answers}) > 1


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 3 + 1),  # three new tokens, and the choices
        ({"likelihood": False}, 3),
        ({"generation": False}, 1 + 1),
        ({"generation": False, "likelihood": False}, 1),
        ({"generation": False, "likelihood": False, "reconstruction": False}, 0),
    ],
)
def test_a_batch_is_read_once(folder, checkpoint, options, passes):
    model, processor = checkpoint
    settings = settings_for(folder, batch_size=4, max_samples=4, **options)
    questions = read_questions(LlavaVideoDataset(settings.data, processor), settings.max_samples)
    assert any(q.choices for q in questions) and any(q.first_videos for q in questions)
    prompts = Prompts(questions, processor, settings)
    batch, _ = PromptCollator(processor)([prompts[index] for index in range(4)])
    # No answer ends early, so that the number of passes is that of the tokens.
    with mock.patch.object(model.generation_config, "eos_token_id", None), Calls(model) as calls:
        measures.measure_batch(model, processor, batch, questions, settings)
    assert (calls.all, calls.over_media) == (passes, min(passes, 1))
    assert calls.of_tower == min(passes, 1)


@pytest.mark.parametrize("changes", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_a_checkpoints_own_cache_options_change_nothing(folder, checkpoint, changes):
    model, processor = checkpoint
    settings = settings_for(folder, batch_size=3, max_samples=3)
    expected = evaluate.evaluate(settings, model, processor, progress=False)
    with mock.patch.multiple(model.generation_config, **changes):
        other = evaluate.evaluate(settings, model, processor, progress=False)
    assert (other["answers"], other["videos"]) == (expected["answers"], expected["videos"])


def test_the_hook_is_gone_after_an_error(folder, checkpoint):
    model, processor = checkpoint
    before = len(model._forward_hooks)
    with mock.patch.object(model, "generate", side_effect=RuntimeError("out of memory")), pytest.raises(RuntimeError):
        evaluate.evaluate(settings_for(folder, max_samples=1), model, processor, progress=False)
    assert len(model._forward_hooks) == before


def test_no_number_of_a_frame_is_read_by_itself(folder, checkpoint, tmp_path, monkeypatch):
    """Three `.item()` for each predicted frame there once were; what is left does not grow with the frames."""
    model, processor = checkpoint
    write_clip(tmp_path / "clip.mp4", 24, width=64, height=48, fps=4)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"video": "clip.mp4", "conversations": turns}]))
    counts, lists = [], []
    for num_frames in (5, 20):
        settings = settings_for(folder, data=str(tmp_path / "data.json"), num_frames=num_frames, generation=False)
        questions = read_questions(LlavaVideoDataset(settings.data, processor))
        batch, _ = PromptCollator(processor)([Prompts(questions, processor, settings)[0]])
        batch.pop("labels")
        with torch.inference_mode():
            prompts = measures.read_prompts(model, batch, max_new_tokens=0, wants_cache=False, wants_frames=True)
            called = mock.Mock(side_effect=torch.Tensor.tolist)
            monkeypatch.setattr(torch.Tensor, "tolist", lambda self, called=called: called(self))
            with Items() as items:
                (record,) = measures.next_frame_records(prompts.reconstruction, batch["video_timestamps"], questions)
            monkeypatch.undo()
        assert len(record["mse"]) == len(record["linear_mse"]) == num_frames - 1
        assert all(isinstance(value, float) for value in (*record["mse"], *record["linear_mse"], *record["cosine"]))
        counts.append(items.count)
        lists.append(called.call_count)
    assert counts == [0, 0]
    assert lists[0] == lists[1] <= 6
