"""Data and trainer: labels, errors, and losses that do not depend on the split of a step."""

import copy
import json
import sys
from pathlib import Path

import guard_runs
import processes
import psutil
import pytest
import torch
import torch.distributed.nn  # imported later, its functions would keep the process group of that time
from PIL import Image
from tiny import VIDEO_TOKEN, tiny_model, tiny_onevision
from tiny_processor import tiny_processor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training_runs import CASES, FRAMES, SPLITS, TOWERS, difference, make_samples, one_step
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from video_clips import picture, write_clip

from llava_next_ar.training.trainer import (
    AutoregressiveTrainer,
    BadSampleError,
    LlavaVideoCollator,
    LlavaVideoDataset,
)

TESTS = Path(__file__).resolve().parents[1]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model.config, num_frames=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Videos of 12, 3 and 1 frames, two images, a damaged video and a file outside."""
    folder = tmp_path_factory.mktemp("media") / "root"
    folder.mkdir()
    for name, num_frames in (("long", 12), ("short", 3), ("still", 1)):
        write_clip(folder / f"{name}.mp4", num_frames, width=64, height=48)
    Image.fromarray(picture(3, 60, 40)).save(folder / "a.png")
    Image.fromarray(picture(9, 40, 60)).save(folder / "b.png")
    (folder / "damaged.mp4").write_bytes((folder / "long.mp4").read_bytes()[:300])
    write_clip(folder.parent / "outside.mp4", 3, width=64, height=48)
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    return folder


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return [
        {"conversations": turns("<video>\nWhat?", "A square.", "Sure?", "Yes!"), "video": "long.mp4"},
        {"conversations": turns("Hello?", "Hi there.")},
        {"conversations": turns("<video>\n<video>\nSame?", "No."), "video": ["short.mp4", "long.mp4"]},
        {"conversations": turns("<image>\nWhat?", "A picture."), "image": "a.png"},
        {"video": "still.mp4"},
        {
            "conversations": turns("<image>\nAnd <video>\nand <image>\n?", "All."),
            "video": "short.mp4",
            "image": ["a.png", "b.png"],
        },
        {"video": "short.mp4"},
    ]


@pytest.fixture(scope="module")
def dataset(entries, processor, root) -> LlavaVideoDataset:
    return LlavaVideoDataset(entries, processor, video_root=root)


# ------------------------------------------------------------------------------------------------------------- dataset


def supervised_text(sample, processor) -> str:
    return processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])


def test_exactly_the_answers_are_supervised(dataset, processor):
    texts = [supervised_text(sample, processor) for sample in dataset]
    assert texts == [
        "A square.<|im_end|>Yes!<|im_end|>",
        "Hi there.<|im_end|>",
        "No.<|im_end|>",
        "A picture.<|im_end|>",
        "",
        "All.<|im_end|>",
        "",
    ]


def test_labels_are_the_inputs_where_supervised(dataset):
    for sample in dataset:
        is_target = sample["labels"] != -100
        assert torch.equal(sample["labels"][is_target], sample["input_ids"][is_target])


def test_chat_messages_give_the_same_sample_as_llava_turns(dataset, processor, root):
    video = {"type": "video", "video": "short.mp4"}
    image = {"type": "image"}
    question = [
        *(image, {"type": "text", "text": "And "}, video, {"type": "text", "text": "and "}),
        *({"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": "?"}),
    ]
    chat = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "All."}],
            "image": "a.png",
        },
        {
            "messages": [
                {"role": "user", "content": "<video>\nWhat?"},
                {"role": "assistant", "content": "A square."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes!"},
            ],
            "videos": ["long.mp4"],
        },
    ]
    for sample, expected in zip(
        LlavaVideoDataset(chat, processor, video_root=root), (dataset[5], dataset[0]), strict=True
    ):
        sample.pop("sample_name"), expected.pop("sample_name")
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[name], expected[name]) for name in sample)


def test_json_lines_and_json_are_read_relative_to_the_file(entries, dataset, processor, root):
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    (root / "data.json").write_text(json.dumps(entries))
    for name in ("data.jsonl", "data.json"):
        read = LlavaVideoDataset(root / name, processor)
        assert len(read) == len(entries)
        assert torch.equal(read[0]["pixel_values_videos"], dataset[0]["pixel_values_videos"])


BAD = {
    "role": ({"conversations": [{"from": "bot", "value": "x"}]}, "'bot', expected one of system, human, gpt"),
    "chat role": ({"messages": [{"role": "gpt", "content": "x"}]}, "'gpt', expected one of system, user, assistant"),
    "no answer": ({"conversations": turns("<video>\nWhat?"), "video": "short.mp4"}, "no answer"),
    "empty answer": ({"conversations": turns("What?", " ")}, "no answer"),
    "missing placeholder": ({"conversations": turns("a", "b"), "video": "short.mp4"}, "0 <video> placeholders for 1"),
    "missing video": ({"conversations": turns("<video>\na", "b")}, "1 <video> placeholders for 0 videos"),
    "too many parts": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "b"}]},
        "no video is given for it",
    ),
    "video in an answer": (
        {"conversations": turns("a", "<video>\nb"), "video": "short.mp4"},
        "0 <video> placeholders for 1 videos",
    ),
    "no file": ({"conversations": turns("<video>\na", "b"), "video": "gone.mp4"}, "no such file: .*gone.mp4"),
    "damaged": ({"conversations": turns("<video>\na", "b"), "video": "damaged.mp4"}, "damaged.mp4"),
    "no media": ({"id": 7}, "neither 'conversations' nor 'messages'"),
    "no dict": ("short.mp4", "must be a dict, got str"),
    "both": ({"conversations": [], "messages": []}, "both 'conversations' and 'messages'"),
    "number": ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 must have a string"),
    "dots": ({"video": "../outside.mp4"}, "leads to .*outside.mp4, outside of"),
    "link": ({"video": "link.mp4"}, "leads to .*outside.mp4, outside of"),
    "absolute": ({"video": "/etc/hostname"}, "outside of"),
    "url": ({"video": "https://example.org/x.mp4"}, "is a URL"),
}


@pytest.mark.parametrize(("entry", "cause"), BAD.values(), ids=BAD)
def test_a_bad_sample_names_itself_its_file_and_the_cause(entry, cause, processor, root):
    if isinstance(entry, dict):
        entry = {"id": "clip-1", **entry}
    bad = LlavaVideoDataset([{"video": "short.mp4"}, entry], processor, video_root=root)
    with pytest.raises(BadSampleError, match=cause) as caught:
        bad[1]
    error = caught.value
    assert error.index == 1 and "sample 1" in str(error)
    if isinstance(entry, dict):
        assert error.sample_id == entry["id"] and repr(entry["id"]) in str(error)
        if "video" in entry:
            assert error.files == (entry["video"],) and entry["video"] in str(error)
    bad[0]  # the other one is fine


def test_paths_may_leave_the_folder_when_allowed(processor, root):
    names = ["../outside.mp4", "link.mp4", str(root.parent / "outside.mp4")]
    allowed = LlavaVideoDataset(
        [{"video": name} for name in names], processor, video_root=root, allow_outside_root=True
    )
    pixels = [sample["pixel_values_videos"] for sample in allowed]
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])


def test_check_finds_a_missing_file_without_decoding(entries, processor, root):
    LlavaVideoDataset([*entries, {"video": "damaged.mp4"}], processor, video_root=root).check()
    with pytest.raises(BadSampleError, match="sample 7.*gone.mp4"):
        LlavaVideoDataset([*entries, {"video": "gone.mp4"}], processor, video_root=root).check()


def test_a_bad_sample_is_still_named_when_a_worker_finds_it(processor, root):
    bad = LlavaVideoDataset([{"video": "damaged.mp4", "id": "clip-1"}], processor, video_root=root)
    with pytest.raises(BadSampleError, match="sample 0 .*clip-1.*damaged.mp4"):
        list(DataLoader(bad, num_workers=1, collate_fn=LlavaVideoCollator(processor)))


def test_too_long_a_sample_says_by_how_many_tokens(dataset, entries, processor, root):
    def limited(index: int, max_length: int, **options) -> dict:
        return LlavaVideoDataset([entries[index]], processor, video_root=root, max_length=max_length, **options)[0]

    sample = dataset[0]
    length = len(sample["input_ids"])
    is_visual = sample["input_ids"] == processor.video_token_id
    last_visual = int(is_visual.nonzero().max())
    first_target = int((sample["labels"] != -100).nonzero().min())
    assert len(limited(0, length)["input_ids"]) == length
    with pytest.raises(BadSampleError, match=f"has {length} tokens, 3 more than max_length={length - 3}; truncate"):
        limited(0, length - 3)
    assert torch.equal(limited(0, length - 3, truncate=True)["labels"], sample["labels"][:-3])
    with pytest.raises(BadSampleError, match=f"2 of its {int(is_visual.sum())} visual tokens .* Sample fewer frames"):
        limited(0, last_visual - 1, truncate=True)
    with pytest.raises(BadSampleError, match=r"all its 15 targets lie beyond; the first one is 4 too far"):
        limited(0, first_target - 3, truncate=True)


def test_a_template_that_marks_no_answer_is_refused_at_once(entries, model):
    unmarked = tiny_processor(model.config)
    unmarked.chat_template = unmarked.chat_template.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    with pytest.raises(ValueError, match="generation"):
        LlavaVideoDataset(entries, unmarked)


# ------------------------------------------------------------------------------------------------------------ collator


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_sample_gives_the_same_alone_and_in_a_padded_batch(dataset, processor, model, padding_side):
    collator = LlavaVideoCollator(processor, padding_side=padding_side, pad_to_multiple_of=8)
    samples = list(dataset)
    batch = collator(samples)
    assert batch["input_ids"].shape[1] % 8 == 0
    with torch.no_grad():
        together = model(**batch)
        alone = [model(**collator([sample])) for sample in samples]
    plain = LlavaVideoCollator(processor)
    num_targets, num_videos = 0, 0
    main_sum, autoregressive_sum = 0.0, 0.0
    for row, (sample, output) in enumerate(zip(samples, alone, strict=True)):
        length = len(sample["input_ids"])
        own = slice(-length, None) if padding_side == "left" else slice(None, length)
        torch.testing.assert_close(together.logits[row, own], output.logits[0, own], atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            unpadded = model(**plain([sample]))
        torch.testing.assert_close(unpadded.logits[0], output.logits[0, own], atol=1e-5, rtol=1e-5)
        targets = int((sample["labels"][1:] != -100).sum())
        main_sum, num_targets = main_sum + unpadded.main_loss * targets, num_targets + targets
        if unpadded.autoregressive_loss is not None:
            videos = int((sample["video_frame_mask"].sum(1) >= 2).sum())
            autoregressive_sum += unpadded.autoregressive_loss * videos
            num_videos += videos
    assert num_videos == 5
    torch.testing.assert_close(together.main_loss, main_sum / num_targets, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.autoregressive_loss, autoregressive_sum / num_videos, atol=1e-5, rtol=1e-5)


def test_collator_refuses_what_cannot_share_a_batch(dataset, processor):
    other_size = dict(dataset[0])
    other_size["pixel_values_videos"] = other_size["pixel_values_videos"][..., :-1]
    with pytest.raises(ValueError, match="must agree"):
        LlavaVideoCollator(processor)([dataset[0], other_size])
    with_types = {**dataset[0], "video_frame_types": torch.zeros(1, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match="1 of 2 samples have video_frame_types"):
        LlavaVideoCollator(processor)([dataset[0], with_types])
    without_padding = copy.deepcopy(processor.tokenizer)
    without_padding.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        LlavaVideoCollator(without_padding)


# ------------------------------------------------------------------------------------------------ invariance of a step


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict:
    """Every case in every split: in this process, and on two ranks of gloo."""
    path = tmp_path_factory.mktemp("ranks") / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with processes.Program([*command, TESTS / "training_runs.py", path]) as ranks:
        results = {
            (trainer, objective, (1, *split)): one_step(objective, *split, trainer)
            for trainer, objective in CASES
            for split in SPLITS[1]
        }
        ranks.finish(timeout=480)
    on_ranks = torch.load(path, weights_only=False)
    results["guards"] = on_ranks.pop("guards")
    assert {result["processes"] for result in on_ranks.values()} == {2}
    return results | on_ranks


def test_gradients_do_not_depend_on_how_a_step_is_split(steps):
    print(f"\n{'trainer':<22}{'objective':<16}{'batch x accumulation x ranks':<30}max relative difference")
    for trainer, objective in CASES:
        reference = steps[trainer, objective, (1, 8, 1)]["gradients"]
        assert max(gradient.abs().max() for gradient in reference.values()) > 1e-3
        for num_ranks, splits in SPLITS.items():
            for split in splits:
                worst = difference(reference, steps[trainer, objective, (num_ranks, *split)]["gradients"])
                print(f"{trainer:<22}{objective:<16}{f'{split[0]} x {split[1]} x {num_ranks}':<30}{worst:.1e}")
                assert worst < 1e-5


def test_the_log_adds_up_and_does_not_depend_on_how_a_step_is_split(steps):
    for objective, (weight, _) in {"main": (0, 1), "reconstruction": (1, 0), "both": (1, 1)}.items():
        reference = steps["AutoregressiveTrainer", objective, (1, 8, 1)]["log"]
        for num_ranks, splits in SPLITS.items():
            for split in splits:
                log = steps["AutoregressiveTrainer", objective, (num_ranks, *split)]["log"]
                assert log["total_loss"] == pytest.approx(log["loss"], rel=1e-6)
                total = log["main_loss"] + weight * log["autoregressive_loss"]
                assert log["total_loss"] == pytest.approx(total, rel=1e-6)
                assert log["autoregressive_share"] == pytest.approx(1 - log["main_loss"] / log["loss"], abs=1e-6)
                for name in ("loss", "main_loss", "autoregressive_loss", "skill"):
                    assert log[name] == pytest.approx(reference[name], rel=1e-5)


def test_the_logged_losses_are_means_over_tokens_and_videos(steps):
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    change = model.autoregressive_module.change
    change.weight.data = torch.randn(change.weight.shape, generator=generator) * 0.1
    with torch.no_grad():
        output = model(**LlavaVideoCollator(0)(make_samples(model.config)))
    log = steps["AutoregressiveTrainer", "both", (2, 2, 2)]["log"]
    assert log["main_loss"] == pytest.approx(output.main_loss.item(), rel=1e-5)
    assert log["autoregressive_loss"] == pytest.approx(output.autoregressive_loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_ranks_with_and_without_video_agree(steps, name):
    # A rank whose batch left out the head would wait for the other for ever, or miss its gradient.
    one_process = one_step("both", 2, 1, frames=FRAMES[:2], **TOWERS[name])
    assert difference(one_process["gradients"], steps[name]["gradients"]) < 1e-5


def test_ranks_skip_the_step_that_one_of_them_spoils(steps):
    skipped, absent = steps["guards"]["skip"], steps["guards"]["absent"]
    assert skipped["processes"] == 2
    assert all(torch.equal(skipped["weights"][name], value) for name, value in absent["weights"].items())
    for name in ("loss", "main_loss", "autoregressive_loss", "grad_norm"):
        assert [entry[name] for entry in skipped["log"]] == [entry[name] for entry in absent["log"]]
    assert [entry["step"] for entry in skipped["log"]] == [1, 3] and skipped["log"][1]["skipped_steps"] == 1
    (line,) = skipped["ledger"]
    losses = {(batch["rank"], batch["batch"], *batch["samples"]): batch["loss"] for batch in line["batches"]}
    assert losses.keys() == {(0, 0, "clip 4"), (0, 1, "clip 6"), (1, 0, "clip 5"), (1, 1, "clip 7")}
    assert [name for name, loss in losses.items() if loss == "nan"] == [(1, 1, "clip 7")]


def test_ranks_stop_together_and_say_why(steps):
    error = steps["guards"]["stop"]["error"]
    assert error["step"] == 2 and "batch 1 of rank 1 (loss nan): clip 7." in error["message"]


def test_ranks_that_see_different_norms_decide_alike(steps):
    """Each judged by itself, and the one that found a problem waited in vain for the other to say what it had trained on."""
    disagreeing = steps["guards"]["disagree"]
    assert (disagreeing["processes"], disagreeing["steps"]) == (2, 3)
    (line,) = disagreeing["ledger"]
    assert (line["step"], line["action"], line["grad_norm"]) == (2, "skip", "nan") and len(line["batches"]) == 4
    absent = steps["guards"]["absent"]
    assert all(torch.equal(disagreeing["weights"][name], value) for name, value in absent["weights"].items())


def test_guards_and_signals_need_one_reduction_a_step(steps):
    run, number = steps["guards"]["reductions"]
    assert run["processes"] == 2 and run["steps"] == 3
    assert number == 3 + 1  # and one for the losses of the log entry


def test_throughput_is_of_all_ranks_and_all_batches_of_a_step(steps):
    """Ratios of rates are those of counts, whatever the time: 2 ranks, 2 batches of one sample each, 3 steps."""
    samples = guard_runs.named_samples(tiny_model().config, 12)
    measured = steps["guards"]["whole run"]["measured"]
    assert len(measured) == 3
    for step, entry in enumerate(measured):
        ids = [sample["input_ids"] for sample in samples[4 * step : 4 * step + 4]]
        num_tokens = sum(map(len, ids))
        num_visual = sum(int((row == VIDEO_TOKEN).sum()) for row in ids)
        assert num_visual > 0
        assert entry["tokens_per_second"] / entry["samples_per_second"] == pytest.approx(num_tokens / 4)
        assert entry["visual_tokens_per_second"] / entry["tokens_per_second"] == pytest.approx(num_visual / num_tokens)
        text = entry["tokens_per_second"] - entry["visual_tokens_per_second"]
        assert entry["text_tokens_per_second"] == pytest.approx(text)
        assert 0 < entry["data_wait_share"] < 1 and entry["peak_memory_gib"] > 0.01
        assert "model_flops_utilization" not in entry  # the peak of a CPU is not known


# Stopped after step 5 of 6, in the second epoch, accelerate would go on in the order of the first.
@pytest.mark.parametrize(("kind", "num_steps"), [("in order", 3), ("at random", 6), ("stream", 3)])
def test_ranks_stop_together_when_one_is_terminated_and_go_on_exactly(steps, kind, num_steps):
    whole, terminated, resumed = (steps["guards"][kind][name] for name in ("whole", "terminated", "resumed"))
    stop = num_steps - 1
    assert (terminated["steps"], terminated["checkpoints"], terminated["log"]) == (stop, [f"checkpoint-{stop}"], [])
    assert resumed["log"] == whole["log"] and [entry["step"] for entry in whole["log"]] == [num_steps]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


def test_ranks_read_nothing_of_a_stream_that_they_have_trained_on(steps):
    runs = steps["guards"]["stream"]
    assert runs["whole"]["read"] == [0, 2, 4, 6, 8, 10]  # of the first rank
    assert runs["resumed"]["read"] == [8, 10]


def test_a_plain_trainer_survives_a_step_without_any_label(tmp_path):
    # 0 targets made 0 / 0 of it once: NaN in every weight, and a logged loss of 0.
    step = one_step("reconstruction", 2, 2, "Trainer")
    assert all(gradient.isfinite().all() for gradient in step["gradients"].values())


# ------------------------------------------------------------------------------------------------------------- trainer


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3}
    return TrainingArguments(folder, **{**defaults, **options})


def test_processor_and_collator_come_from_the_dataset_and_checkpoints_are_complete(dataset, tmp_path):
    trainer = AutoregressiveTrainer(tiny_model(), arguments(tmp_path, save_strategy="steps", save_steps=2), dataset)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    assert processor.video_processor.num_frames == 5
    batch = LlavaVideoCollator(processor)([dataset[0]])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch)
        actual = loaded(**batch)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.autoregressive_loss, expected.autoregressive_loss)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_is_a_mean_over_the_set_whatever_the_batches(dataset, processor, tmp_path, batch_size):
    model = tiny_model(head={"loss_weight": 0.5})
    torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.05)
    trainer = AutoregressiveTrainer(
        model, arguments(tmp_path, per_device_eval_batch_size=batch_size), dataset, eval_dataset=dataset
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        output = model.eval()(**LlavaVideoCollator(processor)(list(dataset)), return_reconstruction=True)
    frames = output.reconstruction.frame_metrics()
    expected = {
        "eval_main_loss": output.main_loss,
        "eval_autoregressive_loss": output.autoregressive_loss,
        "eval_loss": output.main_loss + 0.5 * output.autoregressive_loss,
        "eval_skill": 1 - frames["mse"].mean() / frames["copy_mse"].mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-5), name


def test_training_starts_at_the_copy_baseline_and_improves_on_it(dataset, tmp_path):
    trainer = AutoregressiveTrainer(
        tiny_model(head={"loss_weight": 1.0}),
        arguments(tmp_path, max_steps=30, per_device_train_batch_size=7, lr_scheduler_type="constant"),
        dataset,
        head_learning_rate=5e-3,
    )
    trainer.train()
    skills = [entry["skill"] for entry in trainer.state.log_history if "skill" in entry]
    assert skills[0] == 0 and skills[-1] > 0.2


def test_no_logits_are_made_in_training(dataset, tmp_path):
    trainer = AutoregressiveTrainer(tiny_model(), arguments(tmp_path), dataset, eval_dataset=dataset)
    widths = []
    trainer.model.lm_head.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].dim()))
    trainer.train()
    trainer.evaluate()
    assert set(widths) == {2}  # [targets, hidden], never [B, S, hidden]


def test_without_the_objective_the_head_neither_runs_nor_changes(dataset, tmp_path, monkeypatch):
    model = tiny_model()
    before = copy.deepcopy(model.autoregressive_module.state_dict())
    monkeypatch.setattr(type(model.autoregressive_module), "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    trainer = AutoregressiveTrainer(
        model, arguments(tmp_path, weight_decay=0.1), dataset, enable_autoregressive=False, eval_dataset=dataset
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert all(torch.equal(value, before[name]) for name, value in model.autoregressive_module.state_dict().items())
    log = trainer.state.log_history[0]
    assert log["total_loss"] == log["main_loss"] == pytest.approx(log["loss"])
    assert "autoregressive_loss" not in log and "eval_autoregressive_loss" not in metrics
    assert metrics["eval_loss"] == metrics["eval_main_loss"]


def test_any_model_trains_without_the_objective(tmp_path):
    model = tiny_onevision()
    config = tiny_model().config
    samples = make_samples(config, frames=([], []))
    trainer = AutoregressiveTrainer(
        model, arguments(tmp_path), samples, enable_autoregressive=False, data_collator=LlavaVideoCollator(0)
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["main_loss"] == pytest.approx(log["loss"]) and log["loss"] > 0


def test_the_head_has_its_own_learning_rate(dataset, tmp_path):
    trainer = AutoregressiveTrainer(
        tiny_model(), arguments(tmp_path, weight_decay=0.1), dataset, head_learning_rate=0.25
    )
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {group["weight_decay"] for group in optimizer.param_groups if group["lr"] == 0.25}
    assert decays == {0.0, 0.1}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (0.25 if name.startswith("autoregressive_module.") else 1e-3)
    assert not rates


def test_refusals(dataset, tmp_path):
    with pytest.raises(ValueError, match="LlavaOnevisionForConditionalGeneration has no reconstruction head"):
        AutoregressiveTrainer(tiny_onevision(), arguments(tmp_path), dataset)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        AutoregressiveTrainer(tiny_model(), arguments(tmp_path, label_smoothing_factor=0.1), dataset)
    with pytest.raises(ValueError, match="compute_loss_func"):
        AutoregressiveTrainer(tiny_model(), arguments(tmp_path), dataset, compute_loss_func=lambda *args: None)


def test_the_process_group_ends_with_the_trainer(tmp_path):
    """Ranks hung after their last line if a wrapper was the last to hold the group (pytorch/pytorch#56297)."""
    trainer = AutoregressiveTrainer(tiny_model(), arguments(tmp_path))
    threads = psutil.Process().num_threads()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = trainer.model_wrapped = DistributedDataParallel(trainer.model)  # noqa: F841 (held by the caller too)
        earlier = DistributedDataParallel(tiny_model())  # noqa: F841 (of a run before, known to no trainer)
        assert psutil.Process().num_threads() > threads
        trainer.end()
        assert psutil.Process().num_threads() == threads
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_plain_trainer_trains_too(tmp_path):
    model = tiny_model(head={"loss_weight": 1.0})
    samples = make_samples(model.config, frames=([4], [3]))
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=15, learning_rate=1e-2, lr_scheduler_type="constant"),
        data_collator=LlavaVideoCollator(0),
        train_dataset=samples,
        eval_dataset=samples,
    )
    trainer.train()
    # An argument of forward that is named like a label and not given once kept Trainer from evaluating any loss.
    assert trainer.evaluate()["eval_loss"] > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]


def test_a_plain_trainer_resumes_where_it_stopped(tmp_path):
    """Under legacy names in the file it went on from fresh weights, with one warning."""

    def run(folder: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
        model = tiny_model()
        trainer = Trainer(
            model,
            arguments(folder, max_steps=4, save_steps=2, save_strategy="steps", learning_rate=1e-2),
            data_collator=LlavaVideoCollator(0),
            train_dataset=make_samples(model.config, frames=([4], [3])),
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model.state_dict()

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-2")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
