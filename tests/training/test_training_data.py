"""Sources, mixtures, streams, bad samples and lengths: what is trained on, and what is not."""

import itertools
import json
import pickle
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import av
import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderShard, IterableDatasetShard
from PIL import Image
from tiny import tiny_model
from tiny_processor import tiny_processor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from training_runs import KeepGradients, difference
from transformers import TrainerCallback, TrainingArguments
from video_clips import cut, picture, write_clip

from llava_next_ar.processing import video_frames
from llava_next_ar.training import recipes
from llava_next_ar.training import samples as training_samples
from llava_next_ar.training.bad_samples import BadSample, BadSampleError, BadSampleLedger, TooManyBadSamplesError
from llava_next_ar.training.collator import LlavaVideoCollator, first_batches_unread, read_samples
from llava_next_ar.training.data import LlavaVideoDataset, load_training_data
from llava_next_ar.training.mixture import EpochSampler, LlavaVideoMixture
from llava_next_ar.training.sources import DataSource, JsonEntries
from llava_next_ar.training.stream import LlavaVideoStream
from llava_next_ar.training.trainer import AutoregressiveTrainer, last_complete_checkpoint


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def text_entries(count: int, first: int = 0) -> list[dict]:
    return [{"id": f"t{first + i}", "conversations": turns("Hi?", f"{first + i:03d}")} for i in range(count)]


def write_lines(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model().config, num_frames=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name, num_frames in (("long", 12), ("short", 3), ("still", 1)):
        write_clip(folder / f"{name}.mp4", num_frames, width=64, height=48)
    write_clip(folder / "other.mkv", 7, width=64, height=48)
    Image.fromarray(picture(3, 60, 40)).save(folder / "a.png")
    Image.fromarray(picture(9, 40, 60)).save(folder / "b.png")
    (folder / "frames").mkdir()
    for index in range(4):
        Image.fromarray(picture(index, 40, 30)).save(folder / "frames" / f"{index}.png")
    np.save(folder / "frames.npy", np.stack([picture(index, 40, 30) for index in range(6)]))
    return folder


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return [
        {"id": "a", "conversations": turns("<video>\nWhat?", "A square."), "video": "long.mp4"},
        {"id": "b", "conversations": turns("<image>\nWhat?", "A picture."), "image": "a.png"},
        {"id": "c", "video": "short.mp4"},
        {"id": "d", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"id": "e", "conversations": turns("<video>\nWhat?", "Longer " * 9), "video": "other.mkv"},
    ]


def same(one: dict, other: dict) -> bool:
    names = [name for name in one if name != "sample_name"]  # which tells the data set
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in names)


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
    return TrainingArguments(folder, **{**defaults, **options})


# ------------------------------------------------------------------------------------------------------------- sources


