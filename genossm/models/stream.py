"""An encoder over a long sequence, chunk by chunk and layer by layer, with the result of one pass.

A layer runs over the whole sequence before the next one begins: its recurrent mixer sweeps from right to left for the
states that enter each chunk from its right, then all that the layer does goes from left to right. Between layers the
features wait in a `ChunkStore`, on the device, in the host's memory or in a file; what the device computes on is one chunk
with its halo.

Letters: B batch, L length in trunk bins, D width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from genossm.models.mixers.mixer import Mixer, State

if TYPE_CHECKING:
    from genossm.models.encoder import Encoder, Layer

Keep = Literal["cpu", "device"] | Path
Read = Callable[[int, int], Tensor]
Advance = Callable[[float], object]
Watch = Callable[[int, int, int, State], object]
"""Told (layer from 0, first trunk bin of a chunk, the one after its last, the state that leaves it).

The state may share memory with the chunk: it is not to be kept."""

_Told = Callable[[int, int, State], object]
"""`Watch` for one layer."""


class ChunkStore:
    """The features of a sequence (batch, length, width) in chunks of equal length, of which the last may be shorter.

    Args:
        length: bins of the sequence.
        chunk: bins of a chunk.
        kept_on, used_on: the devices where chunks wait, and where they are handed out.
    """

    def __init__(self, length: int, chunk: int, *, kept_on: torch.device, used_on: torch.device) -> None:
        self.length, self.chunk = length, chunk
        self.kept_on, self.used_on = kept_on, used_on
        self._whole: Tensor | None = None
        self._chunks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """How many chunks the sequence has, stored or not."""
        return -(-self.length // self.chunk)

    def bounds(self, index: int) -> tuple[int, int]:
        """The first bin of a chunk and the one after its last."""
        return index * self.chunk, min((index + 1) * self.chunk, self.length)

    def put(self, index: int, x_BLD: Tensor) -> None:
        """Keep the features of a chunk in place of those it had."""
        if (
            self._whole is None
        ):  # one tensor: chunks among what comes and goes would leave memory full of holes
            self._whole = x_BLD.new_empty(
                len(x_BLD), self.length, x_BLD.shape[2], dtype=x_BLD.dtype, device=self.kept_on
            )
        if x_BLD.dtype == self._whole.dtype:
            start, stop = self.bounds(index)
            self._chunks[index] = self._whole[:, start:stop].copy_(x_BLD)
        else:  # a layer in autocast may change it
            self._chunks[index] = x_BLD.to(self.kept_on).contiguous()

    def get(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """The features of a chunk, from `start` to `stop` within it."""
        return self._chunks[index][:, start:stop].to(self.used_on)

    def read(self, start: int, stop: int) -> Tensor:
        """The features of the bins from `start` < `stop` on, whatever chunks they are in."""
        parts = []
        for index in range(start // self.chunk, -(-stop // self.chunk)):
            first, last = self.bounds(index)
            parts.append(self.get(index, max(start, first) - first, min(stop, last) - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def close(self) -> None:
        """Give up what is kept."""
        self._chunks.clear()
        self._whole = None


class FileStore(ChunkStore):
    """A store whose chunks wait in a file of `folder` that has no name there: it is gone when closed, even by a kill.

    Chunks are written position by position, so that any part of one is a single read.
    """

    def __init__(self, length: int, chunk: int, *, folder: Path, used_on: torch.device) -> None:
        super().__init__(length, chunk, kept_on=torch.device("cpu"), used_on=used_on)
        self._file = tempfile.TemporaryFile(dir=folder)
        self._layouts: dict[int, tuple[torch.dtype, torch.Size]] = {}

    def put(self, index: int, x_BLD: Tensor) -> None:
        x_LBD = x_BLD.to(self.kept_on).transpose(0, 1).contiguous()
        self._layouts[index] = x_LBD.dtype, x_LBD.shape
        self._file.seek(self._offset(index, x_LBD.shape))
        self._file.write(x_LBD.view(torch.uint8).numpy().data)

    def get(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        dtype, shape = self._layouts[index]
        start, stop, _ = slice(start, stop).indices(shape[0])
        x_LBD = torch.empty(stop - start, *shape[1:], dtype=dtype)
        self._file.seek(self._offset(index, shape) + start * shape[1:].numel() * dtype.itemsize)
        if self._file.readinto(x_LBD.view(torch.uint8).numpy().data) != x_LBD.nbytes:
            raise OSError("the file of features ended early")
        return x_LBD.transpose(0, 1).contiguous().to(self.used_on)

    def close(self) -> None:
        self._file.close()

    def _offset(self, index: int, shape: torch.Size) -> int:
        """Where a chunk's bytes begin: there is room for float64, as dtypes may differ; holes take no space."""
        return index * self.chunk * shape[1:].numel() * 8


