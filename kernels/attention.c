/* Attention on a CPU, forward and backward: Dao 2023, "FlashAttention-2", where a vector's lanes
   are queries. `_attention_cpu.py` calls it.

   A block of queries meets the keys a block at a time, and what it computes of them stays in the
   cache; blocks out of its sight are not visited. Numbers are fp32 or bf16, scores, softmax and all
   sums fp32. The same bits come out whatever the threads.

   A word is one fp32 number, or two bf16 numbers that are summed together: of one row, side by
   side, or of two rows, one below the other. Scores and their gradients lie turned, keys × queries.

   Shapes: B batch, H query heads, G key-value heads, T queries, S keys, D, Dv head dimensions. */

#include "vectors.h"

#if defined(__AVX512F__)
#define QUERIES 32 /* of a block */
#define KEYS 64
#else
#define QUERIES 64
#define KEYS 32
#endif
#define VECTORS (QUERIES / LANES)
#define OF(half) ((half) ? 2 : 1) /* numbers in a word */
#if defined(__AVX512F__) || defined(__aarch64__)
#define TALL 4 /* rows, and vectors, of a tile of sums, which stays in registers: 4 × 4 of 32 */
#define WIDE 4
#else
#define TALL 6 /* 6 × 2 of 16: eight sums are as many as are under way, and ran half as fast */
#define WIDE 2
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

typedef struct {
  float *at; /* fp32 numbers, or words of two in bf16 */
  int64_t row; /* words from one row to the next */
} Sheet;

typedef struct {
  const char *data;
  int64_t row, rows, dim; /* row: bytes from one to the next */
} Rows;

/* n of the rows, from `first` on. */
INLINE Rows some(Rows x, int64_t first, int64_t n) {
  return (Rows){x.data + first * x.row, x.row, n, x.dim};
}

/* What lies from there on. */
INLINE Sheet from(Sheet x, int64_t row, int64_t column) {
  return (Sheet){x.at + row * x.row + column, x.row};
}

/* c (rows, vectors · LANES) = or += a (rows, k words) · b (k words, vectors · LANES). */
INLINE void tile(const int rows, const int vectors, Sheet c, const char *a, int64_t a_row, Sheet b,
                 int64_t k, int adds, int half) {
  vec sum[8][4];
  EACH_OF(rows, i) EACH_OF(vectors, v)
    sum[i][v] = adds ? load(c.at, i * c.row + v * LANES, 0) : (vec){};
  for (int64_t n = 0; n < k; n++) {
    vec others[4];
    EACH_OF(vectors, v) others[v] = load(b.at, n * b.row + v * LANES, 0);
    EACH_OF(rows, i) {
      uint32_t word;
      memcpy(&word, a + i * a_row + 4 * n, 4);
      const words all = word - (words){};
      EACH_OF(vectors, v)
        if (half) sum[i][v] = pairs_added(sum[i][v], all, (words)others[v]);
        else sum[i][v] += (vec)all * others[v];
    }
  }
  EACH_OF(rows, i) EACH_OF(vectors, v) store(c.at, i * c.row + v * LANES, sum[i][v], 0);
}

INLINE void product_of(Sheet c, int64_t n, Rows a, Sheet b, int64_t k, int adds, int half) {
#define STRIP(rows_, vectors)                                                        \
  for (; i + rows_ <= a.rows; i += rows_)                                            \
    tile(rows_, vectors, from(c, i, j), a.data + i * a.row, a.row, from(b, 0, j), k, \
         adds, half);
  for (int64_t j = 0, i; j < n;) {
    i = 0;
    if (n - j >= WIDE * LANES) { STRIP(TALL, WIDE) STRIP(2, WIDE) STRIP(1, WIDE) j += WIDE * LANES; }
    else if (n - j >= 2 * LANES) { STRIP(8, 2) STRIP(1, 2) j += 2 * LANES; }
    else { STRIP(8, 1) STRIP(1, 1) j += LANES; }
  }
#undef STRIP
}