def test_every_kind_of_source_gives_the_same_samples(entries, processor, root, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(entries))
    write_lines(tmp_path / "data.jsonl", entries)
    keys = ("id", "conversations", "messages", "video", "image")
    table = datasets.Dataset.from_list([{key: entry.get(key) for key in keys} for entry in entries])
    table.to_parquet(tmp_path / "data.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    expected = list(LlavaVideoDataset(entries, processor, video_root=root))
    for name in ("data.json", "data.jsonl", "data.parquet", "disk", "splits", table):
        data = name if name is table else tmp_path / name
        read = list(LlavaVideoDataset(data, processor, video_root=root))
        assert len(read) == 5 and all(map(same, read, expected)), name
        if name is table:
            continue
        stream = LlavaVideoStream(str(data), processor, video_root=root, shuffle_buffer=1, repeat=False)
        assert all(same(sample.read_sample(), one) for sample, one in zip(stream, expected, strict=True)), name
    (one,) = LlavaVideoDataset(DataSource(path=str(tmp_path / "splits"), split="test"), processor, video_root=root)
    assert same(one, expected[0])
    with pytest.raises(ValueError, match="no split 'dev', only train, test"):
        LlavaVideoDataset(DataSource(path=str(tmp_path / "splits"), split="dev"), processor)


def test_media_columns_of_datasets_are_read_undecoded(entries, processor, root):
    # datasets itself would decode them with torchcodec.
    expected = list(LlavaVideoDataset(entries[:2], processor, video_root=root))
    for stored in (str, lambda path: {"bytes": path.read_bytes(), "path": path.name}):
        columns = {
            "video": [stored(root / "long.mp4"), None],
            "image": [None, stored(root / "a.png")],
            "conversations": [entry["conversations"] for entry in entries[:2]],
        }
        table = datasets.Dataset.from_dict(columns)
        table = table.cast_column("video", datasets.Video()).cast_column("image", datasets.Image())
        assert all(map(same, LlavaVideoDataset(table, processor, video_root=root), expected))


def test_frames_saved_by_numpy_are_a_video(processor, root):
    saved, images = LlavaVideoDataset(
        [{"video": "frames.npy"}, {"video": np.load(root / "frames.npy")}], processor, video_root=root
    )
    assert saved["pixel_values_videos"].shape[1] == 5 and same(saved, images)


def write_empty_frames(path: Path, num_frames: int, *, size: int) -> None:
    """A numpy file whose header claims frames of 48 x 64, with `size` bytes after it that take no place on the disk."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (num_frames, 48, 64, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + size)


def test_of_frames_saved_by_numpy_only_those_sampled_are_read_whatever_the_header_claims(processor, tmp_path):
    of_one = 48 * 64 * 3
    write_empty_frames(tmp_path / "long.npy", 10**5, size=10**5 * of_one)
    write_empty_frames(tmp_path / "claims.npy", 10**12, size=of_one)
    long = LlavaVideoDataset([{"video": "long.npy"}], processor, video_root=tmp_path)
    tracemalloc.start()
    sample, (length,) = long[0], long.lengths()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample["pixel_values_videos"].shape[1] == 5 and length == len(sample["input_ids"])
    assert peak < 1000 * of_one
    with pytest.raises(BadSampleError, match="claims.npy.*mmap length is greater than file size"):
        LlavaVideoDataset([{"video": "claims.npy"}], processor, video_root=tmp_path)[0]


def test_entries_of_a_file_are_one_block_of_memory_or_none(tmp_path):
    # As Python objects, every worker would copy them little by little, by counting references.
    (tmp_path / "data.json").write_text(json.dumps(text_entries(50)))
    write_lines(tmp_path / "data.jsonl", text_entries(50))
    for name in ("data.json", "data.jsonl"):
        read = JsonEntries(tmp_path / name)
        assert list(read) == text_entries(50) and read[3:5] == text_entries(2, first=3)
        assert all(isinstance(v, (np.ndarray, Path, type(None))) for v in vars(read).values())
    assert list(pickle.loads(pickle.dumps(read))) == text_entries(50)


def test_a_line_that_is_no_json_is_one_bad_sample(processor, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", text_entries(2))
    path.write_text(path.read_text() + "{broken\n\n")
    data = LlavaVideoDataset(path, processor)
    assert len(data) == 3 and len(data[1]["input_ids"])
    with pytest.raises(BadSampleError, match="sample 2 of .*data.jsonl: Expecting"):
        data[2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.json", "wieght": 2}, "unknown key 'wieght' of a data source; did you mean 'weight'"),
        ({"path": "a.json", "weight": 0}, "weight of a.json must be a number above 0, got 0"),
        ({"weight": 2}, "needs a path"),
        (["a.json", "a.json"], "a.json is given 2 times; give it once, with a weight"),
        ([], "no data source"),
    ],
)
def test_mistakes_in_a_source(source, message, processor):
    with pytest.raises(ValueError, match=message):
        load_training_data(source, processor)


def test_a_data_set_on_the_hub_is_asked_for_as_the_source_says(entries, processor, root, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.DatasetDict({"validation": datasets.Dataset.from_list(entries[:1])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "someone/clips", "name": "short", "revision": "abc", "video_root": str(root)}
    data = load_training_data(source, processor)
    assert len(data) == 1 and len(data[0]["input_ids"]) and data.name == "someone/clips name=short"
    load_training_data({**source, "split": "validation"}, processor, streaming=True)
    common = {"name": "short", "revision": "abc"}
    assert asked == [
        ("someone/clips", {"split": None, "streaming": False, **common}),
        ("someone/clips", {"split": "validation", "streaming": True, **common}),
    ]


def test_a_source_that_is_not_there(processor, tmp_path):
    for name in ("gone.json", "gone.parquet", "gone"):
        with pytest.raises(FileNotFoundError, match=name):
            load_training_data(str(tmp_path / name), processor)
    with pytest.raises(ValueError, match="is not a data set: expected a .json"):
        load_training_data(str(tmp_path), processor)


def test_sources_in_a_recipe_and_on_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_data: [a.json, {path: b.parquet, weight: 0.5, video_root: clips}]\n")
    common = ["--model", "m", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    for given in (
        ["--config", str(recipe)],
        ["--train_data", "a.json", "{path: b.parquet, weight: 0.5, video_root: clips}"],
    ):
        _, data_args, *_ = recipes.parse_arguments([*given, *common])
        parsed = [DataSource.parse(source) for source in data_args.train_data]
        assert parsed == [DataSource(path="a.json"), DataSource(path="b.parquet", weight=0.5, video_root="clips")]
    one = ["--train_data", "{path: a.json, weight: 3}"]
    _, data_args, *_ = recipes.parse_arguments([*one, *common])
    assert [DataSource.parse(source).weight for source in data_args.train_data] == [3]
    with pytest.raises(ValueError, match="max_steps"):
        recipes.parse_arguments([*one, *common, "--streaming", "true"])


# ------------------------------------------------------------------------------------------------------------ mixtures


@pytest.fixture(scope="module")
def three(processor) -> list[LlavaVideoDataset]:
    return [
        LlavaVideoDataset(text_entries(count, first=100 * number), processor)
        for number, count in ((0, 4), (1, 6), (2, 5))
    ]


def test_weights_are_whole_passes_and_a_rest_that_changes_with_the_epoch(three):
    def places(epoch: int, seed: int = 0) -> list[tuple[int, int]]:
        mixture = LlavaVideoMixture(three, [2.5, 0.5, 1], seed=seed)
        mixture.set_epoch(epoch)
        return [mixture.locate(position) for position in range(len(mixture))]

    rests = []
    for epoch in range(6):
        counts = Counter(places(epoch))
        assert sum(counts.values()) == 10 + 3 + 5
        assert sorted(counts[0, i] for i in range(4)) == [2, 2, 3, 3]
        assert sorted(counts[1, i] for i in range(6)) == [0, 0, 0, 1, 1, 1]
        assert [counts[2, i] for i in range(5)] == [1] * 5
        rests.append(tuple(i for i in range(6) if counts[1, i]))
    assert len(set(rests)) > 1 and places(3) == places(3) and places(3) != places(3, seed=1)
    # Over epochs, no sample is left behind.
    assert set(itertools.chain(*rests)) == set(range(6))
    with pytest.raises(ValueError, match="weight 0.1 leaves none of the 4 samples"):
        LlavaVideoMixture(three, [0.1, 1, 1])


def test_workers_that_live_on_see_the_epoch_change(three):
    mixture = LlavaVideoMixture(three, [1, 0.5, 1])
    loader = DataLoader(mixture, num_workers=1, persistent_workers=True, batch_size=None)
    for epoch in range(3):
        mixture.set_epoch(epoch)
        expected = [mixture[position] for position in range(len(mixture))]
        given = list(loader)
        assert len(given) == len(expected) and all(map(same, given, expected))


def _resumed_and_whole(make_data, tmp_path, steps: int, stop: int, **options) -> None:
    """Trains in one go, and again from the checkpoint at `stop`; asserts equal losses and weights."""

    def run(folder: Path, resume: Path | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
        trainer = AutoregressiveTrainer(
            tiny_model(),
            arguments(folder, max_steps=steps, save_steps=stop, save_strategy="steps", **options),
            make_data(),
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer.model.state_dict(), [log["loss"] for log in trainer.state.log_history if "loss" in log]

    whole, losses = run(tmp_path / "whole")
    resumed, resumed_losses = run(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{stop}")
    assert len(losses) == steps and len(set(losses)) == steps and resumed_losses == losses
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_mixture_resumes_exactly_in_its_second_epoch(entries, processor, root, tmp_path):
    write_lines(tmp_path / "texts.jsonl", text_entries(5))
    write_lines(tmp_path / "videos.jsonl", entries)

    def make_data():
        sources = [{"path": str(tmp_path / "texts.jsonl"), "weight": 0.5}, str(tmp_path / "videos.jsonl")]
        return load_training_data(sources, processor, video_root=root)

    assert len(make_data()) == 7  # four steps an epoch
    _resumed_and_whole(make_data, tmp_path, steps=7, stop=5)


# ------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_gives_each_entry_once_to_one_worker_of_one_rank(processor, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "data.jsonl", text_entries(48))
    make = lambda: LlavaVideoStream(str(path), processor, shuffle_buffer=10, repeat=False)  # noqa: E731
    everything = [sample.index for sample in make()]
    assert sorted(everything) == list(range(48)) and everything != sorted(everything)
    ranks = []
    for rank in range(2):
        # As accelerate prepares it.
        shard = IterableDatasetShard(make(), batch_size=3, num_processes=2, process_index=rank)
        loader = DataLoader(shard, batch_size=3, num_workers=2, collate_fn=lambda samples: [s.index for s in samples])
        ranks.append(list(itertools.chain(*loader)))
    assert len(ranks[0]) == len(ranks[1]) == 24
    assert sorted(ranks[0] + ranks[1]) == list(range(48))


def test_a_stream_decodes_nothing_that_another_rank_trains_on(processor, root, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "data.jsonl", [{"video": "short.mp4"}] * 8)
    decoded = []
    load = video_frames.load_video
    monkeypatch.setattr(
        "llava_next_ar.processing.video_inputs.load_video", lambda *args, **kw: decoded.append(1) or load(*args, **kw)
    )
    shard = IterableDatasetShard(
        LlavaVideoStream(str(path), processor, video_root=root, repeat=False), 2, num_processes=2, process_index=1
    )
    assert len(list(DataLoader(shard, batch_size=2, collate_fn=LlavaVideoCollator(processor)))) == 2
    assert len(decoded) == 4


def test_the_order_of_a_stream_depends_on_seed_and_epoch_alone(processor, tmp_path):
    sources = [str(write_lines(tmp_path / f"{i}.jsonl", text_entries(9))) for i in range(2)]

    def order(epoch: int = 0, seed: int = 0) -> list:
        stream = LlavaVideoStream(sources, processor, shuffle_buffer=4, seed=seed)
        stream.set_epoch(epoch)
        return [(sample.source, sample.index) for sample in itertools.islice(stream, 40)]

    assert order() == order() and order() != order(epoch=1) and order() != order(seed=1)
    # It starts again, in another order, and each pass is complete.
    of_first = [index for source, index in order() if source == sources[0]]
    assert sorted(of_first[:9]) == list(range(9)) and of_first[:9] != of_first[9:18]


def test_weights_of_a_stream_are_probabilities(processor, tmp_path):
    sources = [
        {"path": str(write_lines(tmp_path / "a.jsonl", text_entries(3))), "weight": 3},
        {"path": str(write_lines(tmp_path / "b.jsonl", text_entries(50))), "weight": 1},
    ]
    stream = LlavaVideoStream(sources, processor)
    counts = Counter(sample.source for sample in itertools.islice(stream, 2000))
    assert 0.7 < counts[sources[0]["path"]] / 2000 < 0.8
    once = Counter(sample.source for sample in LlavaVideoStream(sources, processor, repeat=False))
    assert sorted(once.values()) == [3, 50]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_resumes_exactly(entries, processor, root, tmp_path, num_workers):
    datasets.Dataset.from_list(text_entries(7)).to_parquet(tmp_path / "texts.parquet")
    write_lines(tmp_path / "videos.jsonl", entries)

    def make_data():
        sources = [str(tmp_path / "texts.parquet"), {"path": str(tmp_path / "videos.jsonl"), "weight": 2}]
        return load_training_data(sources, processor, streaming=True, shuffle_buffer=3, video_root=root)

    workers = {"dataloader_num_workers": num_workers, "gradient_accumulation_steps": 2 - num_workers // 2}
    _resumed_and_whole(make_data, tmp_path, steps=4, stop=2, **workers)


class PutBack(TrainerCallback):
    """Moves files back when the epoch that a run was resumed in is over."""

    def __init__(self, away: Path, folder: Path) -> None:
        self.away, self.folder, self.epochs = away, folder, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs += 1
        if self.epochs == 2:
            for path in self.away.iterdir():
                path.rename(self.folder / path.name)


@pytest.mark.parametrize(
    ("num_workers", "stop", "options"),
    [
        (0, 2, {"gradient_accumulation_steps": 2}),
        (1, 4, {}),
        (2, 2, {"gradient_accumulation_steps": 2, "dataloader_persistent_workers": True}),
        (2, 14, {"dataloader_persistent_workers": True}),  # in the second of three epochs of twelve steps
    ],
)
def test_a_resumed_stream_opens_no_media_that_were_trained_on(processor, root, tmp_path, num_workers, stop, options):
    """The media of trained samples are deleted; the first run has recorded the bad samples."""
    media, away = tmp_path / "media", tmp_path / "away"
    media.mkdir(), away.mkdir()
    is_endless = stop < 12
    count = 36 if is_endless else 24  # workers are far ahead, and must not come to what is gone a second time
    for index in range(count):
        if index not in (5, 17):
            shutil.copy(root / "short.mp4", media / f"{index}.mp4")
    data = [{"video": f"{i}.mp4", "conversations": turns("<video>\nWhat?", f"{i:03d}")} for i in range(count)]
    path = write_lines(tmp_path / "data.jsonl", data)
    steps, in_epoch = (stop + 2, stop + 2) if is_endless else (26, 12)

    def make_data() -> LlavaVideoStream:
        ledger = BadSampleLedger(tmp_path / "bad.jsonl", max_samples=2)
        return LlavaVideoStream(
            str(path), processor, video_root=media, shuffle_buffer=4, bad_samples=ledger, repeat=is_endless
        )

    def run(folder: Path, *callbacks: TrainerCallback) -> tuple[list[float], dict[str, torch.Tensor]]:
        given = {"save_strategy": "steps", "save_steps": stop, "dataloader_num_workers": num_workers, **options}
        args = arguments(folder, max_steps=steps, **given)
        trainer = AutoregressiveTrainer(tiny_model(), args, make_data(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer.model.state_dict()

    losses, weights = run(tmp_path / "run")
    bad = (tmp_path / "bad.jsonl").read_text()
    for step in range(stop + 1, steps + 1):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}", ignore_errors=True)
    order = make_data()
    order.set_epoch(stop // in_epoch)
    num_batches = stop % in_epoch * options.get("gradient_accumulation_steps", 1)
    trained_on = [sample.index for sample in itertools.islice(order, 2 * num_batches)]
    for index in {*trained_on} - {5, 17}:
        (media / f"{index}.mp4").rename(away / f"{index}.mp4")
    resumed_losses, resumed_weights = run(tmp_path / "run", PutBack(away, media))
    assert len(losses) == steps and len({*losses}) > steps // 2 and resumed_losses == losses
    assert all(torch.equal(resumed_weights[name], tensor) for name, tensor in weights.items())
    assert (tmp_path / "bad.jsonl").read_text() == bad and 5 in trained_on and 17 not in trained_on


class Uneven(IterableDataset):
    """Unread numbers, of which the first worker has but two: of five batches the last three are the second worker's."""

    def __iter__(self):
        own = get_worker_info().id
        return (SimpleNamespace(read_sample=lambda n=n: n) for n in range(10 * own, 10 * own + (2, 7)[own]))


def test_no_batch_stays_unread_that_may_be_needed():
    expected = [[0, 1], [10, 11], [12, 13], [14, 15], [16]]
    for in_order, num_batches, read in ((True, 2, expected[2:]), (True, 4, expected[3:]), (False, 4, expected)):
        loader = DataLoaderShard(Uneven(), batch_size=2, num_workers=2, collate_fn=read_samples, in_order=in_order)
        with first_batches_unread(loader, num_batches):
            batches = list(loader)
        assert len(batches) == 5 and sorted(b for b in batches if isinstance(b, list)) == read
        assert list(loader) == expected or not in_order  # and no other pass leaves any out


def test_refusals_of_a_stream(processor, tmp_path):
    path = str(write_lines(tmp_path / "data.jsonl", []))
    with pytest.raises(ValueError, match="data.jsonl is empty"):
        next(iter(LlavaVideoStream(path, processor)))
    with pytest.raises(ValueError, match="needs max_samples"):
        LlavaVideoStream(path, processor, bad_samples=BadSampleLedger(tmp_path / "bad.jsonl", max_share=0.5))
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1, got 0"):
        LlavaVideoStream(path, processor, shuffle_buffer=0)
    with pytest.raises(ValueError, match="dispatch_batches"):
        args = arguments(tmp_path, accelerator_config={"dispatch_batches": True})
        AutoregressiveTrainer(tiny_model(), args, LlavaVideoStream(path, processor))


# -------------------------------------------------------------------------------------------------- videos without text


def test_videos_without_text_count_as_videos_and_not_as_answers(processor, root, tmp_path):
    labelled = LlavaVideoDataset(
        [
            {"conversations": turns("<video>\nWhat?", "A " * n), "video": v}
            for n, v in ((3, "long.mp4"), (9, "short.mp4"))
        ],
        processor,
        video_root=root,
    )
    unlabelled = LlavaVideoDataset([{"video": "other.mkv"}, {"video": "frames.npy"}], processor, video_root=root)
    mixture = LlavaVideoMixture([labelled, unlabelled], [1, 3])

    def step(batch_size: int) -> tuple[dict, dict]:
        model = tiny_model(head={"loss_weight": 1.0})
        generator = torch.Generator().manual_seed(1)
        change = model.autoregressive_module.change
        change.weight.data = torch.randn(change.weight.shape, generator=generator) * 0.1
        keep = KeepGradients()
        split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        args = arguments(tmp_path, max_steps=1, max_grad_norm=0, **split)
        trainer = AutoregressiveTrainer(model, args, mixture, callbacks=[keep])
        trainer.train()
        return keep.gradients, trainer.state.log_history[0]

    gradients, log = step(8)
    for batch_size in (1, 2):
        other_gradients, other_log = step(batch_size)
        assert difference(gradients, other_gradients) < 1e-5
        for name in ("loss", "main_loss", "autoregressive_loss"):
            assert other_log[name] == pytest.approx(log[name], rel=1e-5)
    # Of eight samples two have answers and all have a video: means over the answers' tokens, and over all videos.
    model = tiny_model(head={"loss_weight": 1.0})
    generator = torch.Generator().manual_seed(1)
    change = model.autoregressive_module.change
    change.weight.data = torch.randn(change.weight.shape, generator=generator) * 0.1
    collator = LlavaVideoCollator(processor)
    with torch.no_grad():
        main = model(**collator(list(labelled))).main_loss
        videos = [model(**collator([sample])).autoregressive_loss for sample in (*labelled, *list(unlabelled) * 3)]
    assert log["main_loss"] == pytest.approx(main.item(), rel=1e-5)
    assert log["autoregressive_loss"] == pytest.approx(torch.stack(videos).mean().item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------- bad samples


@pytest.fixture(scope="module")
def broken(root) -> list[tuple[dict, str, str]]:
    """Ten kinds of broken entry: (entry, class of the cause, message)."""
    write_clip(root / "whole.mp4", 96, container_options={"movflags": "faststart"})
    cut(root / "whole.mp4", root / "data_cut.mp4", 0.8)  # the index is there, some of the data is not
    write_clip(root / "index_last.mp4", 96)
    cut(root / "index_last.mp4", root / "index_cut.mp4", 0.6)  # the index, which lies at the end, is not
    with av.open(str(root / "no_frames.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with av.open(str(root / "no_frames.avi")) as container:
        assert len(container.streams.video) == 1
    frames = np.random.default_rng(0).uniform(0, 255, (4, 30, 40, 3)).astype(np.float32)
    frames[2, 3, 4, 1] = np.nan
    np.save(root / "nan.npy", frames)
    asked = turns("<video>\nWhat?", "A square.")
    return [
        ({"conversations": asked, "video": "gone.mp4"}, "FileNotFoundError", "no such file"),
        ({"conversations": asked, "video": "data_cut.mp4"}, "VideoReadError", "damaged or truncated"),
        ({"conversations": asked, "video": "index_cut.mp4"}, "VideoReadError", "without its index"),
        ({"conversations": asked, "video": "no_frames.avi"}, "VideoReadError", "no readable video frame"),
        ({"conversations": 7, "video": "short.mp4"}, "ValueError", "must be a list of turns, got int"),
        ({"conversations": [], "video": "short.mp4"}, "ValueError", "has no turns"),
        ({"conversations": asked[:1], "video": "short.mp4"}, "ValueError", "has no answer"),
        ({"conversations": asked, "video": "a.png"}, "ValueError", "is an image; give it under 'image'"),
        (
            {"conversations": turns("<video>\nWhat?", "word " * 400), "video": "short.mp4"},
            "ValueError",
            "max_length=400",
        ),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "ValueError", "'bot', expected one of"),
        ({"conversations": asked, "video": "nan.npy"}, "ValueError", "non-finite"),
    ]


@pytest.fixture(scope="module")
def fifth_broken(broken, root) -> list[dict]:
    """Every fifth entry is broken; the others have a text of their own, by which to know them."""
    entries = []
    for number, (entry, *_) in enumerate(broken):
        entries += [
            {"id": f"good {number}", "conversations": turns("<video>\nWhat?", f"<{number}>"), "video": "short.mp4"},
            *text_entries(2, first=10 * number),
            {"id": f"alone {number}", "video": "still.mp4"},
            {"id": f"bad {number}", **entry},
        ]
    return entries


def test_with_a_ledger_training_uses_exactly_the_rest_and_the_ledger_names_all_else(
    fifth_broken, broken, processor, root, tmp_path
):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(fifth_broken))
    ledger = BadSampleLedger(tmp_path / "out" / "bad_samples.jsonl", max_share=0.2)
    data = LlavaVideoDataset(path, processor, video_root=root, max_length=400, bad_samples=ledger)
    model = tiny_model()
    seen = []

    def record(module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"].bool()
        seen.extend(tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True))

    model.register_forward_pre_hook(record, with_kwargs=True)
    args = arguments(tmp_path / "out", max_steps=-1, num_train_epochs=2, dataloader_num_workers=2, learning_rate=1e-4)
    AutoregressiveTrainer(model, args, data).train()

    good = [entry for entry in fifth_broken if not entry["id"].startswith("bad")]
    expected = LlavaVideoDataset(good, processor, video_root=root, max_length=400)
    wanted = Counter(tuple(sample["input_ids"].tolist()) for sample in expected)
    nothing = (processor.tokenizer.pad_token_id,)  # a batch of bad samples alone
    assert Counter(row for row in seen if row != nothing) == Counter({row: 2 * n for row, n in wanted.items()})

    records = ledger.records()  # by two workers in two epochs, each sample once
    assert len(records) == len(broken) == len(fifth_broken) / 5
    for record in records:
        number = record["index"] // 5
        entry, kind, text = broken[number]
        assert record["source"] == str(path) and record["id"] == f"bad {number}" and record["index"] == 5 * number + 4
        assert record["files"] == ([entry["video"]] if "video" in entry else [])
        assert record["cause"].startswith(f"{kind}: ") and text in record["cause"]


def test_without_a_ledger_the_first_bad_sample_is_named(fifth_broken, processor, root, tmp_path):
    data = LlavaVideoDataset(fifth_broken, processor, video_root=root, max_length=400)
    for index in range(len(data)):
        if index % 5 == 4:
            with pytest.raises(BadSampleError, match=f"sample {index} .id 'bad {index // 5}'."):
                data[index]
    with pytest.raises(BadSampleError, match=r"sample 4 \(id 'bad 0'\) .*gone.mp4"):
        for sample in DataLoader(data, collate_fn=LlavaVideoCollator(processor)):
            assert len(sample)


def test_a_batch_with_bad_samples_is_the_batch_without_them(fifth_broken, processor, root, tmp_path):
    ledger = BadSampleLedger(tmp_path / "bad.jsonl", max_share=1)
    some = fifth_broken[:20]
    with_bad = LlavaVideoDataset(some, processor, video_root=root, bad_samples=ledger)
    rest = [entry for entry in some if not entry["id"].startswith("bad")]
    without = LlavaVideoDataset(rest, processor, video_root=root)
    collator = LlavaVideoCollator(processor)
    batch = collator(list(with_bad))
    assert len(batch["input_ids"]) == 16 and same(batch, collator(list(without)))

    def gradients(data, batch_size: int, folder: str) -> dict:
        keep = KeepGradients()
        split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": len(data) // batch_size}
        args = arguments(tmp_path / folder, max_steps=1, max_grad_norm=0, **split)
        trainer = AutoregressiveTrainer(tiny_model(head={"loss_weight": 1.0}), args, data, callbacks=[keep])
        trainer.train()
        return keep.gradients

    # One at a time, so that some batches hold nothing but a bad sample: counts are of what is left.
    assert difference(gradients(without, 16, "a"), gradients(with_bad, 1, "b")) < 1e-5


def test_a_batch_of_bad_samples_alone_teaches_nothing(processor):
    batch = LlavaVideoCollator(processor)([BadSample("data.json", 3, "ValueError: x")] * 2)
    assert batch["input_ids"].shape == (1, 1) and batch["labels"].tolist() == [[-100]]
    for skip_logits in (True, False):
        model = tiny_model().train()
        loss = model(**batch, skip_logits=skip_logits).loss
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.autoregressive_module.parameters())


def test_a_ledger_stops_training_above_its_bounds_and_counts_for_everyone(processor, tmp_path):
    path = tmp_path / "bad.jsonl"
    bad = [{"id": i, "conversations": []} for i in range(10)]

    def data(**bounds) -> LlavaVideoDataset:
        return LlavaVideoDataset(bad + text_entries(10), processor, bad_samples=BadSampleLedger(path, **bounds))

    one, other = data(max_samples=4), data(max_samples=4)  # as two workers, or two runs
    for index in (0, 1, 0, 1):
        assert isinstance(one[index], BadSample) and isinstance(other[index], BadSample)
    one[2], other[3], one[3]
    assert len(one.bad_samples) == len(other.bad_samples) == 4
    assert sorted(record["index"] for record in one.bad_samples.records()) == [0, 1, 2, 3]
    with pytest.raises(TooManyBadSamplesError, match=r"5 of 20 \(25.0%\) .* max_bad_samples=4 .*bad.jsonl"):
        other[4]
    with pytest.raises(TooManyBadSamplesError):  # and so everyone else, at a sample that was known
        one[0]
    data(max_share=0.25)[0]
    with pytest.raises(TooManyBadSamplesError, match="max_bad_share=0.2 "):
        data(max_share=0.2)[0]
    with pytest.raises(TooManyBadSamplesError, match="6 of 20"):
        list(DataLoader(data(max_samples=5), num_workers=1, collate_fn=list, sampler=[5]))
    for bounds, message in (({}, "needs max_samples or max_share"), ({"max_share": 2}, "0 ... 1, got 2")):
        with pytest.raises(ValueError, match=message):
            BadSampleLedger(path, **bounds)


def test_pixels_that_are_not_finite_after_processing_are_a_bad_sample(root):
    processor = tiny_processor(tiny_model().config, num_frames=5, image_std=[1e-50] * 3)
    with pytest.raises(BadSampleError, match="short.mp4.*: pixel_values_videos holds values that are not finite"):
        LlavaVideoDataset([{"video": "short.mp4"}], processor, video_root=root)[0]


def test_check_writes_malformed_entries_down(processor, tmp_path):
    ledger = BadSampleLedger(tmp_path / "bad.jsonl", max_samples=2)
    data = LlavaVideoDataset([{"video": "gone.mp4"}, *text_entries(1), "text"], processor, bad_samples=ledger)
    data.check()
    assert [record["index"] for record in ledger.records()] == [0, 2]


@pytest.mark.parametrize(
    "entry",
    [
        {"conversations": [{"from": ["human"], "value": "x"}]},
        {"conversations": [None]},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [None]}]},
        {"messages": {"role": "user"}},
        {"video": {"path": None, "bytes": None}},
        {"video": [["a.mp4"]]},
        {"video": ""},
        {"video": 3.5},
        {"video": "a\0.mp4"},
        {"image": "x" * 5000},
        None,
        [],
    ],
    ids=str,
)
def test_whatever_an_entry_holds_is_a_bad_sample_and_no_crash(entry, processor):
    with pytest.raises(BadSampleError, match="sample 0 of the list"):
        LlavaVideoDataset([entry], processor)[0]


