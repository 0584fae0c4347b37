"""Exits as they are computed inside a CUDA graph, here on a CPU: the same outcomes as the eager ones', told at once."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from services.verifier.engine.channel import ChannelMessage, ExitMessage, Sender
from services.verifier.engine.device_head import DeviceHead
from services.verifier.engine.exit_files import ExitSet
from services.verifier.engine.exit_head import SHORTLIST, ExactHead, Naming, largest
from services.verifier.engine.exit_modules import JUDGEMENT_INPUTS, ExitModule, TrainedExit
from services.verifier.engine.exits import ExitReader, Pass, VerifiedRows
from services.verifier.engine.graph_exits import Blocks, GraphExits
from services.verifier.engine.ranking import rank
from shared.speculation.outcomes import Calibration, Line, calibrated, rank_outcomes

HIDDEN, VOCABULARY, LONGEST, OUTCOMES = 16, 200, 3, 4
WIDTH = LONGEST + 1
LENGTHS = (3, 1, 0, 2)


class Listener(Sender):
    """A sender that keeps what it is to send."""

    def __init__(self) -> None:
        self.sent: list[ChannelMessage] = []

    def send(self, message: ChannelMessage) -> None:
        self.sent.append(message)


def random_exit(seed: int) -> TrainedExit:
    torch.manual_seed(seed)
    module = TrainedExit(HIDDEN, width=8, judge_rank=4, judge_width=6, eps=1e-5)
    torch.nn.init.normal_(module.down.weight, std=0.2)
    weights = tuple(torch.randn(JUDGEMENT_INPUTS).mul(0.3).tolist())
    module.calibration = Calibration(Line(0.8, -0.1), Line(1.2, 0.2), weights if seed % 2 else ())
    return module.eval()


def blocks_of(seed: int, lengths: tuple[int, ...] = LENGTHS, *, began: float = 0.0) -> Blocks:
    """Blocks of these lengths, with a stranger's row between any two."""
    generator = torch.Generator().manual_seed(seed)
    starts = np.arange(len(lengths)) * (WIDTH + 1)
    places = starts[:, None] + np.minimum(np.arange(WIDTH), np.array(lengths)[:, None])
    drafts = np.zeros((len(lengths), WIDTH), dtype=np.int32)
    sure = np.full((len(lengths), WIDTH), np.nan, dtype=np.float32)
    sessions = []
    for number, length in enumerate(lengths):
        block = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        drafts[number, :length] = block
        if number % 2:
            sure[number, :length] = -0.3
        sessions.append(VerifiedRows(f"s{number}", 10 * number, number * WIDTH, tuple(block)))
    return Blocks(
        began, places.astype(np.int32), drafts, sure, np.array(lengths, dtype=np.int32), tuple(sessions)
    )


def eager_messages(
    exits: ExitSet, weight: torch.Tensor, blocks: Blocks, stream: torch.Tensor
) -> dict[int, ExitMessage]:
    """What `ExitReader` says of the same blocks."""
    head = ExactHead(lambda hidden: hidden @ weight.T, weight, exits.naming)
    reader = ExitReader(exits, lambda hidden: hidden, head, OUTCOMES)
    rows: list[int] = []
    drafts: list[int] = []
    sure: list[float] = []
    sessions = []
    for own in blocks.sessions:
        count = len(own.drafts) + 1
        sessions.append(VerifiedRows(own.key, own.base, len(rows), own.drafts))
        block = own.start // WIDTH
        rows += blocks.places[block, :count].tolist()
        drafts += blocks.drafts[block, :count].tolist()
        sure += blocks.sure[block, :count].tolist()
    seen = Pass(0.0, torch.tensor(rows), tuple(sessions), torch.tensor(drafts), torch.tensor(sure))
    return {layer: reader.read(layer, stream[seen.rows], seen, lambda: 0.0) for layer in exits.modules}


