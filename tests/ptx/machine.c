/* A GPU's processor that runs what program.py decodes: one block of threads after another.

   A warp's registers are rows of 32 lanes; a slot is 32 bits, of what has 64 it takes two. The
   operands of an instruction stand in `pool`; what each number there is stands beside its case.
   What begins at once and ends later (cp.async, wgmma, TMA) is kept as `Pending`, and done at one of
   the times that are allowed: see `when`.

   Sources: PTX ISA, sections 9.7.8 (copies), 9.7.13 (barriers), 9.7.14 (mma), 9.7.15 (wgmma), and
   for layouts in shared memory 5.5.6 (TMA) and 9.7.15.5 (descriptors). */

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;

enum { LANES = 32, MOST_WARPS = 32, MOST_PENDING = 4096, BARRIERS = 16, GONE = INT32_MAX };
enum { PUBLISHED = MOST_WARPS + 1 }; /* in `unfenced`: written before a barrier */
enum { AT_ONCE, LAST_MOMENT, BETWEEN }; /* when what is asynchronous is done */
enum { PRODUCT, COPY, LOAD, STORE, ADD, TENSOR_PRODUCT, TENSOR_COMMIT };
enum { TENSOR_ROWS = 128, TENSOR_COLUMNS = 512 };
enum { PRODUCTS, COPIES, STORES, QUEUES }; /* each has groups of its own */

typedef struct {
  i32 op, guard, negated, first, together, line;
} Instruction;

typedef struct {
  i32 kind, group; /* of its queue; -1: not committed yet */
  const Instruction *ins;
  u64 a, b;             /* descriptors of a product; of a bulk copy shared address and tensor map */
  i32 add;              /* of a product: to what is there */
  u32 d, shape;         /* of a product in tensor memory */
  i32 coords[5];        /* of a bulk copy */
  u32 mbarrier, bytes;
  u8 on[LANES], size, given[LANES];
  u32 to[LANES];
  u64 from[LANES];
} Pending;

typedef struct {
  u32 *w;        /* registers: [slot][lane] */
  i32 pc[LANES]; /* of each lane; GONE at the end */
  i32 held[LANES]; /* waits for the other lanes of its warp */
  i32 done, blocked, spinning;
  Pending *pending;
  i32 n_pending, groups[QUEUES]; /* groups: how many were committed */
} Warp;

typedef struct {
  const Instruction *code;
  const i32 *pool;
  const u32 *registers; /* of every warp at the start */
  const i32 *special;   /* slots of tid.x, ctaid.x, y, z, nctaid.x, y, z; -1: not read */
  const u64 *memory;    /* first and end of each tensor */
  u64 n_tensors, seed;
  i32 n_slots, threads, shared_size, grid[3];
  char *error;
  i32 error_size;
} Machine;

static Machine machine;
static Warp warps[MOST_WARPS];
static u8 *shared;
static u8 *unfenced; /* who wrote a byte, by the generic proxy, with no fence after: 1 + a warp */
static int any_unfenced;
static Pending *loads;        /* bulk loads under way, of all warps */
static Pending *issued;       /* to the fifth generation's tensor cores: done in this order */
static i32 n_issued, n_columns;
static u32 tensor[TENSOR_ROWS][TENSOR_COLUMNS]; /* their memory; columns are handed out */
static i32 n_loads, when, arrived[BARRIERS];
static u32 waiting[BARRIERS]; /* a bit for each warp */
static u64 random_state;
static jmp_buf failed;

static void fail(const Instruction *ins, const char *format, ...) {
  va_list list;
  int n = ins ? snprintf(machine.error, machine.error_size, "line %d: ", ins->line) : 0;
  va_start(list, format);
  vsnprintf(machine.error + n, machine.error_size - n, format, list);
  va_end(list);
  longjmp(failed, 1);
}

static u64 drawn(u64 below) { /* xorshift */
  random_state ^= random_state << 13, random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % below;
}

/* ---- numbers */

