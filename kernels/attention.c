/* Attention on a CPU, forward and backward: Dao 2023, "FlashAttention-2", where the lanes of a vector
   are queries. `_attention_cpu.py` calls it.

   A block of queries meets the keys a block at a time, and what it computes of them stays in the
   cache; blocks out of its sight are not visited. Numbers are fp32 or bf16, products of bf16 numbers
   are summed in fp32, softmax and sums are fp32. The same bits come out whatever the threads.

   A word is one fp32 number, or two bf16 numbers that are summed together: of one row, side by side,
   or of two rows, one below the other. Scores and their gradients lie turned, keys × queries.

   Shapes: B batch, H query heads, G key-value heads, T queries, S keys, D and Dv head dimensions. */

#include "vectors.h"

#define QUERIES 64 /* of a block */
#define KEYS 32
#define VECTORS (QUERIES / LANES)
#define OF(half) ((half) ? 2 : 1) /* numbers in a word */
#if defined(__AVX512F__) || defined(__aarch64__)
#define WIDE 4 /* vectors of a tile of sums, which stays in registers: 4 × 4 of 32 */
#else
#define WIDE 2 /* 4 × 2 of 16 */
#endif
#define EACH_OF(n, i) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

/* A block of words and its rows and columns exchanged. */
INLINE void turn(vec a[LANES]) {
#define EXCHANGE(n)                                               \
  EACH_LANE(i) if (!(i & n)) {                                    \
    const vec even = EVEN_GROUPS(n, a[i], a[i + n]);              \
    a[i + n] = ODD_GROUPS(n, a[i], a[i + n]);                     \
    a[i] = even;                                                  \
  }
#if LANES == 16
  EXCHANGE(8)
#endif
#if LANES >= 8
  EXCHANGE(4)
#endif
  EXCHANGE(2) EXCHANGE(1)
}

INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; } /* of vectors */

INLINE vec larger(vec a, vec b) { return choose(b > a, b, a); }

#define SELF(n, i) (i)
INLINE ints counted(void) { return (ints){OF_LANES(SELF, 1)}; } /* 0, 1, 2, … */

typedef struct {
  void *data; /* (batch, heads, tokens, dim); numbers of a head lie side by side */
  int64_t batch, head, token; /* strides, in numbers */
} View;

typedef struct {
  View q, k, v, out, dout, dq, dk, dv;
  const int64_t *query_ids, *key_ids; /* (B, T), (B, S) segments, or NULL */
  float *lse;  /* (B, H, T) */
  float *room; /* (threads, what `room` says) */
  int64_t batch, heads, kv_heads, queries, keys, dim, v_dim;
  int64_t offset, width; /* query i sees the keys offset - width < j - i <= offset */
  int64_t threads;
  float scale;
} Attention;

/* ---- products of words */

/* c (rows, vectors · LANES) = or += a (rows, k words) · b (k words, vectors · LANES). */
INLINE void tile(const int rows, const int vectors, float *c, int64_t c_row, const char *a,
                 int64_t a_row, const float *b, int64_t b_row, int64_t k, int adds, int half) {
  vec sum[8][4];
  EACH_OF(rows, i) EACH_OF(vectors, v)
    sum[i][v] = adds ? load(c, i * c_row + v * LANES, 0) : (vec){};
  for (int64_t n = 0; n < k; n++) {
    vec others[4];
    EACH_OF(vectors, v) others[v] = load(b, n * b_row + v * LANES, 0);
    EACH_OF(rows, i) {
      uint32_t word;
      memcpy(&word, a + i * a_row + 4 * n, 4);
      const words all = word - (words){};
      EACH_OF(vectors, v)
        if (half) sum[i][v] = pairs_added(sum[i][v], all, (words)others[v]);
        else sum[i][v] += (vec)all * others[v];
    }
  }
  EACH_OF(rows, i) EACH_OF(vectors, v) store(c, i * c_row + v * LANES, sum[i][v], 0);
}