static void product_of_halves(Sheet c, int64_t n, Rows a, Sheet b, int64_t k, int adds) {
#if HAS_TILES
  const int64_t rows = a.rows / 16 * 16, words = k / 16 * 16;
#define TILES(tall, wide)                                                                     \
  tiles_product(tall, wide, from(c, i, j).at, c.row, a.data + i * a.row, a.row,               \
                from(b, 0, j).at, b.row, words, adds, NULL, 0)
  if (tiles_granted && rows && words) {
    for (int64_t j = 0; j < n; j += 32)
      for (int64_t i = 0; i < rows; i += 32)
        if (i + 32 <= rows) { if (j + 32 <= n) TILES(2, 2); else TILES(2, 1); }
        else { if (j + 32 <= n) TILES(1, 2); else TILES(1, 1); }
    const Rows rest = {a.data + 4 * words, a.row, rows, 0};
    if (words < k) product_of(c, n, rest, from(b, words, 0), k - words, 1, 1);
    c = from(c, rows, 0), a = some(a, rows, a.rows - rows);
  }
#endif
  product_of(c, n, a, b, k, adds, 1);
#undef TILES
}

static void product_of_floats(Sheet c, int64_t n, Rows a, Sheet b, int64_t k, int adds) {
  product_of(c, n, a, b, k, adds, 0);
}

/* c (rows of a, n) = or += a · b, summed over k words; n is of whole vectors. */
INLINE void product(Sheet c, int64_t n, Rows a, Sheet b, int64_t k, int adds, int half) {
  if (half) product_of_halves(c, n, a, b, k, adds);
  else product_of_floats(c, n, a, b, k, adds);
}

/* ---- rows as operands: what is past their last is 0 */

INLINE Rows rows_of(View x, int64_t b, int64_t head, int64_t rows, int64_t dim, int half) {
  const int size = half ? 2 : 4;
  const char *data = (const char *)x.data + size * (b * x.batch + head * x.head);
  return (Rows){data, size * x.token, rows, dim};
}

/* Of a sheet of words. */
INLINE Rows words_in(Sheet x, int64_t rows) {
  return (Rows){(const char *)x.at, 4 * x.row, rows, 0};
}

