"""Small schedulers for tests, requests of few tokens for them, and their steps without a model."""

from distaff.runtime.kv_pool import KVPool
from distaff.runtime.request import Request, RequestStatus
from distaff.runtime.sampling_params import SamplingParams
from distaff.runtime.scheduler import Scheduler, SchedulerConfig

PAGE_SIZE = 4
ABORTED = RequestStatus.FINISHED_ABORTED


def make(num_pages=100, caching=False, windows=(), **config):
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64, "watermark": 0.0}
    return Scheduler(SchedulerConfig(**{**defaults, **config}), KVPool(num_pages, PAGE_SIZE, caching, windows))


def ask(name, prompt=5, eos=(), **fields):
    """A request; a prompt given as a number is of tokens that no other request has."""
    own = {key: fields.pop(key) for key in ("priority", "arrival_time", "deadline", "cache_salt") if key in fields}
    if isinstance(prompt, int):
        prompt = [1000 + 100 * ord(name[0]) + i for i in range(prompt)]
    params = SamplingParams(**{"max_tokens": None, **fields})
    return Request(name, prompt, params, eos_token_ids=frozenset(eos), **own)


def add(scheduler, *requests):
    for request in requests:
        scheduler.add(request)
    return requests


def rows(plan):
    return [(row.request.request_id, row.start, row.num_tokens, row.samples) for row in plan.scheduled]


def tokens_for(plan, token=7):
    return {row.request.request_id: [token] for row in plan.scheduled if row.samples}


def step(scheduler, token=7):
    plan = scheduler.schedule()
    scheduler.update(plan, tokens_for(plan, token))
    scheduler.check_integrity()
    return rows(plan)