def test_a_missing_package_is_no_bad_sample(processor, root, tmp_path, monkeypatch):
    monkeypatch.setattr(video_frames, "choose_backend", lambda backend: exec("raise ImportError('pip install av')"))
    ledger = BadSampleLedger(tmp_path / "bad.jsonl", max_samples=9)
    with pytest.raises(ImportError, match="pip install av"):
        LlavaVideoDataset([{"video": "short.mp4"}], processor, video_root=root, bad_samples=ledger)[0]


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 5},
        {"sampling": "fps", "fps": 8, "max_frames": 6},
        {"use_fast_slow_frames": True, "num_fast": 2, "num_slow": 3},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("add_time_instruction", [False, True])
def test_lengths_are_those_of_the_samples_without_decoding(options, add_time_instruction, entries, root, monkeypatch):
    layout = {"mm_newline_position": "grid", "add_faster_video": True} if "num_fast" in options else {}
    processor = tiny_processor(tiny_model(**layout).config, **options)
    processor.add_time_instruction = add_time_instruction
    more = [
        {
            "conversations": turns("<image>\n<video>\nAnd <image>\n?", "All."),
            "video": "long.mp4",
            "image": ["a.png", "b.png"],
        }
    ]
    if "fps" not in options:  # frames without times have no rate to go by
        more += [{"video": "frames.npy"}, {"video": "frames"}]
    data = LlavaVideoDataset([*entries, *more], processor, video_root=root)
    real = [len(sample["input_ids"]) for sample in data]
    monkeypatch.setattr(video_frames, "_read_sampled", lambda *args: pytest.fail("it decodes"))
    assert data.lengths() == real
    # Known by now: not found out again.
    monkeypatch.setattr(training_samples.SampleReader, "length", lambda *args: pytest.fail("it counts again"))
    assert data.lengths(num_workers=2) == real