static float as_float(u32 x) { float f; memcpy(&f, &x, 4); return f; }
static u32 as_bits(float f) { u32 x; memcpy(&x, &f, 4); return x; }
static float low(u64 x) { return as_float((u32)x); } /* of two numbers in 64 bits */
static float high(u64 x) { return as_float(x >> 32); }
static u64 pair(float a, float b) { return (u64)as_bits(b) << 32 | as_bits(a); }
static float from_bf16(u32 x) { return as_float(x << 16); }
static u32 to_bf16(float f) {
  u32 x = as_bits(f);
  return isnan(f) ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
static float from_f16(u32 x) {
  u32 exponent = x >> 10 & 31, mantissa = x & 1023;
  float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : ldexpf(exponent ? mantissa + 1024 : mantissa, (exponent ? (int)exponent : 1) - 25);
  return x & 0x8000 ? -f : f;
}
static u32 to_f16(float f) {
  u32 sign = as_bits(f) >> 16 & 0x8000;
  int exponent;
  if (isnan(f)) return 0x7fff;
  f = fabsf(f);
  if (f >= 65520) return sign | 0x7c00;
  if (f < 0x1p-14f) return sign | (u32)rintf(f * 0x1p24f);
  u32 mantissa = (u32)rintf(ldexpf(frexpf(f, &exponent), 11)); /* 1024 to 2048 */
  return sign | (((exponent + 14) << 10) + mantissa - 1024);
}
static float flushed(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0, f) : f; }
static float maximum(float a, float b) {
  return isnan(a) ? b : isnan(b) ? a : a == b ? (signbit(a) ? b : a) : a > b ? a : b;
}
static float minimum(float a, float b) { return -maximum(-a, -b); }
static i32 integer(float f) {
  return isnan(f) ? 0 : f >= 0x1p31f ? INT32_MAX : f <= -0x1p31f ? INT32_MIN : (i32)f;
}
static u64 field(u64 x, u32 first, u32 n) {
  first &= 255, n &= 255;
  return first > 63 || n == 0 ? 0 : x >> first & (n > 63 ? ~0ull : (1ull << n) - 1);
}
static i32 signed_field(i32 x, u32 first, u32 n) {
  u32 bits = (u32)field((i64)x, first, n), top = n & 255;
  return top == 0 || top > 31 ? (i32)bits : (i32)(bits << (32 - top)) >> (32 - top);
}
static u32 permuted(u32 a, u32 b, u32 selectors) {
  u64 x = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> 4 * i, byte = x >> 8 * (selector & 7) & 255;
    result |= (selector & 8 ? (byte >> 7) * 255 : byte) << 8 * i;
  }
  return result;
}

#include "lanes.h"

/* ---- memory */

static void check_global(u64 at, u64 size, const Instruction *ins) {
  static u64 last;
  for (u64 i = 0; i < machine.n_tensors; i++) {
    u64 j = (last + i) % machine.n_tensors;
    if (at >= machine.memory[2 * j] && at + size <= machine.memory[2 * j + 1]) {
      last = j;
      return;
    }
  }
  fail(ins, "%d bytes at 0x%llx are in no tensor", (int)size, (unsigned long long)at);
}

static void check_shared(u64 at, u64 size, const Instruction *ins) {
  if (at + size > (u64)machine.shared_size)
    fail(ins, "bytes %llu to %llu are beyond shared memory, which has %d", (unsigned long long)at,
         (unsigned long long)(at + size), machine.shared_size);
}

static void check_aligned(u64 at, u64 size, const Instruction *ins) {
  if (at % size) fail(ins, "0x%llx is no multiple of %d", (unsigned long long)at, (int)size);
}

static void wrote(u64 at, u64 size, int warp) {
  memset(unfenced + at, warp + 1, size);
  any_unfenced = 1;
}

/* Before the asynchronous proxy reads. */
static void check_fenced(u64 at, u64 size, const Instruction *ins) {
  check_shared(at, size, ins);
  for (u64 i = at; i < at + size; i++)
    if (unfenced[i])
      fail(ins, "byte %llu was written without a fence.proxy.async since", (unsigned long long)i);
}

/* What a warp of the set wrote is known to whoever waited with it. */
static void publish(u32 set) {
  for (int i = 0; i < machine.shared_size && any_unfenced; i++)
    if (unfenced[i] && unfenced[i] < PUBLISHED && set >> (unfenced[i] - 1) & 1)
      unfenced[i] = PUBLISHED;
}

/* Of a warp's own writes, and of those before a barrier. */
static void fence(int warp) {
  int left = 0;
  for (int i = 0; i < machine.shared_size && any_unfenced; i++) {
    if (unfenced[i] == warp + 1 || unfenced[i] == PUBLISHED) unfenced[i] = 0;
    left |= unfenced[i];
  }
  any_unfenced = left;
}

/* Rows of 32, 64 or 128 bytes, whose parts of 16 bytes are exchanged from row to row. */
static u64 swizzled(u64 at, int row) { return at ^ (at >> 7 & (row / 16 - 1)) << 4; }

static int number_of(const Warp *warp) { return (int)(warp - warps); }

/* ---- TMA. The fields in an order of our own; 120 of the 128 bytes */

typedef struct {
  u64 address;
  u32 rank, box[5], size[5], step[5];
  u64 stride[4]; /* bytes */
  u32 type, interleave, swizzle, fill;
} TensorMap;

static TensorMap *tensor_map(u64 at, const Instruction *ins) {
  static const u8 row[] = {16, 32, 64, 128};
  TensorMap *map = (TensorMap *)at;
  check_global(at, 128, ins);
  if (map->rank > 4 || map->interleave || map->fill || map->swizzle > 3)
    fail(ins, "a tensor map of rank %d, interleave %d, fill %d, swizzle %d", map->rank + 1,
         map->interleave, map->fill, map->swizzle);
  if (map->type != 6 && map->type != 7 && map->type != 10) fail(ins, "tensor type %d", map->type);
  u32 width = map->box[0] * (map->type == 7 ? 4 : 2);
  check_aligned(map->address, 16, ins);
  check_aligned(width, 16, ins);
  if (map->swizzle && width > row[map->swizzle]) fail(ins, "rows of %d bytes", width);
  for (u32 i = 0; i <= map->rank; i++) {
    if (map->box[i] == 0 || map->box[i] > 256 || map->step[i] != 1)
      fail(ins, "a box of %d, every %dth", map->box[i], map->step[i]);
    if (i) check_aligned(map->stride[i - 1], 16, ins);
  }
  return map;
}

