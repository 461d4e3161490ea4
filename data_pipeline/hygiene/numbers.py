"""Payment card and phone numbers in a run of digits and separators."""

import re
from collections.abc import Iterator

Span = tuple[int, int]
CONTEXT = 32

# Words before a number that say what it is.
FILLER = r"(?:[ .:#/()-]|\b(?:no|nr|number|num|us|me|now|today|is|at|on|free|toll|and|or)\b)"
IS_PHONE = re.compile(
    r"(?:(?<![^\W\d_])(?:tel|tél|tlf|telephone|téléphone|telefon|telefono|teléfono|telefone|phone|ph|fax|"
    r"mobile?|mob|móvil|celular|cell|call|dial|handy|whatsapp|sms|hotline|helpline|тел|телефон|факс)"
    rf"|电话|手机|传真|電話|携帯){FILLER}{{0,8}}[：\s]?$",
    re.I,
)
IS_OTHER = re.compile(
    r"(?:[$€£¥#№]|(?<![^\W\d_])(?:isbn(?:-1[03])?|issn|imei|ean|upc|gtin|asin|sku|oclc|pmid|doi|"
    r"order|invoice|tracking|serial|parcel|part|patent|case|account|acct|iban|ref|reference|id|"
    rf"item|model|ticket|no|nr|bestellnummer))(?:{FILLER}|\bid\b){{0,4}}\s?$",
    re.I,
)

# ISO/IEC 7812 issuers and their lengths: Visa, Mastercard, American Express, Discover, Diners Club,
# JCB, UnionPay, Mir, and the Maestro ranges that no other kind of number is known for.
ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|"
    r"3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d)\d{12,15}|3(?:0[0-5]|095|[689]\d)\d{11}|"
    r"35(?:2[89]|[3-8]\d)\d{12,15}|62\d{14,17}|220[0-4]\d{12,15}|"
    r"(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{8,15}"
)
CARD = re.compile(
    r"(?<![\w.,/+-])(?:(?P<whole>\d{12,19})|(?<!\D\d{4}[ -])(?<!^\d{4}[ -])"
    r"(?P<grouped>\d{4}(?P<s>[ \u00a0-])(?:\d{4}(?P=s)\d{4}(?P=s)\d{1,4}|\d{6}(?P=s)\d{4,5}))"
    r"(?:(?P=s)\d{3})?(?![ -]\d{4}(?!\d)))"
    r"(?!\w|[/.,-]\d)"
)

