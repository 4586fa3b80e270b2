import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponder.tasks import answers
from ponder.tasks.answers import (
    canonical,
    extract,
    extract_number,
    last_boxed,
    last_number,
    number,
    same,
)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>so 3</think>#### 72", "72"),
        ("steps\n#### 1\nmore\n#### 72 \nThanks", "72"),
        (r"so $\boxed{\frac{1}{2}}$ is \boxed{x^{2} + \{1\}}.", r"x^{2} + \{1\}"),
        (r"\boxed{5} but then \boxed{6", "5"),  # the last one that closes
        ("The answer is: 12 apples.\nI hope so", "12 apples."),
        ("Final answer: (3, 4)", "(3, 4)"),
        ("first\nsecond\n42\n", "42"),
        ("<think>#### 3</think>", None),
        ("<think>#### 3", None),  # a thought that never ended
        ("<think>a</think>no, 3</think>4", "4"),  # after the last one
        ("The answer is 3.\nNo, the answer is 4", "4"),
        ("**Answer: 4** \nas I said", "4"),
        ("", None),
        ("####", None),
        ("x" * 2000, None),
    ],
)
def test_where_an_answer_stands(text, answer):
    assert extract(text) == answer


def test_boxes_nest():
    assert last_boxed(r"\boxed{\frac{a}{\sqrt{b}}} end") == r"\frac{a}{\sqrt{b}}"
    assert last_boxed(r"\fbox {7}") == "7"
    assert last_boxed(r"{ \boxed{\boxed{1} \boxed{2}") == "2"
    assert last_boxed(r"\boxed{\boxed{1} or 2}") == "1"  # the last that is opened
    assert last_boxed("\\boxed{" * 50_000) is None  # in no time
    assert last_boxed("boxed{7}") is None and last_boxed(r"\boxed{") is None


@pytest.mark.parametrize(
    "text, value",
    [
        ("72", "72"),
        ("072", "72"),
        ("$1,234.50", "2469/2"),
        ("-3.0", "-3"),
        ("−3", "-3"),
        (".5", "1/2"),
        ("50\\%", "50"),
        (r"-\$5", "-5"),
        ("10/4", "5/2"),
        (r"\frac{10}{4}", "5/2"),
        (r"-\dfrac{1}{2}", "-1/2"),
        (r"90^\circ", "90"),
        ("18.", "18"),
        ("1,23", None),
        ("1/0", None),
        ("1{,}234", "1234"),
        (r"1\,234\,567.5", "2469135/2"),
        (r"12\!,345", "12345"),
        ("1~234", "1234"),
        ("1 234", "1234"),
        ("1\u202f234", "1234"),
        ("12 34", None),
        ("1234 567", None),
        ("- 18", "-18"),
        ("3e5", "300000"),
        ("-1.5E-3", "-3/2000"),
        ("3e500", None),
        (r"3 \times 10^5", "300000"),
        (r"2.5 \cdot 10^{-3}", "1/400"),
        ("2 × 10^{−3}", "1/500"),
        ("2 1/2", "5/2"),
        ("-2 1/2", "-5/2"),
        (r"2\frac{1}{2}", "5/2"),
        (r"-2 \dfrac{1}{4}", "-9/4"),
        ("1+1/2", None),
        ("2 1/0", None),
        (r"-\frac{-1}{2}", "1/2"),
        (r"2\frac{-1}{2}", None),
        ("-- 3", None),
        ("x", None),
        ("", None),
        ("٣", None),
        ("9" * 101, None),
    ],
)
def test_numbers_have_one_way_of_writing(text, value):
    assert number(text) == value


def test_the_last_number_of_a_sentence():
    assert last_number("from 3 to $1,200.") == "1200"
    assert last_number("10-15 apples, so 2-3") == "3"
    assert last_number("it is -4 degrees") == "-4"
    assert last_number("none") is None
    assert last_number("the area is 10 m^2.") == "10" == last_number("10 cm^{2}, or m^{-12}")
    assert last_number(r"so \boxed{-5}") == "-5" and last_number("x_{-5}") == "-5"
    assert last_number("2^10 is not 7^3") == "7"
    assert last_number("she has 1{,}234 of them") == "1234" == last_number(r"it is 1\,234!")
    assert last_number("about 3e5 of them") == "300000" == last_number(r"3 \times 10^5 atoms")
    assert last_number("it takes 2 1/2 hours") == "5/2"
    assert last_number("in 2020 345 people") == "345"
    assert last_number("room 5e") == "5"


@given(st.text(max_size=80))
def test_no_text_breaks_them(text):
    for function in (extract, last_boxed, number, last_number, answers.normal):
        result = function(text)
        assert result is None or isinstance(result, str)


@given(st.fractions(max_denominator=1000))
def test_a_number_is_its_own_canonical_form(value):
    assert number(str(value)) == str(value) == number(f"  {value}$")


def test_formulas_without_math_verify(monkeypatch):
    monkeypatch.setattr(answers, "have_math_verify", lambda: False)
    assert same(r"\frac{1}{2}", "0.5") and same(r"\left( 3, \dfrac{1}{2} \right)", r"(3,\frac12)")
    assert same(r"\text{Evelyn}", "Evelyn") and not same("x+1", "1+x")
    assert same("x+1", "x+1.") and same("$x+1$", "x+1")


def test_formulas_with_math_verify():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert canonical("x + 1") == canonical("1+x") and canonical("0.5x") == canonical("x/2")
    assert same("(x+1)^2", "x^2+2x+1") and not same("x^2", "x^3")
    assert same(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}")
    assert not same("5", r"\frac{")


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("The answer is 18 dollars per day for 3 days", "18"),
        ("Answer: 18 (rounded from 17.6)", "18"),
        ("The answer is 18 = 9*2", "18"),
        ("The answer is 9*2 = 18 dollars", "18"),
        ("Answer is 18, not 20", "18"),
        ("**Answer**: 42\n\nI hope this helps with your 3 questions!", "42"),
        ("**Final Answer:** 42\n\nLet me know if you need 3 more!", "42"),
        ("The answer isn't 7. It is 12", "12"),
        ("the answer is x = 5", "5"),
        (r"so \boxed{18\text{ dollars for 3 days}}", "18"),
        ("#### 1,234", "1234"),
        ("she has 3 and 4, that is 7", "7"),  # nothing announces it: the last
        ("The answer is 10^2", None),  # neither 10 nor, without arithmetic, 100
        ("The answer is 10 ^2", None),
        ("The answer is {10}^2", None),
        ("The answer is 9*2 = what you know", "9"),  # no number behind it: the first
        ("The answer is 1 234", "1234"),  # as a whole
        ("The answer is not known", None),
    ],
)
def test_the_number_that_is_announced_is_the_answer(text, given):
    assert extract_number(text) == given


def test_marks_around_an_answer_are_none_of_it():
    assert answers.extract("so\n**Answer: x^2 + 1**") == "x^2 + 1"
    assert answers.extract("the answer is **west**") == "west"


@pytest.mark.parametrize(
    ("gold", "given", "equal"),
    [
        (r"\text{Evelyn}", "Evelyn", True),
        ("x = 5", "5", True),
        (r"x \in [-2, 7]", "[-2,7]", True),
        ("y = 2x + 3", "2x+3", True),
        ("east", "seat", False),  # no products of the same letters
        ("[0, 1]", "[0, 2]", False),
    ],
)
def test_what_an_answer_is_called_does_not_tell_it_apart_and_words_are_words(gold, given, equal):
    assert same(gold, given) == (canonical(gold) == canonical(given)) == equal