static int element_size(const TensorMap *map) { return map->type == 7 ? 4 : 2; }

static u32 box_bytes(const TensorMap *map) {
  u32 n = element_size(map);
  for (u32 i = 0; i <= map->rank; i++) n *= map->box[i];
  return n;
}

static void bulk_copy(const Pending *p) {
  const TensorMap *map = tensor_map(p->b, p->ins);
  int size = element_size(map), n = box_bytes(map) / size, row = 16 << map->swizzle;
  check_aligned(p->a, 128, p->ins);
  check_shared(p->a, (u64)n * size, p->ins);
  for (int e = 0; e < n; e++) {
    u64 rest = e, at = map->address;
    int inside = 1;
    for (u32 i = 0; i <= map->rank; i++) {
      i64 x = p->coords[i] + (i64)(rest % map->box[i]);
      rest /= map->box[i];
      inside &= x >= 0 && x < (i64)map->size[i];
      at += x * (i ? map->stride[i - 1] : (u64)size);
    }
    u64 here = swizzled(p->a + (u64)e * size, row);
    if (inside) check_global(at, size, p->ins);
    if (p->kind == LOAD) {
      memset(shared + here, 0, size), memset(unfenced + here, 0, size);
      if (inside) memcpy(shared + here, (void *)at, size);
    } else if (inside) {
      check_fenced(here, size, p->ins);
      if (p->kind == STORE) memcpy((void *)at, shared + here, size);
      else *(float *)at += *(float *)(shared + here);
    }
  }
}

/* ---- mbarriers, of 8 bytes */

typedef struct { u64 phase : 1, expected : 12, missing : 12; i64 bytes : 39; } MBarrier;

static MBarrier *mbarrier(u32 at, const Instruction *ins) {
  check_shared(at, 8, ins);
  check_aligned(at, 8, ins);
  return (MBarrier *)(shared + at);
}

static void arrive(MBarrier *b, u32 n, i64 bytes, const Instruction *ins) {
  if (n > b->missing) fail(ins, "%d arrive where an mbarrier waits for %d", n, (int)b->missing);
  b->missing -= n, b->bytes += bytes;
  if (b->missing == 0 && b->bytes == 0) b->phase ^= 1, b->missing = b->expected;
}

static void finish_load(int i) {
  Pending p = loads[i];
  loads[i] = loads[--n_loads];
  bulk_copy(&p);
  arrive(mbarrier(p.mbarrier, p.ins), 0, -(i64)p.bytes, p.ins);
}

/* ---- matrix products */

/* Of an operand in shared memory, where its element (row, k) is: in rows of its swizzle along k, or
   along the other side. */
static u64 element(u64 descriptor, int row, int k, int along_k) {
  static const u8 widths[] = {16, 16, 128, 128, 64, 64, 32, 32}; /* Hopper has two bits of these */
  u64 at = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  u64 stride = (descriptor >> 32 & 0x3fff) << 4;
  int width = widths[descriptor >> 61];
  if (along_k) {
    at += row / 8 * stride + row % 8 * width;
    at += width == 16 ? k / 8 * leading + k % 8 * 2 : k * 2;
  } else if (width == 16) {
    at += row / 8 * stride + row % 8 * 2 + k / 8 * leading + k % 8 * 16;
  } else {
    at += row / (width / 2) * leading + row % (width / 2) * 2 + k / 8 * stride + k % 8 * width;
  }
  return swizzled(at, width);
}

static float half(u32 bits, int bfloat) { return bfloat ? from_bf16(bits) : from_f16(bits); }

static float shared_half(u64 at, int bfloat, const Instruction *ins) {
  check_fenced(at, 2, ins);
  return half(*(u16 *)(shared + at), bfloat);
}

/* d += a · bᵀ for a tile of 16 rows, n columns, 16 products; d[j] of a lane are its registers. */
static void multiply(int n, float (*a)[16], float (*b)[16], Warp *warp, const i32 *d, int add) {
  for (int lane = 0; lane < LANES; lane++)
    for (int j = 0; j < n / 2; j++) {
      u32 *to = warp->w + d[j] * LANES + lane;
      int row = lane / 4 + (j & 2) * 4, column = j / 4 * 8 + lane % 4 * 2 + (j & 1);
      double sum = add ? as_float(*to) : 0;
      for (int k = 0; k < 16; k++) sum += (double)a[row][k] * b[column][k];
      *to = as_bits((float)sum);
    }
}

/* A tile of 16 x 16 that lies in 4 registers. */
static void tile(float (*a)[16], const u32 *const registers[4], int bfloat) {
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 8; i++)
      a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
          half(registers[i / 2][lane] >> i % 2 * 16 & 0xffff, bfloat);
}

