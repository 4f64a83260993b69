"""Read damaged copies of the clips in a folder, one after another, and report the outcome of each.

    python tests/fuzz_videos.py FOLDER FIRST_SEED NUM_SEEDS

It is a separate process, since crashes are among the outcomes. Each line of its output is `seed outcome`. A seed is printed
before its clip is read.
"""

import logging
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import torch
from fuzzing import check, damage

from llava_next_ar.processing.video_frames import FrameSampling, load_video

MEMORY = 8 * 2**30  # bytes of address space: a clip that claims more must raise an error


def main(folder: Path, first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    clips = sorted(path for path in folder.iterdir() if path.is_file())
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(first, first + count):
            random = Random(seed)
            clip = random.choice(clips)
            path = Path(scratch) / clip.name
            path.write_bytes(damage(clip.read_bytes(), random))
            sampling = random.choice([None, FrameSampling(num_frames=4), FrameSampling(policy="fps", fps=3)])
            size, partial = random.choice([None, 32]), random.random() < 0.5
            print(seed, clip.name, end=" ", flush=True)
            counts: Counter = Counter()

            def read(path=path, sampling=sampling, size=size, partial=partial):
                video = load_video(path, sampling, size=size, allow_partial=partial, backend="pyav")
                if not (len(video) == len(video.timestamps) and torch.isfinite(video.timestamps).all()):
                    raise AssertionError(f"{video} has {len(video.timestamps)} timestamps, or non-finite ones")

            problem = check(read, {str(path)}, counts)
            print(problem or next(iter(counts)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
