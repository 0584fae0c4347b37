# mypy: ignore-errors
"""The kernels of `fused_exits`, in Triton's language: it looks like Python and is not, so types are not checked here.

One program a row of a verified block (`rank`: a block). The formulas are those of `exit_head`, `exit_modules` and `ranking`,
where they are explained.
"""

import triton
import triton.language as tl

from services.verifier.engine.exit_head import EDGE
from shared.speculation.outcomes import LEAST, SUREST_LOGIT

_EDGE = tl.constexpr(EDGE)
_MOST = tl.constexpr(65504.0)  # a float16 takes
_LEAST = tl.constexpr(LEAST)
_SUREST = tl.constexpr(SUREST_LOGIT)


@triton.jit
def _not(log_prob):
    """1 - exp(log_prob) without the loss of small values."""
    small = -log_prob * (1.0 + log_prob * (0.5 + log_prob * 0.16666667))
    return tl.where(log_prob > -0.01, small, 1.0 - tl.exp(log_prob))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _keyed(values, behind):
    """64-bit integers that sort like float32 values, and by `behind` (0 to 2^31 - 1) where these are equal."""
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0.0 is 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits.to(tl.int64) << 32) | behind


@triton.jit
def _value(keys):
    """What `_keyed` was given."""
    bits = (keys >> 32).to(tl.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _largest(values, places, most: tl.constexpr, count: tl.constexpr):
    """Of `values` at `places` (0 to `most`) the `count` largest, best first and of equal ones the first: values, places."""
    keys = tl.topk(_keyed(values, (most - places).to(tl.int64)), count)
    return _value(keys), (most - (keys & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def gather(
    hidden, residual, places, weight, own, normed, size: tl.constexpr, eps: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.arange(0, block)
    inside = at < size
    place = tl.load(places + row).to(tl.int64)
    left = tl.load(hidden + place * size + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(residual + place * size + at, mask=inside, other=0.0).to(tl.float32)
    total = (left + right).to(own.dtype.element_ty)
    tl.store(own + row * size + at, total, mask=inside)
    values = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * size + at, (values * scale * weights).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def gated(both, out, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    gate = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (gate * _sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm(values_of, weight, out, size: tl.constexpr, eps: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, block)
    inside = at < size
    values = tl.load(values_of + row * size + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, (values * scale * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rough_logits(
    states,
    matrix,
    rough,
    best,
    total,
    rows,
    stride: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
    chunks: tl.constexpr,
    chunk: tl.constexpr,
    tall: tl.constexpr,
    deep: tl.constexpr,
):
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    number = tl.program_id(1)
    at = number * chunk + tl.arange(0, chunk)
    part = tl.arange(0, deep)
    known, named = row < rows, at < columns
    values = tl.zeros([tall, chunk], dtype=tl.float32)
    lines = matrix + at.to(tl.int64)[None, :] * width + part[:, None]
    for start in range(0, width, deep):
        inside = start + part < width
        state = tl.load(
            states + row[:, None] * stride + start + part[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        weights = tl.load(lines + start, mask=inside[:, None] & named[None, :], other=0.0)
        values = tl.dot(state, weights, values, input_precision="ieee")
    kept = tl.minimum(tl.maximum(values, -_MOST), _MOST).to(rough.dtype.element_ty)
    tl.store(
        rough + row.to(tl.int64)[:, None] * columns + at[None, :], kept, mask=known[:, None] & named[None, :]
    )
    values = tl.where(named[None, :], kept.to(tl.float32), float("-inf"))  # what is kept is what is summed
    highest = tl.max(values, axis=1)
    tl.store(best + row * chunks + number, highest, mask=known)
    tl.store(total + row * chunks + number, tl.sum(tl.exp(values - highest[:, None]), axis=1), mask=known)


@triton.jit
def score(
    rough,
    best_of,
    total_of,
    normed,
    small,
    drafts,
    sure_of,
    ids,
    head,
    taken,
    first,
    first_bias,
    last,
    last_bias,
    judgement,
    tokens_out,
    log_probs_out,
    drafted_out,
    accepted_out,
    columns: tl.constexpr,
    chunks: tl.constexpr,
    chunk: tl.constexpr,
    chunks_block: tl.constexpr,
    shortlist: tl.constexpr,
    named: tl.constexpr,
    size: tl.constexpr,
    size_block: tl.constexpr,
    step: tl.constexpr,
    small_width: tl.constexpr,
    state_at: tl.constexpr,
    rank: tl.constexpr,
    rank_block: tl.constexpr,
    width: tl.constexpr,
    width_block: tl.constexpr,
    features: tl.constexpr,
    tail: tl.constexpr,
    slope: tl.constexpr,
    offset: tl.constexpr,
    has_ids: tl.constexpr,
    has_judge: tl.constexpr,
    has_judgement: tl.constexpr,
):
    row = tl.program_id(0)
    # what needs no search is asked for before it
    draft = tl.load(drafts + row).to(tl.int64)
    if has_judge:
        sure = tl.load(sure_of + row)
        figure = tl.arange(0, features)
        inner = tl.arange(0, rank_block)
        unit = tl.arange(0, width_block)
        length = 3 * rank + features
        line = first + unit[:, None] * length
        grid = (unit[:, None] < width) & (inner[None, :] < rank)
        of_state = tl.load(line + inner[None, :], mask=grid, other=0.0)
        of_token = tl.load(line + rank + inner[None, :], mask=grid, other=0.0)
        of_both = tl.load(line + 2 * rank + inner[None, :], mask=grid, other=0.0)
        of_figures = tl.load(line + 3 * rank + figure[None, :], mask=unit[:, None] < width, other=0.0)
        bias = tl.load(first_bias + unit, mask=unit < width, other=0.0)
        outward = tl.load(last + unit, mask=unit < width, other=0.0)
        last_one = tl.load(last_bias)
        seen = tl.load(small + row * small_width + state_at + inner, mask=inner < rank, other=0.0)
        if has_judgement:
            weight_of_figures = tl.load(judgement + 2 + figure, mask=figure < features - 1, other=0.0)
            weight_of_one = tl.load(judgement)
            weight_of_odds = tl.load(judgement + 1)
    along = tl.arange(0, size_block)
    all_state = tl.load(normed + row * size + along, mask=along < size, other=0.0)
    tl.debug_barrier()  # or the compiler asks for them when they are needed
    number = tl.arange(0, chunks_block)
    maxima = tl.load(best_of + row * chunks + number, mask=number < chunks, other=float("-inf"))
    sums = tl.load(total_of + row * chunks + number, mask=number < chunks, other=0.0)
    drafts_own = tl.load(head + draft * size + along, mask=along < size, other=0.0)
    if has_judge:
        token = tl.load(taken + draft * rank + inner, mask=inner < rank, other=0.0)
    # the chunks with the largest maxima, and the normalising sum of all rough logits
    listed = tl.arange(0, shortlist)
    _, where = _largest(maxima, number, chunks_block - 1, shortlist)
    # the largest of these chunks' logits
    at = where[:, None] * chunk + tl.arange(0, chunk)[None, :]
    values = tl.load(rough + row.to(tl.int64) * columns + at, mask=at < columns, other=float("-inf"))
    # until they come: the sum of all rough logits, the draft's exact logit, and what the judge sees of both vectors
    highest = tl.max(maxima, axis=0)
    total = highest + tl.log(tl.sum(sums * tl.exp(maxima - highest), axis=0))
    own = tl.sum(drafts_own.to(tl.float32) * all_state.to(tl.float32), axis=0)
    if has_judge:
        seen_state, seen_token = seen.to(tl.float32)[None, :], token.to(tl.float32)[None, :]
        within = of_state.to(tl.float32) * seen_state + of_token.to(tl.float32) * seen_token
        within = tl.sum(within + of_both.to(tl.float32) * (seen_state * seen_token), axis=1)
        within += bias.to(tl.float32)
    roughly, column = _largest(
        tl.reshape(values.to(tl.float32), [shortlist * chunk]),
        tl.reshape(at, [shortlist * chunk]),
        chunks_block * chunk - 1,
        shortlist,
    )
    tokens = tl.minimum(column, columns - 1)
    if has_ids:
        tokens = tl.load(ids + tokens).to(tl.int32)
    # their exact logits: sums stay within a thread up to the last
    rows = head + tokens.to(tl.int64)[:, None] * size
    part = tl.arange(0, step)
    sums = tl.zeros([shortlist, step // 8], dtype=tl.float32)
    for start in tl.static_range(0, size, step):
        inside = start + part < size
        state = tl.load(normed + row * size + start + part, mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(rows + start + part[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        products = tl.reshape(weights * state[None, :], [shortlist, step // 8, 8])
        sums += tl.sum(products, axis=2)
    exact = tl.sum(sums, axis=1)
    exact = tl.where(exact > float("-inf"), exact, float("-inf"))  # not what is no number
    kept = tl.minimum((roughly - tl.min(roughly, axis=0)) * (1.0 / _EDGE), 1.0)
    kept = tl.where(roughly > float("-inf"), kept, 0.0)
    on_list = tl.log(tl.sum(kept * tl.exp(roughly - total), axis=0))
    rest = total + tl.log(_not(tl.minimum(on_list, -1e-6))) + tail
    top = tl.max(exact, axis=0)
    known = top + tl.log(tl.sum(kept * tl.exp(exact - top), axis=0))
    higher = tl.maximum(known, rest)
    total = higher + tl.log(tl.exp(known - higher) + tl.exp(rest - higher))
    drafted = own - total
    # best first: a token's place is the number of better ones, and of equal ones before it on the list
    better = exact[None, :] > exact[:, None]
    better |= (exact[None, :] == exact[:, None]) & (listed[None, :] < listed[:, None])
    place = tl.sum(better.to(tl.int32), axis=1)
    tl.store(tokens_out + row * named + place, tokens, mask=place < named)
    tl.store(log_probs_out + row * named + place, exact - total, mask=place < named)
    accepted = drafted
    if has_judge:
        first_best = top - total
        second_best = tl.sum(tl.where(place == 1, exact, 0.0), axis=0) - total
        told = sure < 1.0  # not so where it is NaN
        sure = tl.minimum(tl.maximum(tl.where(told, sure, -1.0), -12.0), -1e-4)
        is_told = tl.where(told, 1.0, 0.0)
        inside_drafted = tl.minimum(tl.maximum(drafted, -25.0), 0.0)
        figures = tl.where(figure == 0, inside_drafted / 5, 0.0)
        figures = tl.where(figure == 1, tl.exp(inside_drafted), figures)
        behind = tl.minimum(tl.maximum(inside_drafted - first_best, -20.0), 5.0) / 5
        figures = tl.where(figure == 2, behind, figures)
        figures = tl.where(figure == 3, tl.exp(first_best), figures)
        lead = tl.minimum(tl.maximum(first_best - second_best, 0.0), 20.0) / 5
        figures = tl.where(figure == 4, lead, figures)
        figures = tl.where(figure == 5, tl.exp(sure) * is_told, figures)
        figures = tl.where(figure == 6, (sure - tl.log(_not(sure))) / 5 * is_told, figures)
        figures = tl.where(figure == 7, is_told, figures)
        raised = within + tl.sum(of_figures.to(tl.float32) * figures[None, :], axis=1)
        odds = tl.sum(raised * _sigmoid(raised) * outward.to(tl.float32), axis=0) + last_one.to(tl.float32)
        calibrated = odds * slope + offset
        if has_judgement:
            judged = weight_of_one + weight_of_odds * odds / 5 + tl.sum(weight_of_figures * figures, axis=0)
            calibrated = tl.where(told, judged, calibrated)
        accepted = _log_sigmoid(calibrated)
    tl.store(drafted_out + row, drafted)
    tl.store(accepted_out + row, accepted)


@triton.jit
def rank(
    drafted_of,
    accepted_of,
    drafts_of,
    lengths,
    tokens_of,
    log_probs_of,
    out,
    places: tl.constexpr,
    places_block: tl.constexpr,
    named: tl.constexpr,
    named_block: tl.constexpr,
    limit: tl.constexpr,
    limit_block: tl.constexpr,
    slope: tl.constexpr,
    offset: tl.constexpr,
    corrected: tl.constexpr,
):
    block = tl.program_id(0)
    length = tl.load(lengths + block)
    place = tl.arange(0, places_block)
    inside = place < places
    judged = place < length
    drafted = tl.load(drafted_of + block * places + place, mask=inside, other=0.0)
    accepted = tl.load(accepted_of + block * places + place, mask=inside, other=0.0)
    drafts = tl.load(drafts_of + block * places + place, mask=inside, other=-1)
    held = tl.where(judged, accepted, 0.0)
    share = tl.cumsum(held, axis=0) - held
    share += tl.where(judged, tl.log(tl.maximum(_not(accepted), _LEAST)), 0.0)
    name = tl.arange(0, named_block)
    at = place[:, None] * named + name[None, :]
    known = inside[:, None] & (name[None, :] < named) & (place[:, None] <= length)
    tokens = tl.load(tokens_of + block * places * named + at, mask=known, other=-1)
    scores = tl.load(log_probs_of + block * places * named + at, mask=known, other=float("-inf"))
    scores = tl.where(judged[:, None] & (tokens == drafts[:, None]), float("-inf"), scores)
    others = tl.sum(tl.exp(scores), axis=1)
    rest = tl.log(tl.maximum(tl.maximum(_not(drafted), others), _LEAST))
    scores += (share - tl.where(judged, rest, 0.0))[:, None]
    count: tl.constexpr = places_block * named_block
    flat = tl.arange(0, count)
    largest, chosen = _largest(tl.reshape(scores, [count]), flat, count - 1, limit_block)
    length = chosen // named_block
    name = chosen % named_block
    known = (name < named) & (length < places)
    token = tl.load(tokens_of + block * places * named + length * named + name, mask=known, other=-1)
    probability = tl.minimum(tl.exp(largest), 1.0)
    if corrected:
        odds = tl.log(tl.maximum(probability, _LEAST)) - tl.log(tl.maximum(1.0 - probability, _LEAST))
        odds = tl.minimum(tl.maximum(odds, -_SUREST), _SUREST)
        probability = tl.where(largest == float("-inf"), 0.0, _sigmoid(slope * odds + offset))
    turn = tl.arange(0, limit_block)
    to = out + (block * limit + turn) * 3
    tl.store(to, length, mask=turn < limit)
    tl.store(to + 1, token, mask=turn < limit)
    tl.store(to + 2, probability.to(tl.float32).to(tl.int32, bitcast=True), mask=turn < limit)
