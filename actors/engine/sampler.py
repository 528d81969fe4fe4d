"""From logits to tokens, for all sampling slices of a step at once, on the device where the logits are.

What happens to a row, in this order: repetition penalty (divides positive and multiplies negative logits of tokens in
prompt or generated, as in CTRL, arXiv 1909.05858), presence and frequency penalties (over generated tokens) and
``logit_bias``, which are added, then -inf for the tokens that would end the request before ``min_tokens``. A greedy
row takes the largest of what results, the lowest id among equals. Otherwise: temperature, top-k, top-p over what top-k
left, min-p, and one draw by inversion of the cumulative distribution in order of token id. No filter separates equal
logits: those equal to the least likely token kept are kept too, so it does not matter how a sort breaks ties.

The draw uses one number per token, from (seed, position in the sequence) alone: what a request samples depends neither
on its rank nor on the batch it is in.

Nothing is sorted: filters only need the *value* of the least likely token kept. The largest few values of a row are
found through the maxima of its tiles, and where top-p keeps more than a few, a histogram finds its border. A draw goes
through the sums of tiles first for the same reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

from actors.engine.batch import Sampled, Slice
from actors.wire import Failure, SamplingParams, TokenLogprobs

# Below this a temperature is greedy: dividing by it would leave float32.
MIN_TEMPERATURE = 1e-5
# Logarithm of the smallest probability, relative to the largest, that is told from zero: a draw has 53 bits, exp(80)
# fits float32, and exp of what does not is slow on CPUs.
LOWEST = -80.0
# The smallest step from zero in float32.
SMALLEST = 2.0**-149
# Columns per tile.
TILE = 64
# Rows drawn for at once on a CPU: their temporaries should stay in its cache and come from memory already mapped.
CPU_ROWS = 4
# How many of the largest values top-p looks at first, and the bins it sorts all values into if those were not enough.
FIRST, BINS = 128, 4096


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), of 53 random bits that depend on ``seed`` and ``position`` alone."""
    bits = int.from_bytes(blake2b(f"{seed}:{position}".encode(), digest_size=8).digest(), "little") >> 11
    return bits * 2.0**-53


def sample(logits: Tensor, slices: Sequence[Slice]) -> list[Sampled | Failure]:
    """The next token of each slice: ``Sampling(logits, slices).results()``."""
    return Sampling(logits, slices).results()


class Sampling:
    """Draws the next token of each slice, on the device where ``logits`` is; ``results`` waits for it.

    ``tokens``, int64 [S], are the tokens on that device, in the order of its stream.

    ``logits`` is [S, V] of any floating dtype, row ``i`` belongs to ``slices[i]``; it is left as it is. A row with NaN
    or +inf, or with no finite logit, gives a ``Failure`` in its place and does not touch the others. Log probabilities
    are natural logarithms of the model's own distribution: the softmax of the row before any of the above.
    Raises ValueError unless there are as many rows as slices.
    """

    @torch.inference_mode()
    def __init__(self, logits: Tensor, slices: Sequence[Slice]) -> None:
        if logits.dim() != 2 or logits.shape[0] != len(slices):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(slices)} slices: one row per slice is needed"
            )
        self._slices = slices
        self.tokens = torch.empty(0, dtype=torch.int64, device=logits.device)
        if not slices:
            return
        edited = _edit(logits, slices)
        drawn = _largest_of(edited)
        tokens, best = drawn[0], drawn[1].view(torch.float64)
        random = [row for row, piece in enumerate(slices) if piece.sampling.temperature >= MIN_TEMPERATURE]
        at_once = CPU_ROWS if logits.device.type == "cpu" else len(slices)
        for start in range(0, len(random), at_once):
            some = random[start : start + at_once]
            rows = _put(some, torch.int64, logits.device)
            tokens[rows] = _draw(
                edited.index_select(0, rows).float(), best[rows].float(), [slices[row] for row in some]
            )
        if random:
            # A draw from NaN may point past the end, and no bad row may become an index error.
            tokens.clamp_(max=logits.shape[1] - 1)
        self.tokens = tokens
        self._logprobs = _Logprobs(logits, tokens, slices)
        self._drawn = _fetch(drawn)
        self._there = torch.cuda.Event() if logits.is_cuda else None
        if self._there is not None:
            self._there.record()

    def results(self) -> list[Sampled | Failure]:
        results: list[Sampled | Failure] = []
        if not self._slices:
            return results
        if self._there is not None:
            self._there.synchronize()
        logprobs = self._logprobs.by_row()
        tokens, peaks = self._drawn[0].tolist(), self._drawn[1].view(torch.float64).tolist()
        for row, (piece, token, peak) in enumerate(zip(self._slices, tokens, peaks, strict=True)):
            if math.isfinite(peak) and (row not in logprobs or math.isfinite(logprobs[row].logprob)):
                results.append(Sampled(token, logprobs.get(row)))
            else:
                results.append(_failure(piece, peak))
        return results