/* Of a sheet of numbers, from the `first` of each row on; those in bf16 lie closer. */
INLINE Rows numbers_in(Sheet x, int64_t rows, int64_t first, int half) {
  const int size = half ? 2 : 4;
  return (Rows){(const char *)x.at + first * size, size * x.row, rows, 0};
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
INLINE void turn_beside(Sheet to, Rows x, int64_t n, int half) {
  for (int64_t i = 0; i < x.dim / OF(half); i += LANES)
    for (int64_t row = 0; row < n; row += LANES) {
      vec block[LANES];
      EACH_LANE(l) block[l] = beside(x, row + l, i, half);
      turn(block);
      EACH_LANE(l) store(to.at, (i + l) * to.row + row, block[l], 0);
    }
}

/* (dim, rows in words): what is summed over the rows. */
INLINE void turn_below(Sheet to, Rows x, int half) {
  for (int64_t i = 0; i < x.dim; i += LANES)
    for (int64_t row = 0; row * OF(half) < x.rows; row += LANES) {
      vec block[LANES];
      EACH_LANE(l) block[l] = below(x, (row + l) * OF(half), i, half);
      turn(block);
      EACH_LANE(l) store(to.at, (i + l) * to.row + row, block[l], 0);
    }
}

/* Of (blocks of keys, dim, KEYS in words), the block that begins at `key`. */
INLINE Sheet block_in(Sheet x, int64_t key, int64_t dim, int half) {
  return (Sheet){x.at + key / OF(half) * whole(dim), KEYS / OF(half)};
}

/* Each block of keys, turned, close together, so that its rows fit the cache side by side. */
INLINE void turn_blocks(Sheet to, Rows x, int half) {
  for (int64_t key = 0; key < x.rows; key += KEYS) {
    const int64_t n = x.rows - key < KEYS ? x.rows - key : KEYS;
    turn_below(block_in(to, key, x.dim, half), some(x, key, n), half);
  }
}

/* (n rows in words, dim): lanes are numbers of a row. */
INLINE void copy_below(Sheet to, Rows x, int64_t n, int half) {
  for (int64_t row = 0; row * OF(half) < n; row++)
    for (int64_t i = 0; i < x.dim; i += LANES)
      store(to.at, row * to.row + i, below(x, row * OF(half), i, half), 0);
}

/* Numbers i … of a row of x. */
INLINE void put_row(Rows x, int64_t row, int64_t i, vec value, int half) {
  set((char *)x.data + row * x.row, i, x.dim, value, half, i + LANES <= x.dim);
}

/* x = from (dim, rows), turned back, each row times its factor. */
INLINE void turn_back(Rows x, Sheet from, const float *factors, int half) {
  for (int64_t row = 0; row < x.rows; row += LANES)
    for (int64_t i = 0; i < x.dim; i += LANES) {
      vec block[LANES];
      EACH_LANE(l) block[l] = load(from.at, (i + l) * from.row + row, 0);
      turn(block);
      for (int64_t l = 0; l < LANES && row + l < x.rows; l++)
        put_row(x, row + l, i, block[l] * factors[row + l], half);
    }
}

/* x = from (rows, dim) times the factor. */
INLINE void put_rows(Rows x, Sheet from, float factor, int half) {
  for (int64_t row = 0; row < x.rows; row++)
    for (int64_t i = 0; i < x.dim; i += LANES)
      put_row(x, row, i, load(from.at, row * from.row + i, 0) * factor, half);
}

/* ---- a block of queries and a block of keys */

typedef struct {
  int64_t b, first, n, lanes; /* queries; of whole vectors */
  int64_t ids[QUERIES], least_id, largest_id;
} Block;

INLINE Block block_of(const Attention *a, int64_t b, int64_t first) {
  Block block = {.b = b, .first = first, .n = a->queries - first};
  if (block.n > QUERIES) block.n = QUERIES;
  block.lanes = whole(block.n);
  block.least_id = INT64_MAX, block.largest_id = INT64_MIN;
  for (int64_t i = 0; a->query_ids && i < QUERIES; i++) {
    const int64_t id = a->query_ids[b * a->queries + first + (i < block.n ? i : 0)];
    block.ids[i] = id;
    if (id < block.least_id) block.least_id = id;
    if (id > block.largest_id) block.largest_id = id;
  }
  return block;
}

/* Whether n keys from `key` on are all of segments that no query of the block is of. */
INLINE int apart(const Attention *a, const Block *block, int64_t key, int64_t n) {
  int64_t near = a->query_ids == NULL;
  for (int64_t j = 0; a->query_ids && j < n; j++) {
    const int64_t id = a->key_ids[block->b * a->keys + key + j];
    near |= id >= block->least_id && id <= block->largest_id;
  }
  return !near;
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
  return block->first + a->offset < 0 || a->keys == 0 || a->query_ids != NULL;
}

/* The first query, of a whole vector, that may see a key from `key` on. */
INLINE int64_t first_lane(const Attention *a, const Block *block, int64_t key) {
  const int64_t n = key - a->offset - block->first;
  return n < 0 ? 0 : n / LANES * LANES;
}

/* The scores (n, queries) of n keys from `key` on, -inf where a query does not see; what is
   returned they are yet to be multiplied by. */
INLINE float scores_of(const Attention *a, const Block *block, Rows k, int64_t key, int64_t n,
                      Sheet q, Sheet scores, int half) {
  const int64_t lane = first_lane(a, block, key);
  product(from(scores, 0, lane), block->lanes - lane, some(k, key, n), from(q, 0, lane),
          a->dim / OF(half), 0, half);
  const int64_t first = block->first + a->offset, last = first + block->n - 1;
  const int hides = key + n - 1 > first || key <= last - a->width || a->query_ids != NULL;
  if (!hides) return a->scale;
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = lane; i < block->lanes; i += LANES) {
      vec score = load(scores.at, j * QUERIES + i, 0) * a->scale;
      const ints ahead = (int32_t)(key + j - first - i) - counted();
      ints hidden = (ahead > 0) | (ahead <= -(int32_t)a->width);
      if (a->query_ids) {
        const int64_t id = a->key_ids[block->b * a->keys + key + j];
        EACH_LANE(l) hidden[l] |= -(block->ids[i + l] != id);
      }
      score = choose(hidden, spread(-INFINITY), score);
      store(scores.at, j * QUERIES + i, score, 0);
    }
  return 1;
}

