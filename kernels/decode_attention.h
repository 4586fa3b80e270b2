/* Attention of one token to the positions of a cache, those that its row shares in front of its own:
   for `decode_attention.c` and a GPT's decoder.

   It goes over the positions in blocks that are counted from the first, so that nothing beyond the
   last changes a bit. */

#include "vectors.h"

/* Of some that are known to the compiler, at most MOST: unrolled, so that they stay in registers. */
#define EACH_OF(MOST, some) _Pragma("GCC unroll 8") for (int i = 0; i < MOST; i++) if (i < some)
#define GROUP 4 /* heads that read their keys together */
#define EACH_HEAD(heads) _Pragma("GCC unroll 4") for (int h = 0; h < GROUP; h++) if (h < heads)
#define MOST_DIM 256 /* of a head */

static void narrow(const float *x, int64_t n, bf16 *y) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) *(halves *)(y + i) = narrowed(*(const vec *)(x + i));
  for (; i < n; i++) y[i] = narrowed_one(x[i]);
}

static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* The sum of each of LANES vectors, in their order. */
INLINE vec totals(vec a[LANES]) {
#define FOLD(n)                                           \
  _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)     \
    a[i] = EVEN_GROUPS(n, a[i], a[i + n]) + ODD_GROUPS(n, a[i], a[i + n]);
#if LANES == 16
  FOLD(8)
#endif
#if LANES >= 8
  FOLD(4)
#endif
  FOLD(2) FOLD(1)
  return a[0];
}

/* The scores of LANES keys with q, of which those behind the `last` are that one's again. */
INLINE vec scores_of(const float *q, const uint32_t *pairs, const void *keys, int64_t last,
                     int64_t dim, int half) {
  const int64_t even = dim / LANES * LANES, paired = half ? dim / (2 * LANES) * LANES : 0;
#define ROW(i) ((i < last ? i : last) * dim)
  vec acc[LANES] = {};
  for (int64_t d = 0; d < paired; d += LANES) {
    const words b_q = *(const words *)(pairs + d);
    EACH_LANE(i)
      acc[i] = pairs_added(acc[i], b_q, *(const words *)((const uint32_t *)keys + ROW(i) / 2 + d));
  }
  for (int64_t d = 2 * paired; d < even; d += LANES) {
    const vec b_q = *(const vec *)(q + d);
    EACH_LANE(i) acc[i] += b_q * load(keys, ROW(i) + d, half);
  }
  vec sum = totals(acc);
  for (int64_t d = even; d < dim; d++)
    for (int i = 0; i < LANES; i++) sum[i] += q[d] * at(keys, ROW(i) + d, half);
#undef ROW
  return sum;
}

/* scores[j] of n keys (n, dim) with q, scaled; −inf up to the next multiple of LANES. In bf16 as many
   numbers as fill vectors are multiplied in pairs, with q rounded as the keys are. Meanwhile the
   values, which lie as the keys do, are asked for. */
INLINE void score(const float *q, const uint32_t *pairs, const void *keys, const void *values,
                  int64_t n, int64_t dim, float scale, float *scores, int half) {
  const int64_t size = dim * (half ? 2 : 4);
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    const char *soon = (const char *)values + j * size;
    for (int64_t b = 0; b < LANES * size; b += 64) __builtin_prefetch(soon + b, 0, 3);
    const void *from = (const char *)keys + j * size;
    *(vec *)(scores + j) = scale * scores_of(q, pairs, from, LANES, dim, half);
  }
  if (j == n) return;
  const vec found = scale * scores_of(q, pairs, (const char *)keys + j * size, n - j - 1, dim, half);
  *(vec *)(scores + j) = choose(counted() < (int32_t)(n - j), found, spread(-INFINITY));
}

/* Of several heads at once, each value read once: out += weights · values for `wide` vectors of
   outputs. Heads are `room` numbers apart in the weights, values and rows of out are dim apart. */