def _failure(piece: Slice, peak: float) -> Failure:
    if peak == -math.inf and (piece.sampling.logit_bias or piece.sampling.min_tokens):
        return Failure("invalid", "logit_bias and min_tokens leave no token to choose from: allow at least one")
    return Failure("model_error", f"the logits for position {piece.end} contain NaN or infinity")


# --- before sampling -----------------------------------------------------------------------------------------------


def _edit(logits: Tensor, slices: Sequence[Slice]) -> Tensor:
    """Penalties, bias and the mask of ``min_tokens``: ``logits`` itself where no slice has any, else a float32 copy."""
    repeated, penalized, biased, masked = _Entries(), _Entries(), _Entries(), _Entries()
    for row, piece in enumerate(slices):
        sampling = piece.sampling
        if sampling.repetition_penalty != 1:
            seen = {*piece.prompt, *piece.generated}
            repeated.put(row, seen, [sampling.repetition_penalty] * len(seen))
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = Counter(piece.generated)
            presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
            penalized.put(row, counts, [presence + frequency * count for count in counts.values()])
        if sampling.logit_bias:
            biased.put(row, sampling.logit_bias, sampling.logit_bias.values())
        if piece.end - len(piece.prompt) < sampling.min_tokens:
            ends = [t for t in {*sampling.eos_token_ids, *sampling.stop_token_ids} if 0 <= t < logits.shape[1]]
            masked.put(row, ends, [-math.inf] * len(ends))
    if not any(entries.rows for entries in (repeated, penalized, biased, masked)):
        return logits
    edited = logits.to(torch.float32, copy=True)
    if repeated.rows:
        where, values = repeated.tensors(logits.device)
        old = edited[where]
        edited[where] = torch.where(old > 0, old / values, old * values)
    if penalized.rows:
        where, values = penalized.tensors(logits.device)
        edited[where] -= values
    if biased.rows:
        where, values = biased.tensors(logits.device)
        edited[where] += values
    if masked.rows:
        where, values = masked.tensors(logits.device)
        edited[where] = values
    return edited


class _Entries:
    """Some elements of a matrix, each once, and a value for each."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []

    def put(self, row: int, columns: Collection[int], values: Iterable[float]) -> None:
        self.rows.append(row)
        self.lengths.append(len(columns))
        self.columns += columns
        self.values += values

    def tensors(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        rows = torch.repeat_interleave(torch.tensor(self.rows), torch.tensor(self.lengths)).tolist()
        where = _put(rows, torch.int64, device), _put(self.columns, torch.int64, device)
        return where, _put(self.values, torch.float32, device)


def _put(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On ``device``; a GPU is not waited for, which it would be from memory that is not pinned."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _fetch(values: Tensor) -> Tensor:
    """On the host once the stream's work up to here is done: a step launched behind it is not waited for."""
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


