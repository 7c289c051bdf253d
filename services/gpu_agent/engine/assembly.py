"""What runs the requests of a hosted model: a batch with its KV cache, or an embedder."""

from collections.abc import Callable

from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.engine.blocks import Blocks
from services.gpu_agent.engine.decode_graph import DecodeGraphs, Recorder, can_record
from services.gpu_agent.engine.embedding import Embedder
from services.gpu_agent.engine.kv import KVStore
from services.gpu_agent.engine.kv_host import HostKV
from services.gpu_agent.engine.kv_manager import KVManager
from services.gpu_agent.engine.prefix import are_prefixes_shareable
from services.gpu_agent.engine.prompts import ModelText
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.pages import PagePool


def make_batch(
    hosted: HostedModel,
    pool: PagePool,
    text: ModelText,
    host_kv: HostKV,
    recorder: Recorder | None,
    on_ready: Callable[[], None],
) -> Batch | Embedder:
    """``recorder``: for decode steps, where the device has such. ``on_ready``: see Batch."""
    facts = hosted.facts
    if hosted.pooling is not None:
        return Embedder(
            hosted.module,
            hosted.pooling,
            text,
            facts.dimensions,
            facts.max_model_len,
            pool.torch_device,
        )
    kv = make_cache(hosted, pool, host_kv)
    can = recorder is not None and can_record(hosted.module, kv.store)
    return Batch(
        hosted.module,
        kv,
        text,
        max_model_len=facts.max_model_len,
        max_batch=facts.max_batch,
        graphs=DecodeGraphs(hosted.module, kv.store, recorder) if recorder and can else None,
        on_ready=on_ready,
    )


def make_cache(hosted: HostedModel, pool: PagePool, host_kv: HostKV) -> KVManager:
    """A cache that may borrow the pages of ``pool`` that nobody needs."""
    store, free = KVStore(pool, hosted.geometry), pool.free
    blocks = Blocks(
        store.blocks_per_page,
        borrow=lambda: free.take(1)[0] if free.num_free else None,
        give_back=lambda page: free.give([page]),
        num_borrowable=lambda: free.num_free,
    )
    return KVManager(
        store,
        blocks,
        hosted.facts.kv_bytes // pool.page_bytes,
        host_kv.open(store.block_bytes) if hosted.spec.preemption != "recompute" else None,
        hosted.spec.prefix_caching and are_prefixes_shareable(hosted.config),
    )