INLINE void product_of(float *c, int64_t c_row, int64_t m, int64_t n, const void *a, int64_t a_row,
                       const float *b, int64_t b_row, int64_t k, int adds, int half) {
#define STRIP(rows, vectors) for (; i + rows <= m; i += rows) \
    tile(rows, vectors, c + i * c_row + j, c_row, (const char *)a + i * a_row, a_row, b + j, b_row, k, adds, half);
  for (int64_t j = 0, i; j < n;) {
    i = 0;
    if (n - j >= WIDE * LANES) { STRIP(4, WIDE) STRIP(1, WIDE) j += WIDE * LANES; }
    else if (n - j >= 2 * LANES) { STRIP(8, 2) STRIP(1, 2) j += 2 * LANES; }
    else { STRIP(8, 1) STRIP(1, 1) j += LANES; }
  }
#undef STRIP
}

static void product_of_halves(float *c, int64_t c_row, int64_t m, int64_t n, const void *a,
                              int64_t a_row, const float *b, int64_t b_row, int64_t k, int adds) {
  product_of(c, c_row, m, n, a, a_row, b, b_row, k, adds, 1);
}

static void product_of_floats(float *c, int64_t c_row, int64_t m, int64_t n, const void *a,
                              int64_t a_row, const float *b, int64_t b_row, int64_t k, int adds) {
  product_of(c, c_row, m, n, a, a_row, b, b_row, k, adds, 0);
}

/* c (m, n) = or += a · b, summed over k words; rows of a are a_row bytes apart, of the others so many
   words. n is of whole vectors. */
#define product(half, ...) ((half) ? product_of_halves(__VA_ARGS__) : product_of_floats(__VA_ARGS__))

/* ---- rows as operands: what is past their last is 0 */

typedef struct {
  const char *data;
  int64_t row, rows, dim; /* row: bytes from one to the next */
} Rows;

INLINE Rows rows_of(View x, int64_t b, int64_t head, int64_t first, int64_t n, int64_t dim, int half) {
  const int size = half ? 2 : 4;
  const char *data = (const char *)x.data + size * (b * x.batch + head * x.head + first * x.token);
  return (Rows){data, size * x.token, n, dim};
}

/* Words i … i + LANES - 1 of a row, each of numbers side by side. */
INLINE vec beside(Rows x, int64_t row, int64_t i, int half) {
  vec found = {};
  const int64_t left = x.dim / OF(half) - i;
  if (row >= x.rows) return found;
  if (left >= LANES) return load(x.data + row * x.row, i, 0);
  memcpy(&found, x.data + row * x.row + 4 * i, 4 * left);
  return found;
}

/* Numbers i … of `row` and, in bf16, of the one below it, each pair a word. */
INLINE vec below(Rows x, int64_t row, int64_t i, int half) {
  if (!half) return beside(x, row, i, 0);
  vec first = {}, second = {};
  const int64_t n = x.dim;
  const int full = i + LANES <= n;
  if (row < x.rows) first = get(x.data + row * x.row, i, n, 1, full);
  if (row + 1 < x.rows) second = get(x.data + (row + 1) * x.row, i, n, 1, full);
  return (vec)((words)first >> 16 | (words)second);
}

/* (dim words, n): lanes are rows; n is of whole vectors. */
INLINE void turn_beside(float *to, int64_t to_row, Rows x, int64_t n, int half) {
  for (int64_t i = 0; i < x.dim / OF(half); i += LANES)
    for (int64_t row = 0; row < n; row += LANES) {
      vec block[LANES];
      EACH_LANE(l) block[l] = beside(x, row + l, i, half);
      turn(block);
      EACH_LANE(l) store(to, (i + l) * to_row + row, block[l], 0);
    }
}

/* (dim, rows in words): what is summed over the rows. */
INLINE void turn_below(float *to, int64_t to_row, Rows x, int half) {
  for (int64_t i = 0; i < x.dim; i += LANES)
    for (int64_t row = 0; row * OF(half) < x.rows; row += LANES) {
      vec block[LANES];
      EACH_LANE(l) block[l] = below(x, (row + l) * OF(half), i, half);
      turn(block);
      EACH_LANE(l) store(to, (i + l) * to_row + row, block[l], 0);
    }
}

