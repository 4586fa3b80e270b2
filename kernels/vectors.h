/* What the C of this package shares: vectors of fp32, and of bf16 that are widened to it. */

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef uint16_t bf16;

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif
#define EACH_LANE(i) _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
#if LANES == 16
#define OF_LANES(f, n) OF_8(f, n, 0), OF_8(f, n, 8)
#elif LANES == 8
#define OF_LANES(f, n) OF_8(f, n, 0)
#else
#define OF_LANES(f, n) OF_4(f, n, 0)
#endif
#define OF_8(f, n, i) OF_4(f, n, i), OF_4(f, n, i + 4)
#define OF_4(f, n, i) f(n, (i)), f(n, (i + 1)), f(n, (i + 2)), f(n, (i + 3))
/* Groups of n lanes, of a and b in turn: those before which an even number stands, or an odd. */
#define EVEN(n, i) ((i) & (n) ? LANES + (i) - (n) : (i))
#define ODD(n, i) ((i) & (n) ? LANES + (i) : (i) + (n))
#define EVEN_GROUPS(n, a, b) SHUFFLE(a, b, OF_LANES(EVEN, n))
#define ODD_GROUPS(n, a, b) SHUFFLE(a, b, OF_LANES(ODD, n))

/* Whether the threads that are asked for are there. */
#ifdef _OPENMP
const int has_threads = 1;
#else
const int has_threads = 0;
#endif

INLINE vec spread(float x) { return x - (vec){}; }

#define SELF(n, i) (i)
INLINE ints counted(void) { return (ints){OF_LANES(SELF, 1)}; } /* 0, 1, 2, … */

INLINE float total(vec x) {
#define BEHIND(n, i) (((i) + (n)) % LANES)
#if LANES == 16
  x += SHUFFLE(x, x, OF_LANES(BEHIND, 8));
#endif
#if LANES >= 8
  x += SHUFFLE(x, x, OF_LANES(BEHIND, 4));
#endif
  x += SHUFFLE(x, x, OF_LANES(BEHIND, 2));
  return x[0] + x[1];
#undef BEHIND
}

INLINE vec choose(ints mask, vec a, vec b) {
  return (vec)(((ints)a & mask) | ((ints)b & ~mask));
}

INLINE vec larger(vec a, vec b) { /* a where b is NaN */
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)b, (__m512)a);
#else
  return choose(b > a, b, a);
#endif
}

/* e^x to 2 units in the last place, 0 below −87; x at most 88. */
INLINE vec exponential(vec x) {
  const vec magic = spread(12582912.0f); /* 1.5 · 2²³: adding it rounds to an integer */
  vec n = x * 1.44269504f + magic;
  const ints power = ((ints)n - (ints)magic + 127) << 23; /* 2ⁿ, as a number's bits */
  n -= magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec y = spread(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return (vec)((ints)(y * (vec)power) & ~(x < -87.0f));
}

/* The same where it is rounded to bf16, to 4·10⁻³ of it: to 3·10⁻⁶. x may be −inf. */
INLINE vec rounded_exponential(vec x) {
#if defined(__AVX512F__)
  x *= 1.44269504f;
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, 0), r = x - n;
  vec y = spread(9.582852977e-3f); /* 2ʳ */
  y = y * r + 5.590642474e-2f;
  y = y * r + 2.402409861e-1f;
  y = y * r + 6.931241934e-1f;
  y = (vec)_mm512_scalef_ps((__m512)(y * r + 1.0f), (__m512)n);
  return (vec)((ints)y & ~(x < -126.0f));
#else
  return exponential(x);
#endif
}

/* A weight of attention whose numbers are bf16, or fp32. */
INLINE vec weight_of(vec x, int half) { return half ? rounded_exponential(x) : exponential(x); }

INLINE vec not_below(vec x, float least) { return choose(x < least, spread(least), x); }

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-not_below(x, -87.0f))); }

/* As `ACTIVATIONS` lists them. */
enum { RELU, RELU2, GELU, GELU_TANH, SILU, SIGMOID, TANH, IDENTITY };

INLINE vec activated(vec x, int64_t activation) {
  switch (activation) {
    case RELU:
      return not_below(x, 0.0f);
    case RELU2:
      x = not_below(x, 0.0f);
      return x * x;
    case GELU:
      for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
      return x;
    case GELU_TANH:
      x = not_below(x, -10.0f);
      return x / (1.0f + exponential(-x * (1.59576912f + 0.07135482f * x * x)));
    case SILU:
      x = not_below(x, -87.0f);
      return x / (1.0f + exponential(-x));
    case SIGMOID:
      return sigmoid(x);
    case TANH:
      for (int i = 0; i < LANES; i++) x[i] = tanhf(x[i]);
  }
  return x;
}

