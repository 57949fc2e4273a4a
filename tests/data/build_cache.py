"""A process that tokenises: `python build_cache.py SOURCE TOKENIZER CACHE UNIT_BYTES`; prints the cache's folder."""

import sys
from types import SimpleNamespace

from tokenizers import Tokenizer

from hf_mamba.data import parse_sources, records, tokenize_source

if __name__ == "__main__":
    source, folder, cache, unit_bytes = sys.argv[1:]
    records.MIN_UNIT_BYTES = int(unit_bytes)
    # The two attributes that are read of a PreTrainedTokenizerFast, without the seconds that importing it takes.
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(f"{folder}/tokenizer.json"), eos_token_id=0)
    try:
        shards = tokenize_source(parse_sources([source])[0], tokenizer, cache_dir=cache, num_proc=2, progress=False)
    except ValueError as error:
        raise SystemExit(f"ValueError: {error}") from None
    print(shards.path)
