"""Answers in free text: where they stand, how they are written, and when two are the same."""

import importlib.util
import re
import threading
from fractions import Fraction

from .task import final_text

# A sign, but no hyphen between numbers; thousands' commas; a fraction, a mixed number, a power of
# ten. What stands behind ^ is an exponent.
_NUMBER = re.compile(
    r"(?:(?<!\d)[-−+])?\$?(?:(?<![\d^])(?<!\^[{+−-])(?<!\^\{[+−-])"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+|/\d+| \d+/\d+)?(?:e[-+]?\d\d?(?!\w))?"
    r"|(?<!\d)\.\d+)",
    re.ASCII | re.IGNORECASE,
)
# Between groups of three digits: LaTeX's {,} and \, and ~, and narrow or unbreakable spaces.
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;: ]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_POWER = re.compile(
    r"\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*(?:\{\s*([-−+]?\d\d?)\s*\}|(\d))", re.ASCII
)
_PART = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", re.ASCII)
# Marks of Markdown may stand between.
_SAID = re.compile(r"\banswer[ *_]*(?:is\b|:|=)[ \t*_]*:?\s*([^\n]+)", re.IGNORECASE)
_SPACE = re.compile(r"\\[,;:! ]|~|\\q?quad\b|\s+")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]{3,}(?:-[^\W\d_]+)*")  # as a product of letters east would be seat
# Of "x = 5" and "x \in [0, 1]" what stands behind says the answer.
_NAMED = re.compile(r"^\s*[a-zA-Z]\s*(?:=|\\in\b)(?=[^=]*$)")
LONGEST = 1000  # characters of an answer; what is longer is no answer


def extract(text: str) -> str | None:
    """The answer that a completion gives, as it stands there; None where it gives none.

    Of what follows `</think>`, in this order: the line after the last `####`, the last `\\boxed{}`,
    what is said after the last "answer is" or "answer:", else the last line.
    """
    return _extract(text)[0]


def extract_number(text: str) -> str | None:
    """The number that a completion gives, in one way of writing it: of what `extract` finds, the
    whole, else the first number where something says that the answer stands there ("18 dollars a
    day for 3 days"), the last one of a last line that nothing announces; None where there is
    none."""
    given, announced = _extract(text)
    if given is None:
        return None
    return number(given) or (first_number(given) if announced else last_number(given))