/* (n rows in words, dim): lanes are numbers of a row. */
INLINE void copy_below(float *to, int64_t to_row, Rows x, int64_t n, int half) {
  for (int64_t row = 0; row * OF(half) < n; row++)
    for (int64_t i = 0; i < x.dim; i += LANES)
      store(to, row * to_row + i, below(x, row * OF(half), i, half), 0);
}

/* x = from (dim, queries), turned back, each query's row times its factor. */
INLINE void turn_back(Rows x, const float *from, const float *factors, int half) {
  const int64_t n = x.dim;
  for (int64_t row = 0; row < x.rows; row += LANES)
    for (int64_t i = 0; i < n; i += LANES) {
      vec block[LANES];
      EACH_LANE(l) block[l] = load(from, (i + l) * QUERIES + row, 0);
      turn(block);
      for (int64_t l = 0; l < LANES && row + l < x.rows; l++)
        set((char *)x.data + (row + l) * x.row, i, n, block[l] * factors[row + l], half, i + LANES <= n);
    }
}

/* x = from (rows, dim) times the factor. */
INLINE void put_rows(Rows x, const float *from, int64_t from_row, float factor, int half) {
  const int64_t n = x.dim;
  for (int64_t row = 0; row < x.rows; row++)
    for (int64_t i = 0; i < n; i += LANES)
      set((char *)x.data + row * x.row, i, n, load(from, row * from_row + i, 0) * factor, half, i + LANES <= n);
}

/* ---- a block of queries and a block of keys */

typedef struct {
  int64_t first, n, lanes; /* queries; of whole vectors */
  int64_t ids[QUERIES];
} Block;

INLINE Block block_of(const Attention *a, int64_t b, int64_t first) {
  Block block = {.first = first, .n = a->queries - first};
  if (block.n > QUERIES) block.n = QUERIES;
  block.lanes = whole(block.n);
  for (int64_t i = 0; a->query_ids && i < QUERIES; i++)
    block.ids[i] = a->query_ids[b * a->queries + first + (i < block.n ? i : 0)];
  return block;
}

/* The keys that some query of the block sees, from the beginning of a block of keys. */
INLINE int64_t first_key(const Attention *a, const Block *block) {
  const int64_t first = block->first + a->offset + 1 - a->width;
  return first < 0 ? 0 : first / KEYS * KEYS;
}

INLINE int64_t last_key(const Attention *a, const Block *block) {
  const int64_t last = block->first + block->n + a->offset;
  return last < a->keys ? last : a->keys;
}

/* Whether there may be a query that no block of keys is for: its sums begin, and stay, at 0. */
INLINE int blind(const Attention *a, const Block *block) {
  return block->first + a->offset < 0 || a->keys == 0;
}

/* The first query, of a whole vector, that may see a key from `key` on. */
INLINE int64_t first_lane(const Attention *a, const Block *block, int64_t key) {
  const int64_t n = key - a->offset - block->first;
  return n < 0 ? 0 : n / LANES * LANES;
}

/* The scores (n, queries) of n keys from `key` on, scaled; -inf where a query does not see. */
INLINE void scores_of(const Attention *a, const Block *block, int64_t b, Rows k, int64_t key, int64_t n,
                      const float *q, float *scores, int half) {
  const int64_t lane = first_lane(a, block, key), lanes = block->lanes - lane;
  product(half, scores + lane, QUERIES, n, lanes, k.data + key * k.row, k.row, q + lane, QUERIES,
          a->dim / OF(half), 0);
  const int64_t first = block->first + a->offset, last = first + block->n - 1;
  const int hides = key + n - 1 > first || key <= last - a->width || a->query_ids != NULL;
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = lane; i < block->lanes; i += LANES) {
      vec score = load(scores, j * QUERIES + i, 0) * a->scale;
      if (hides) {
        const ints ahead = (int32_t)(key + j - first - i) - counted();
        ints hidden = (ahead > 0) | (ahead <= -(int32_t)a->width);
        if (a->query_ids) {
          const int64_t id = a->key_ids[b * a->keys + key + j];
          EACH_LANE(l) hidden[l] |= -(block->ids[i + l] != id);
        }
        score = choose(hidden, spread(-INFINITY), score);
      }
      store(scores, j * QUERIES + i, score, 0);
    }
}

