"""The engine's thread: many callers, slow ones, cancelled ones, and what happens when it dies."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from functools import partial

import pytest
from toy_runner import ToyRunner, plain_generate, save_toy_artifact

from distaff.runtime.async_engine import AsyncEngine
from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.errors import DuplicateRequestError, EngineDeadError, EngineOverloadedError, PromptError
from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams

ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, output_kind=RequestOutputKind.DELTA)


@pytest.fixture(scope="module")
def executables(tmp_path_factory):
    return tmp_path_factory.mktemp("executables")


class SlowRunner(ToyRunner):
    """Takes some time for a step, as models do."""

    def execute(self, program, batch, rows=None):
        time.sleep(0.002)
        return super().execute(program, batch, rows)


@pytest.fixture
async def serve(tmp_path, executables):
    """Starts engines, and shuts them down at the end."""
    started = []

    async def start(runner=SlowRunner, artifact=None, **config):
        folder = tmp_path / str(len(started))
        save_toy_artifact(folder, **{"max_model_len": 128, "num_pages": 200, **(artifact or {})})
        engine = Engine(folder, EngineConfig(warm_up=False, **config), make_runner=partial(runner, executables))
        started.append(AsyncEngine(engine))
        await started[-1].start()
        return started[-1]

    yield start
    for engine in started:
        await engine.shutdown()


async def collect(engine, prompt, params, request_id, pause=0.0, **options):
    outputs = []
    async for output in engine.generate(prompt, params, request_id, **options):
        outputs.append(output)
        await asyncio.sleep(pause)
    return outputs


async def until_idle(engine):
    """Waits until the engine has nothing to do, then checks on its thread that nothing leaked."""
    deadline = time.monotonic() + 10
    while await engine._call(lambda: engine._engine.has_unfinished):
        assert time.monotonic() < deadline, "requests are left"
        await asyncio.sleep(0.005)
    await engine._call(engine._engine.check_idle)
    assert await engine._call(lambda: engine._streams) == {}


@pytest.mark.smoke
async def test_concurrent_requests_get_their_own_outputs(serve):
    engine = await serve(ToyRunner)
    prompts = [[4 + i, 5, 6] for i in range(12)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    results = await asyncio.gather(*(collect(engine, p, params, str(i)) for i, p in enumerate(prompts)))
    for prompt, outputs in zip(prompts, results, strict=True):
        assert [t for o in outputs for t in o.outputs[0].token_ids] == plain_generate(prompt, 20, ignore_eos=True)
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    await until_idle(engine)
    assert engine.stats().running == 0 and not engine.errored


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
async def test_a_slow_reader_gets_merged_outputs(serve, kind):
    engine = await serve(ToyRunner)
    params = SamplingParams(n=2, seed=0, max_tokens=60, ignore_eos=True, output_kind=kind, logprobs=0)
    quick = await collect(engine, [5, 6], params, "quick")
    slow = await collect(engine, [5, 6], params, "slow", pause=0.03)
    assert len(slow) < len(quick) / 2

    def tokens(outputs, index):
        own = [c for o in outputs for c in o.outputs if c.index == index]
        if kind == RequestOutputKind.CUMULATIVE:
            return own[-1].token_ids, len(own[-1].logprobs), own[-1].cumulative_logprob
        return [t for c in own for t in c.token_ids], sum(len(c.logprobs) for c in own), own[-1].cumulative_logprob

    for index in range(2):
        assert tokens(quick, index) == tokens(slow, index)
        assert tokens(slow, index)[1] == 60
    assert len(slow[-1].metrics) == 2


async def test_leaving_the_iterator_aborts(serve):
    engine = await serve()
    iterator = engine.generate([5, 6], ENDLESS, "r")
    await anext(iterator)
    await iterator.aclose()
    await until_idle(engine)


async def test_cancelling_at_any_moment_leaves_nothing(serve):
    engine = await serve()
    rng = random.Random(1)
    for i in range(60):
        task = asyncio.create_task(collect(engine, [5, 6], ENDLESS, str(i)))
        await asyncio.sleep(rng.choice([0, 0, 0.001, 0.01]))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until_idle(engine)


async def test_abort_gives_a_last_output(serve):
    engine = await serve()
    task = asyncio.create_task(collect(engine, [5, 6], ENDLESS, "r"))
    await asyncio.sleep(0.03)
    await engine.abort("r")
    await engine.abort("unknown")
    outputs = await task
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
    await until_idle(engine)


async def test_timeout_ends_a_request(serve):
    engine = await serve()
    outputs = await collect(engine, [5, 6], ENDLESS, "r", timeout=0.05)
    assert outputs[-1].outputs[0].finish_reason == "abort" and "timeout" in outputs[-1].error


async def test_refusals_come_before_the_first_output(serve):
    engine = await serve(max_num_seqs=1, max_waiting=1)
    running = engine.generate([5], ENDLESS, "running")
    await anext(running)
    waiting = asyncio.create_task(collect(engine, [6], ENDLESS, "waiting"))
    await asyncio.sleep(0.02)
    for error, prompt, request_id in [
        (PromptError, [], "new"),
        (DuplicateRequestError, [5], "running"),
        (EngineOverloadedError, [5], "new"),
    ]:
        with pytest.raises(error):
            await collect(engine, prompt, ENDLESS, request_id)
    assert not (await anext(running)).finished, "the duplicate took the other's outputs"
    await running.aclose()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await until_idle(engine)


async def test_reset_prefix_cache(serve):
    engine = await serve()
    iterator = engine.generate([5, 6], ENDLESS, "r")
    await anext(iterator)
    assert not await engine.reset_prefix_cache()
    await iterator.aclose()
    assert await engine.reset_prefix_cache()


async def test_an_engine_that_was_not_started_says_so(serve):
    engine = await serve()
    with pytest.raises(EngineDeadError, match="not started"):
        await collect(AsyncEngine(engine._engine), [5], ENDLESS, "r")


async def test_death_reaches_everyone(serve):
    engine = await serve()
    tasks = [asyncio.create_task(collect(engine, [5, i], ENDLESS, str(i))) for i in range(4, 8)]
    await asyncio.sleep(0.03)
    engine._engine._runner.fail = RuntimeError("out of order")
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, EngineDeadError) and "out of order" in str(result)
        assert isinstance(result.__cause__, RuntimeError)
    assert engine.errored
    with pytest.raises(EngineDeadError):
        await collect(engine, [5], ENDLESS, "late")
    with pytest.raises(EngineDeadError):
        await engine.abort("late")
    await asyncio.wait_for(engine.shutdown(), 5)


async def test_shutdown_drains_and_then_aborts(serve):
    engine = await serve(artifact={"max_model_len": 1024})
    short = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    tasks = [asyncio.create_task(collect(engine, [5, 6], p, str(i))) for i, p in enumerate([short, ENDLESS])]
    await asyncio.sleep(0.01)
    stopping = asyncio.create_task(engine.shutdown(timeout=1.0))
    await asyncio.sleep(0.005)
    with pytest.raises(EngineDeadError, match="shut"):
        await collect(engine, [5], short, "late")
    await stopping
    drained, aborted = await asyncio.gather(*tasks)
    assert drained[-1].outputs[0].finish_reason == "length"
    assert aborted[-1].outputs[0].finish_reason == "abort"
    assert not engine.errored
    engine._engine.check_idle()


async def test_a_closed_event_loop_does_not_hurt_the_engine(serve):
    engine = await serve()
    loop = asyncio.new_event_loop()

    async def start_only():
        iterator = engine.generate([5, 6], ENDLESS, "orphan")
        await anext(iterator)
        return iterator  # kept, so that closing the loop does not close it

    thread_result = []
    thread = threading.Thread(target=lambda: thread_result.append(loop.run_until_complete(start_only())))
    thread.start()
    await asyncio.to_thread(thread.join)
    loop.close()
    await until_idle(engine)
    assert len(await collect(engine, [5], ENDLESS, "next")) > 0


async def test_500_random_requests_leave_nothing_behind(serve):
    engine = await serve(ToyRunner, artifact={"num_pages": 40})
    rng = random.Random(2)

    async def one(i):
        params = SamplingParams(
            n=rng.choice([1, 1, 3]), max_tokens=rng.randrange(1, 12), output_kind=rng.choice(list(RequestOutputKind))
        )
        prompt = [rng.randrange(4, 8) for _ in range(rng.randrange(1, 30))]
        await asyncio.sleep(rng.random() * 0.5)
        return await collect(engine, prompt, params, str(i), timeout=rng.choice([None, 0.01]))

    tasks = [asyncio.create_task(one(i)) for i in range(500)]
    for task in rng.sample(tasks, 150):
        await asyncio.sleep(0.003)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    done = [r for r in results if not isinstance(r, asyncio.CancelledError)]
    assert len(done) >= 350 and all(outputs[-1].finished for outputs in done)
    await until_idle(engine)