# --- choosing ------------------------------------------------------------------------------------------------------


def _tiles(x: Tensor, fill: float) -> Tensor:
    """[R, V] as [R, tiles, TILE], the last tile filled up."""
    missing = -x.shape[1] % TILE
    if missing:
        x = pad(x, (0, missing), value=fill)
    return x.reshape(x.shape[0], -1, TILE)


def _largest_of(x: Tensor) -> Tensor:
    """``_argmax`` of each row of [R, V] as int64 [2, R]: indices, and elements as the bits of float64."""
    if x.is_cuda:
        from actors.engine.cuda.greedy import largest

        return largest(x)
    tokens, best = _argmax(x)
    return torch.stack((tokens.clamp_(max=x.shape[1] - 1), best.double().view(torch.int64)))


def _argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first largest element of each row of [R, V], and that element; NaN counts as largest."""
    tiles = _tiles(x, -math.inf)
    best, tile = tiles.amax(-1).max(-1)
    inside = tiles[torch.arange(len(x), device=x.device), tile].argmax(-1)
    return tile * TILE + inside, best


def _draw(x: Tensor, best: Tensor, slices: Sequence[Slice]) -> Tensor:
    """One token per row of float32 [R, V], whose largest elements are ``best`` [R]. Overwrites ``x``."""
    sampling = [piece.sampling for piece in slices]
    numbers = [uniform(piece.sampling.seed, piece.end) for piece in slices]
    u = _put(numbers, torch.float64, x.device)
    scale = _put([1 / s.temperature for s in sampling], torch.float32, x.device)
    # From here on the likeliest token has 0, and the others the logarithm of how much less likely they are.
    x = x.sub_(best[:, None]).mul_(scale[:, None]).clamp_(min=LOWEST - 1)
    # Relative to the floor, what is kept is 0 or more and weighs 1 or more: one threshold for all rows.
    x = threshold(x.sub_(_floors(x, sampling)[:, None]), -SMALLEST, -1.0, inplace=True)
    tiles = _tiles(threshold(x.exp_(), 0.5, 0.0, inplace=True), 0.0)
    sums = tiles.sum(-1).double().cumsum(-1)
    tile, rest = _invert(sums, u * sums[:, -1])
    chosen = tiles[torch.arange(len(x), device=x.device), tile].double().cumsum(-1)
    inside, _ = _invert(chosen, rest)
    return tile * TILE + inside


def _invert(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index at which each row of [R, N] exceeds ``target`` [R], and what of the target lies beyond its start.

    A target of the whole sum or more, which is only rounding, is taken for a little less: never a weight of zero.
    """
    whole = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(whole, torch.zeros_like(whole)))
    index = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=cumulative.shape[1] - 1)
    before = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp_(min=0)), 0.0)
    return index[:, 0], target - before[:, 0]


# --- filters -------------------------------------------------------------------------------------------------------


def _floors(x: Tensor, sampling: Sequence[SamplingParams]) -> Tensor:
    """The value of the least likely token that the filters keep, for each row of ``x`` [R, V] with maxima 0."""
    lowest = [max(LOWEST, math.log(s.min_p) if s.min_p > 0 else LOWEST) for s in sampling]
    floors = _put(lowest, torch.float32, x.device)
    vocab = x.shape[1]
    cut = [row for row, s in enumerate(sampling) if 0 < s.top_k < vocab or s.top_p < 1]
    if cut:
        rows = _put(cut, torch.int64, x.device)
        limits = [min(sampling[row].top_k or vocab, vocab) for row in cut]
        top_k = _put(limits, torch.int64, x.device)
        top_p = _put([sampling[row].top_p for row in cut], torch.float64, x.device)
        count = min(max(sampling[row].top_k or FIRST for row in cut), vocab)
        part = x if len(cut) == len(x) else x.index_select(0, rows)
        floors[rows] = torch.maximum(floors[rows], _cut(part, top_k, top_p, count, max(limits)))
    return floors