/* Of a round's threads each has its own. */
typedef struct {
  float *q, *scores, *weights, *sums;     /* (D, T'), (S', T'), (S', T'), (Dv, T'): T', S' of a block */
  float *values, *keys;                   /* (Dv, S), (D, S) in words */
  float *dout, *q_rows, *dout_rows;       /* (Dv, T'), (T', D), (T', Dv) */
  float *dweights, *narrow, *dnarrow;     /* (S', T') */
  float *dq, *dk, *dv, *end;              /* (D, T'), (S, D), (S, Dv) */
} Room;

INLINE float *taken(float **room, int64_t rows, int64_t columns) {
  float *found = *room;
  *room += whole(rows) * whole(columns);
  return found;
}

INLINE Room room_in(const Attention *a, float *room, int backward) {
  Room r = {.q = taken(&room, a->dim, QUERIES)};
  r.scores = taken(&room, KEYS, QUERIES), r.weights = taken(&room, KEYS, QUERIES);
  if (!backward) {
    r.sums = taken(&room, a->v_dim, QUERIES), r.values = taken(&room, a->v_dim, a->keys);
  } else {
    r.keys = taken(&room, a->dim, a->keys), r.dout = taken(&room, a->v_dim, QUERIES);
    r.q_rows = taken(&room, QUERIES, a->dim), r.dout_rows = taken(&room, QUERIES, a->v_dim);
    r.dweights = taken(&room, KEYS, QUERIES), r.narrow = taken(&room, KEYS, QUERIES);
    r.dnarrow = taken(&room, KEYS, QUERIES), r.dq = taken(&room, a->dim, QUERIES);
    r.dk = taken(&room, a->keys, a->dim), r.dv = taken(&room, a->keys, a->v_dim);
  }
  r.end = room;
  return r;
}

/* Numbers that a thread needs. */
int64_t room(const Attention *a, int backward) {
  float any;
  return room_in(a, &any, backward).end - &any;
}

/* Two rows of numbers as one of words, or the one. */
INLINE void put_below(float *to, int64_t row, int64_t i, vec first, vec second, int half) {
  if (half) {
    const words low = __builtin_convertvector(narrowed(first), words);
    first = (vec)(low | __builtin_convertvector(narrowed(second), words) << 16);
  }
  store(to, row / OF(half) * QUERIES + i, first, 0);
}

/* ---- out, lse */

