"""A kernel's PTX, read into what machine.c runs.

Every register, number and parameter has a slot, of 32 bits for each of a warp's lanes, or two where
it has 64. An instruction is a number, a guard, and its operands in a common pool: slots, and what
is known when it is read (widths, offsets, modes), in the order that machine.c says.
"""

import re
from array import array
from collections.abc import Callable

from .instructions import LANE, NUMBER, TOGETHER

RULES: list[tuple[re.Pattern, Callable]] = []
REGISTER = re.compile(r"%(p|rs|rd|r)\d+$")
SPECIAL = ["%tid.x", *(f"%{name}.{x}" for name in ("ctaid", "nctaid") for x in "xyz")]
JUNK = 0  # the slot that nobody reads
IDLE = (  # what orders that which the machine does in order, or that only ptxas needs
    r"(wgmma\.fence|setmaxnreg|bar\.warp\.sync|fence\.proxy\.tensormap|fence\.acq_rel|membar|"
    r"tcgen05\.(wait|fence|dealloc|relinquish)).*"
)
TENSORMAP = """global_address rank box_dim global_dim global_stride element_stride elemtype
interleave_layout swizzle_mode fill_mode""".split()


def rule(pattern: str):
    """The method reads the instructions whose whole name matches: (match, operands) → (operation,
    its part of the pool)."""

    def registered(method: Callable) -> Callable:
        RULES.append((re.compile(pattern), method))
        return method

    return registered


