"""KV cache bookkeeping on ints: which block belongs to whom. No array is touched here."""

from octavo.kv_cache.block_pool import BlockPool
from octavo.kv_cache.manager import KVCacheManager

__all__ = ["BlockPool", "KVCacheManager"]