/* What a thread works in; T', S': the queries and the keys of a block. */
typedef struct {
  Sheet q, scores, weights;            /* (D, T'), (S', T'), (S', T') */
  Sheet sums, values;                  /* (Dv, T'), (S / S', Dv, S') */
  Sheet dout, q_rows, dout_rows, keys; /* (Dv, T'), (T', D), (T', Dv), (S / S', D, S') */
  Sheet dweights, narrow, dnarrow;     /* (S', T') */
  Sheet dq, dk, dv;                    /* (D, T'), (S, D), (S, Dv) */
  float *end;
} Room;

INLINE Sheet taken(Room *room, int64_t rows, int64_t columns) {
  const Sheet found = {room->end, whole(columns)};
  room->end += whole(rows) * found.row;
  return found;
}

INLINE Room room_in(const Attention *a, float *from, int backward) {
  const int64_t keys = (a->keys + KEYS - 1) / KEYS * KEYS;
  Room r = {.end = from};
  r.q = taken(&r, a->dim, QUERIES);
  r.scores = taken(&r, KEYS, QUERIES);
  r.weights = taken(&r, KEYS, QUERIES);
  if (!backward) {
    r.sums = taken(&r, a->v_dim, QUERIES);
    r.values = taken(&r, a->v_dim, keys);
    return r;
  }
  r.dout = taken(&r, a->v_dim, QUERIES);
  r.q_rows = taken(&r, QUERIES, a->dim);
  r.dout_rows = taken(&r, QUERIES, a->v_dim);
  r.keys = taken(&r, a->dim, keys);
  r.dweights = taken(&r, KEYS, QUERIES);
  r.narrow = taken(&r, KEYS, QUERIES);
  r.dnarrow = taken(&r, KEYS, QUERIES);
  r.dq = taken(&r, a->dim, QUERIES);
  r.dk = taken(&r, a->keys, a->dim);
  r.dv = taken(&r, a->keys, a->v_dim);
  return r;
}

/* Its numbers. */
int64_t room(const Attention *a, int backward) {
  float any;
  return room_in(a, &any, backward).end - &any;
}

/* Two rows of numbers as one of words, or the first. */
INLINE void put_below(Sheet to, int64_t row, int64_t i, vec first, vec second, int half) {
  if (half) first = (vec)paired(first, second);
  store(to.at, row / OF(half) * to.row + i, first, 0);
}

/* ---- out, lse */

/* Of the lanes from `lane` on, n keys' scores, times `scale`, become weights; the sums so far are
   scaled to the new largest score, if there is one. */
INLINE void weigh(const Room *r, int64_t lane, int64_t n, float scale, int64_t v_dim, vec *most,
                  vec *total, int half) {
  const float *scores = r->scores.at + lane;
  vec now = *most, too = now; /* two, as each waits for the one before */
  for (int64_t j = 0; j < n; j += 2) {
    now = larger(now, load(scores, j * QUERIES, 0) * scale);
    if (j + 1 < n) too = larger(too, load(scores, (j + 1) * QUERIES, 0) * scale);
  }
  now = larger(now, too);
  const vec kept = exponential(*most - now);
  vec sum = *total * kept;
  for (int64_t j = 0; j < n; j += OF(half)) {
    const vec one = weight_of(load(scores, j * QUERIES, 0) * scale - now, half);
    vec other = {};
    if (half && j + 1 < n) other = weight_of(load(scores, (j + 1) * QUERIES, 0) * scale - now, 1);
    sum += one + other;
    put_below(r->weights, j, lane, one, other, half);
  }
  const ints same = now == *most;
  int32_t all = -1;
  EACH_LANE(l) all &= same[l];
  for (int64_t d = all ? v_dim : 0; d < v_dim; d++) {
    float *x = r->sums.at + d * QUERIES + lane;
    store(x, 0, load(x, 0, 0) * kept, 0);
  }
  *most = now, *total = sum;
}

