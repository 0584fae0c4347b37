"""When the engine can't start, or dies: a clear error, no hang, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.verifier.engine.compat import CPU_SYMBOLS, CUDA_SYMBOLS, SYMBOLS, check_compatible
from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.exit_files import FILE_FORMAT
from services.verifier.engine.exit_modules import TrainedExit
from services.verifier.engine.types import EngineInfo
from shared import models
from shared.errors import EngineError, ModelFilesError
from tests.integration.engine_bench import (
    DEADLINE_S,
    Bench,
    always_right,
    endless,
    next_output,
    settings_for,
)
from tests.integration.tiny_target import HIDDEN, LAYERS, VOCABULARY, TinyTarget, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

START_S = 120.0


async def test_killed_engine_process_fails_streams_calls_and_health_at_once(tiny_target: TinyTarget) -> None:
    engine = VllmEngine(settings_for(tiny_target))
    async with Bench.over(engine):
        prompt, params = random_prompt(1, 10), endless()
        streams = [engine.open(name, prompt, (), params) for name in ("parked", "starting")]
        await next_output(streams[0])
        waiting = [asyncio.create_task(next_output(stream)) for stream in streams]
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGKILL)
        for stream, task in zip(streams, waiting, strict=True):
            with pytest.raises(EngineError, match="died"):
                await task
                await next_output(stream)
        assert not engine.healthy()
        with pytest.raises(EngineError, match="died"):
            await engine.submit("parked", 1, ())
        with pytest.raises(EngineError, match="died"):
            await engine.stats()
        with pytest.raises(EngineError, match="died"):
            engine.open("later", prompt, (), params)
        await engine.close("parked")


async def test_call_under_way_when_the_engine_dies_is_answered(tiny_target: TinyTarget) -> None:
    engine = VllmEngine(settings_for(tiny_target))
    async with Bench.over(engine):
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGSTOP)
        call = asyncio.create_task(engine.stats())
        await asyncio.wait([call], timeout=0.05)
        assert not call.done()
        os.kill(engine.process_id, signal.SIGKILL)
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(call, DEADLINE_S)


async def test_engine_process_dies_with_its_verifier(tiny_target: TinyTarget) -> None:
    verifier = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.engine_child",
        str(tiny_target.directory),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert verifier.stdout is not None
    line = await asyncio.wait_for(verifier.stdout.readline(), START_S)
    engine_process = psutil.Process(int(line))
    verifier.kill()
    await verifier.wait()
    deadline = time.monotonic() + DEADLINE_S
    while engine_process.is_running() and engine_process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine process has outlived its verifier"
        await asyncio.sleep(0.01)


async def test_engine_can_be_stopped_twice_and_used_no_more(tiny_target: TinyTarget) -> None:
    engine = VllmEngine(settings_for(tiny_target))
    with pytest.raises(EngineError, match="not started"):
        await engine.stats()
    async with Bench.over(engine):
        with pytest.raises(EngineError, match="running"):
            await engine.start(lambda report: None)
        stream = engine.open("one", random_prompt(1, 10), (), endless())
        await next_output(stream)
        waiting = asyncio.create_task(next_output(stream))
        process = psutil.Process(engine.process_id)
        await engine.stop()
        with pytest.raises(EngineError, match="stopped"):
            await waiting
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        assert not engine.healthy()
        with pytest.raises(EngineError, match="stopped"):
            await engine.stats()


async def test_too_little_kv_for_the_context_is_refused_with_the_settings_to_mend(
    tiny_target: TinyTarget,
) -> None:
    error = await failure(VllmEngine(settings_for(tiny_target, kv_cache_mb=1, max_model_len=2048)))
    assert type(error) is EngineError
    assert "OUTRIDER_KV_CACHE_MB" in error.message
    assert "OUTRIDER_MAX_MODEL_LEN" in error.message


async def test_missing_weights_are_refused_with_their_names(tiny_target: TinyTarget, tmp_path: Path) -> None:
    model = copy_of(tiny_target, tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.3.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    error = await failure(VllmEngine(settings_for(tiny_target, model=str(model))))
    assert type(error) is ModelFilesError
    assert "layers.3.mlp.down_proj.weight" in error.message


async def test_damaged_weights_are_refused_before_anything_is_started(
    tiny_target: TinyTarget, tmp_path: Path
) -> None:
    model = copy_of(tiny_target, tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    error = await failure(VllmEngine(settings_for(tiny_target, model=str(model))))
    assert type(error) is ModelFilesError
    assert "damaged" in error.message
    assert "fetch it again" in error.message


async def test_context_smaller_than_asked_for_is_noted(tiny_target: TinyTarget) -> None:
    async with Bench.over(VllmEngine(settings_for(tiny_target, max_model_len=4096))) as bench:
        assert bench.info.max_model_len == 2048
        assert "2048" in bench.info.notes[0]
        assert "OUTRIDER_MAX_MODEL_LEN=4096" in bench.info.notes[0]


async def test_trained_exits_are_used_and_change_nothing_but_hints(
    tiny_target: TinyTarget, tmp_path: Path
) -> None:
    file = tmp_path / "exits.safetensors"
    write_exits(file, tiny_target.directory, layers=(4, 6, 7))
    info = await exact_with_exits(tiny_target, file)
    assert (info.exits, info.exit_layers, info.notes) == ("trained: exits.safetensors", (4, 6, 7), ())


async def test_exits_of_another_target_give_way_to_untrained_ones(
    tiny_target: TinyTarget, tmp_path: Path
) -> None:
    file = tmp_path / "exits.safetensors"
    write_exits(file, tiny_target.directory, layers=(4, 6, 7), target_sha256="0" * 64)
    info = await exact_with_exits(tiny_target, file)
    assert (info.exits, info.exit_layers) == ("untrained", (4, 6, 7))
    assert "trained for the target 000000000000…" in info.notes[0]
    assert "untrained exits serve instead" in info.notes[0]


async def test_engine_without_exits_is_exact_and_silent(tiny_target: TinyTarget) -> None:
    async with Bench.over(VllmEngine(settings_for(tiny_target, exit_layers="none"))) as bench:
        truth = await bench.answer(tiny_target.prompt, endless())
        assert await bench.speculate("s", tiny_target.prompt, truth.tokens, endless(), always_right) == truth
        assert bench.reports == []
        assert (bench.info.exits, bench.info.exit_layers) == ("off", ())


def test_everything_overridden_of_vllms_is_checked_at_start_up() -> None:
    from services.verifier.engine import cuda_worker, model, runner, scheduler, worker

    ours = (
        scheduler.SessionScheduler,
        model._TappedModel,
        model._WithExits,
        model.OutriderLlamaForCausalLM,
        runner.SessionRows,
        worker.SessionRunner,
        worker.SessionWorker,
        cuda_worker.CudaSessionRunner,
        cuda_worker.CudaSessionWorker,
    )
    vllms = {
        name
        for cls in ours
        for base in cls.__mro__
        if base.__module__.startswith("vllm")
        for name, value in vars(base).items()
        if callable(value) and not name.startswith("__")
    }
    overridden = {name for cls in ours for name in vars(cls) if name in vllms}
    assert {"schedule", "_init_model", "_prepare_inputs", "init_device"} <= overridden
    checked = (*SYMBOLS, *CPU_SYMBOLS, *CUDA_SYMBOLS)
    assert overridden <= {symbol.name.rpartition(".")[2] for symbol in checked}
    check_compatible()


async def test_other_vllm_is_refused_before_a_model_is_loaded(
    tiny_target: TinyTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.33.0")
    error = await failure(VllmEngine(settings_for(tiny_target)))
    assert type(error) is EngineError
    assert "vLLM 0.33.0 is installed; the engine is built for 0.32.0" in error.message


async def test_changed_hook_is_refused_by_name(
    tiny_target: TinyTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vllm.v1.core.sched.scheduler.Scheduler._reserve_prefill_lookahead")
    error = await failure(VllmEngine(settings_for(tiny_target)))
    assert type(error) is EngineError
    assert "Scheduler._reserve_prefill_lookahead is missing" in error.message


async def failure(engine: VllmEngine) -> Exception:
    """Why the engine does not start; nothing of it may be left."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises((EngineError, ModelFilesError)) as caught:
        await asyncio.wait_for(engine.start(lambda report: None), START_S)
    assert not engine.healthy()
    left = {process for process in psutil.Process().children(recursive=True) if process.pid not in before}
    assert not [process for process in left if "EngineCore" in " ".join(process.cmdline())]
    return caught.value