/* n, bfloat, a in registers, a transposed, b transposed; d (n / 2), a (4 or 1), b, add */
static void product(const Pending *p, Warp *warp) {
  const i32 *o = machine.pool + p->ins->first;
  int n = o[0], first = number_of(warp) % 4 * 16;
  static float a[16][16], b[256][16];
  if (o[2]) {
    const u32 *registers[4];
    for (int i = 0; i < 4; i++) registers[i] = warp->w + o[5 + n / 2 + i] * LANES;
    tile(a, registers, o[1]);
  }
  for (int k = 0; k < 16; k++) {
    for (int row = 0; row < 16 && !o[2]; row++)
      a[row][k] = shared_half(element(p->a, first + row, k, !o[3]), o[1], p->ins);
    for (int column = 0; column < n; column++)
      b[column][k] = shared_half(element(p->b, column, k, !o[4]), o[1], p->ins);
  }
  multiply(n, a, b, warp, o + 5, p->add);
}

static u32 *cell(u32 at, int row, int column, const Instruction *ins) {
  row += at >> 16, column += at & 0xffff;
  if (row >= TENSOR_ROWS || column >= n_columns) fail(ins, "tensor memory (%d, %d)", row, column);
  return &tensor[row][column];
}

/* The fifth generation's: in tensor memory, of the shape that a descriptor tells. */
static void tensor_product(const Pending *p) {
  static float a[16], b[256][16];
  int rows = (p->shape >> 24 & 31) * 16, n = (p->shape >> 17 & 63) * 8;
  int stored = machine.pool[p->ins->first];
  int bfloat = p->shape >> 7 & 7, along_m = p->shape >> 15 & 1, along_n = p->shape >> 16 & 1;
  if ((rows != 64 && rows != 128) || bfloat > 1 || (p->shape >> 4 & 3) != 1)
    fail(p->ins, "products of the shape 0x%x", p->shape);
  for (int column = 0; column < n; column++)
    for (int k = 0; k < 16; k++)
      b[column][k] = shared_half(element(p->b, column, k, !along_n), bfloat, p->ins);
  for (int row = 0; row < rows; row++) {
    int lane = rows == 64 ? row / 16 * 32 + row % 16 : row; /* 64 rows: 16 of each 32 lanes */
    for (int k = 0; k < 16; k++)
      a[k] = stored ? half(*cell(p->a, lane, k / 2, p->ins) >> k % 2 * 16 & 0xffff, bfloat)
                    : shared_half(element(p->a, row, k, !along_m), bfloat, p->ins);
    for (int column = 0; column < n; column++) {
      u32 *d = cell(p->d, lane, column, p->ins);
      double sum = p->add ? as_float(*d) : 0;
      for (int k = 0; k < 16; k++) sum += (double)a[k] * b[column][k];
      *d = as_bits((float)sum);
    }
  }
}

static void finish_issued(void) { /* the first */
  Pending p = issued[0];
  memmove(issued, issued + 1, --n_issued * sizeof *issued);
  if (p.kind == TENSOR_PRODUCT) tensor_product(&p);
  else arrive(mbarrier(p.mbarrier, p.ins), 1, 0, p.ins);
}

static void issue(const Pending *p) {
  if (n_issued == MOST_PENDING) fail(p->ins, "too much is under way");
  issued[n_issued++] = *p;
  if (when == AT_ONCE) finish_issued();
}

static void mma(Warp *warp, const i32 *o) { /* bfloat, d (4), a (4), b (2), c (4) */
  float a[16][16], b[16][16];
  const u32 *rows[4], *columns[4];
  u32 c[4][LANES];
  for (int i = 0; i < 4; i++) {
    rows[i] = warp->w + o[5 + i] * LANES;
    columns[i] = warp->w + o[9 + i / 2] * LANES; /* b has 8 columns: half a tile */
    memcpy(c[i], warp->w + o[11 + i] * LANES, sizeof c[i]);
  }
  tile(a, rows, o[0]), tile(b, columns, o[0]);
  for (int i = 0; i < 4; i++) memcpy(warp->w + o[1 + i] * LANES, c[i], sizeof c[i]);
  multiply(8, a, b, warp, o + 1, 1);
}

/* ---- what has begun */

static int queue_of(const Pending *p) {
  return p->kind == PRODUCT ? PRODUCTS : p->kind == COPY ? COPIES : STORES;
}

static void finish(const Pending *p, Warp *warp) {
  if (p->kind == PRODUCT) product(p, warp);
  else if (p->kind != COPY) bulk_copy(p);
  else
    for (int l = 0; l < LANES; l++)
      if (p->on[l]) {
        memset(shared + p->to[l], 0, p->size);
        memcpy(shared + p->to[l], (void *)p->from[l], p->given[l]);
        /* PTX counts these writes to the generic proxy; but neither Triton nor CUTLASS puts a fence
           between them and wgmma, and both work. */
        memset(unfenced + p->to[l], 0, p->size);
      }
}