def _extract(text: str) -> tuple[str | None, bool]:
    """What `extract` gives, and whether something announces it."""
    final = final_text(text)
    if not final:
        return None, False
    announced = True
    if "####" in final:
        answer = final.rpartition("####")[2].strip().partition("\n")[0]
    elif (boxed := last_boxed(final)) is not None:
        answer = boxed
    elif said := _SAID.findall(final):
        answer = said[-1].rstrip().removesuffix("**")
    else:
        answer, announced = final.splitlines()[-1], False
    answer = answer.strip()
    return (answer if 0 < len(answer) <= LONGEST else None), announced


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{}` or `\\fbox{}` holds, braces within it balanced; None where there is
    none, or its braces never close."""
    boxes = {m.end() - 1 for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)}
    opened: list[int] = []
    last = -1, -1
    for m in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # a brace behind a backslash is a character
        if m[0] == "{":
            opened.append(m.start())
        elif m[0] == "}" and opened:
            start = opened.pop()
            if start in boxes:
                last = max(last, (start, m.start()))
    return text[last[0] + 1 : last[1]].strip() if last[0] >= 0 else None


def number(text: str) -> str | None:
    """A number in one way of writing it: "$1,234.50" → "2469/2"; None for what is none.

    Currency signs, what parts thousands, per cent and degree signs and a full stop at the end are
    left out; decimals, mixed numbers (2 1/2) and powers of ten (3e5) become exact fractions.
    """
    bare = _plain(text.strip().strip("$").replace("\\$", "").replace("\\%", ""))
    bare = re.sub(r"\^?\{?\\circ\}?$|[%°]$", "", bare.strip().rstrip(".").strip())
    bare = bare.replace("−", "-").replace("$", "").strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(\.\d+)?|[-+]?\d{1,3}(?: \d{3})+(\.\d+)?", bare):
        bare = re.sub("[, ]", "", bare)
    bare = re.sub(r"^([-+])\s+", r"\1", _PART.sub(r" \1/\2", bare).strip())
    bare = re.sub(r"^--(?=\d+/)", "", bare)  # of -\frac{-1}{2}
    if len(bare) > 100:
        return None
    try:
        if parts := re.fullmatch(r"([-+]?)(?:(\d+)\s+)?(\d+/\d+)", bare, re.ASCII):
            sign, whole, part = parts.groups()
            return str(Fraction(sign + "1") * (Fraction(whole or 0) + Fraction(part)))
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d\d?)?", bare, re.ASCII | re.IGNORECASE):
            return str(Fraction(bare))
    except ZeroDivisionError:
        pass
    return None


def _plain(text: str) -> str:
    """Numbers in a text with commas between thousands, and powers of ten as 3e5."""
    text = _GROUPS.sub(",", text.replace("\\!", ""))
    return _POWER.sub(lambda m: f"e{m[1] or m[2]}".replace("−", "-"), text)


def first_number(text: str) -> str | None:
    """The first number in a text, in one way of writing it, or what a sum in front of "=" comes to
    ("9 * 2 = 18"); None where there is none, or a power (10^2)."""
    text = _plain(text)
    sum_, equals, result = text.rpartition("=")
    if equals and len(_NUMBER.findall(sum_)) > 1 and _NUMBER.search(result):
        text = result
    found = _NUMBER.search(text)
    if found is None or text[found.end() :].lstrip(" {}").startswith("^"):
        return None
    return number(found[0])


def last_number(text: str) -> str | None:
    """The last number in a text, in one way of writing it; None where there is none."""
    found = _NUMBER.findall(_plain(text))
    return number(found[-1]) if found else None


def normal(text: str) -> str:
    """LaTeX in one way of writing it, as far as that can be seen from the outside: spaces,
    \\left and \\right, \\dfrac, \\text{} and dollar signs do not tell answers apart."""
    text = text.strip().strip("$").rstrip(".")
    text = re.sub(r"\\left\b|\\right\b", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)  # \frac12
    text = _NAMED.sub("", _WRAPPED.sub(r"\1", text))
    return number(text) or _SPACE.sub("", text)


def canonical(text: str) -> str:
    """One text for all the ways of writing an answer that are known to be the same: a number, or
    what math-verify makes of it (x + 1 and 1 + x, x/2 and 0.5x), or normal LaTeX."""
    plain = normal(text)
    if number(plain) is not None or _WORD.fullmatch(plain) or not have_math_verify():
        return plain
    from math_verify import parse  # pyright: ignore[reportMissingImports]
    from sympy import nsimplify

    try:
        bare = _NAMED.sub("", text)
        parsed = parse(f"\\boxed{{{bare}}}", parsing_timeout=_seconds())
        if not parsed or isinstance(parsed[0], str):
            return plain
        return str(nsimplify(parsed[0], rational=True))
    except Exception:  # noqa: BLE001  sympy raises what it likes on what a model wrote
        return plain


def same(gold: str, given: str) -> bool:
    """Whether two answers are equal: written alike, or equal to math-verify where it is there."""
    if canonical(gold) == canonical(given):
        return True
    if not have_math_verify() or any(_WORD.fullmatch(normal(text)) for text in (gold, given)):
        return False
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    try:
        left, right = (
            parse(f"\\boxed{{{text}}}", parsing_timeout=_seconds()) for text in (gold, given)
        )
        return bool(verify(left, right, timeout_seconds=_seconds()))  # in this order
    except Exception:  # noqa: BLE001
        return False


def have_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _seconds() -> int | None:
    """A limit on one comparison: math-verify's rests on SIGALRM, which only the main thread has."""
    return 5 if threading.current_thread() is threading.main_thread() else None