def graph_exits(exits: ExitSet, weight: torch.Tensor, listener: Listener) -> GraphExits:
    return GraphExits(
        exits,
        lambda hidden: hidden,
        DeviceHead(weight, exits.naming),
        listener,
        device=torch.device("cpu"),
        most_blocks=5,
        longest=LONGEST,
        outcomes=OUTCOMES,
    )


@pytest.mark.parametrize("named", [None, torch.arange(0, VOCABULARY, 2)], ids=["all tokens", "half of them"])
def test_outcomes_are_those_of_the_eager_exits(named: torch.Tensor | None) -> None:
    exits = ExitSet({2: random_exit(0), 3: random_exit(1), 5: ExitModule()}, "test", (), Naming(named))
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(4))
    listener = Listener()
    own = graph_exits(exits, weight, listener)
    generator = torch.Generator().manual_seed(5)
    hidden, residual = torch.randn(2, 25, HIDDEN, generator=generator)
    blocks = blocks_of(6)
    with torch.inference_mode():
        expected = eager_messages(exits, weight, blocks, hidden + residual)
    own.stage(blocks)
    for layer in own.layers:
        own.run(layer, hidden, residual)
    own.drain()
    assert [message.layer for message in listener.sent if isinstance(message, ExitMessage)] == [2, 3, 5]
    for message in listener.sent:
        assert isinstance(message, ExitMessage)
        for found, wanted in zip(message.outlooks, expected[message.layer].outlooks, strict=True):
            assert (found.key, found.base) == (wanted.key, wanted.base)
            assert [outcome[:2] for outcome in found.outcomes] == [outcome[:2] for outcome in wanted.outcomes]
            assert [outcome[2] for outcome in found.outcomes] == pytest.approx(
                [outcome[2] for outcome in wanted.outcomes], abs=2e-5
            )


def test_a_hint_is_sent_while_the_pass_still_runs_and_once() -> None:
    exits = ExitSet({2: random_exit(0), 4: random_exit(1)}, "test")
    weight, listener = torch.randn(VOCABULARY, HIDDEN), Listener()
    own = graph_exits(exits, weight, listener)
    stream = torch.randn(25, HIDDEN)
    own.stage(blocks_of(1, began=time.monotonic()))
    own.run(2, stream, stream)
    deadline = time.monotonic() + 10
    while not listener.sent and time.monotonic() < deadline:
        time.sleep(0.001)
    (early,) = listener.sent
    own.run(4, stream, stream)
    own.drain()
    own.drain()
    assert isinstance(early, ExitMessage)
    assert early.layer == 2
    assert [message.layer for message in listener.sent if isinstance(message, ExitMessage)] == [2, 4]


def test_a_pass_of_others_says_nothing_and_reads_no_row_that_it_lacks() -> None:
    exits = ExitSet({2: random_exit(0)}, "test")
    listener = Listener()
    own = graph_exits(exits, torch.randn(VOCABULARY, HIDDEN), listener)
    own.stage(blocks_of(1))
    own.run(2, torch.randn(25, HIDDEN), torch.randn(25, HIDDEN))
    own.drain()
    listener.sent.clear()
    own.stage(None)
    own.run(2, torch.randn(WIDTH, HIDDEN), torch.randn(WIDTH, HIDDEN))
    own.drain()
    assert listener.sent == []


def test_rows_past_the_last_block_are_ones_that_the_pass_has() -> None:
    exits = ExitSet({2: random_exit(0)}, "test")
    own = graph_exits(exits, torch.randn(VOCABULARY, HIDDEN), Listener())
    own.stage(blocks_of(1, (3, 3, 3, 3, 3)))
    own.run(2, torch.randn(25, HIDDEN), torch.randn(25, HIDDEN))
    own.drain()
    own.stage(blocks_of(2, (3,)))
    padded = torch.randn(3 * WIDTH, HIDDEN)  # one block, and a graph that was captured for three
    own.run(2, padded, padded)
    own.drain()