/* All but the last `but` groups of a queue; -1: what was not committed too. */
static void finish_groups(Warp *warp, int queue, int but) {
  int kept = 0;
  for (int i = 0; i < warp->n_pending; i++) {
    Pending *p = &warp->pending[i];
    int ready = p->group >= 0 && p->group < warp->groups[queue] - but;
    if (queue_of(p) == queue && (ready || but < 0)) finish(p, warp);
    else warp->pending[kept++] = *p;
  }
  warp->n_pending = kept;
}

static void commit(Warp *warp, int queue) {
  for (int i = 0; i < warp->n_pending; i++) {
    Pending *p = &warp->pending[i];
    if (queue_of(p) == queue && p->group < 0) p->group = warp->groups[queue];
  }
  warp->groups[queue]++;
}

static void begin(Warp *warp, const Pending *p) {
  if (when == AT_ONCE) {
    finish(p, warp);
    return;
  }
  if (warp->n_pending == MOST_PENDING) fail(p->ins, "too much is under way");
  warp->pending[warp->n_pending] = *p;
  warp->pending[warp->n_pending++].group = -1;
}

/* ---- one instruction, for the lanes that are on; whether the warp may go on */

#define SLOT(i) (w + o[i] * LANES)
#define WIDE(i) ((u64 *)SLOT(i))
#define EACH for (int l = 0; l < LANES; l++) if (on[l])

static int shuffled(int mode, int lane, i32 by, u32 control) { /* -1: none */
  int segment = control >> 8 & 31, most = (lane & segment) | (control & 31 & ~segment);
  int from = mode == 0   ? (lane & segment) | (by & 31 & ~segment)
             : mode == 1 ? lane ^ (by & 31)
             : mode == 2 ? lane - (by & 31)
                         : lane + (by & 31);
  return (mode == 2 ? from < most : from > most) ? -1 : from;
}