INLINE void forward_block(const Attention *a, Room r, int64_t b, int64_t head, int64_t i,
                          int half) {
  const Rows k = rows_of(a->k, b, head / (a->heads / a->kv_heads), a->keys, a->dim, half);
  const Rows q = rows_of(a->q, b, head, a->queries, a->dim, half);
  const Rows out = rows_of(a->out, b, head, a->queries, a->v_dim, half);
  const Block block = block_of(a, b, i);
  const int64_t first = first_key(a, &block), last = last_key(a, &block);
  vec most[VECTORS], total[VECTORS];
  for (int v = 0; v < VECTORS; v++) most[v] = spread(-FLT_MAX), total[v] = (vec){};
  if (blind(a, &block)) memset(r.sums.at, 0, 4 * whole(a->v_dim) * QUERIES);
  turn_beside(r.q, some(q, i, block.n), block.lanes, half);
  for (int64_t key = first, adds = 0; key < last; key += KEYS) {
    const int64_t n = last - key < KEYS ? last - key : KEYS, lane = first_lane(a, &block, key);
    if (apart(a, &block, key, n)) continue;
    const float scale = scores_of(a, &block, k, key, n, r.q, r.scores, half);
    for (int64_t x = lane; x < block.lanes; x += LANES)
      weigh(&r, x, n, scale, adds ? a->v_dim : 0, &most[x / LANES], &total[x / LANES], half);
    const Rows values = words_in(block_in(r.values, key, a->v_dim, half), a->v_dim);
    product(from(r.sums, 0, lane), block.lanes - lane, values, from(r.weights, 0, lane),
            (n + OF(half) - 1) / OF(half), adds, half);
    adds = 1;
  }
  float factors[QUERIES], *lse = a->lse + (b * a->heads + head) * a->queries + i;
  for (int64_t n = 0; n < block.n; n++) {
    const float sum = total[n / LANES][n % LANES];
    factors[n] = sum == 0 ? 0 : 1 / sum;
    lse[n] = sum == 0 ? 0 : most[n / LANES][n % LANES] + logf(sum);
  }
  turn_back(some(out, i, block.n), r.sums, factors, half);
}

INLINE void forward_head(const Attention *a, Room r, int64_t unit, int half) {
  const int64_t b = unit / a->heads, head = unit % a->heads;
  const Rows v = rows_of(a->v, b, head / (a->heads / a->kv_heads), a->keys, a->v_dim, half);
  turn_blocks(r.values, v, half);
  for (int64_t i = 0; i < a->queries; i += QUERIES) forward_block(a, r, b, head, i, half);
}

/* ---- dq, dk, dv */

/* Of the lanes from `lane` on, n keys' weights and the gradients of their scores. */
INLINE void differ(const Room *r, int64_t lane, int64_t n, float scale, vec lse, vec delta,
                   int half) {
  vec before = {};
  for (int64_t j = 0; j < n; j++) {
    const int64_t place = j * QUERIES + lane;
    const vec weight = weight_of(load(r->scores.at, place, 0) * scale - lse, half);
    const vec dscore = weight * (load(r->dweights.at, place, 0) - delta);
    store(r->narrow.at, place, weight, half);
    store(r->dnarrow.at, place, dscore, half);
    if (!half || j % 2) put_below(r->weights, j, lane, half ? before : dscore, dscore, half);
    else if (j == n - 1) put_below(r->weights, j, lane, dscore, (vec){}, half);
    before = dscore;
  }
}