INLINE void forward_head(const Attention *a, Room r, int64_t unit, int half) {
  const int64_t b = unit / a->heads, head = unit % a->heads, group = head / (a->heads / a->kv_heads);
  const Rows k = rows_of(a->k, b, group, 0, a->keys, a->dim, half);
  const int64_t v_row = whole(a->keys);
  turn_below(r.values, v_row, rows_of(a->v, b, group, 0, a->keys, a->v_dim, half), half);
  for (int64_t i = 0; i < a->queries; i += QUERIES) {
    const Block block = block_of(a, b, i);
    const int64_t first = first_key(a, &block), last = last_key(a, &block);
    turn_beside(r.q, QUERIES, rows_of(a->q, b, head, i, block.n, a->dim, half), block.lanes, half);
    vec most[VECTORS], total[VECTORS];
    for (int v = 0; v < VECTORS; v++) most[v] = spread(-1e30f), total[v] = (vec){};
    if (blind(a, &block)) memset(r.sums, 0, 4 * whole(a->v_dim) * QUERIES);
    for (int64_t key = first; key < last; key += KEYS) {
      const int64_t n = last - key < KEYS ? last - key : KEYS, lane = first_lane(a, &block, key);
      scores_of(a, &block, b, k, key, n, r.q, r.scores, half);
      for (int64_t x = lane; x < block.lanes; x += LANES) {
        const float *scores = r.scores + x;
        const vec before = most[x / LANES];
        vec now = before;
        for (int64_t j = 0; j < n; j++) now = larger(now, load(scores, j * QUERIES, 0));
        const vec kept = exponential(before - now);
        vec sum = total[x / LANES] * kept;
        for (int64_t j = 0; j < n; j += OF(half)) {
          const vec one = exponential(load(scores, j * QUERIES, 0) - now);
          vec other = {};
          if (half && j + 1 < n) other = exponential(load(scores, (j + 1) * QUERIES, 0) - now);
          sum += one + other;
          put_below(r.weights, j, x, one, other, half);
        }
        for (int64_t d = 0; key > first && d < a->v_dim; d++)
          store(r.sums, d * QUERIES + x, load(r.sums, d * QUERIES + x, 0) * kept, 0);
        most[x / LANES] = now, total[x / LANES] = sum;
      }
      product(half, r.sums + lane, QUERIES, a->v_dim, block.lanes - lane, r.values + key / OF(half), 4 * v_row,
              r.weights + lane, QUERIES, (n + OF(half) - 1) / OF(half), key > first);
    }
    float factors[QUERIES];
    for (int64_t n = 0; n < block.n; n++) {
      const float sum = total[n / LANES][n % LANES];
      const int none = sum == 0;
      factors[n] = none ? 0 : 1 / sum;
      a->lse[unit * a->queries + i + n] = none ? 0 : most[n / LANES][n % LANES] + logf(sum);
    }
    turn_back(rows_of(a->out, b, head, i, block.n, a->v_dim, half), r.sums, factors, half);
  }
}

/* ---- dq, dk, dv */

INLINE void backward_block(const Attention *a, Room r, int64_t b, int64_t head, int64_t i, int half) {
  const int64_t group = head / (a->heads / a->kv_heads);
  const Rows k = rows_of(a->k, b, group, 0, a->keys, a->dim, half);
  const Rows v = rows_of(a->v, b, group, 0, a->keys, a->v_dim, half);
  const int64_t dim = whole(a->dim), v_dim = whole(a->v_dim), k_row = whole(a->keys);
  const Block block = block_of(a, b, i);
  const int64_t first = first_key(a, &block), last = last_key(a, &block);
  const Rows q = rows_of(a->q, b, head, i, block.n, a->dim, half);
  const Rows dout = rows_of(a->dout, b, head, i, block.n, a->v_dim, half);
  const Rows out = rows_of(a->out, b, head, i, block.n, a->v_dim, half);
  turn_beside(r.q, QUERIES, q, block.lanes, half);
  turn_beside(r.dout, QUERIES, dout, block.lanes, half);
  copy_below(r.q_rows, dim, q, block.lanes, half);
  copy_below(r.dout_rows, v_dim, dout, block.lanes, half);
  if (blind(a, &block)) memset(r.dq, 0, 4 * dim * QUERIES);
  float lse[QUERIES] = {}, delta[QUERIES] = {}, factors[QUERIES];
  for (int64_t j = 0; j < block.n; j++) {
    const int64_t n = a->v_dim;
    const void *x = out.data + j * out.row, *dx = dout.data + j * dout.row;
    vec sum = {};
    EACH(sum += GET(x, half) * GET(dx, half);)
    delta[j] = total(sum);
    lse[j] = a->lse[(b * a->heads + head) * a->queries + i + j];
    factors[j] = a->scale;
  }
  for (int64_t key = first; key < last; key += KEYS) {
    const int64_t n = last - key < KEYS ? last - key : KEYS, lane = first_lane(a, &block, key);
    const int64_t lanes = block.lanes - lane;
    scores_of(a, &block, b, k, key, n, r.q, r.scores, half);
    product(half, r.dweights + lane, QUERIES, n, lanes, v.data + key * v.row, v.row, r.dout + lane, QUERIES,
            a->v_dim / OF(half), 0);
    for (int64_t x = lane; x < block.lanes; x += LANES) {
      const vec log = load(lse, x, 0), mean = load(delta, x, 0);
      vec before = {};
      for (int64_t j = 0; j < n; j++) {
        const int64_t place = j * QUERIES + x;
        const vec weight = exponential(load(r.scores, place, 0) - log);
        const vec dscore = weight * (load(r.dweights, place, 0) - mean);
        store(r.narrow, place, weight, half);
        store(r.dnarrow, place, dscore, half);
        if (!half || j % 2) put_below(r.weights, j, x, half ? before : dscore, dscore, half);
        else if (j == n - 1) put_below(r.weights, j, x, dscore, (vec){}, half);
        before = dscore;
      }
    }
    const int64_t size = half ? 2 : 4, row = QUERIES * size, words = lanes / OF(half);
    const int64_t above = lane / OF(half);
    product(half, r.dv + key * v_dim, v_dim, n, v_dim, (char *)r.narrow + lane * size, row,
            r.dout_rows + above * v_dim, v_dim, words, 1);
    product(half, r.dk + key * dim, dim, n, dim, (char *)r.dnarrow + lane * size, row,
            r.q_rows + above * dim, dim, words, 1);
    product(half, r.dq + lane, QUERIES, a->dim, lanes, r.keys + key / OF(half), 4 * k_row, r.weights + lane,
            QUERIES, (n + OF(half) - 1) / OF(half), key > first);
  }
  turn_back(rows_of(a->dq, b, head, i, block.n, a->dim, half), r.dq, factors, half);
}

