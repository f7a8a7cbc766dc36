import numpy as np
from levanter.data.sharded_datasource import ShardedDataSource
from levanter.data.text.formats import LmDatasetFormatBase
from levanter.store.cache import CacheOptions, TreeCache
from levanter.tokenizers import MarinTokenizer

def build_lm_dataset_cache(
    cache_dir: str,
    source: ShardedDataSource,
    format: LmDatasetFormatBase,
    tokenizer: MarinTokenizer,
    options: CacheOptions = ...,
    enforce_eos: bool = True,
) -> TreeCache[dict[str, np.ndarray]]: ...
