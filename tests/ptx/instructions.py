"""What each lane does by itself, in C: name → (kinds of the operands, expression of a, b, c, d).

Kinds, the destination's first: i, u are 32 bits, with a sign or without; I, U 64 bits; s, h 16
bits; f is fp32, d fp64, p a predicate. Source: PTX ISA, section 9.7.
"""

# What warps do together, or with memory: in machine.c.
WARP = """
NOP BRA RET LD_GLOBAL ST_GLOBAL LD_SHARED ST_SHARED CP_ASYNC CP_ASYNC_COMMIT CP_ASYNC_WAIT WGMMA
WGMMA_COMMIT WGMMA_WAIT MMA LDMATRIX STMATRIX SHFL REDUX ELECT BAR FENCE_ASYNC MBARRIER_INIT
MBARRIER_INVAL MBARRIER_ARRIVE TRY_WAIT BULK_LOAD BULK_STORE BULK_COMMIT BULK_WAIT TENSORMAP
TENSORMAP_COPY TENSOR_ALLOC TENSOR_LD TENSOR_ST TENSOR_MMA TENSOR_COMMIT
""".split()
TOGETHER = set("WGMMA MMA LDMATRIX STMATRIX SHFL REDUX ELECT BAR TENSOR_LD TENSOR_ST".split())

COMPARE = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=")
SUM = dict(add="+", sub="-", mul="*")


def _integers() -> dict[str, tuple[str, str]]:
    t = {}
    for bits, signed, unsigned in ((16, "s", "h"), (32, "i", "u"), (64, "I", "U")):
        for letter, k in (("s", signed), ("u", unsigned)):
            for op, sign in SUM.items():
                op = "mul.lo" if op == "mul" else op
                t[f"{op}.{letter}{bits}"] = (unsigned * 3, f"a {sign} b")
            t[f"mad.lo.{letter}{bits}"] = (unsigned * 4, "a * b + c")
            t[f"div.{letter}{bits}"] = (k * 3, "b ? a / b : -1")
            t[f"rem.{letter}{bits}"] = (k * 3, "b ? a % b : a")
            t[f"min.{letter}{bits}"] = (k * 3, "a < b ? a : b")
            t[f"max.{letter}{bits}"] = (k * 3, "a > b ? a : b")
        t[f"min.relu.s{bits}"] = (signed * 3, "a < 0 || b < 0 ? 0 : a < b ? a : b")
        t[f"max.relu.s{bits}"] = (signed * 3, "a < 0 && b < 0 ? 0 : a > b ? a : b")
        t[f"neg.s{bits}"] = (signed * 2, "-a")
        t[f"abs.s{bits}"] = (signed * 2, "a < 0 ? -a : a")
        t[f"not.b{bits}"] = (unsigned * 2, "~a")
        for op, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            t[f"{op}.b{bits}"] = (unsigned * 3, f"a {sign} b")
        for letter, k in (("s", signed), ("u", unsigned), ("b", unsigned)):
            t[f"mov.{letter}{bits}"] = (k * 2, "a")
            t[f"selp.{letter}{bits}"] = (k * 3 + "p", "c ? a : b")
            for op, sign in COMPARE.items():
                t[f"setp.{op}.{letter}{bits}"] = ("p" + k * 2, f"a {sign} b")
        most = bits - 1
        t[f"shl.b{bits}"] = (unsigned * 2 + "u", f"b > {most} ? 0 : a << b")
        for letter in "ub":
            t[f"shr.{letter}{bits}"] = (unsigned * 2 + "u", f"b > {most} ? 0 : a >> b")
        t[f"shr.s{bits}"] = (signed * 2 + "u", f"a >> (b > {most} ? {most} : b)")
    for op, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        t[f"{op}.pred"] = ("ppp", f"a {sign} b")
    t["not.pred"], t["mov.pred"] = ("pp", "!a"), ("pp", "a != 0")
    t["cvta.global.u64"] = t["cvta.to.global.u64"] = ("UU", "a")
    t["mul.wide.s16"], t["mul.wide.u16"] = ("iss", "(i32)a * b"), ("uhh", "(u32)a * b")
    t["mul.wide.s32"], t["mul.wide.u32"] = ("Iii", "(i64)a * b"), ("Uuu", "(u64)a * b")
    t["mad.wide.s32"], t["mad.wide.u32"] = ("IiiI", "(i64)a * b + c"), ("UuuU", "(u64)a * b + c")
    t["mul.hi.s32"], t["mul.hi.u32"] = ("iii", "(i64)a * b >> 32"), ("uuu", "(u64)a * b >> 32")
    t["mul.hi.s64"] = ("III", "(i64)((__int128)a * b >> 64)")
    t["mul.hi.u64"] = ("UUU", "(u64)((unsigned __int128)a * b >> 64)")
    t["bfe.u32"], t["bfe.s32"] = ("uuuu", "(u32)field(a, b, c)"), ("iuuu", "signed_field(a, b, c)")
    t["bfe.u64"] = ("UUuu", "field(a, b, c)")
    t["prmt.b32"] = ("uuuu", "permuted(a, b, c)")
    # Words made of halves, and taken apart: `mov` with braces.
    t["pack.b32"], t["pack.b64"] = ("uhh", "(u32)b << 16 | a"), ("Uuu", "(u64)b << 32 | a")
    t["low.b32"], t["high.b32"] = ("hu", "a & 0xffff"), ("hu", "a >> 16")
    t["low.b64"], t["high.b64"] = ("uU", "(u32)a"), ("uU", "a >> 32")
    kinds = dict(s16="s", u16="h", s32="i", u32="u", s64="I", u64="U")
    for to, k in kinds.items():
        for of, j in kinds.items():
            t[f"cvt.{to}.{of}"] = (k + j, "a")
    # (of a register that is wider than the number in it)
    t["cvt.s64.s32.wide"], t["cvt.u64.u32.wide"] = ("II", "(i32)a"), ("UU", "(u32)a")
    return t


