"""Exits in few kernels say what they say in PyTorch. Runs on a GPU, and in Triton's interpreter with TRITON_INTERPRET=1.

A CPU's environment has no Triton, so these are left out there.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from services.verifier.engine.device_head import DeviceHead
from services.verifier.engine.exit_files import ExitSet
from services.verifier.engine.exit_head import Naming
from services.verifier.engine.exit_modules import JUDGEMENT_INPUTS, ExitModule, TrainedExit
from services.verifier.engine.graph_exits import GraphExits
from shared.speculation.outcomes import Calibration, Line
from tests.unit.test_engine_graph_exits import Listener

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not RUNS, reason="no Triton, or no GPU for it"
    ),
    pytest.mark.timeout(300),  # the interpreter takes its time
]

BLOCKS, OUTCOMES, EPSILON = 5, 8, 1e-5
BASIS = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q[:, :40]
HALF = torch.arange(0, 2560, 2)


def module_of(hidden: int, *, judged: bool) -> TrainedExit:
    module = TrainedExit(hidden, width=24, judge_rank=6, judge_width=10, eps=EPSILON)
    torch.nn.init.normal_(module.down.weight, std=0.2)
    torch.nn.init.normal_(module.norm.weight, mean=1.0, std=0.1)
    weights = tuple(torch.randn(JUDGEMENT_INPUTS).mul(0.3).tolist()) if judged else ()
    module.calibration = Calibration(Line(0.8, -0.1), Line(1.2, 0.2), weights)
    return module.eval()


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "naming", "longest", "kind"),
    [
        (48, 1280, Naming(), 3, "judged by a line"),
        (48, 1280, Naming(), 3, "judged by weights"),
        (48, 1000, Naming(), 3, "judged by weights"),
        (64, 2560, Naming(), 5, "judged by weights"),
        (48, 1280, Naming(), 3, "untrained"),
        (48, 2560, Naming(HALF), 3, "judged by weights"),
        (48, 2560, Naming(HALF, BASIS.T.contiguous(), BASIS, 0.05), 3, "judged by weights"),
    ],
)
def test_fused_exits_foresee_the_same(
    hidden: int, vocabulary: int, naming: Naming, longest: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.verifier.engine import fused_exits
    from services.verifier.engine.fused_exits import FusedExit

    if longest > 3:
        monkeypatch.setattr(fused_exits, "FEW_ROWS", 2)  # launched as many rows are
    torch.manual_seed(1)
    module = ExitModule() if kind == "untrained" else module_of(hidden, judged=kind == "judged by weights")
    module = module.to(DEVICE)
    weight = (torch.randn(vocabulary, hidden) * 0.3).to(DEVICE)
    norm = (1 + 0.1 * torch.randn(hidden)).to(DEVICE)
    head, width = DeviceHead(weight, naming), longest + 1
    exits = GraphExits(
        ExitSet({2: module}, "test", (), naming),
        lambda values: torch.nn.functional.rms_norm(values, (hidden,), norm, EPSILON),
        head,
        Listener(),
        device=DEVICE,
        most_blocks=BLOCKS,
        longest=longest,
        outcomes=OUTCOMES,
    )
    rows = BLOCKS * width
    lengths = torch.randint(width, (BLOCKS,), dtype=torch.int32).to(DEVICE)
    places = torch.randint(40, (rows,), dtype=torch.int32).to(DEVICE)
    drafts = torch.randint(vocabulary, (rows,), dtype=torch.int32).to(DEVICE)
    sure = torch.where(torch.rand(rows) < 0.5, -3 * torch.rand(rows), torch.nan).to(DEVICE)
    stream, residual = torch.randn(2, 40, hidden).to(DEVICE)
    for kept, staged in (
        (exits._lengths, lengths),
        (exits._drafts, drafts),
        (exits._sure, sure.view(torch.int32)),
    ):
        kept.copy_(staged)
    with torch.inference_mode():
        wanted = exits.outcomes(2, stream[places.long()] + residual[places.long()], BLOCKS)
        fused = FusedExit(module, head, norm, EPSILON, OUTCOMES)
        own, normed = fused.gather(stream, residual, places)
        found = fused.outcomes(own, normed, drafts, sure, lengths, width)
    assert torch.equal(found[..., :2], wanted[..., :2])
    shares = [each[..., 2].contiguous().view(torch.float32) for each in (found, wanted)]
    assert torch.allclose(shares[0], shares[1], atol=1e-5)
    if naming.reduce is None:
        return
    with torch.inference_mode():
        fused._rough_type = torch.float16  # as beside weights of 16 bits
        found = fused.outcomes(*fused.gather(stream, residual, places), drafts, sure, lengths, width)
    assert torch.equal(found[:, 0, :2], wanted[:, 0, :2])
    assert torch.allclose(found[..., 2].contiguous().view(torch.float32), shares[1], atol=2e-3)


def test_of_equally_likely_tokens_the_first_are_named() -> None:
    from services.verifier.engine.fused_exits import FusedExit

    hidden, width = 48, 2
    fused = FusedExit(
        ExitModule(),
        DeviceHead(torch.zeros(1280, hidden, device=DEVICE)),
        torch.ones(hidden, device=DEVICE),
        EPSILON,
        OUTCOMES,
    )
    rows = torch.arange(width, dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        own, normed = fused.gather(*torch.randn(2, width, hidden).to(DEVICE), rows)
        unsure = torch.full((width,), torch.nan, device=DEVICE)
        found = fused.outcomes(own, normed, rows, unsure, torch.zeros_like(rows[:1]), width)
    assert found[0, :, :2].tolist() == [[0, token] for token in range(OUTCOMES)]