def split(text: str) -> list[str]:
    """Operands, at the commas outside of braces and brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def inner(operand: str) -> list[str]:
    """The parts of {a, b} or [a, b]; one that has neither is its own."""
    return split(operand[1:-1]) if operand[0] in "{[" else [operand]


class Program:
    """A kernel's PTX, decoded.

    Attributes:
        name, threads: the kernel's name, and the threads of a block.
        parameters: (PTX's declaration, name) of each.
        code: rows of (operation, guard's slot or -1, negated, first in `pool`, whether the whole
            warp must be there, line in the text).
        constants: (slot, bits, wide).
        slots: of registers by name; of parameters, of their addresses ("&" and the name), and of
            SPECIAL, where they are read.

    Raises:
        NotImplementedError: for an instruction that the machine does not know.
    """

    def __init__(self, text: str):
        head, rest = text.split(".entry", 1)
        signature, body = rest.split("\n{", 1)
        self.text = text
        self.name = signature.split("(")[0].strip()
        self.threads = int(re.search(r"\.reqntid (\d+)", signature)[1])
        self.parameters = re.findall(r"\.param\s+(.*?)\s*(\w+_param_\d+)", signature)
        self.n_slots = 2
        self.slots: dict[str | tuple[int, bool], int] = {"_": JUNK}
        self.constants: list[tuple[int, int, bool]] = []
        self.code: list[tuple[int, ...]] = []
        self.pool = array("i")
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []
        self._aliases: dict[str, str] = {}  # of what is declared in a scope
        self._read(body, head.count("\n") + signature.count("\n") + 2)
        for at, label in self._jumps:
            self.pool[at] = self._labels[label]

    # ---- the text
    def _read(self, body: str, first_line: int) -> None:
        outer: list[dict[str, str]] = []
        statement = ""
        for number, line in enumerate(body.split("\n"), first_line):
            statement += " " + re.sub(r"//.*|^\s*\.loc\b.*", "", line)
            while statement := statement.strip():
                if statement[0] == "{":  # (no statement begins with an operand)
                    outer.append(self._aliases)
                    self._aliases = self._aliases | {".": f"#{number}"}
                    statement = statement[1:]
                elif statement[0] == "}":
                    if not outer:
                        return
                    self._aliases = outer.pop()
                    statement = statement[1:]
                elif label := re.match(r"([A-Za-z_$][\w$]*):(?!:)", statement):
                    self._labels[self._label(label[1])] = len(self.code)
                    statement = statement[label.end() :]
                elif ";" in statement:
                    one, statement = statement.split(";", 1)
                    self._statement(one.strip(), number)
                else:
                    break

    def _label(self, name: str) -> str:
        """Labels that LLVM makes are the kernel's; others, of inline assembly, their scope's."""
        return name if name.startswith("$") else name + self._aliases.get(".", "")

    def _statement(self, text: str, line: int) -> None:
        if declared := re.match(r"\.reg\s+\.(\w+)\s+([^<]*)$", text):
            kind = "%rd" if declared[1].endswith("64") else "%r"
            for name in split(declared[2]):
                self._aliases[name] = f"{kind}{10**6 + len(self.slots)}"
                self._slot(name)
        if not text or text.startswith("."):
            return
        guard, negated = -1, 0
        if match := re.match(r"@(!?)([%\w]+)\s+", text):
            guard, negated, text = self._slot(match[2]), int(bool(match[1])), text[match.end() :]
        name, _, operands = text.replace("\t", " ").partition(" ")
        operands = split(operands)
        for operation, pool in self._decoded(name, operands, text):
            row = (NUMBER[operation], guard, negated, len(self.pool), operation in TOGETHER, line)
            self.code.append(row)
            self.pool.extend(pool)

    def _decoded(self, name: str, operands: list[str], text: str) -> list[tuple[str, list[int]]]:
        for pattern, method in RULES:
            if match := pattern.fullmatch(name):
                found = method(self, match, operands)
                return found if isinstance(found, list) else [found]
        if name in ("cvt.s64.s32", "cvt.u64.u32") and self._wide(operands[1]):
            name += ".wide"
        if name.startswith(("max.", "min.")) and len(operands) == 4:
            name += ".of3"
        kinds = LANE[name][0] if name in LANE else ""
        wide = [kind in "IUd" for kind in kinds]
        given = [
            self._wide(x) if self._register(x) else w for x, w in zip(operands, wide, strict=False)
        ]
        if not kinds or len(kinds) != len(operands) or given != wide:
            raise NotImplementedError(f"{self.name}: {text}")
        return [(name, [*map(self._slot, operands, wide)])]

    # ---- operands
    def _register(self, x: str) -> re.Match | None:
        return REGISTER.match(self._aliases.get(x, x))

    def _wide(self, x: str) -> bool:
        match = self._register(x)
        return bool(match) and match[1] == "rd"

    def _new(self, name: str | tuple[int, bool], wide: bool) -> int:
        if name not in self.slots:
            self.slots[name] = self.n_slots
            self.n_slots += 1 + wide
        return self.slots[name]

    def _number(self, bits: int, wide: bool = False) -> int:
        key = (bits & (2**64 if wide else 2**32) - 1, wide)
        if key not in self.slots:
            self.constants.append((self._new(key, wide), *key))
        return self.slots[key]

    def _slot(self, x: str, wide: bool = False) -> int:
        """Of a register, or of a number that is to have 64 bits if `wide`."""
        if self._register(x):
            return self._new(self._aliases.get(x, x), self._wide(x))
        if x in SPECIAL or x == "_":
            return self._new(x, False)
        if any(x == name for _, name in self.parameters):
            return self._new(f"&{x}", True)
        if x == "global_smem":  # the machine's shared memory begins at 0
            return self._number(0, wide)
        if match := re.fullmatch(r"0([fd])([0-9A-F]+)", x):
            return self._number(int(match[2], 16), match[1] == "d")
        return self._number(int(x, 0), wide)

    def _address(self, x: str) -> list[int]:
        """[slot, offset] of "[%rd1 + 16]" or "[global_smem+16]"."""
        base, _, offset = (part.strip() for part in x.strip("[] ").partition("+"))
        return [self._slot(base), int(offset or "0", 0)]

    # ---- instructions, by their names
    @rule(IDLE)
    def _idle(self, match, x):
        return "NOP", []

    @rule(r"bra(\.uni)?")
    def _branch(self, match, x):
        self._jumps.append((len(self.pool), self._label(x[0])))
        return "BRA", [0]

    @rule(r"ret|exit")
    def _return(self, match, x):
        return "RET", []

    @rule(r"ld\.param\.(([bsuf])(\d+))")
    def _parameter(self, match, x):
        if self._register(x[1].strip("[]")):  # its address, chosen between two
            pool = [int(match[3]) // 8, 1, int(self._wide(x[0])), int(match[2] == "s")]
            return "LD_GLOBAL", [*pool, *self._address(x[1]), 1, self._slot(x[0])]
        of = self._new(x[1].strip("[]"), True)
        to, wide = self._slot(x[0]), self._wide(x[0])
        if wide and match[3] == "32":
            return f"cvt.{match[2]}64.{match[1]}", [to, of]
        return "mov.b64" if wide else "mov.b32", [to, of]

    @rule(r"(ld|st)\.(global|shared)(?:::cta)?(?:\.v\d)?\.([bsuf])(\d+)")
    def _memory(self, match, x):
        kind, space, letter, bits = match.groups()
        where, values = x if kind == "st" else x[::-1]
        values = inner(values)
        wide = self._wide(values[0]) or (kind == "st" and bits == "64")
        wide_address = self._wide(where.strip("[] ").partition("+")[0].strip())
        pool = [int(bits) // 8, len(values), wide, letter == "s", *self._address(where)]
        pool = [*map(int, pool), int(wide_address), *(self._slot(v, wide) for v in values)]
        return f"{kind}_{space}".upper(), pool

    @rule(r"mov\.b(32|64)")
    def _move(self, match, x):
        bits, wide = match[1], match[1] == "64"
        if x[0].startswith("{"):
            low, high = inner(x[0])
            of = self._slot(x[1], wide)
            return [
                (f"low.b{bits}", [self._slot(low), of]),
                (f"high.b{bits}", [self._slot(high), of]),
            ]
        if x[1].startswith("{"):
            return f"pack.b{bits}", [self._slot(x[0]), *map(self._slot, inner(x[1]))]
        return f"mov.b{bits}", [self._slot(x[0]), self._slot(x[1], wide)]

    @rule(r"setp\.(\w+)\.(bf16x2|f16x2)")
    def _compare_pairs(self, match, x):
        operands = [self._slot(v) for v in x[1:]]
        parts = zip(x[0].split("|"), ("low", "high"), strict=True)
        return [(f"{match[0]}.{which}", [self._slot(p), *operands]) for p, which in parts]

    @rule(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global.*")
    def _copy(self, match, x):
        size = int(x[2], 0)
        given = self._slot(x[3]) if len(x) > 3 else self._number(size)
        return "CP_ASYNC", [size, *self._address(x[0]), *self._address(x[1]), given]

    @rule(r"(cp\.async|wgmma|cp\.async\.bulk)\.(commit|wait)_group(?:\.read)?(?:\.sync\.aligned)?")
    def _groups(self, match, x):
        name = {"cp.async": "CP_ASYNC", "wgmma": "WGMMA", "cp.async.bulk": "BULK"}[match[1]]
        return f"{name}_{match[2].upper()}", [int(n) for n in x]

    @rule(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
    def _wgmma(self, match, x):
        registers = x[1].startswith("{")
        a = [self._slot(v, not registers) for v in inner(x[1])]
        scales, transposed = x[4:6], [int(v) for v in x[6:]]
        assert scales == ["1", "1"] and len(transposed) == 2 - registers
        pool = [int(match[1]), match[2] == "bf16", registers, *([0] * registers + transposed)]
        pool += [*map(self._slot, inner(x[0])), *a, self._slot(x[2], True), self._slot(x[3])]
        return "WGMMA", [int(v) for v in pool]

    @rule(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32")
    def _mma(self, match, x):
        slots = [self._slot(v) for group in x for v in inner(group)]
        return "MMA", [int(match[1] == "bf16"), *slots]

    @rule(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x\d(\.trans)?\.shared(?:::cta)?\.b16")
    def _matrix(self, match, x):
        where, values = x if match[1] == "st" else x[::-1]
        values = [self._slot(v) for v in inner(values)]
        pool = [len(values), int(bool(match[2])), *self._address(where), *values]
        return f"{match[1]}MATRIX".upper(), pool

    @rule(r"shfl\.sync\.(idx|bfly|up|down)\.b32")
    def _shuffle(self, match, x):
        to, _, valid = x[0].partition("|")
        mode = ["idx", "bfly", "up", "down"].index(match[1])
        return "SHFL", [mode, self._slot(to), self._slot(valid or "_"), *map(self._slot, x[1:4])]

    @rule(r"redux\.sync\.(min|max|add)\.(s32|f32)")
    def _reduce(self, match, x):
        of = ["min", "max", "add"].index(match[1])
        return "REDUX", [of, int(match[2] == "f32"), *map(self._slot, x[:2])]

    @rule(r"elect\.sync")
    def _elect(self, match, x):
        return "ELECT", [self._slot(v) for v in x[0].split("|")]

    @rule(r"(bar|barrier)(\.cta)?\.sync(\.aligned)?")
    def _barrier(self, match, x):
        return "BAR", [self._slot(x[0]), self._slot(x[1]) if len(x) > 1 else -1]

    @rule(r"fence\.proxy\.async.*")
    def _fence(self, match, x):
        return "FENCE_ASYNC", []

    @rule(r"mbarrier\.(init|inval)\.shared(?:::cta)?\.b64")
    def _mbarrier(self, match, x):
        return f"MBARRIER_{match[1].upper()}", [*self._address(x[0]), *map(self._slot, x[1:])]

    @rule(r"mbarrier\.arrive(\.expect_tx)?\.shared(?:::cta)?\.b64")
    def _arrive(self, match, x):
        n = self._slot(x[2] if len(x) > 2 else "1")
        count_and_bytes = [self._number(1), n] if match[1] else [n, self._number(0)]
        return "MBARRIER_ARRIVE", [*self._address(x[1]), *count_and_bytes]

    @rule(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64")
    def _try_wait(self, match, x):
        return "TRY_WAIT", [self._slot(x[0]), *self._address(x[1]), self._slot(x[2])]

    @rule(r"cp\.async\.bulk\.tensor\.\dd\.shared::(cta|cluster)\.global.*")
    def _bulk_load(self, match, x):
        map_, coordinates = inner(x[1])
        c = [self._slot(v) for v in inner(coordinates)]
        pool = [*self._address(x[0]), self._slot(map_), *self._address(x[2]), len(c), *c]
        return "BULK_LOAD", pool

    @rule(r"cp\.(reduce\.)?async\.bulk\.tensor\.\dd\.global\.shared::cta(\.add)?\.bulk_group")
    def _bulk_store(self, match, x):
        map_, coordinates = inner(x[0])
        c = [self._slot(v) for v in inner(coordinates)]
        return "BULK_STORE", [
            int(bool(match[1])),
            self._slot(map_),
            *self._address(x[1]),
            len(c),
            *c,
        ]

    @rule(r"tensormap\.replace\.tile\.(\w+)\.shared::cta\.b1024\.b(32|64)")
    def _tensormap(self, match, x):
        wide = match[2] == "64"
        index = int(x[1], 0) if len(x) == 3 else 0
        pool = [TENSORMAP.index(match[1]), self._address(x[0])[0], index]
        return "TENSORMAP", [*pool, self._slot(x[-1], wide), int(wide)]

    @rule(r"tensormap\.cp_fenceproxy.*")
    def _tensormap_copy(self, match, x):
        return "TENSORMAP_COPY", [self._address(x[0])[0], self._address(x[1])[0]]

    @rule(r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32")
    def _tensor_alloc(self, match, x):
        return "TENSOR_ALLOC", [*self._address(x[0]), int(x[1])]

    @rule(r"tcgen05\.(ld|st)\.sync\.aligned\.(32x32b|16x32bx2)\.x\d+\.b32")
    def _tensor_memory(self, match, x):
        values, rest = (x[0], x[1:]) if match[1] == "ld" else (x[-1], x[:-1])
        second = int(rest[1]) if match[2] == "16x32bx2" else -1
        values = [self._slot(v) for v in inner(values)]
        return f"TENSOR_{match[1]}".upper(), [len(values), second, *self._address(rest[0]), *values]

    @rule(r"tcgen05\.mma\.cta_group::1\.kind::f16")
    def _tensor_mma(self, match, x):
        stored = x[1].startswith("[")  # in tensor memory
        a = self._address(x[1]) if stored else [self._slot(x[1]), 0]
        pool = [int(stored), *self._address(x[0]), *a, self._slot(x[2], True)]
        return "TENSOR_MMA", [*pool, self._slot(x[3]), self._slot(x[4])]

    @rule(r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one\.shared::cluster\.b64")
    def _tensor_commit(self, match, x):
        return "TENSOR_COMMIT", self._address(x[0])
