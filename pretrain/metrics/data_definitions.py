"""What a data run reports of itself, in DIR/metrics.jsonl; rows of attempts, then totals."""

from pretrain.metrics.metric import Metric

SOURCE = "data_pipeline/rates.py"
COUNTED = "counted by the process that works; of a total by the audit, each document once"
BY_STAGE = "clean: archives, texts that passed; dedup: texts; shards: texts, shard files"


def _metric(name: str, unit: str, formula: str, meaning: str) -> Metric:
    # Nothing is reduced: each process has rows of its own, and totals are over all of them.
    return Metric(f"data/{name}", unit, formula, meaning, "equal", SOURCE)


DATA_DEFINITIONS: tuple[Metric, ...] = (
    _metric(
        "stage",
        "name",
        "clean, dedup, tokenizer, audit or shards",
        "Of `farspan data run`. This and those below are in DIR/metrics.jsonl of a data run, which "
        "has a row now and then for each attempt at a stage, and one with the totals at the end.",
    ),
    _metric("part", "name", "I/N", "Which part of the stage a job or a task does."),
    _metric("attempt", "name", "process and machine", "Who worked; not of a total."),
    _metric("time", "s", "seconds since 1970 (UTC)", "When the row was written."),
    _metric(
        "finished",
        "1",
        "1 in the last row of an attempt that came to its end, else 0",
        "An attempt whose last row has 0 is at work, or was stopped or killed.",
    ),
    _metric("attempts", "attempts", "how many worked at the stage", "Of a total alone."),
    _metric("workers", "processes", "--workers, or processors of a Ray cluster", "Of an attempt."),
    _metric(
        "wall_s",
        "s",
        "since the attempt began; of a total while at least one attempt was at work",
        "Time in which nobody worked, such as in a queue, does not count.",
    ),
    _metric(
        "cpu_s",
        "s",
        "user and system time of the processes",
        "Far below wall_s * workers, something else is waited for: network or disks. Of a Ray "
        "cluster it is known for clean alone.",
    ),
    _metric(
        "unfinished_s",
        "s",
        "sum of wall_s over attempts that did not come to their end",
        "What was finished meanwhile is kept: the time is not all lost.",
    ),
    _metric("documents", "documents", COUNTED, "Documents that came into the stage."),
    _metric("bytes_in", "bytes", COUNTED, f"Bytes that came into the stage. {BY_STAGE}."),
    _metric("bytes_out", "bytes", COUNTED, f"Bytes that the stage left. {BY_STAGE}."),
    _metric("items", "items", "archives or shards", "What an attempt has to do."),
    _metric(
        "share",
        "1",
        "what is done / what the attempt had to do",
        "Bytes of archives, or shards. The rest takes wall_s * (1 - share) / share.",
    ),
    _metric("documents_per_s", "documents/s", "documents / wall_s", "Over all workers."),
    _metric(
        "documents_per_s_per_worker",
        "documents/s",
        "documents / sum over attempts of wall_s * workers",
        "It should not fall as workers are added; where it does, they wait for something shared.",
    ),
    _metric("mb_in_per_s", "MB/s", "bytes_in / wall_s / 10^6", "Over all workers."),
    _metric("mb_out_per_s", "MB/s", "bytes_out / wall_s / 10^6", "Over all workers."),
)
