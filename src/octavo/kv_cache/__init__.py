"""KV cache bookkeeping on ints: which block belongs to whom, and what is cached. No array is touched here."""

from octavo.kv_cache.block_pool import BlockPool
from octavo.kv_cache.block_tables import BlockTable
from octavo.kv_cache.manager import KVCacheManager, PendingKV
from octavo.kv_cache.prefix_cache import CachedPrefix

__all__ = ["BlockPool", "BlockTable", "CachedPrefix", "KVCacheManager", "PendingKV"]