static int step(Warp *warp, const Instruction *ins, const u32 *on, int all, int any) {
  const i32 *o = machine.pool + ins->first;
  u32 *w = warp->w;
  int self = number_of(warp);
  switch (ins->op) {
  case OP_NOP:
    return 1;
  case OP_LD_GLOBAL: /* bytes, how many, wide, signed, address, offset, address wide, values */
  case OP_LD_SHARED:
  case OP_ST_GLOBAL:
  case OP_ST_SHARED: {
    int bytes = o[0], n = o[1], load = ins->op == OP_LD_GLOBAL || ins->op == OP_LD_SHARED;
    int global = ins->op == OP_LD_GLOBAL || ins->op == OP_ST_GLOBAL;
    EACH {
      u64 at = (o[6] ? WIDE(4)[l] : SLOT(4)[l]) + (i64)o[5];
      check_aligned(at, bytes * n, ins);
      if (global) check_global(at, bytes * n, ins);
      else check_shared(at, bytes * n, ins);
      if (!load && !global) wrote(at, bytes * n, self);
      u8 *memory = global ? (u8 *)at : shared + at;
      u64 values[8] = {0};
      for (int i = 0; i < n; i++)
        if (load) {
          memcpy(&values[i], memory + i * bytes, bytes);
          if (o[3] && bytes < 8 && values[i] >> (8 * bytes - 1)) values[i] |= ~0ull << 8 * bytes;
        } else {
          values[i] = o[2] ? WIDE(7 + i)[l] : SLOT(7 + i)[l];
          memcpy(memory + i * bytes, &values[i], bytes);
        }
      for (int i = 0; i < n && load; i++)
        if (o[2]) WIDE(7 + i)[l] = values[i];
        else SLOT(7 + i)[l] = (u32)values[i];
    }
    return 1;
  }
  case OP_CP_ASYNC: { /* bytes, to, offset, from, offset, bytes given (the rest is zero) */
    Pending p = {.kind = COPY, .ins = ins, .size = o[0]};
    EACH {
      p.on[l] = 1, p.to[l] = SLOT(1)[l] + o[2], p.from[l] = WIDE(3)[l] + (i64)o[4];
      p.given[l] = SLOT(5)[l];
      check_shared(p.to[l], p.size, ins), check_aligned(p.to[l], p.size, ins);
      if (p.given[l]) check_global(p.from[l], p.given[l], ins);
      if (p.given[l]) check_aligned(p.from[l], p.size, ins);
    }
    begin(warp, &p);
    return 1;
  }
  case OP_WGMMA: { /* see product */
    int d = 5 + o[0] / 2, b = d + (o[2] ? 4 : 1);
    Pending p = {.kind = PRODUCT, .ins = ins, .b = WIDE(b)[0], .add = SLOT(b + 1)[0] != 0};
    if (!o[2]) p.a = WIDE(d)[0];
    begin(warp, &p);
    return 1;
  }
  case OP_CP_ASYNC_COMMIT: commit(warp, COPIES); return 1;
  case OP_CP_ASYNC_WAIT: finish_groups(warp, COPIES, o[0]); return 1;
  case OP_WGMMA_COMMIT: commit(warp, PRODUCTS); return 1;
  case OP_WGMMA_WAIT: finish_groups(warp, PRODUCTS, o[0]); return 1;
  case OP_BULK_COMMIT: if (any) commit(warp, STORES); return 1;
  case OP_BULK_WAIT: if (any) finish_groups(warp, STORES, o[0]); return 1;
  case OP_MMA: mma(warp, o); return 1;
  case OP_LDMATRIX: /* how many, transposed, address, offset, registers */
  case OP_STMATRIX: {
    u32 got[4][LANES] = {0};
    for (int i = 0; i < o[0]; i++)
      for (int l = 0; l < 2 * LANES; l++) {
        int lane = l / 2, pair = lane % 4 * 2 + l % 2;
        int row = o[1] ? pair : lane / 4, column = o[1] ? lane / 4 : pair;
        u32 at = SLOT(2)[i * 8 + row] + o[3];
        check_shared(at, 16, ins), check_aligned(at, 16, ins);
        at += 2 * column;
        if (ins->op == OP_LDMATRIX) got[i][lane] |= (u32) * (u16 *)(shared + at) << l % 2 * 16;
        else {
          *(u16 *)(shared + at) = SLOT(4 + i)[lane] >> l % 2 * 16;
          wrote(at, 2, self);
        }
      }
    for (int i = 0; i < o[0] && ins->op == OP_LDMATRIX; i++)
      memcpy(SLOT(4 + i), got[i], sizeof got[i]);
    return 1;
  }
  case OP_SHFL: { /* mode, to, whether there is one, of, by, control */
    u32 got[LANES], valid[LANES];
    for (int l = 0; l < LANES; l++) {
      int from = shuffled(o[0], l, (i32)SLOT(4)[l], SLOT(5)[l]);
      valid[l] = from >= 0;
      got[l] = SLOT(3)[from < 0 ? l : from];
    }
    memcpy(SLOT(2), valid, sizeof valid), memcpy(SLOT(1), got, sizeof got);
    return 1;
  }
  case OP_REDUX: { /* min, max or add; of floats; to, of */
    u32 x = SLOT(3)[0];
    for (int l = 1; l < LANES; l++) {
      u32 y = SLOT(3)[l];
      if (o[1]) x = as_bits(o[0] ? maximum(as_float(x), as_float(y)) : minimum(as_float(x), as_float(y)));
      else x = o[0] == 2 ? x + y : (o[0] == 0) == ((i32)y < (i32)x) ? y : x;
    }
    for (int l = 0; l < LANES; l++) SLOT(2)[l] = x;
    return 1;
  }
  case OP_ELECT: /* the lane's number, whether it is this one */
    for (int l = 0; l < LANES; l++) SLOT(0)[l] = 0, SLOT(1)[l] = l == 0;
    return 1;
  case OP_BAR: { /* number, threads (-1: of the whole block) */
    int number = SLOT(0)[0] % BARRIERS, threads = o[1] < 0 ? machine.threads : (i32)SLOT(1)[0];
    waiting[number] |= 1u << self;
    arrived[number] += LANES;
    warp->blocked = arrived[number] < threads;
    if (warp->blocked) return 0;
    publish(waiting[number]);
    for (int i = 0; i < MOST_WARPS; i++)
      if (waiting[number] >> i & 1) warps[i].blocked = 0;
    arrived[number] = waiting[number] = 0;
    return 1;
  }
  case OP_FENCE_ASYNC:
    fence(self);
    return 1;
  case OP_MBARRIER_INIT: /* address, offset, how many arrive */
    EACH *mbarrier(SLOT(0)[l] + o[1], ins) = (MBarrier){0, SLOT(2)[l], SLOT(2)[l], 0};
    return 1;
  case OP_MBARRIER_INVAL:
    EACH memset(mbarrier(SLOT(0)[l] + o[1], ins), 0xff, 8);
    return 1;
  case OP_MBARRIER_ARRIVE: /* address, offset, how many, bytes that will come */
    EACH arrive(mbarrier(SLOT(0)[l] + o[1], ins), SLOT(2)[l], SLOT(3)[l], ins);
    return 1;
  case OP_TRY_WAIT: /* whether the phase is over, address, offset, its parity */
    EACH {
      SLOT(0)[l] = mbarrier(SLOT(1)[l] + o[2], ins)->phase != (SLOT(3)[l] & 1);
      warp->spinning |= !SLOT(0)[l];
    }
    return 1;
  case OP_BULK_LOAD: /* to, offset, map, mbarrier, offset, how many coordinates, these */
    EACH {
      const TensorMap *map = tensor_map(WIDE(2)[l], ins);
      Pending p = {.kind = LOAD, .ins = ins, .a = SLOT(0)[l] + o[1], .b = WIDE(2)[l]};
      p.mbarrier = SLOT(3)[l] + o[4], p.bytes = box_bytes(map);
      if ((int)map->rank + 1 != o[5]) fail(ins, "the map's rank is %d", map->rank + 1);
      for (int i = 0; i < o[5]; i++) p.coords[i] = (i32)SLOT(6 + i)[l];
      if (n_loads == MOST_PENDING) fail(ins, "too many loads are under way");
      loads[n_loads++] = p;
      if (when == AT_ONCE) finish_load(n_loads - 1);
    }
    return 1;
  case OP_BULK_STORE: /* add, map, from, offset, how many coordinates, these */
    EACH {
      Pending p = {.kind = o[0] ? ADD : STORE, .ins = ins, .a = SLOT(2)[l] + o[3], .b = WIDE(1)[l]};
      const TensorMap *map = tensor_map(p.b, ins);
      if (o[0] && map->type != 7) fail(ins, "sums of type %d", map->type);
      for (int i = 0; i < o[4]; i++) p.coords[i] = (i32)SLOT(5 + i)[l];
      begin(warp, &p);
    }
    return 1;
  case OP_TENSORMAP: /* field, address, index, value, value wide */
    EACH {
      u64 at = WIDE(1)[l], value = o[4] ? WIDE(3)[l] : SLOT(3)[l];
      check_shared(at, 128, ins);
      TensorMap *map = (TensorMap *)(shared + at);
      u32 *fields[] = {0, &map->rank, map->box, map->size, 0, map->step, &map->type,
                       &map->interleave, &map->swizzle, &map->fill};
      if (o[0] == 0) map->address = value;
      else if (o[0] == 4) map->stride[o[2]] = value;
      else fields[o[0]][o[2]] = value;
    }
    return 1;
  case OP_TENSOR_ALLOC: /* where the address goes, offset, columns */
    if (!any) return 1;
    check_shared(SLOT(0)[0] + o[1], 4, ins);
    memcpy(shared + SLOT(0)[0] + o[1], &n_columns, 4);
    n_columns += o[2];
    if (n_columns > TENSOR_COLUMNS) fail(ins, "%d columns of tensor memory", n_columns);
    return 1;
  case OP_TENSOR_LD: /* how many, columns to the other half warp's (-1: all have rows), address, offset */
  case OP_TENSOR_ST:
    for (int l = 0; l < LANES; l++)
      for (int i = 0; i < o[0]; i++) {
        int row = o[1] < 0 ? l : l % 16, column = i + (o[1] < 0 ? 0 : l / 16 * o[1]);
        u32 *at = cell(SLOT(2)[l] + o[3], row, column, ins);
        if ((at - tensor[0]) / TENSOR_COLUMNS / LANES != self % 4) fail(ins, "another warp's rows");
        if (ins->op == OP_TENSOR_LD) SLOT(4 + i)[l] = *at;
        else *at = SLOT(4 + i)[l];
      }
    return 1;
  case OP_TENSOR_MMA: /* a in tensor memory, d, offset, a, offset, b, shape, add */
    EACH {
      Pending p = {.kind = TENSOR_PRODUCT, .ins = ins, .d = SLOT(1)[l] + o[2], .b = WIDE(5)[l]};
      p.a = o[0] ? SLOT(3)[l] + o[4] : WIDE(3)[l];
      p.shape = SLOT(6)[l], p.add = SLOT(7)[l] != 0;
      issue(&p);
    }
    return 1;
  case OP_TENSOR_COMMIT: /* mbarrier, offset */
    EACH {
      Pending p = {.kind = TENSOR_COMMIT, .ins = ins, .mbarrier = SLOT(0)[l] + o[1]};
      issue(&p);
    }
    return 1;
  case OP_TENSORMAP_COPY: /* to, from: by the warp, once */
    for (int l = 0; l < LANES; l++)
      if (on[l]) {
        check_global(WIDE(0)[l], 128, ins), check_shared(WIDE(1)[l], 128, ins);
        memcpy((void *)WIDE(0)[l], shared + WIDE(1)[l], 128);
        break;
      }
    return 1;
  }
  lanes(ins, w, on, all);
  return 1;
}

