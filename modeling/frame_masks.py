# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Frame-level attention masks, as a dense token mask, as a list of frames, or as a picture.

Shape letters: T frames, L tokens of all frames together, K the largest number of frames that a frame attends to.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..configuration.frame_token_layout import FrameType


class FrameLevelMaskGenerator:
    """Attention masks between frames. `True` means "may attend"; rows are queries, columns are keys.

    `is_visible` defines the rule and `frame_visibility` applies it to all pairs of frames. `expand` makes a dense token mask of
    it, the result of the `create_*` methods. `visible_frames` makes lists of frames of it, which the head uses at a cost
    linear in the number of frames.
    """

    @staticmethod
    def frame_visibility(
        num_frames: int,
        window_size: int | None = None,
        frame_types: Sequence[int] | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        """Frame-level mask `[T, T]` bool: frame t attends to itself and to earlier frames.

        Args:
            num_frames: T.
            window_size: number of visible frames, the own one included; all earlier ones if None.
            frame_types: with slow (0) and fast (1) frames, slow ones stay visible outside of the window too, as the long
                memory of the clip.
            causal: `False` lets each frame attend to all frames.

        Raises:
            ValueError: if `num_frames` or the window is below 1, or the types do not fit the frames.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        if frame_types is not None and len(frame_types) != num_frames:
            raise ValueError(f"{len(frame_types)} frame types were given for {num_frames} frames")
        if not causal:
            return torch.ones(num_frames, num_frames, dtype=torch.bool)
        frame = torch.arange(num_frames)
        return FrameLevelMaskGenerator.is_visible(frame[:, None], frame[None, :], window_size, frame_types)

    @staticmethod
    def is_visible(
        query: torch.Tensor | int,
        keys: torch.Tensor,
        window_size: int | None = None,
        key_types: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Causal visibility of key frames to a query frame, all by their indices: bool, broadcast. See `frame_visibility`."""
        distance = query - keys
        near = torch.ones_like(distance, dtype=torch.bool) if window_size is None else distance < window_size
        if key_types is not None:
            near |= torch.tensor([int(frame_type) for frame_type in key_types]) == FrameType.SLOW
        return near & (distance >= 0)

    @staticmethod
    def expand(visibility: torch.Tensor, num_patches_per_frame: int | Sequence[int]) -> torch.Tensor:
        """Expands a mask `[T, T]` of frames to `[L, L]` of tokens; frames may have different numbers of tokens.

        Raises:
            ValueError: if the counts do not fit the frames.
        """
        num_frames = visibility.shape[0]
        if isinstance(num_patches_per_frame, int):
            num_patches_per_frame = [num_patches_per_frame] * num_frames
        counts = torch.as_tensor(num_patches_per_frame, device=visibility.device)
        if len(counts) != num_frames or (counts < 1).any():
            raise ValueError(
                f"num_patches_per_frame must be one positive count, or one for each of {num_frames} frames, got "
                f"{list(num_patches_per_frame)}"
            )
        return visibility.repeat_interleave(counts, 0).repeat_interleave(counts, 1)

    @staticmethod
    def visible_frames(visibility: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists of visible frames: `[T, K]` int64 indices in time order, and `[T, K]` bool validity.

        Invalid entries point at the frame itself.
        """
        num_visible = int(visibility.sum(1).max())
        # A stable sort puts visible frames first and keeps them in time order.
        order = (~visibility).to(torch.int8).argsort(dim=1, stable=True)[:, :num_visible]
        valid = visibility.gather(1, order)
        query = torch.arange(visibility.shape[0], device=visibility.device)[:, None]
        return torch.where(valid, order, query), valid

    @classmethod
    def create_causal_frame_mask(cls, num_frames: int, num_patches_per_frame: int | Sequence[int]) -> torch.Tensor:
        """`[L, L]` bool: a patch attends to all patches of its own and of all earlier frames."""
        return cls.expand(cls.frame_visibility(num_frames), num_patches_per_frame)

    @classmethod
    def create_sliding_window_mask(
        cls, num_frames: int, num_patches_per_frame: int | Sequence[int], window_size: int
    ) -> torch.Tensor:
        """`[L, L]` bool: a patch attends to its own frame and the `window_size - 1` frames before it."""
        return cls.expand(cls.frame_visibility(num_frames, window_size), num_patches_per_frame)

    @classmethod
    def create_fast_slow_mask(
        cls, frame_types: Sequence[int], num_patches_per_frame: int | Sequence[int], window_size: int
    ) -> torch.Tensor:
        """`[L, L]` bool: the sliding window, and every earlier slow frame (0) besides."""
        visibility = cls.frame_visibility(len(frame_types), window_size, frame_types)
        return cls.expand(visibility, num_patches_per_frame)

    @staticmethod
    def visualize_mask(
        mask: torch.Tensor,
        title: str = "frame mask",
        *,
        num_patches_per_frame: int | Sequence[int] | None = None,
        frame_types: Sequence[int] | None = None,
        save_path: str | None = None,
    ) -> Any:
        """Draws a mask with frame boundaries and frame types.

        Args:
            mask: `[L, L]` bool, `True` = may attend.
            title: of the figure.
            num_patches_per_frame: tokens of each frame, for the boundaries; none are drawn if None.
            frame_types: slow (0) or fast (1) for each frame, for the labels.
            save_path: an image file to write.

        Returns:
            The matplotlib `Figure`. Nothing is shown and no global state of matplotlib is changed.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if the mask is not square or the frames do not fill it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("visualize_mask needs matplotlib: pip install matplotlib") from error
        if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
            raise ValueError(f"expected a square mask, got shape {tuple(mask.shape)}")
        size = mask.shape[0]
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.subplots()
        axes.imshow(mask.cpu().numpy(), cmap="Greys", vmin=0, vmax=1.6, interpolation="nearest")
        axes.set(title=title, xlabel="key", ylabel="query")
        if num_patches_per_frame is not None:
            if isinstance(num_patches_per_frame, int):
                num_patches_per_frame = [num_patches_per_frame] * (size // num_patches_per_frame)
            if sum(num_patches_per_frame) != size:
                raise ValueError(f"the frames hold {sum(num_patches_per_frame)} tokens, the mask {size}")
            if frame_types is not None and len(frame_types) != len(num_patches_per_frame):
                raise ValueError(f"{len(frame_types)} frame types for {len(num_patches_per_frame)} frames")
            ends = torch.tensor(num_patches_per_frame).cumsum(0)
            centers = (ends - torch.tensor(num_patches_per_frame) / 2 - 0.5).tolist()
            for end in ends[:-1].tolist():
                axes.axhline(end - 0.5, color="tab:blue", linewidth=0.6)
                axes.axvline(end - 0.5, color="tab:blue", linewidth=0.6)
            names = [
                f"{frame}" if frame_types is None else f"{frame} {FrameType(int(frame_types[frame])).name.lower()}"
                for frame in range(len(centers))
            ]
            axes.set_xticks(centers, names, rotation=90, fontsize=7)
            axes.set_yticks(centers, names, fontsize=7)
            axes.set(xlabel="key frame", ylabel="query frame")
        if save_path is not None:
            figure.savefig(save_path, dpi=120)
        return figure