def _compared(a: str, b: str) -> dict[str, str]:
    """Of floating-point numbers: false beside a NaN, but for those that end with u."""
    nan = f"isnan({a}) || isnan({b})"
    ordered = {op: f"{a} {sign} {b}" for op, sign in COMPARE.items()}
    ordered["ne"] = f"{a} < {b} || {a} > {b}"
    return ordered | {f"{op}u": f"{nan} || {e}" for op, e in ordered.items()} | dict(nan=nan)


def _fp32() -> dict[str, tuple[str, str]]:
    t = {}
    for z, f in (("", "({})"), (".ftz", "flushed({})")):  # denormals, in and out
        a, b, c = (f.format(x) for x in "abc")
        for op, sign in SUM.items():
            for rounding in ("", ".rn"):
                t[f"{op}{rounding}{z}.f32"] = ("fff", f.format(f"{a} {sign} {b}"))
        t[f"fma.rn{z}.f32"] = ("ffff", f.format(f"fmaf({a}, {b}, {c})"))
        for how in ("approx", "full", "rn"):
            t[f"div.{how}{z}.f32"] = ("fff", f.format(f"{a} / {b}"))
            t[f"sqrt.{how}{z}.f32"] = ("ff", f"sqrtf({a})")
            t[f"rcp.{how}{z}.f32"] = ("ff", f.format(f"1 / {a}"))
        t[f"rsqrt.approx{z}.f32"] = ("ff", f"1 / sqrtf({a})")
        t[f"ex2.approx{z}.f32"] = ("ff", f.format(f"exp2f({a})"))
        t[f"lg2.approx{z}.f32"] = ("ff", f"log2f({a})")
        t[f"neg{z}.f32"], t[f"abs{z}.f32"] = ("ff", f"-{a}"), ("ff", f"fabsf({a})")
        for op in ("max", "min"):
            t[f"{op}{z}.f32"] = ("fff", f"{op}imum({a}, {b})")
            t[f"{op}.NaN{z}.f32"] = ("fff", f"isnan(a) || isnan(b) ? NAN : {op}imum({a}, {b})")
            t[f"{op}{z}.f32.of3"] = ("ffff", f"{op}imum({op}imum({a}, {b}), {c})")
        t |= {f"setp.{op}{z}.f32": ("pff", e) for op, e in _compared(a, b).items()}
        for rounding, function in (("rmi", "floorf"), ("rpi", "ceilf"), ("rzi", "truncf")):
            t[f"cvt.{rounding}{z}.f32.f32"] = ("ff", f"{function}({a})")
            t[f"cvt.{rounding}{z}.s32.f32"] = ("if", f"integer({function}({a}))")
        parts = ("low({})", "high({})")
        for op, sign in SUM.items():
            two = (f.format(f"{x.format('a')} {sign} {x.format('b')}") for x in parts)
            t[f"{op}{z}.f32x2"] = t[f"{op}.rn{z}.f32x2"] = ("UUU", f"pair({', '.join(two)})")
        two = (f.format(f"fmaf({', '.join(map(x.format, 'abc'))})") for x in parts)
        t[f"fma.rn{z}.f32x2"] = ("UUUU", f"pair({', '.join(two)})")
    t["mov.f32"], t["selp.f32"] = ("ff", "a"), ("fffp", "c ? a : b")
    t["tanh.approx.f32"] = ("ff", "tanhf(a)")
    t["copysign.f32"] = ("fff", "copysignf(b, a)")
    for of, k in dict(s16="s", u16="h", s32="i", u32="u", s64="I", u64="U").items():
        t[f"cvt.rn.f32.{of}"] = ("f" + k, "(float)a")
    return t


def _fp64() -> dict[str, tuple[str, str]]:
    t = {}
    for op, sign in (SUM | dict(div="/")).items():
        for rounding in ("", ".rn"):
            t[f"{op}{rounding}.f64"] = ("ddd", f"a {sign} b")
    t |= {f"setp.{op}.f64": ("pdd", e) for op, e in _compared("a", "b").items()}
    t["fma.rn.f64"], t["mov.f64"] = ("dddd", "fma(a, b, c)"), ("dd", "a")
    t["cvt.f64.f32"], t["cvt.rn.f32.f64"] = ("df", "a"), ("fd", "(float)a")
    for of, k in dict(s32="i", u32="u", s64="I", u64="U").items():
        t[f"cvt.rn.f64.{of}"] = ("d" + k, "(double)a")
    return t


