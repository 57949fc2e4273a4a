"""What a start asks of the disk: `python count_calls.py CACHE TOKENIZER SOURCE...`; prints the counts of three starts.

The first start makes the tokens, the second finds them, and the third was told by the second what the files hold.
"""

import json
import os
import subprocess
import sys
from collections import Counter

if __name__ == "__main__":
    from hf_mamba.data import encoding, load_tokenizer, prepare_data, shards

    cache, folder, *sources = sys.argv[1:]
    data = os.path.dirname(os.path.commonpath(sources)) if len(sources) > 1 else sources[0]
    counts: Counter[str] = Counter()
    fsync, popen, of = os.fsync, subprocess.Popen, encoding.Encoding.of

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    def hook(event, args):
        if event == "open" and isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            kind = "data" if path.startswith(data) else os.path.relpath(path, cache).split("/")[0]
            counts[kind] += path.startswith((data, cache))

    os.fsync, subprocess.Popen = counted("fsync", fsync), counted("processes", popen)
    encoding.Encoding.of = counted("fingerprints", of)
    tokenizer = load_tokenizer(folder)
    sys.addaudithook(hook)
    options = {"seq_len": 16, "eval_fraction": 0, "cache_dir": cache, "num_proc": 2, "progress": False}
    contents = None
    for start in range(3):
        counts.clear()
        shards.forget_maps()
        prepared = prepare_data(sources, tokenizer=tokenizer, contents=contents if start == 2 else None, **options)
        contents = [source["content"] for source in prepared.fingerprint["sources"]]
        print(json.dumps(counts))