INLINE vec widened(halves x) {
#if defined(__AVX512F__) /* which GCC does by halves */
  return (vec)((words)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
  return (vec)(__builtin_convertvector(x, words) << 16);
#endif
}

INLINE halves narrowed(vec x) { /* to nearest, ties to even */
#if defined(__AVX512BF16__)
  return (halves)_mm512_cvtneps_pbh((__m512)x);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (halves)vcvt_bf16_f32((float32x4_t)x);
#else
  words w = (words)x;
  words rounded = w + 0x7fff + ((w >> 16) & 1);
  ints nan = x != x;
  w = (rounded & ~(words)nan) | ((w | 0x400000) & (words)nan);
  return __builtin_convertvector(w >> 16, halves);
#endif
}

/* Words of two bf16 numbers each. */
INLINE words paired(vec first, vec second) {
#if defined(__AVX512BF16__)
#define TWO(n, i) (uint16_t)(i), (uint16_t)((i) + LANES)
  typedef uint16_t numbers __attribute__((vector_size(4 * LANES)));
  const numbers one_behind_another = {OF_LANES(TWO, 0)};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (words)_mm512_permutexvar_epi16((__m512i)one_behind_another, both);
#else
  const words low = __builtin_convertvector(narrowed(first), words);
  return low | __builtin_convertvector(narrowed(second), words) << 16;
#endif
}

INLINE bf16 narrowed_one(float x) {
  uint32_t w;
  memcpy(&w, &x, 4);
  if (x != x) return (bf16)(w >> 16 | 0x40);
  return (bf16)((w + 0x7fff + (w >> 16 & 1)) >> 16);
}

INLINE float widened_one(bf16 x) {
  uint32_t w = (uint32_t)x << 16;
  float y;
  memcpy(&y, &w, 4);
  return y;
}

/* acc + the products of two bf16 numbers, as one word, with two others. */
INLINE vec pairs_added(vec acc, words inputs, words weights) {
#if defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)inputs, (__m512bh)weights);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (vec)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)inputs, (bfloat16x8_t)weights);
#else
  acc += (vec)(inputs << 16) * (vec)(weights << 16);
  return acc + (vec)(inputs & 0xffff0000) * (vec)(weights & 0xffff0000);
#endif
}

/* Matrix products by AMX: a tile is 16 rows of 16 words, of two bf16 numbers or one of fp32. */
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
static int tiles_granted;

/* Linux gives a process its tiles where it asks for them, once: here, when this is loaded. */
__attribute__((constructor)) static void ask_for_tiles(void) {
  enum { REQUEST = 0x1023, TILES = 18 };
  tiles_granted = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}

/* A thread's tiles, before its products and after. */
INLINE void take_tiles(void) {
  const struct { uint8_t palette, rest[15]; uint16_t bytes[16]; uint8_t rows[16]; } layout = {
      1, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  if (tiles_granted) _tile_loadconfig(&layout);
}

INLINE void leave_tiles(void) { if (tiles_granted) _tile_release(); }

/* c (16 · tall rows, 16 · wide) = or += a · b, over k words, of tiles of 16; tall and wide are 1 or
   2. Rows of a lie a_row bytes apart, of b and c so many words. */
INLINE void tiles_product(const int tall, const int wide, float *c, int64_t c_row, const char *a,
                          int64_t a_row, const float *b, int64_t b_row, int64_t k, int adds,
                          const char *ahead, int64_t bytes) {
  float *c2 = c + 16 * c_row;
  c_row *= 4, b_row *= 4;
#define EACH_TILE(of)                           \
  of(0, c) if (wide == 2) of(1, c + 16)         \
  if (tall == 2) { of(2, c2) if (wide == 2) of(3, c2 + 16) }
#define LOADED(n, from) _tile_loadd(n, from, c_row);
#define ZERO(n, from) _tile_zero(n);
#define STORED(n, to) _tile_stored(n, to, c_row);
  if (adds) { EACH_TILE(LOADED) }
  else { EACH_TILE(ZERO) }
  for (int64_t n = 0; n < k; n += 16) {
    const char *row = (const char *)b + n * b_row;
    for (int64_t i = n * bytes; i < (n + 16) * bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    _tile_loadd(4, a + 4 * n, a_row);
    _tile_loadd(6, row, b_row);
    _tile_dpbf16ps(0, 4, 6);
    if (wide == 2) { _tile_loadd(7, row + 64, b_row); _tile_dpbf16ps(1, 4, 7); }
    if (tall == 2) {
      _tile_loadd(5, a + 16 * a_row + 4 * n, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if (wide == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  EACH_TILE(STORED)
#undef EACH_TILE
#undef LOADED
#undef ZERO
#undef STORED
}
#else
#define HAS_TILES 0
INLINE void take_tiles(void) {}
INLINE void leave_tiles(void) {}
#endif

/* Of x: bf16 numbers where half, else fp32. */

INLINE float at(const void *x, int64_t i, int half) {
  return half ? widened_one(((const bf16 *)x)[i]) : ((const float *)x)[i];
}

INLINE void put(void *x, int64_t i, float value, int half) {
  if (half) ((bf16 *)x)[i] = narrowed_one(value);
  else ((float *)x)[i] = value;
}

INLINE vec load(const void *x, int64_t i, int half) {
  if (half) return widened(*(const halves *)((const bf16 *)x + i));
  return *(const vec *)((const float *)x + i);
}

INLINE void store(void *x, int64_t i, vec value, int half) {
  if (half) *(halves *)((bf16 *)x + i) = narrowed(value);
  else *(vec *)((float *)x + i) = value;
}

/* What follows for each LANES numbers of n, from i on; the last may be fewer: then not `full`. */
#define EACH(...) \
  for (int64_t i = 0; i < n; i += LANES) \
    if (i + LANES <= n) { enum { full = 1 }; __VA_ARGS__ } \
    else { enum { full = 0 }; __VA_ARGS__ }
#define GET(x, half) get(x, i, n, half, full)
#define SET(x, half, value) set(x, i, n, value, half, full)

INLINE vec get(const void *x, int64_t i, int64_t n, int half, int full) {
  if (full) return load(x, i, half);
  vec some = {};
  for (int j = 0; j < n - i; j++) some[j] = at(x, i + j, half);
  return some;
}

INLINE void set(void *x, int64_t i, int64_t n, vec value, int half, int full) {
  if (full) store(x, i, value, half);
  else for (int j = 0; j < n - i; j++) put(x, i + j, value[j], half);
}
