"""Where the tokens and the documents of a batch are: padding and packing, resolved once for all blocks."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mamba.private.torch import is_transformed


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch are laid out. Everything is None for plain, unpadded, unpacked rows.

    Attributes:
        seq_idx: (B, L) int32, the document of each token; None when every row is one document.
        lengths: (B,) real tokens of each row, which come first after `compact`; None when no token is padding.
        order: (B, L) the permutation that brings the real tokens to the front.
        restart: (B,) bool, rows that begin a new document although a state is carried; None when none may.
    """

    seq_idx: Tensor | None = None
    lengths: Tensor | None = None
    order: Tensor | None = None
    restart: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether every row is one unpadded document."""
        return self.seq_idx is None and self.lengths is None and self.restart is None

    def compact(self, hidden: Tensor) -> Tensor:
        """Bring the real tokens of each row to the front, so that all padding is right padding. (B, L, d)"""
        return hidden if self.order is None else take(hidden, self.order)

    def restore(self, hidden: Tensor) -> Tensor:
        """Undo `compact`."""
        return hidden if self.order is None else take(hidden, self.order.argsort(1))

    @functools.cached_property
    def document_lengths(self) -> list[int]:
        """Tokens of each document, row after row; together B·L."""
        assert self.seq_idx is not None
        starts = torch.nn.functional.pad(self.seq_idx.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero()
        return starts.flatten().diff(append=starts.new_tensor([self.seq_idx.numel()])).tolist()

    def padding(self, length: int) -> Tensor | None:
        """(B, L) bool, True at the padding of compacted rows."""
        if self.lengths is None:
            return None
        return torch.arange(length, device=self.lengths.device) >= self.lengths[:, None]


def take(hidden: Tensor, index: Tensor) -> Tensor:
    """The tokens (B, L, d) at (B, L) columns of each row."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def resolve_layout(
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    carried: bool = False,
) -> Layout:
    """Turn the arguments that transformers uses for padding and packing into one Layout.

    A document starts wherever any of the three packing arguments says so of a real token. The first real token of a row
    continues the carried state, unless its position id is 0. What the arguments say at padding means nothing.

    Args:
        shape: (B, L).
        attention_mask: (B, L), or (B, past + L) when a state is carried; 0 is padding, anywhere in the row.
        seq_idx: (B, L) document numbers. position_ids: (B, L) or (1, L), restarting at each document.
        cu_seq_lens_q: (documents + 1,) offsets into the B·L flattened tokens, from 0 to B·L.
        carried: whether a cache holds the state of earlier tokens.

    Raises:
        ValueError: where a shape or the offsets do not fit.
    """
    _check_shapes(shape, seq_idx, position_ids)
    position_ids = None if position_ids is None else position_ids.expand(shape)
    numbers = None if cu_seq_lens_q is None else _numbers(shape, cu_seq_lens_q)
    order = lengths = None
    if attention_mask is not None:
        mask = _token_mask(shape, attention_mask, carried)
        if torch.compiler.is_compiling() or is_transformed() or not bool(mask.all()):
            order = mask.logical_not().to(torch.int8).argsort(stable=True, dim=1)
            lengths = mask.sum(1)
            # what an argument says of padding means nothing: only real tokens are compared
            seq_idx, position_ids, numbers = (
                None if t is None else t.gather(1, order) for t in (seq_idx, position_ids, numbers)
            )
    restart = None
    if carried and position_ids is not None and shape[1]:
        restart = position_ids[:, 0] == 0
        if lengths is not None:
            restart = restart & (lengths > 0)
    starts = _document_starts(seq_idx, position_ids, numbers, order)
    if starts is None:
        return Layout(None, lengths, order, restart)
    if lengths is not None:  # padding belongs to the last real document, whose state is carried on
        starts = starts & (torch.arange(shape[1], device=starts.device) < lengths[:, None])
    return Layout(starts.cumsum(1).to(torch.int32), lengths, order, restart)


def check_attention_hints(
    cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None, max_length_q: int | None, max_length_k: int | None
) -> None:
    """Refuse flash attention's other packing arguments where they do not describe the documents of `cu_seq_lens_q`.

    Raises:
        ValueError: naming the contradiction.
    """
    given = {"cu_seq_lens_k": cu_seq_lens_k, "max_length_q": max_length_q, "max_length_k": max_length_k}
    alone = [name for name, value in given.items() if value is not None]
    if cu_seq_lens_q is None:
        if alone:
            raise ValueError(f"{', '.join(alone)} given without cu_seq_lens_q, which says where the documents are.")
        return
    if torch.compiler.is_compiling():
        return
    if (
        cu_seq_lens_k is not None
        and cu_seq_lens_k is not cu_seq_lens_q
        and not torch.equal(cu_seq_lens_k, cu_seq_lens_q)
    ):
        raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q; in a scan they are the same documents.")
    longest = None
    for name in ("max_length_q", "max_length_k"):
        if given[name] is not None:
            longest = int(cu_seq_lens_q.diff().max()) if longest is None else longest
            if int(given[name]) < longest:  # type: ignore[arg-type]
                raise ValueError(f"{name} is {given[name]}, but cu_seq_lens_q has a document of {longest} tokens.")


def _token_mask(shape: tuple[int, int], attention_mask: Tensor, carried: bool) -> Tensor:
    batch, length = shape
    found = tuple(attention_mask.shape)
    if attention_mask.ndim != 2 or found[0] != batch or found[1] < length or (found[1] > length and not carried):
        raise ValueError(
            f"attention_mask has shape {found}, the tokens have {shape}; a Mamba takes one 0/1 mask per row, "
            "with one column per token (earlier tokens included when a state is carried)."
        )
    return attention_mask[:, -length:].bool() if length else attention_mask[:, :0].bool()


def _check_shapes(shape: tuple[int, int], seq_idx: Tensor | None, position_ids: Tensor | None) -> None:
    batch, length = shape
    if seq_idx is not None and tuple(seq_idx.shape) != shape:
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; it numbers the tokens' documents, so {shape}.")
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; it must be {shape} or (1, {length}).")


def _document_starts(
    seq_idx: Tensor | None, position_ids: Tensor | None, numbers: Tensor | None, order: Tensor | None
) -> Tensor | None:
    """(B, L) bool, True at t > 0 where a document starts; None when nothing is packed.

    All in compact order; `order` holds the columns that the tokens came from. Within a document a position is one more
    than the last one's, or as much more as there are columns between the two, whichever way padding is counted.
    """
    changes = [numbers[:, 1:] != numbers[:, :-1] for numbers in (seq_idx, numbers) if numbers is not None]
    if position_ids is not None:
        ahead = position_ids.diff(dim=1)
        change = ahead != 1
        changes.append(change if order is None else change & (ahead != order.diff(dim=1)))
    if not changes:
        return None
    start = changes[0]
    for change in changes[1:]:
        start = start | change
    return torch.nn.functional.pad(start, (1, 0))


def _numbers(shape: tuple[int, int], offsets: Tensor) -> Tensor:
    """(B, L) the document of each token."""
    total = shape[0] * shape[1]
    if not torch.compiler.is_compiling() and (
        offsets.ndim != 1 or int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets.diff() < 0).any())
    ):
        raise ValueError(
            f"cu_seq_lens_q is {offsets.tolist()}; it must rise from 0 to {total}, the number of tokens, "
            "with one entry at each document's start and one at the end."
        )
    return torch.searchsorted(offsets, torch.arange(total, device=offsets.device), right=True).view(shape)