def test_lengths_of_bad_samples(broken, processor, root, tmp_path):
    listed = [entry for entry, *_ in broken]
    ledger = BadSampleLedger(tmp_path / "bad.jsonl", max_samples=99)
    lengths = LlavaVideoDataset(listed, processor, video_root=root, bad_samples=ledger).lengths(num_workers=2)
    assert lengths[0] == 1 and lengths[8] > 400 and not ledger.path.exists()
    with pytest.raises(BadSampleError, match="gone.mp4"):
        LlavaVideoDataset(listed, processor, video_root=root).lengths()


def test_batches_are_grouped_by_length(processor, tmp_path):
    texts = [
        {"conversations": turns("Hi?", "x" * (1 + length))} for length in np.random.default_rng(0).permutation(160)
    ]
    data = LlavaVideoDataset(texts, processor)
    mixture = LlavaVideoMixture([data, data], [1, 0.5])
    widths: dict[str, list[int]] = {}
    for strategy in ("random", "group_by_length"):
        args = arguments(tmp_path, per_device_train_batch_size=8, train_sampling_strategy=strategy)
        trainer = AutoregressiveTrainer(tiny_model(), args, mixture)
        batches = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(map(len, batches)) == 240
        widths[strategy] = [int(mask.numel() - mask.sum()) for mask in batches]
    assert sum(widths["group_by_length"]) < 0.2 * sum(widths["random"])  # padding
    sampler = EpochSampler(mixture, group_size=8)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(240))


def test_a_run_grouped_by_length_resumes_exactly(entries, processor, root, tmp_path):
    def make_data():
        return LlavaVideoDataset(entries + text_entries(5), processor, video_root=root)

    _resumed_and_whole(make_data, tmp_path, steps=8, stop=6, train_sampling_strategy="group_by_length")