INLINE void backward_block(const Attention *a, Room r, int64_t b, int64_t head, int64_t i,
                           int half) {
  const int64_t group = head / (a->heads / a->kv_heads);
  const Rows k = rows_of(a->k, b, group, a->keys, a->dim, half);
  const Rows v = rows_of(a->v, b, group, a->keys, a->v_dim, half);
  const Block block = block_of(a, b, i);
  const Rows q = some(rows_of(a->q, b, head, a->queries, a->dim, half), i, block.n);
  const Rows out = some(rows_of(a->out, b, head, a->queries, a->v_dim, half), i, block.n);
  const Rows dout = some(rows_of(a->dout, b, head, a->queries, a->v_dim, half), i, block.n);
  const Rows dq = some(rows_of(a->dq, b, head, a->queries, a->dim, half), i, block.n);
  const int64_t first = first_key(a, &block), last = last_key(a, &block);
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
  if (blind(a, &block)) memset(r.dq.at, 0, 4 * whole(a->dim) * QUERIES);
  turn_beside(r.q, q, block.lanes, half);
  turn_beside(r.dout, dout, block.lanes, half);
  copy_below(r.q_rows, q, block.lanes, half);
  copy_below(r.dout_rows, dout, block.lanes, half);
  for (int64_t key = first, adds = 0; key < last; key += KEYS) {
    const int64_t n = last - key < KEYS ? last - key : KEYS, lane = first_lane(a, &block, key);
    if (apart(a, &block, key, n)) continue;
    const int64_t lanes = block.lanes - lane, words = lanes / OF(half), above = lane / OF(half);
    const float scale = scores_of(a, &block, k, key, n, r.q, r.scores, half);
    product(from(r.dweights, 0, lane), lanes, some(v, key, n), from(r.dout, 0, lane),
            a->v_dim / OF(half), 0, half);
    for (int64_t x = lane; x < block.lanes; x += LANES)
      differ(&r, x, n, scale, load(lse, x, 0), load(delta, x, 0), half);
    product(from(r.dv, key, 0), r.dv.row, numbers_in(r.narrow, n, lane, half),
            from(r.dout_rows, above, 0), words, 1, half);
    product(from(r.dk, key, 0), r.dk.row, numbers_in(r.dnarrow, n, lane, half),
            from(r.q_rows, above, 0), words, 1, half);
    const Rows keys = words_in(block_in(r.keys, key, a->dim, half), a->dim);
    product(from(r.dq, 0, lane), lanes, keys, from(r.weights, 0, lane),
            (n + OF(half) - 1) / OF(half), adds, half);
    adds = 1;
  }
  turn_back(dq, r.dq, factors, half);
}

INLINE void backward_group(const Attention *a, Room r, int64_t unit, int half) {
  const int64_t b = unit / a->kv_heads, group = unit % a->kv_heads, heads = a->heads / a->kv_heads;
  turn_blocks(r.keys, rows_of(a->k, b, group, a->keys, a->dim, half), half);
  memset(r.dk.at, 0, 4 * a->keys * r.dk.row);
  memset(r.dv.at, 0, 4 * a->keys * r.dv.row);
  for (int64_t head = group * heads; head < (group + 1) * heads; head++)
    for (int64_t i = 0; i < a->queries; i += QUERIES) backward_block(a, r, b, head, i, half);
  put_rows(rows_of(a->dk, b, group, a->keys, a->dim, half), r.dk, a->scale, half);
  put_rows(rows_of(a->dv, b, group, a->keys, a->v_dim, half), r.dv, 1, half);
}

/* ---- what is called: a thread takes some heads, or, backward, key-value heads, side by side */

#define DEAL(units, backward, call)                                                          \
  const int64_t size = room(&a, backward), n_units = units;                                  \
  _Pragma("omp parallel for num_threads(a.threads) if (a.threads > 1)")                      \
  for (int64_t thread = 0; thread < a.threads; thread++) {                                   \
    const Room r = room_in(&a, a.room + thread * size, backward);                            \
    const int64_t last = n_units * (thread + 1) / a.threads;                                 \
    if (half) take_tiles();                                                                  \
    for (int64_t unit = n_units * thread / a.threads; unit < last; unit++) call;             \
    if (half) leave_tiles();                                                                 \
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