def _halves() -> dict[str, tuple[str, str]]:
    t = {}
    for kind in ("bf16", "f16"):
        get, put = f"from_{kind}({{}})", f"to_{kind}({{}})"

        def of(expression: str, part: str = "{}", get=get, put=put) -> str:
            """An expression of numbers a, b and c, by the bits that stand for them."""
            numbers = {x: get.format(part.format(x)) for x in "abc"}
            return put.format("".join(numbers.get(x, x) for x in expression))

        def both(expression: str, of=of) -> str:
            return f"{of(expression, '({} >> 16)')} << 16 | {of(expression, '({} & 0xffff)')}"

        t[f"cvt.f32.{kind}"] = ("fh", get.format("a"))
        t[f"cvt.rn.{kind}.f32"] = ("hf", put.format("a"))
        t[f"cvt.rn.{kind}x2.f32"] = ("uff", f"{put.format('a')} << 16 | {put.format('b')}")
        for op, sign in SUM.items():
            for rounding in ("", ".rn"):
                t[f"{op}{rounding}.{kind}"] = ("hhh", of(f"a {sign} b"))
                t[f"{op}{rounding}.{kind}x2"] = ("uuu", both(f"a {sign} b"))
        a, b = get.format("a"), get.format("b")
        t[f"add.rn.f32.{kind}"], t[f"sub.rn.f32.{kind}"] = ("fhf", f"{a} + b"), ("fhf", f"{a} - b")
        t[f"fma.rn.f32.{kind}"] = ("fhhf", f"fmaf({a}, {b}, c)")
        t[f"fma.rn.{kind}"] = ("hhhh", of("1. * a * b + c"))  # in fp64, where a * b is exact
        t[f"fma.rn.{kind}x2"] = ("uuuu", both("1. * a * b + c"))
        t |= {f"setp.{op}.{kind}": ("phh", e) for op, e in _compared(a, b).items()}
        t[f"neg.{kind}"], t[f"neg.{kind}x2"] = ("hh", "a ^ 0x8000"), ("uu", "a ^ 0x80008000")
        t[f"abs.{kind}"], t[f"abs.{kind}x2"] = ("hh", "a & 0x7fff"), ("uu", "a & 0x7fff7fff")
        for op in ("max", "min"):
            one = put.format(f"{op}imum({get}, {get})")
            high, low = (one.format(f"(a {x})", f"(b {x})") for x in (">> 16", "& 0xffff"))
            t[f"{op}.{kind}"] = ("hhh", one.format("a", "b"))
            t[f"{op}.{kind}x2"] = ("uuu", f"{high} << 16 | {low}")
        for op, sign in COMPARE.items():
            low, high = (get.format(f"({{}} {part})") for part in ("& 0xffff", ">> 16"))
            t[f"setp.{op}.{kind}x2.low"] = ("puu", f"{low.format('a')} {sign} {low.format('b')}")
            t[f"setp.{op}.{kind}x2.high"] = ("puu", f"{high.format('a')} {sign} {high.format('b')}")
    return t


LANE = _integers() | _fp32() | _fp64() | _halves()
NUMBER = {name: i for i, name in enumerate([*WARP, *LANE])}
C_TYPES = dict(i="i32", u="u32", I="i64", U="u64", h="u32", s="i32", f="float", d="double", p="u32")
CASTS = dict(h="(u16)", s="(i16)")  # 16 bits lie in a slot of 32


def header() -> str:
    """C for machine.c: the numbers of its instructions, and `lanes`, a case for each of ours."""
    lines = [f"enum {{ {', '.join(f'OP_{name} = {NUMBER[name]}' for name in WARP)} }};"]
    lines.append("static void lanes(const Instruction *ins, u32 *w, const u32 *on, int all) {")
    lines.append("const i32 *o = machine.pool + ins->first;\nswitch (ins->op) {")
    for name, (kinds, expression) in LANE.items():
        types = [C_TYPES[kind] for kind in kinds]
        slots = [f"{type} *x{j} = (void *)(w + o[{j}] * LANES);" for j, type in enumerate(types)]
        reads = [
            f"{type} {letter} = {CASTS.get(kind, '')}x{j}[l];"
            for j, kind, type, letter in zip(range(1, 5), kinds[1:], types[1:], "abcd")  # noqa: B905
        ]
        put = f"x0[l] = {expression};"
        if kinds[0] in "hs":
            put = f"((u32 *)x0)[l] = (u16)({expression});"
        body = f"{{ {' '.join(reads)} {put} }}"
        every = "for (int l = 0; l < LANES; l++)"
        lines.append(f"case {NUMBER[name]}: {{  // {name}")
        lines.append(" ".join(slots))
        lines.append(f"if (all) {every} {body}\nelse {every} if (on[l]) {body}\nreturn;\n}}")
    lines.append("}\n}")
    return "\n".join(lines) + "\n"