INLINE void backward_group(const Attention *a, Room r, int64_t unit, int half) {
  const int64_t b = unit / a->kv_heads, group = unit % a->kv_heads, heads = a->heads / a->kv_heads;
  const int64_t dim = whole(a->dim), v_dim = whole(a->v_dim);
  turn_below(r.keys, whole(a->keys), rows_of(a->k, b, group, 0, a->keys, a->dim, half), half);
  memset(r.dk, 0, 4 * a->keys * dim);
  memset(r.dv, 0, 4 * a->keys * v_dim);
  for (int64_t head = group * heads; head < (group + 1) * heads; head++)
    for (int64_t i = 0; i < a->queries; i += QUERIES) backward_block(a, r, b, head, i, half);
  put_rows(rows_of(a->dk, b, group, 0, a->keys, a->dim, half), r.dk, dim, a->scale, half);
  put_rows(rows_of(a->dv, b, group, 0, a->keys, a->v_dim, half), r.dv, v_dim, 1, half);
}

/* ---- what is called: a thread takes some heads, or, backward, key-value heads, side by side */

#define DEAL(units, backward, call)                                                                \
  const int64_t size = room(&a, backward), n_units = units;                                        \
  _Pragma("omp parallel for num_threads(a.threads) if (a.threads > 1)")                            \
  for (int64_t thread = 0; thread < a.threads; thread++) {                                    \
    const Room r = room_in(&a, a.room + thread * size, backward);                                  \
    const int64_t last = n_units * (thread + 1) / a.threads;                                       \
    for (int64_t unit = n_units * thread / a.threads; unit < last; unit++) call;                   \
  }

void attention(const Attention *given, int half) {
  const Attention a = *given;
  if (half) { DEAL(a.batch * a.heads, 0, forward_head(&a, r, unit, 1)) }
  else { DEAL(a.batch * a.heads, 0, forward_head(&a, r, unit, 0)) }
}

void attention_backward(const Attention *given, int half) {
  const Attention a = *given;
  if (half) { DEAL(a.batch * a.kv_heads, 1, backward_group(&a, r, unit, 1)) }
  else { DEAL(a.batch * a.kv_heads, 1, backward_group(&a, r, unit, 0)) }
}