# Country codes that are assigned (ITU-T E.164).
COUNTRY = (
    r"(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|21[12368]|2[2346]\d|25[0-8]|"
    r"29[017-9]|35\d|37[0-8]|38[0-35-79]|42[013]|5[09]\d|67[02-9]|68[0-35-9]|69[0-2]|80[08]|"
    r"85[02356]|87[08]|88[0-36]|888|96[0-8]|97[0-79]|99[2-68])"
)
DASH = r"\-\u2010-\u2013"
SPACE = r" \u00a0\u202f"
GAP = rf"(?:[{SPACE}]?[{DASH}(][ (]?|/|\)[ /{DASH}]{{0,2}}|[.{SPACE}])?"
AREA, EXCHANGE = r"[2-9](?!11)\d\d", r"[2-9]\d\d"
NOT_BEFORE, NOT_AFTER = r"0-9A-Za-z_$€£¥#№", r"0-9A-WYZa-wyz_"  # 212-555-0123x45 has an extension
# Forms that little else has.
CLEAR = re.compile(
    rf"(?<![\w+])(?P<international>\+\(?{COUNTRY}\)?(?:(?: / |{GAP})\d){{5,13}})(?![{NOT_AFTER}])"
    # The North American Numbering Plan: NXX-NXX-XXXX, no area ends in 11.
    rf"|(?:(?<!\d)(?=\()|(?<![{NOT_BEFORE}])(?<!\d[.,/:-]))"
    rf"(?P<american>(?:1[-. ]?)?(?:\({AREA}\)[ .-]{{0,3}}{EXCHANGE}[-. ]"
    rf"|{AREA}(?P<s>[.\-\u2011]){EXCHANGE}(?P=s)|{AREA}[ /]{EXCHANGE}-)\d{{4}})"
    rf"(?![{NOT_AFTER}]|[-./]\d)"
)
# Forms that a part of a longer list of numbers has too.
NATIONAL = re.compile(
    rf"(?<![{NOT_BEFORE}+])(?<!\d[ .,/:-])(?:"
    rf"(?P<prefixed>00 ?{COUNTRY}(?=\d*[ ()/{DASH}])(?:{GAP}\d){{7,13}})"
    rf"|(?P<spaced>(?:1 )?{AREA} {EXCHANGE} \d{{4}})"
    rf"|(?P<pairs>0[1-9](?P<p>[ .-])(?:\d\d(?P=p)){{3}}\d\d)"
    rf"|(?P<bracketed>\(0[1-9]\d{{0,4}}\)[ /{DASH}]{{0,3}}\d{{2,8}}(?:[ {DASH}]\d{{2,5}}){{0,3}})"
    rf"|(?P<trunk>0[1-9]\d{{0,4}}(?: ?[/{DASH}] ?| )\d{{2,8}}(?:[ {DASH}]\d{{2,6}}){{0,4}})"
    rf"|(?P<chinese>1[3-9]\d(?P<c>[ -])\d{{4}}(?P=c)\d{{4}})"
    rf"|(?P<brazilian>\(\d\d\) ?9?\d{{4}}-\d{{4}})"
    rf"|(?P<russian>8[ -]?\(?\d{{3}}\)?[ -]\d{{3}}-\d\d-\d\d)"
    rf")(?![{NOT_AFTER}]|[ .,/:-]\d)"
)
LABELLED = re.compile(rf"[+(]?\d(?:{GAP}\d){{6,14}}(?![{NOT_AFTER}]|[,:]\d)")
# Digits of a form that leaves them open, with those of the country.
DIGITS = {"international": (8, 15), "prefixed": (12, 17), "bracketed": (8, 12), "trunk": (9, 12)}
ELEVEN_DIGITS = ("1", "7")  # the countries whose numbers are all as long
IS_DATE = re.compile(
    r"(?:19|20)\d\d[-./]\d\d?[-./]\d\d?(?!\d)|\d\d?(?P<s>[-./ ])\d\d?(?P=s)(?:19|20)\d\d(?!\d)"
)
IS_ROUND = re.compile(r"[ .\u00a0]000[ .\u00a0]000$")
IS_OTHER_CODE = re.compile(r"\d\d-\d{7}|\d{3}-\d\d-\d{4}|\d{5}-\d{4}")  # EIN, SSN, ZIP + 4


def find_cards(text: str, start: int, stop: int) -> Iterator[Span]:
    """Numbers of a known issuer whose length and last digit (ISO/IEC 7812-1, annex B) are right."""
    for match in CARD.finditer(text, start, min(len(text), stop + 2)):
        begin = match.start()
        if IS_OTHER.search(text[max(0, begin - CONTEXT) : begin]):
            continue
        # Three digits after the groups may be a part of the number or a security code.
        for number in (match[0], match["grouped"] or ""):
            digits = re.sub(r"\D", "", number)
            if ISSUERS.fullmatch(digits) and _passes_luhn(digits):
                yield begin, begin + len(number)
                break


def find_phones(text: str, start: int, stop: int) -> Iterator[Span]:
    """Numbers in a form of `CLEAR` or `NATIONAL`, or after a word for one."""
    before = text[max(0, start - CONTEXT) : start]
    limit = min(len(text), stop + 2)
    if IS_PHONE.search(before):
        labelled = LABELLED.match(text, start, limit)
        if labelled and not IS_DATE.match(text, start):
            yield labelled.span()
    elif IS_OTHER.search(before):
        return
    for pattern in (CLEAR, NATIONAL):
        for match in pattern.finditer(text, start, limit):
            if _is_possible(match):
                yield match.span()


def _is_possible(match: re.Match[str]) -> bool:
    form = match.lastgroup
    digits = re.sub(r"\D", "", match[0])
    fewest, most = DIGITS.get(form or "", (0, len(digits)))
    if not fewest <= len(digits) <= most:
        return False
    if form == "international":
        if digits.startswith(ELEVEN_DIGITS) and len(digits) != 11:
            return False
        return not IS_ROUND.search(match[0])
    if form == "trunk":
        return not IS_DATE.match(match[0]) and not IS_OTHER_CODE.fullmatch(match[0])
    return True


def _passes_luhn(digits: str) -> bool:
    doubled = (2 * int(digit) for digit in digits[-2::-2])
    return (sum(map(int, digits[::-2])) + sum(d // 10 + d % 10 for d in doubled)) % 10 == 0
