"""Documents with known duplicates, and what became of them."""

import itertools
import json
import random
import re

import pyarrow.parquet as pq


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def documents_of(out):
    files = sorted((out / "documents").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def clusters_of(out):
    return pq.read_table(out / "clusters.parquet").to_pylist()


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, min(len(words), 1)))}


def exact_jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def make_corpus(seed):
    """120 documents, some copied, some edited a little or a lot, shuffled."""
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(2000)]
    texts = []
    for _ in range(60):
        words = rng.choices(vocabulary, k=rng.randint(40, 200))
        texts.append(" ".join(words))
        for _ in range(rng.choice([0, 0, 1, 3])):
            for i in rng.sample(range(len(words)), rng.choice([0, 1, 2, len(words) // 10])):
                words[i] = rng.choice(vocabulary)
            texts.append(" ".join(words))
    rng.shuffle(texts)
    return [{"id": f"d{i}", "text": text, "n": i} for i, text in enumerate(texts)]


def true_components(corpus, threshold):
    component = {document["id"]: {document["id"]} for document in corpus}
    for a, b in itertools.combinations(corpus, 2):
        if exact_jaccard(a["text"], b["text"]) >= threshold:
            merged = component[a["id"]] | component[b["id"]]
            component.update(dict.fromkeys(merged, merged))
    return {frozenset(members) for members in component.values()}