INLINE void weigh_some(const int heads, const int wide, const float *weights, int64_t room,
                       const void *values, int64_t at, int64_t n, int64_t dim, float *out,
                       int half) {
  vec acc[GROUP][4] = {}, odd[4] = {};
  int64_t j = 0;
  for (; heads == 1 && j + 2 <= n; j += 2) /* one alone would wait for its own sums */
    EACH_OF(4, wide) {
      acc[0][i] += weights[j] * load(values, at + j * dim + i * LANES, half);
      odd[i] += weights[j + 1] * load(values, at + (j + 1) * dim + i * LANES, half);
    }
  for (; j < n; j++)
    EACH_OF(4, wide) {
      const vec value = load(values, at + j * dim + i * LANES, half);
      EACH_HEAD(heads) acc[h][i] += weights[h * room + j] * value;
    }
  EACH_OF(4, wide) {
    acc[0][i] += odd[i];
    EACH_HEAD(heads) *(vec *)(out + h * dim + i * LANES) += acc[h][i];
  }
}

/* out (heads, dim) += weights · values (n, dim) */
INLINE void weigh(const int heads, const float *weights, int64_t room, const void *values,
                  int64_t n, int64_t dim, float *out, int half) {
  const int wide = LANES == 16 || heads < 3 ? 4 : 2; /* sums stay in registers */
  int64_t d = 0;
  for (; d + wide * LANES <= dim; d += wide * LANES)
    weigh_some(heads, wide, weights, room, values, d, n, dim, out + d, half);
  for (; d + LANES <= dim; d += LANES)
    weigh_some(heads, 1, weights, room, values, d, n, dim, out + d, half);
  for (; d < dim; d++)
    EACH_HEAD(heads)
      for (int64_t j = 0; j < n; j++)
        out[h * dim + d] += weights[h * room + j] * at(values, j * dim + d, half);
}

typedef struct {
  const void *keys, *values;
  int64_t n;
} Segment;

/* out (heads, dim) of queries (heads, dim), a group that shares its keys, against two segments of
   positions; scores has, for each head, room for both. */
INLINE void attend(const int heads, const float *q, const Segment segment[2], int64_t dim,
                   float scale, float *scores, float *out, int half) {
  const int64_t second = round_up(segment[0].n, LANES);
  const int64_t all = second + round_up(segment[1].n, LANES);
  float factor[GROUP];
  EACH_HEAD(heads) {
    float *own = scores + h * all;
    const float *b_q = q + h * dim;
    uint32_t pairs[MOST_DIM / 2];
    if (half) narrow(b_q, dim, (bf16 *)pairs);
    score(b_q, pairs, segment[0].keys, segment[0].values, segment[0].n, dim,
          scale, own, half);
    score(b_q, pairs, segment[1].keys, segment[1].values, segment[1].n, dim,
          scale, own + second, half);
    vec most = spread(-INFINITY), sum = {};
    for (int64_t j = 0; j < all; j += LANES) {
      vec b = *(vec *)(own + j);
      most = larger(most, b);
    }
    float best = most[0];
    for (int i = 1; i < LANES; i++) best = most[i] > best ? most[i] : best;
    for (int64_t j = 0; j < all; j += LANES) {
      vec b = weight_of(*(vec *)(own + j) - best, half);
      *(vec *)(own + j) = b;
      sum += b;
    }
    factor[h] = 1.0f / total(sum);
  }
  memset(out, 0, heads * dim * sizeof *out);
  weigh(heads, scores, all, segment[0].values, segment[0].n, dim, out, half);
  weigh(heads, scores + second, all, segment[1].values, segment[1].n, dim, out, half);
  EACH_HEAD(heads) for (int64_t d = 0; d < dim; d++) out[h * dim + d] *= factor[h];
}

/* The same for any number of heads up to GROUP, each compiled with its sums in registers. */
static void attend_group(int heads, const float *q, const Segment segment[2], int64_t dim,
                         float scale, float *scores, float *out, int half) {
#define OF(n)                                                          \
  case n:                                                              \
    if (half) attend(n, q, segment, dim, scale, scores, out, 1);       \
    else attend(n, q, segment, dim, scale, scores, out, 0);            \
    break;
  switch (heads) { OF(1) OF(2) OF(3) OF(4) }
#undef OF
}