def stream(
    encoder: Encoder,
    tokens: Tensor | Read,
    *,
    chunk_bp: int,
    length: int | None = None,
    keep: Keep = "cpu",
    advance: Advance | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """See `Encoder.stream`; `advance` is told each share of the work when it is done, which make 1 together.

    `watch` is told the state of each recurrent mixer that leaves a chunk: for each but the first to the left, from right to
    left, then for each to the right.
    """
    if encoder.training:
        raise ValueError(
            "the encoder is in training mode, in which batch statistics and dropout differ from chunk to chunk; "
            "call eval() first"
        )
    if keep not in ("cpu", "device") and not isinstance(keep, Path):
        raise ValueError(f"keep is {keep!r}; allowed are 'cpu' and 'device', and the Path of a folder")
    if isinstance(keep, Path) and not keep.is_dir():
        raise ValueError(f"keep is {str(keep)!r}, which is no folder; make it first")
    for mixer in encoder.mixers():
        _ = mixer.halo  # one that cannot stream refuses here
    trunk_bp = encoder.trunk_bp
    if chunk_bp < 1 or chunk_bp % trunk_bp:
        raise ValueError(f"chunk_bp is {chunk_bp}; it must be a multiple of the trunk's bin of {trunk_bp} bp")
    if isinstance(tokens, Tensor) == (length is not None):
        raise ValueError("give `length` with a function that reads tokens, and only then")
    length = tokens.shape[1] if isinstance(tokens, Tensor) else length
    assert length is not None
    if length < 1 or length % trunk_bp:
        raise ValueError(
            f"the length {length} is no multiple of the bin of {trunk_bp} bp; pad the end with code 4"
        )
    device = encoder.norm.weight.device
    bins, chunk = length // trunk_bp, chunk_bp // trunk_bp

    def make_store() -> ChunkStore:
        if isinstance(keep, Path):
            return FileStore(bins, chunk, folder=keep, used_on=device)
        kept_on = torch.device("cpu") if keep == "cpu" else device
        return ChunkStore(bins, chunk, kept_on=kept_on, used_on=device)

    return _stream(encoder, _reader(tokens, device), make_store, advance, watch)


@torch.no_grad()
def _stream(
    encoder: Encoder,
    read: Read,
    make_store: Callable[[], ChunkStore],
    advance: Advance | None,
    watch: Watch | None,
) -> Iterator[tuple[int, Tensor]]:
    with closing(make_store()) as store:
        recurrent = sum(mixer.recurrent for mixer in encoder.mixers())
        steps = len(store) * (len(encoder.layers) + 2) + (len(store) - 1) * recurrent

        def step() -> None:
            if advance is not None:
                advance(1 / steps)

        for index in range(len(store)):
            store.put(index, _stem(encoder, read, store, *store.bounds(index))[0])
            step()
        for number, layer in enumerate(encoder.layers):
            _run(cast("Layer", layer), store, step, None if watch is None else partial(watch, number))
        for index in range(len(store)):
            first, features_BLD = _decoded(encoder, read, store, index)
            step()
            yield first, features_BLD


def _decoded(encoder: Encoder, read: Read, store: ChunkStore, index: int) -> tuple[int, Tensor]:
    """The first output bin of a chunk, and the encoder's output there."""
    start, stop = store.bounds(index)
    if encoder.decoder is None:
        return start, encoder.norm(store.get(index))
    halo = encoder.decoder.halo
    first, last = max(0, start - halo), min(store.length, stop + halo)
    _, finer = _stem(encoder, read, store, first, last, encoder.decoder.finer)
    decoded_BLD = encoder.decoder(encoder.norm(store.read(first, last)), finer)
    factor = encoder.trunk_bp // encoder.bin_bp
    return start * factor, decoded_BLD[:, (start - first) * factor : (stop - first) * factor]


def _stem(
    encoder: Encoder, read: Read, store: ChunkStore, start: int, stop: int, finer: Collection[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """What `ConvStem.with_finer` has for the trunk bins from `start` to `stop` when it sees the whole sequence."""
    stem, bin_bp = encoder.stem, encoder.trunk_bp
    first = max(0, start * bin_bp - stem.halo_bp)
    last = min(store.length * bin_bp, stop * bin_bp + stem.halo_bp)
    x_BLD, found = stem.with_finer(read(first, last), finer)
    before, bins = start - first // bin_bp, stop - start
    cut = {
        fine: tensor[:, before * bin_bp // fine : (before + bins) * bin_bp // fine]
        for fine, tensor in found.items()
    }
    return x_BLD[:, before : before + bins], cut


def _run(layer: Layer, store: ChunkStore, step: Callable[[], object], told: _Told | None) -> None:
    """One layer over all chunks, in place."""
    mixer = layer.mixer
    entering = _leftward(layer, store, step, told) if mixer.recurrent else None
    state: State | None = None
    behind_BLD: Tensor | None = (
        None  # the layer's input on the left, of which the store has the output already
    )
    for index in range(len(store)):
        start, stop = store.bounds(index)
        right = min(mixer.halo[1], store.length - stop)
        x_BLD = store.read(start, stop + right)
        if behind_BLD is not None:
            x_BLD = torch.cat([behind_BLD, x_BLD], 1)
        left = 0 if behind_BLD is None else behind_BLD.shape[1]
        done = left + stop - start
        from_right = entering(index) if entering is not None else None
        mixed_BLD, state = mixer.mix(layer.mixer_norm(x_BLD), left, right, state, from_right)
        if told is not None and state is not None:
            told(start, stop, state)
        behind_BLD = x_BLD[:, max(0, done - mixer.halo[0]) : done].clone()
        store.put(index, layer.joined(x_BLD[:, left:done], mixed_BLD))
        step()


def _leftward(
    layer: Layer, store: ChunkStore, step: Callable[[], object], told: _Told | None
) -> Callable[[int], State | None]:
    """The state that enters each chunk from its right, by the chunk's number; they wait where the store keeps chunks.

    They are copied into tensors for all chunks: a view would hold on to all of the chunk that it is taken from, and small
    tensors that stay between large ones that go leave the host's memory full of holes.
    """
    mixer: Mixer = layer.mixer
    kept: State = ()
    state: State | None = None
    last = len(store) - 1
    for index in range(last, 0, -1):
        start, stop = store.bounds(index)
        left, right = min(mixer.halo[0], start), min(mixer.halo[1], store.length - stop)
        x_BLD = layer.mixer_norm(store.read(start - left, stop + right))
        state = mixer.leftward(x_BLD, left, right, state)
        if state is not None:
            kept = kept or tuple(part.new_empty(last, *part.shape, device=store.kept_on) for part in state)
            for parts, part in zip(kept, state, strict=True):
                parts[index - 1] = part
            if told is not None:
                told(start, stop, state)
        step()

    def entering(index: int) -> State | None:
        return tuple(parts[index].to(store.used_on) for parts in kept) if kept and index < last else None

    return entering


def _reader(tokens: Tensor | Read, device: torch.device) -> Read:
    """Tokens (batch, end - start) of a part of the sequence, on the device."""

    def read(start: int, end: int) -> Tensor:
        part = tokens[:, start:end] if isinstance(tokens, Tensor) else tokens(start, end)
        if part.dim() != 2 or part.shape[1] != end - start:
            raise ValueError(
                f"the tokens from {start} to {end} came in the shape {tuple(part.shape)}; "
                f"(batch, {end - start}) is needed"
            )
        return part.to(device)

    return read