/* ---- warps, blocks, the grid */

/* The lane that is furthest behind, or GONE; lanes that wait for the others of their warp are left
   out until all do. */
static int next_pc(Warp *warp) {
  int held = 0, pc = GONE;
  for (int l = 0; l < LANES; l++) held += warp->held[l];
  if (held == LANES) memset(warp->held, 0, sizeof warp->held);
  for (int l = 0; l < LANES; l++)
    if (!warp->held[l] && warp->pc[l] < pc) pc = warp->pc[l];
  if (pc == GONE && held && held < LANES) fail(0, "a part of a warp waits for lanes that ended");
  return pc;
}

static void run_warp(Warp *warp, u64 budget) {
  for (; budget > 0; budget--) {
    int pc = next_pc(warp), whole = 1, all = 1, any = 0;
    if (pc == GONE) {
      for (int queue = 0; queue < QUEUES; queue++) finish_groups(warp, queue, -1);
      warp->done = 1;
      return;
    }
    const Instruction *ins = &machine.code[pc];
    const u32 *guard = ins->guard < 0 ? 0 : warp->w + ins->guard * LANES;
    u32 here[LANES], on[LANES];
    for (int l = 0; l < LANES; l++) {
      here[l] = warp->pc[l] == pc;
      on[l] = here[l] && (!guard || (guard[l] != 0) != ins->negated);
      whole &= here[l], all &= on[l], any |= on[l];
    }
    if (ins->together && !whole) { /* the rest comes, or the warp never goes on */
      for (int l = 0; l < LANES; l++) warp->held[l] |= here[l];
      continue;
    }
    if (ins->together && any && !all) fail(ins, "a part of a warp");
    int jumps = ins->op == OP_BRA || ins->op == OP_RET;
    int to = ins->op == OP_BRA ? machine.pool[ins->first] : GONE;
    for (int l = 0; l < LANES; l++)
      if (here[l]) warp->pc[l] = jumps && on[l] ? to : pc + 1, warp->held[l] = 0;
    if (!jumps) warp->spinning = 0; /* until it has tried to wait, and jumps back */
    if (jumps ? to <= pc : (any || !ins->together) && !step(warp, ins, on, all, any)) return;
  }
}