def test_a_shortlist_in_fewer_dimensions_finds_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q[:, :10]
    weight = torch.randn(640, HIDDEN, generator=generator)
    hidden = torch.randn(6, 10, generator=generator) @ basis.T  # lies in the dimensions that are kept
    drafts = torch.arange(6)
    exact = DeviceHead(weight)(hidden, drafts, 5)
    rough = DeviceHead(weight, Naming(None, basis.T, basis, 0.0))(hidden, drafts, 5)
    assert torch.equal(rough.tokens, exact.tokens)
    assert torch.allclose(rough.log_probs, exact.log_probs, atol=1e-4)
    assert torch.allclose(rough.drafted, exact.drafted, atol=1e-4)
    assert torch.equal(rough.draft_rows, exact.draft_rows)


@pytest.mark.parametrize("seed", range(8))
def test_which_of_two_nearly_equal_tokens_ends_the_shortlist_makes_no_difference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q[:, :10]
    weight = torch.randn(640, HIDDEN, generator=generator)
    head = DeviceHead(weight, Naming(None, basis.T, basis, 0.1))
    hidden = torch.randn(1, HIDDEN, generator=generator)
    last, next_one = (hidden @ basis @ head.rough.T)[0].topk(SHORTLIST + 1).indices[-2:].tolist()
    apart = head.rough[last] - head.rough[next_one]
    tie = -float(hidden[0] @ basis @ apart) / float(apart @ apart)
    sides = [hidden + (tie + side / float(apart.norm())) * (basis @ apart) for side in (1e-5, -1e-5)]
    lists = [set(largest(one @ basis @ head.rough.T, SHORTLIST)[0].tolist()) for one in sides]
    assert lists[0] ^ lists[1] == {last, next_one}
    scores = [head(one, torch.tensor([3]), 5) for one in sides]
    one, other = (dict(zip(each.tokens[0].tolist(), each.log_probs[0], strict=True)) for each in scores)
    assert len(one.keys() & other.keys()) >= 4
    assert all(abs(one[token] - other[token]) < 2e-4 for token in one.keys() & other.keys())


def test_largest_are_those_of_topk() -> None:
    values = torch.randn(7, 1280, generator=torch.Generator().manual_seed(1))
    found, wanted = largest(values, 12), values.topk(12, dim=-1)
    assert torch.equal(values.gather(1, found).sort(dim=-1, descending=True).values, wanted.values)
    assert torch.equal(found.sort(dim=-1).values, wanted.indices.sort(dim=-1).values)


@pytest.mark.parametrize("seed", range(20))
def test_ranking_is_that_of_the_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks, candidates, limit = 6, OUTCOMES + 1, OUTCOMES
    logits = torch.randn(blocks, WIDTH, 30, generator=generator).mul(3).log_softmax(dim=-1)
    named = logits.topk(candidates, dim=-1)
    drafts = torch.where(
        torch.rand(blocks, WIDTH, generator=generator) < 0.6,
        named.indices[..., 0],
        torch.randint(30, (blocks, WIDTH), generator=generator),
    )
    drafted = logits.gather(2, drafts[..., None])[..., 0]
    accepted = torch.rand(blocks, WIDTH, generator=generator).log()
    lengths = torch.randint(WIDTH, (blocks,), generator=generator, dtype=torch.int32)
    calibration = Calibration(outcome=Line(0.9, 0.3))
    found = rank(drafted, accepted, drafts, lengths, named.indices, named.values, limit, calibration.outcome)
    for block, length in enumerate(lengths.tolist()):
        rows = range(length + 1)
        wanted = calibrated(
            rank_outcomes(
                drafted[block, :length].tolist(),
                accepted[block, :length].tolist(),
                drafts[block, :length].tolist(),
                [
                    list(
                        zip(
                            named.indices[block, row].tolist(),
                            named.values[block, row].tolist(),
                            strict=True,
                        )
                    )
                    for row in rows
                ],
                limit,
            ),
            calibration,
        )
        assert list(zip(found[0][block].tolist(), found[1][block].tolist(), strict=True)) == [
            outcome[:2] for outcome in wanted
        ]
        assert found[2][block].tolist() == pytest.approx(
            [outcome.probability for outcome in wanted], abs=1e-5
        )