async def exact_with_exits(target: TinyTarget, file: Path) -> EngineInfo:
    async with Bench.over(VllmEngine(settings_for(target, exit_modules=str(file)))) as bench:
        truth = await bench.answer(target.prompt, endless())
        assert await bench.speculate("s", target.prompt, truth.tokens, endless(), always_right) == truth
        assert {report.layer for _, report in bench.reports} == {4, 6, 7}
        return bench.info


def copy_of(target: TinyTarget, folder: Path) -> Path:
    return Path(shutil.copytree(target.directory, folder / "copy"))


def write_exits(
    file: Path, target: Path, *, layers: tuple[int, ...], target_sha256: str | None = None
) -> None:
    torch.manual_seed(1)
    assert max(layers) < LAYERS
    modules = {
        layer: TrainedExit(HIDDEN, width=16, judge_rank=4, judge_width=6, eps=1e-5) for layer in layers
    }
    tensors = {
        f"{layer}.{name}": tensor
        for layer, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    tensors["exit_vocab"] = torch.arange(0, VOCABULARY, 2, dtype=torch.int32)
    header = {
        "format": FILE_FORMAT,
        "target_sha256": target_sha256 or models.target_sha256(target),
        "hidden_size": str(HIDDEN),
        "layers": ",".join(map(str, layers)),
    }
    save_file(tensors, file, metadata=header)
