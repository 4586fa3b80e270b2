"""Countdown: reach a target from four numbers with + − × ÷.

    2,3,5,8>43   is reached by   5*8+3

The rules are those of the television game: each number is used at most once, not all need be
used, and every division must be exact. The search may therefore keep to positive whole numbers:
a solution through negative ones can be rearranged into one without.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from math import prod
from typing import Literal, NamedTuple

from .task import Problem, WorkedTask, check_range, final_text

State = tuple[int, ...]  # the numbers in hand, ascending
_TOKEN = re.compile(r"[ \t\r\n]*([1-9][0-9]{0,8}|[-+*/()])")  # 9 digits: more is out of reach


class _Move(NamedTuple):
    left: int
    operation: str
    right: int
    result: int
    state: State  # after it

    def __str__(self):
        state = ",".join(map(str, self.state))
        return f"{self.left}{self.operation}{self.right}={self.result}:{state};"


def _results(a: int, b: int) -> list[tuple[str, int]]:
    """What a >= b give together, as positive whole numbers."""
    results = [("+", a + b), ("*", a * b)]
    if a > b:
        results.append(("-", a - b))
    if a % b == 0:
        results.append(("/", a // b))
    return results


def _moves(state: State) -> Iterator[_Move]:
    """Every operation on two numbers of the state, the larger one first."""
    for i, a in enumerate(state):
        for j, b in enumerate(state[:i]):
            rest = state[:j] + state[j + 1 : i] + state[i + 1 :]
            for operation, result in _results(a, b):
                yield _Move(a, operation, b, result, tuple(sorted((*rest, result))))


@lru_cache(maxsize=4096)
def _options(state: State) -> dict[str, State]:
    """Every step from a state as text, and the state after it."""
    return {str(move): move.state for move in _moves(state)}


def _gains(move: _Move) -> bool:
    """False for a result equal to one of its operands: that only throws the other one away."""
    return move.result != move.left and move.result != move.right


@lru_cache(maxsize=4096)
def _search(numbers: State, target: int) -> tuple[list[_Move], list[_Move]]:
    """(every state visited, the moves that lead to the target) of a depth-first search.

    At each state a move that gives the target is taken at once; else moves whose result divides
    the target are tried first, nearer results before farther ones. Pruned are states seen before,
    states too small to reach the target, and, as they hold one number, all ends but the target.
    """
    visited: list[_Move] = []
    seen: set[State] = set()

    def order(move: _Move) -> tuple[bool, int]:
        divides = move.result > 1 and target % move.result == 0
        return not divides, abs(move.result - target)

    def visit(state: State) -> list[_Move]:
        moves = [move for move in _moves(state) if _gains(move)]
        for move in moves:
            if move.result == target:
                visited.append(move)
                return [move]
        if len(state) == 2:
            return []
        moves.sort(key=order)
        for move in moves:
            # a op b <= max(a, 2) * max(b, 2), and so for whole expressions.
            if move.state in seen or prod(max(number, 2) for number in move.state) < target:
                continue
            seen.add(move.state)
            visited.append(move)
            path = visit(move.state)
            if path:
                return [move, *path]
        return []

    path = visit(numbers)
    return visited, path


@lru_cache(maxsize=1 << 16)
def _reachable(state: State, target: int) -> bool:
    return target in state or any(
        _reachable(move.state, target) for move in _moves(state) if _gains(move)
    )


class _Expression(NamedTuple):
    """A number, or a flat sum (direct - inverse) or product (direct / inverse) of expressions."""

    value: int
    kind: str  # "+", "*", or "" for a number
    direct: tuple["_Expression", ...] = ()
    inverse: tuple["_Expression", ...] = ()

    def __str__(self):
        """One text for all orders and brackets of the same operations, the largest terms first."""
        if not self.kind:
            return str(self.value)
        texts = []
        for parts in (self.direct, self.inverse):
            pairs = [(part.value, f"({part})" if part.kind == "+" else str(part)) for part in parts]
            texts.append([text for _, text in sorted(pairs, reverse=True)])
        undo = "-" if self.kind == "+" else "/"
        return self.kind.join(texts[0]) + "".join(undo + text for text in texts[1])


def _combine(operation: str, a: _Expression, b: _Expression) -> _Expression:
    """Raises ValueError for a division that is not exact."""
    kind = "+" if operation in "+-" else "*"
    direct, inverse = (a.direct, a.inverse) if a.kind == kind else ((a,), ())
    same, opposite = (b.direct, b.inverse) if b.kind == kind else ((b,), ())
    if operation in "-/":
        same, opposite = opposite, same
    if operation == "/":
        if b.value == 0 or a.value % b.value:
            raise ValueError(f"{a.value}/{b.value} is not exact")
        value = a.value // b.value
    else:
        value = {"+": a.value + b.value, "-": a.value - b.value, "*": a.value * b.value}[operation]
    return _Expression(value, kind, direct + same, inverse + opposite)


def _parse(text: str, size: int) -> tuple[_Expression, list[int]]:
    """The expression that text spells, of at most size numbers, and those numbers.

    Raises ValueError for any other text. Two stacks instead of recursion: brackets may nest as
    deep as they like.
    """
    numbers: list[int] = []
    operands: list[_Expression] = []
    operators: list[str] = []

    def reduce_while(tighter: str) -> None:
        while operators and operators[-1] in tighter:
            right = operands.pop()
            operands.append(_combine(operators.pop(), operands.pop(), right))

    position, expects_operand = 0, True
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"not part of an expression: {text[position]!r}")
        position, token = match.end(), match[1]
        if expects_operand != (token == "(" or token.isdigit()):
            raise ValueError(f"misplaced {token!r}")
        if token == "(":
            operators.append(token)
        elif token == ")":
            reduce_while("+-*/")
            if not operators:
                raise ValueError("')' without '('")
            operators.pop()
        elif token.isdigit():
            numbers.append(int(token))
            if len(numbers) > size:
                raise ValueError(f"more than {size} numbers")
            operands.append(_Expression(numbers[-1], ""))
            expects_operand = False
        else:
            reduce_while("+-*/" if token in "+-" else "*/")
            operators.append(token)
            expects_operand = True
    if expects_operand:
        raise ValueError("a number is missing at the end")
    reduce_while("+-*/")
    if operators:
        raise ValueError("'(' without ')'")
    return operands[0], numbers


@dataclass(frozen=True)
class Countdown(WorkedTask):
    """`2,3,5,8>43` → `8*5=40:2,3,40;40+3=43:2,43;` → `5*8+3`.

    A step is a state that a depth-first search visits: the operation that led there, and the
    numbers then in hand, ascending. The search goes back without a word to the last state that
    has moves left. The answer is one expression, and any right one is accepted.

    traces: "search" writes every state that is visited (55 characters at the median, some 1,900 at
    the most), "path" those alone that lead to the target (at most 3 steps): a model of paths
    guesses, and searches by being sampled often.

    numbers: the least and the greatest number to start from; targets: the least and the greatest
    target; size: how many numbers, 2 to 4. The target is what a random walk that uses all the
    numbers ends in, so that every problem has a solution; it is none of the numbers.
    """

    numbers: tuple[int, int] = (1, 25)
    targets: tuple[int, int] = (10, 100)
    size: int = 4
    traces: Literal["search", "path"] = "search"

    name = "countdown"
    step_end = ";"
    alphabet = "0123456789+-*/=():;,>"
    cue = ">"

    def __post_init__(self):
        check_range(self.name, "numbers", self.numbers, least=1)
        check_range(self.name, "targets", self.targets, least=1)
        if self.size not in (2, 3, 4):
            raise ValueError(f"{self.name}: size is {self.size!r}; it must be 2, 3 or 4")
        if self.traces not in ("search", "path"):
            raise ValueError(f"{self.name}: traces is {self.traces!r}; it must be search or path")

    def _fits(self, numbers: State, target: int) -> bool:
        return self.targets[0] <= target <= self.targets[1] and target not in numbers

    def draw(self, rng: random.Random) -> tuple[State, int] | None:
        # A held-out problem takes some 50 draws (split, fit), so they are kept cheap: 7 µs, against
        # 11 with two random picks from an ordered state.
        low, high = self.numbers
        state = rng.choices(range(low, high + 1), k=self.size)
        numbers = tuple(sorted(state))
        while len(state) > 1:
            b, a = sorted((state.pop(), state.pop()))
            gains = [result for _, result in _results(a, b) if result != a and result != b]
            result = gains[int(rng.random() * len(gains))]
            state.insert(int(rng.random() * (len(state) + 1)), result)
        return (numbers, state[0]) if self._fits(numbers, state[0]) else None

    def every(self) -> Iterator[tuple]:
        low, high = self.numbers
        for numbers in combinations_with_replacement(range(low, high + 1), self.size):
            states = {numbers}
            for _ in range(self.size - 1):
                states = {move.state for state in states for move in _moves(state) if _gains(move)}
            for (target,) in states:
                if self._fits(numbers, target):
                    yield numbers, target

    def prompt(self, statement: tuple) -> str:
        numbers, target = statement
        return f"{','.join(map(str, numbers))}>{target}"

    def solve(self, statement: tuple) -> Problem:
        numbers, target = statement
        path = _search(numbers, target)[1]
        hand = [_Expression(number, "") for number in numbers]
        for move in path:
            left, right = (
                hand.pop(next(i for i, held in enumerate(hand) if held.value == value))
                for value in (move.left, move.right)
            )
            hand.append(_combine(move.operation, left, right))
        steps = len(self._moves(statement))
        return Problem(self.name, self.prompt(statement), str(hand[-1]), steps, statement)

    def _moves(self, statement: tuple) -> list[_Move]:
        """Those that a trace tells."""
        visited, path = _search(*statement)
        return path if self.traces == "path" else visited

    def steps(self, problem: Problem) -> Iterator[str]:
        return map(str, self._moves(problem.data))

    def read(self, prompt: str) -> Problem:
        """The problem that a prompt states; ValueError for any other text."""
        try:
            numbers, target = prompt.split(">")
            statement = tuple(sorted(map(int, numbers.split(",")))), int(target)
            if self.prompt(statement) != prompt:
                raise ValueError
        except ValueError:
            raise ValueError(f"{self.name}: {prompt[:60]!r} is not a problem of it") from None
        return self.solve(statement)

    def slip(self, problem: Problem, rng: random.Random) -> str:
        """Operations at random on the way to one number, or till the target would be next.

        Every other time they keep near the target, and the last one is said to give it: so end
        four of five wrong paths of models.
        """
        state, target = problem.data
        text, claims = "", rng.random() < 0.5
        while True:
            moves = [m for m in _moves(state) if _gains(m) and m.result != target]
            if not moves:
                return text
            near = sorted(moves, key=lambda m: abs(m.result - target))
            if claims and len(state) == 2:
                return text + str(near[0]._replace(result=target, state=(target,)))
            if claims:
                moves = near[: len(near) // 2 + 1]
            move = rng.choice(moves)
            text, state = text + str(move), move.state

    def step_labels(self, problem: Problem, trace: str) -> list[bool]:
        """For each whole step of a trace: can the target still be reached from its state?

        False too for a step that is no operation on the numbers of the problem or of a state
        reached before. A last step without its ";" has no label, nor has what a ">" (begin again)
        breaks off. Any string is allowed.
        """
        numbers, target = problem.data
        allowed = dict(_options(numbers))
        labels = []
        for step in trace.split(";")[:-1]:
            state = allowed.get(step.rpartition(">")[2] + ";")
            labels.append(state is not None and _reachable(state, target))
            if state is not None:
                allowed |= _options(state)
        return labels

    def answer(self, text: str) -> str | None:
        """The expression that a completion answers with, in canonical order for votes.

        None for what is no expression of at most `size` numbers, or divides inexactly.
        """
        try:
            return str(_parse(final_text(text) or "", self.size)[0])
        except ValueError:
            return None

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether a completion's expression has the target's value and keeps to the numbers."""
        numbers, target = problem.data
        try:
            expression, used = _parse(final_text(text) or "", self.size)
        except ValueError:
            return False
        return expression.value == target and not Counter(used) - Counter(numbers)