static void deadlock(int n_warps) {
  char lines[16 * MOST_WARPS] = "";
  for (int i = 0; i < n_warps; i++)
    if (!warps[i].done)
      sprintf(lines + strlen(lines), " %d", machine.code[warps[i].pc[0] - warps[i].blocked].line);
  fail(0, "warps wait for one another, at lines%s", lines);
}

static void run_block(int n_warps) {
  memset(shared, 0xff, machine.shared_size); /* NaN */
  memset(unfenced, 0, machine.shared_size), any_unfenced = 0;
  memset(arrived, 0, sizeof arrived), memset(waiting, 0, sizeof waiting);
  memset(tensor, 0xff, sizeof tensor), n_columns = 0;
  for (int turns = 0;; turns++) {
    int ready[MOST_WARPS], n = 0, spinning = 0, done = 0;
    for (int i = 0; i < n_warps; i++) {
      done += warps[i].done;
      if (warps[i].done || warps[i].blocked) continue;
      ready[n++] = i, spinning += warps[i].spinning;
    }
    if (done == n_warps) break;
    if (n > spinning) turns = 0;
    if (n_loads + n_issued && (n == spinning || (when == BETWEEN && drawn(4) == 0))) {
      if (drawn(n_loads + n_issued) < (u64)n_loads) finish_load(drawn(n_loads));
      else finish_issued();
      turns = 0;
    }
    if (turns > 100 * n_warps || (n == 0 && n_loads + n_issued == 0)) deadlock(n_warps);
    if (n) run_warp(&warps[ready[drawn(n)]], 1 + drawn(3000));
  }
  while (n_loads) finish_load(0);
  while (n_issued) finish_issued();
}

static void start_warps(int n_warps, i64 program) {
  i32 x = machine.grid[0], y = machine.grid[1];
  u32 at[3] = {program % x, program / x % y, program / x / y};
  for (int i = 0; i < n_warps; i++) {
    Warp old = warps[i];
    warps[i] = (Warp){.w = old.w, .pending = old.pending};
    memcpy(old.w, machine.registers, (size_t)machine.n_slots * LANES * 4);
    for (int l = 0; l < LANES; l++)
      for (int j = 0; j < 7; j++) {
        u32 value = j == 0 ? i * LANES + l : j < 4 ? at[j - 1] : machine.grid[j - 4];
        if (machine.special[j] >= 0) old.w[machine.special[j] * LANES + l] = value;
      }
  }
}

/* Runs every program of the grid, in an order drawn from the seed; 0, or 1 and what went wrong. */
int run(const Machine *given) {
  machine = *given;
  random_state = machine.seed * 0x9E3779B97F4A7C15ull + 1;
  when = drawn(3);
  n_loads = n_issued = 0;
  int n_warps = machine.threads / LANES;
  i64 programs = (i64)machine.grid[0] * machine.grid[1] * machine.grid[2];
  i64 *order = malloc(programs * sizeof *order);
  shared = aligned_alloc(1024, machine.shared_size / 1024 * 1024 + 1024);
  unfenced = malloc(machine.shared_size + 1);
  loads = malloc(MOST_PENDING * sizeof *loads), issued = malloc(MOST_PENDING * sizeof *issued);
  for (int i = 0; i < n_warps; i++) {
    warps[i].w = aligned_alloc(128, (size_t)machine.n_slots * LANES * 4);
    warps[i].pending = malloc(MOST_PENDING * sizeof *warps[i].pending);
  }
  for (i64 i = 0; i < programs; i++) {
    i64 j = drawn(i + 1);
    order[i] = order[j], order[j] = i;
  }
  int wrong = setjmp(failed);
  if (!wrong)
    for (i64 i = 0; i < programs; i++) {
      start_warps(n_warps, order[i]);
      run_block(n_warps);
    }
  for (int i = 0; i < n_warps; i++) free(warps[i].w), free(warps[i].pending);
  free(shared), free(unfenced), free(loads), free(issued), free(order);
  return wrong;
}