def _cut(x: Tensor, top_k: Tensor, top_p: Tensor, count: int, most: int) -> Tensor:
    """The least value that top-k, then top-p keep, for each row of ``x`` [R, V].

    ``count`` of the largest are looked at: at least as many as any top-k that is on. ``most`` is the largest top-k;
    only if it is more is the device waited for.
    """
    values = _largest(x, count)
    mass = (values.exp().double() * (torch.arange(count, device=x.device) < top_k[:, None])).cumsum(-1)
    seen = top_k <= count
    whole = mass[:, -1]
    if most > count:
        whole = torch.where(seen, whole, x.exp().sum(-1).double())
    target = top_p * whole
    # The first at which the mass reaches top_p; with top_p = 1, all of top_k, however light the last ones are.
    last = torch.where(top_p < 1, (mass < target[:, None]).sum(-1), top_k - 1)
    floors = values.gather(1, last.clamp(max=count - 1)[:, None])[:, 0]
    beyond = (last >= count) & ~seen
    if most > count and bool(beyond.any()):
        floors[beyond] = _nucleus(x[beyond], target[beyond])
    return floors


def _nucleus(x: Tensor, target: Tensor) -> Tensor:
    """What the most likely tokens that together weigh ``target`` [R] are not below, for each row of ``x`` [R, V].

    Without a sort: a histogram of the weights over all values shows the bin in which the target is reached, and a
    histogram of that bin the place in it. Values within 1e-5 (two of the finer bins) of the last count as equal to it.
    """
    weights = x.exp().double()
    high, width = torch.zeros_like(x[:, 0]), (1 - LOWEST) / BINS
    for _ in range(2):
        # What lies above the range is counted in its first bin and what lies below in its last: the sums stay right.
        bins = (high[:, None] - x).mul_(1 / width).clamp_(0, BINS - 1).long()
        mass = weights.new_zeros(len(x), BINS).scatter_add_(1, bins, weights).cumsum(-1)
        reached = (mass < target[:, None]).sum(-1).clamp_(max=BINS - 1)
        high = high - reached * width
        width /= BINS
    return high - 2 * width * BINS


def _largest(x: Tensor, count: int) -> Tensor:
    """The ``count`` largest elements of each row of [R, V], largest first."""
    tiles = _tiles(x, -math.inf)
    if tiles.shape[1] > 2 * count:
        # No element outside the tiles with the largest maxima is larger than the count maxima of those tiles.
        best = tiles.amax(-1).topk(count, sorted=False).indices
        x = tiles[torch.arange(len(x), device=x.device)[:, None], best].flatten(1)
    return x.topk(count).values


# --- reporting -----------------------------------------------------------------------------------------------------


class _Logprobs:
    """Log probabilities of ``tokens``, and the largest of each row, for the rows whose slice asks for them."""

    def __init__(self, logits: Tensor, tokens: Tensor, slices: Sequence[Slice]) -> None:
        self._asked = [
            (row, piece.sampling.logprobs) for row, piece in enumerate(slices) if piece.sampling.logprobs is not None
        ]
        if not self._asked:
            return
        rows = _put([row for row, _ in self._asked], torch.int64, logits.device)
        logprobs = logits[rows].float().log_softmax(-1)
        self._chosen = _fetch(logprobs.gather(1, tokens[rows][:, None])[:, 0])
        largest = logprobs.topk(min(max(number for _, number in self._asked), logits.shape[1]))
        self._values, self._ids = map(_fetch, largest)

    def by_row(self) -> dict[int, TokenLogprobs]:
        """Once they are on the host."""
        if not self._asked:
            return {}
        chosen, values, ids = self._chosen.tolist(), self._values.tolist(), self._ids.tolist()
        return {
            row: TokenLogprobs(chosen[i], list(zip(ids[i][:number], values[i][:number], strict=True)))
            for i, (row, number) in enumerate(self._asked)
        }
