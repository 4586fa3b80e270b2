/* A GPT's forward pass on a CPU, for sampling: `decoder.py` compiles it for the machine at hand.

   Whatever a row gets, it gets by the same operations in the same order, bit for bit, whatever
   stands beside it, whatever the number of rows, of threads and of positions that there is room for:
   an output of a matrix product is one sum from the first to the last input (by AMX's tiles, of 32 at
   a time), and attention goes over the positions in blocks that are counted from the first.

   Shapes: M token rows (sequences × tokens), C width, H query heads, G key-value heads, D head
   width, S positions of a cache. Matrices are packed in panels of PANEL outputs, input by input; in
   bf16 two inputs at a time. */

#include "../kernels/decode_attention.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define STRIP 8 /* rows whose sums stay in registers: 8 × 2 vectors of 32 */
#else
#define STRIP 6 /* of 16 */
#endif
#define PANEL (2 * LANES)

/* In front of a loop: its rounds are dealt out to `team` threads. */
#define TEAM _Pragma("omp parallel for num_threads(team) if (team > 1) schedule(static)")

typedef struct {
  const void *weight; /* packed; fp32, or bf16 in pairs of inputs */
  const float *bias;
  int64_t in, out; /* in: of whole steps; what is past the model's own is zero */
} Matrix;

typedef struct {
  const float *norm, *norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *k_norm;
  Matrix qkv, o, gate, up, down;
  int64_t turned; /* whether its attention knows positions */
} Layer;

typedef struct {
  int64_t n_layer, n_head, n_kv_head, head_dim, width, inner, vocabulary, context, outputs;
  int64_t activation, gated, layer_norm, half; /* half: bf16 matrices and cache */
  const float *embedding, *positions, *cos, *sin, *norm, *norm_bias;
  float eps;
  const Layer *layers;
  Matrix head;
} Model;

typedef struct {
  int64_t sequences, tokens; /* of each */
  const int64_t *token;      /* (sequences, tokens) */
  const int64_t *row;        /* (sequences,) of the cache */
  const int64_t *length;     /* (rows,) positions that a row of the cache holds already */
  void *keys, *values;       /* (L, rows, G, capacity, D) */
  int64_t rows, capacity;
  const void *prefix_keys, *prefix_values; /* (L, groups, G, prefix_capacity, D), or NULL */
  int64_t groups, prefix_capacity, prefix_width;
  const int64_t *place, *prefix_length; /* (rows,), (groups,) */
  float *hidden; /* (sequences, tokens, C), before the final norm; NULL: keys and values alone */
  int64_t threads;
} Pass;

enum { STORE, ADD, ACTIVATE, MULTIPLY };

/* ---- matrix products */

/* Rows whose products with a panel are taken at once: two tiles of AMX, or STRIP of vectors. */
#if HAS_TILES
#define TALL 32
INLINE int with_tiles(int half) { return half && tiles_granted; }
#else
#define TALL STRIP
INLINE int with_tiles(int half) { (void)half; return 0; }
#endif

/* The sums of n rows of x, `stride` numbers apart, with a panel, over so many words of inputs: a
   word is a number, or two in bf16. Meanwhile what follows is asked for, `ahead`, so many bytes a
   word: a fraction of what is read here, as more than that would stand in its way. */
INLINE void sums_of(const int n, vec found[STRIP][2], const void *x, int64_t stride,
                    const void *panel, int64_t inputs, const char *ahead, int64_t bytes, int half) {
  vec acc[STRIP][2] = {};
  if (half) {
    const uint32_t *pairs = x, *w = panel;
    for (int64_t k = 0; k < inputs; k++) {
      words w0 = *(const words *)(w + k * PANEL), w1 = *(const words *)(w + k * PANEL + LANES);
      __builtin_prefetch(ahead + k * bytes, 0, 2);
      EACH_OF(STRIP, n) {
        const words pair = pairs[i * stride / 2 + k] - (words){};
        acc[i][0] = pairs_added(acc[i][0], pair, w0);
        acc[i][1] = pairs_added(acc[i][1], pair, w1);
      }
    }
  } else {
    const float *xs = x, *w = panel;
    for (int64_t k = 0; k < inputs; k++) {
      vec w0 = *(const vec *)(w + k * PANEL), w1 = *(const vec *)(w + k * PANEL + LANES);
      __builtin_prefetch(ahead + k * bytes, 0, 2);
      EACH_OF(STRIP, n) {
        float one = xs[i * stride + k];
        acc[i][0] += one * w0;
        acc[i][1] += one * w1;
      }
    }
  }
  EACH_OF(STRIP, n) found[i][0] = acc[i][0], found[i][1] = acc[i][1];
}

/* The same for any n up to STRIP, each compiled with its sums in registers. */
static void sums(int n, vec found[STRIP][2], const void *x, int64_t stride, const void *panel,
                 int64_t inputs, const char *ahead, int64_t bytes, int half) {
#define OF(n)                                                                     \
  case n:                                                                         \
    if (half) sums_of(n, found, x, stride, panel, inputs, ahead, bytes, 1);       \
    else sums_of(n, found, x, stride, panel, inputs, ahead, bytes, 0);            \
    break;
  switch (n) {
    OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
#if STRIP == 8
    OF(7) OF(8)
#endif
  }
#undef OF
}

/* Two vectors of sums become numbers of y, `end`, with `left` to the end of its row: what is behind
   that is not written. */
INLINE void finish(const Model *model, const Matrix *m, const vec found[2], int64_t column,
                   float *end, int64_t left, int epilogue) {
  for (int i = 0; i < 2; i++, column += LANES, end += LANES, left -= LANES) {
    vec *to = (vec *)end, sum = found[i];
    if (m->bias) sum += *(const vec *)(m->bias + column);
    if (left < LANES) { /* of logits, which are only stored */
      if (left > 0) memcpy(end, &sum, left * sizeof *end);
      continue;
    }
    if (epilogue == ADD) sum += *to;
    else if (epilogue == ACTIVATE) sum = activated(sum, model->activation);
    else if (epilogue == MULTIPLY) sum *= *to;
    *to = sum;
  }
}

/* y of x (rows, in): panels `first` to `last` of the matrix. Rows are `stride_x` and `stride_y`
   numbers apart. */
static void product(const Model *model, const Matrix *m, const void *x, int64_t stride_x,
                    int64_t rows, float *y, int64_t stride_y, int epilogue, int64_t first,
                    int64_t last) {
  const int half = model->half, tall = with_tiles(half) ? TALL : STRIP;
  const int64_t inputs = half ? m->in / 2 : m->in, size = inputs * 4 * PANEL;
  const int64_t strips = (rows + tall - 1) / tall;
  const int64_t bytes = (4 * PANEL + strips - 1) / strips;
  for (int64_t p = first; p < last; p++) {
    const char *panel = (const char *)m->weight + p * size;
    for (int64_t strip = 0; strip < strips; strip++) {
      const int64_t share = with_tiles(half) ? tall * strips : rows; /* about as many rows each */
      const int64_t row = share * strip / strips, end = share * (strip + 1) / strips;
      const int n = (end < rows ? end : rows) - row;
      const char *from = (const char *)x + row * stride_x * (half ? 2 : 4);
      vec found[TALL][2] __attribute__((aligned(64)));
      const char *ahead = panel + size + strip * inputs * bytes;
#if HAS_TILES
#define TILES(tall, ahead, bytes)                                                         \
  tiles_product(tall, 2, (float *)found, PANEL, from, 2 * stride_x, (const float *)panel, \
                PANEL, inputs, 0, ahead, bytes)
      if (with_tiles(half) && n > 16) TILES(2, ahead, bytes);
      else if (with_tiles(half)) TILES(1, NULL, 0); /* which asking ahead slows down */
      else
#endif
        sums(n, found, from, stride_x, panel, inputs, ahead, bytes, half);
      for (int r = 0; r < n; r++)
        finish(model, m, found[r], p * PANEL, y + (row + r) * stride_y + p * PANEL,
               stride_y - p * PANEL, epilogue);
    }
  }
#undef TILES
}

/* n numbers from the beginning of a line of the cache, or NULL. */
static float *cleared(int64_t n) {
  const int64_t size = round_up(n * sizeof(float), 64);
  float *found = aligned_alloc(64, size);
  return found ? memset(found, 0, size) : NULL;
}

/* All of a product, its columns dealt out to a team of threads. */
static void whole(const Model *model, const Matrix *m, const void *x, int64_t stride_x,
                  int64_t rows, float *y, int64_t stride_y, int epilogue, int team) {
  const int64_t panels = round_up(m->out, PANEL) / PANEL;
  TEAM for (int part = 0; part < team; part++) {
    if (model->half) take_tiles();
    product(model, m, x, stride_x, rows, y, stride_y, epilogue, panels * part / team,
            panels * (part + 1) / team);
    if (model->half) leave_tiles();
  }
}

/* ---- norms and rotary positions */

INLINE float sum_of_squares(const float *x, int64_t n, float mean) {
  vec sum = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec a = *(const vec *)(x + i) - mean;
    sum += a * a;
  }
  float all = total(sum);
  for (; i < n; i++) all += (x[i] - mean) * (x[i] - mean);
  return all;
}

/* y = the norm of x, n numbers; y as products read it. */
static void normed(const Model *model, const float *x, const float *weight, const float *bias,
                   int64_t n, int layer_norm, void *y, int half) {
  float mean = 0;
  if (layer_norm) {
    vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += *(const vec *)(x + i);
    mean = total(sum);
    for (; i < n; i++) mean += x[i];
    mean /= n;
  }
  const float scale = 1.0f / sqrtf(sum_of_squares(x, n, mean) / n + model->eps);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec a = (*(const vec *)(x + i) - mean) * scale * *(const vec *)(weight + i);
    if (bias) a += *(const vec *)(bias + i);
    if (half) *(halves *)((bf16 *)y + i) = narrowed(a);
    else *(vec *)((float *)y + i) = a;
  }
  for (; i < n; i++) put(y, i, (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0), half);
}

static void turn(float *restrict x, const float *restrict cos, const float *restrict sin,
                 int64_t half_dim) {
  for (int64_t i = 0; i < half_dim; i++) {
    float a = x[i], b = x[i + half_dim];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half_dim] = b * cos[i] + a * sin[i];
  }
}

/* ---- the model */

/* Where a token stands: the positions before it of the prefix that its row shares, and its own. */
typedef struct {
  int64_t row, group, shared, own;
} Place;

static Place place_of(const Pass *pass, int64_t sequence, int64_t t) {
  Place place = {.row = pass->row[sequence]};
  place.own = pass->length[place.row] + t;
  if (pass->prefix_keys) {
    place.group = pass->place[place.row] / pass->prefix_width;
    place.shared = pass->prefix_length[place.group];
  }
  return place;
}

/* A token's queries, keys and values (in y): normed and turned, the last two put into the cache. */
static void place_token(const Model *m, const Layer *layer, const Pass *pass, int64_t index,
                        Place place, float *y) {
  const int64_t D = m->head_dim, G = m->n_kv_head, H = m->n_head;
  const int64_t angle = (place.shared + place.own) * D / 2;
  for (int64_t head = 0; head < H + G; head++) {
    const float *weight = head < H ? layer->q_norm : layer->k_norm;
    float *x = y + head * D;
    if (weight) normed(m, x, weight, NULL, D, 0, x, 0);
    if (layer->turned) turn(x, m->cos + angle, m->sin + angle, D / 2);
  }
  for (int64_t g = 0; g < G; g++) {
    const float *key = y + (H + g) * D, *value = key + G * D;
    const int64_t at = ((index * pass->rows + place.row) * G + g) * pass->capacity + place.own;
    if (m->half) {
      narrow(key, D, (bf16 *)pass->keys + at * D);
      narrow(value, D, (bf16 *)pass->values + at * D);
    } else {
      memcpy((float *)pass->keys + at * D, key, D * sizeof *key);
      memcpy((float *)pass->values + at * D, value, D * sizeof *value);
    }
  }
}

/* A token's attention: y holds its queries, out (H · D) becomes what the output matrix reads. */
static void attend_token(const Model *m, const Pass *pass, int64_t index, Place place,
                         const float *y, float *scores, void *out) {
  const int64_t D = m->head_dim, G = m->n_kv_head, H = m->n_head, size = m->half ? 2 : 4;
  float found[GROUP * MOST_DIM];
  for (int64_t g = 0; g < G; g++) {
    const int64_t prefix = ((index * pass->groups + place.group) * G + g) * pass->prefix_capacity;
    const int64_t own = ((index * pass->rows + place.row) * G + g) * pass->capacity;
    const Segment segment[2] = {
        {(const char *)pass->prefix_keys + prefix * D * size,
         (const char *)pass->prefix_values + prefix * D * size, place.shared},
        {(const char *)pass->keys + own * D * size, (const char *)pass->values + own * D * size,
         place.own + 1}};
    const int64_t end = (g + 1) * (H / G);
    for (int64_t head = g * (H / G); head < end; head += GROUP) {
      const int heads = end - head < GROUP ? end - head : GROUP;
      attend_group(heads, y + head * D, segment, D, 1.0f / sqrtf(D), scores, found, m->half);
      if (m->half) narrow(found, heads * D, (bf16 *)out + head * D);
      else memcpy((float *)out + head * D, found, heads * D * sizeof *found);
    }
  }
}

/* Sequences first to last through all layers; `team` threads divide each product's columns. */
static int run(const Model *m, const Pass *pass, int64_t first, int64_t last, int team) {
  const int64_t T = pass->tokens, rows = (last - first) * T;
  const int64_t D = m->head_dim, heads = m->n_head * D, C = m->width;
  const int64_t stride_h = round_up(C, PANEL), stride_z = round_up(m->inner, PANEL);
  const int64_t stride_qkv = round_up(heads + 2 * m->n_kv_head * D, PANEL);
  const int64_t stride_y = stride_z > stride_qkv ? stride_z : stride_qkv;
  int64_t stride_x = round_up(heads, PANEL);
  if (stride_x < stride_h) stride_x = stride_h;
  if (stride_x < stride_z) stride_x = stride_z;
  const int half = m->half;
  int64_t positions = 0;
  for (int64_t s = first; s < last; s++) {
    const Place end = place_of(pass, s, T);
    const int64_t n = round_up(end.shared, LANES) + end.own;
    if (n > positions) positions = n;
  }
  positions = GROUP * round_up(positions, LANES); /* scores of a group of heads */
  const int64_t size_h = rows * stride_h, size_y = rows * stride_y;
  const int64_t size_x = round_up(rows, TALL) * stride_x; /* tiles read behind the last */
  float *memory = cleared(size_h + size_y + size_x + team * positions);
  if (!memory) return 1;
  float *h = memory, *y = h + size_h, *scores = y + size_y + size_x;
  void *x = y + size_y;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t s = first + row / T, t = row % T;
    memcpy(h + row * stride_h, m->embedding + pass->token[s * T + t] * C, C * sizeof *h);
    if (m->positions) {
      const Place place = place_of(pass, s, t);
      const float *at = m->positions + (place.shared + place.own) * C;
      for (int64_t i = 0; i < C; i++) h[row * stride_h + i] += at[i];
    }
  }
  for (int64_t index = 0; index < m->n_layer; index++) {
    const Layer *layer = m->layers + index;
    const int64_t size = half ? 2 : 4;
    TEAM for (int64_t row = 0; row < rows; row++)
      normed(m, h + row * stride_h, layer->norm, layer->norm_bias, C, m->layer_norm,
             (char *)x + row * stride_x * size, half);
    whole(m, &layer->qkv, x, stride_x, rows, y, stride_y, STORE, team);
    TEAM for (int64_t row = 0; row < rows; row++)
      place_token(m, layer, pass, index, place_of(pass, first + row / T, row % T),
                  y + row * stride_y);
    if (!pass->hidden && index == m->n_layer - 1) break;
    TEAM for (int part = 0; part < team; part++)
      for (int64_t row = rows * part / team; row < rows * (part + 1) / team; row++)
        attend_token(m, pass, index, place_of(pass, first + row / T, row % T), y + row * stride_y,
                     scores + part * positions, (char *)x + row * stride_x * size);
    whole(m, &layer->o, x, stride_x, rows, h, stride_h, ADD, team);
    TEAM for (int64_t row = 0; row < rows; row++)
      normed(m, h + row * stride_h, layer->mlp_norm, layer->mlp_norm_bias, C, m->layer_norm,
             (char *)x + row * stride_x * size, half);
    whole(m, m->gated ? &layer->gate : &layer->up, x, stride_x, rows, y, stride_y, ACTIVATE, team);
    if (m->gated) whole(m, &layer->up, x, stride_x, rows, y, stride_y, MULTIPLY, team);
    if (half)
      TEAM for (int64_t row = 0; row < rows; row++)
        narrow(y + row * stride_y, stride_z, (bf16 *)x + row * stride_x);
    whole(m, &layer->down, half ? x : y, half ? stride_x : stride_y, rows, h, stride_h, ADD, team);
  }
  for (int64_t row = 0; pass->hidden && row < rows; row++)
    memcpy(pass->hidden + (first * T + row) * C, h + row * stride_h, C * sizeof *h);
  free(memory);
  return 0;
}

/* What the model makes of new tokens, behind those that the cache holds; 1: no memory, 2: no room
   in the cache, or in the context, 3: a token that is none. */
int hidden(const Model *model, const Pass *pass) {
  for (int64_t s = 0; s < pass->sequences; s++) {
    const Place end = place_of(pass, s, pass->tokens);
    if (end.own > pass->capacity || end.shared + end.own > model->context) return 2;
    for (int64_t t = 0; t < pass->tokens; t++) {
      const int64_t token = pass->token[s * pass->tokens + t];
      if (token < 0 || token >= model->vocabulary) return 3;
    }
  }
  const int64_t n = pass->sequences;
  if (!n || !pass->tokens) return 0;
  const int64_t most = pass->tokens < 64 ? 64 / pass->tokens : 1;
  int64_t each = (n + pass->threads - 1) / pass->threads;
  if (each > most) each = most;
  int failed = 0;
  /* A thread takes its sequences through all layers, as many as the others, up to 64 rows. Where
     that is not a strip for each (by tiles, of matrices that no cache holds, not a tile), or leaves
     half of them without any, they divide each operation instead: outside of the region below, as a
     team within another is made anew every time. */
  const int fetched = with_tiles(model->half) && model->width * model->inner >= 1 << 19;
  if (each * pass->tokens < (fetched ? 16 : STRIP) || 2 * ((n + each - 1) / each) <= pass->threads) {
    each = n < most ? n : most;
    for (int64_t first = 0; first < n; first += each)
      failed |= run(model, pass, first, first + each < n ? first + each : n, pass->threads);
    return failed;
  }
#pragma omp parallel for num_threads(pass->threads) schedule(dynamic) reduction(| : failed)
  for (int64_t first = 0; first < n; first += each)
    failed |= run(model, pass, first, first + each < n ? first + each : n, 1);
  return failed;
}

/* y (rows, outputs) of x (rows, C), behind the final norm; 1: no memory. */
int logits(const Model *m, const float *x, int64_t rows, float *y, int64_t threads) {
  if (!rows) return 0;
  const int half = m->half;
  const int64_t C = m->width, size = half ? 2 : 4, stride = round_up(C, PANEL);
  char *memory = (char *)cleared(round_up(rows, TALL) * stride);
  if (!memory) return 1;
  for (int64_t row = 0; row < rows; row++)
    normed(m, x + row * C, m->norm, m->norm_bias, C, m->layer_norm, memory + row * stride * size,
           half);
  whole(m, &m->head, memory, stride, rows, y, m->outputs, STORE, threads);
  free(memory);
  return 0;
}

/* ---- one token a row: what `kernels/sample_tokens.py` defines */

/* u in [0, 1) of (seed, position): Philox 4x32-10. */
static double uniform(uint64_t seed, uint64_t position) {
  uint32_t x[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)x[0] * 0xD2511F53, b = (uint64_t)x[2] * 0xCD9E8D57;
    x[0] = (uint32_t)(b >> 32) ^ x[1] ^ key[0];
    x[1] = (uint32_t)b;
    x[2] = (uint32_t)(a >> 32) ^ x[3] ^ key[1];
    x[3] = (uint32_t)a;
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return (double)((uint64_t)x[0] << 21 | x[1] >> 11) * 0x1p-53;
}

enum { FEW = 64 }; /* of a row's logits, whose sum is taken at once */

static void sift(float *heap, int64_t i, int64_t n) { /* so that none is above its parent */
  const float x = heap[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && heap[child + 1] > heap[child]) child++;
    if (!(heap[child] > x)) break;
    heap[i] = heap[child];
  }
  heap[i] = x;
}

typedef struct {
  const float *logits; /* (rows, n) */
  int64_t rows, n;
  const float *temperature, *top_p, *min_p;
  const int64_t *top_k, *seed, *position; /* (rows,) each */
  int64_t *token;
  float *logprob;
  int64_t threads;
} Draws;

/* e^((x − best) / temperature) of n logits. */
static void weights(const float *x, int64_t n, float best, float temperature, float *weight) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    *(vec *)(weight + i) = exponential((*(const vec *)(x + i) - best) / temperature);
  vec rest = {};
  memcpy(&rest, x + i, (n - i) * sizeof *x);
  rest = exponential((rest - best) / temperature);
  memcpy(weight + i, &rest, (n - i) * sizeof *x);
}

/* The sum of n numbers, in fp64. */
static double sum_of(const float *x, int64_t n) {
  doubles sum = {};
  double all = 0;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    sum += __builtin_convertvector(*(const vec *)(x + i), doubles);
  for (int lane = 0; lane < LANES; lane++) all += sum[lane];
  for (; i < n; i++) all += x[i];
  return all;
}

/* The largest of n numbers; NaN where the first is. */
static float largest(const float *x, int64_t n) {
  vec most = spread(x[0]);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vec b = *(const vec *)(x + i);
    most = larger(most, b);
  }
  float best = most[0];
  for (int lane = 1; lane < LANES; lane++) best = most[lane] > best ? most[lane] : best;
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  return best;
}

/* Puts the largest of a heap of n behind the others, which stay one. */
static float take(float *heap, int64_t n) {
  const float x = heap[0];
  heap[0] = heap[n - 1];
  heap[n - 1] = x;
  sift(heap, 0, n - 1);
  return x;
}

static void make_heap(float *x, int64_t n) {
  for (int64_t i = n / 2; i-- > 0;) sift(x, i, n);
}

/* The least logit that top_k and top_p keep; room has n numbers. */
static float least_kept(const float *logits, const float *weight, int64_t n, int64_t top_k,
                        float top_p, float best, float temperature, float *room) {
  /* Only what may be kept goes into the heap. For top_k: of the blocks' largest, the k-th. For
     top_p: all that are lighter than this together have less than 1 − top_p of the mass. */
  float floor = -INFINITY;
  double light = 0, wanted = 0, mass = 0;
  if (top_k && top_k < n) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < n; i += FEW)
      room[blocks++] = largest(logits + i, n - i < FEW ? n - i : FEW);
    if (top_k <= blocks) {
      make_heap(room, blocks);
      for (int64_t k = 0; k < top_k; k++) floor = take(room, blocks - k);
    }
  } else {
    wanted = sum_of(weight, n);
    light = 0.5 * (1.0 - top_p) * wanted / n;
  }
  int64_t m = 0;
  for (int64_t i = 0; i < n; i += FEW) {
    const int64_t end = n - i < FEW ? n : i + FEW;
    if (largest(weight + i, end - i) < light || largest(logits + i, end - i) < floor) continue;
    for (int64_t j = i; j < end; j++) {
      room[m] = logits[j];
      m += (logits[j] >= floor) & (weight[j] >= light);
    }
  }
  make_heap(room, m);
  float least = -INFINITY;
  int64_t left = m; /* in the heap; what was taken out lies behind it, the best last */
  if (top_k && top_k < n)
    for (; left && left > m - top_k; left--) least = take(room, left);
  if (!(top_p < 1)) return least;
  for (int64_t i = 0; i < n && top_k && top_k < n; i++)
    if (logits[i] >= least) wanted += weight[i];
  wanted *= top_p;
  for (int64_t i = m; i-- > 0;) {
    if (i < left) take(room, left--);
    if (room[i] < least) return least;
    mass += exponential((spread(room[i]) - best) / temperature)[0];
    if (mass >= wanted) return room[i];
  }
  return least;
}

static void draw_row(const Draws *d, int64_t row, float *weight, float *room) {
  const float *logits = d->logits + row * d->n, temperature = d->temperature[row];
  const float best = largest(logits, d->n);
  int64_t token = 0;
  while (token < d->n - 1 && !(logits[token] == best)) token++;
  if (!(logits[token] == best)) token = 0; /* NaN */
  weights(logits, d->n, best, 1.0f, weight);
  const double all = sum_of(weight, d->n);
  if (temperature > 0) {
    if (temperature != 1) weights(logits, d->n, best, temperature, weight);
    float least = -INFINITY;
    if ((d->top_k[row] && d->top_k[row] < d->n) || d->top_p[row] < 1)
      least = least_kept(logits, weight, d->n, d->top_k[row], d->top_p[row], best, temperature,
                         room);
    double mass = 0, before = 0;
    for (int64_t i = 0; i < d->n; i++)
      weight[i] = logits[i] >= least && !(weight[i] < d->min_p[row]) ? weight[i] : 0;
    for (int64_t i = 0; i < d->n; i += FEW)
      mass += sum_of(weight + i, d->n - i < FEW ? d->n - i : FEW);
    mass *= uniform(d->seed[row], d->position[row]);
    for (int64_t i = 0; i < d->n; i += FEW) {
      const int64_t here = d->n - i < FEW ? d->n - i : FEW;
      const double after = before + sum_of(weight + i, here);
      if (after > mass) { /* it is one of these: the last where their own sum is rounded below */
        for (int64_t j = i; j < i + here && !(before > mass); before += weight[j++])
          if (weight[j] > 0) token = j;
        break;
      }
      before = after;
    }
  }
  d->token[row] = token;
  d->logprob[row] = logits[token] - best - (float)log(all);
}

/* 1: no memory. */
int draw(const Draws *d) {
  if (!d->rows) return 0;
  const int64_t threads = d->threads < d->rows ? d->threads : d->rows;
  float *memory = malloc(2 * d->n * threads * sizeof *memory);
  if (!memory) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    float *weight = memory + 2 * d->n * part;
    for (int64_t row = d->rows * part / threads; row < d->rows * (part + 1) / threads; row++)
      draw_row(d, row, weight, weight + d->n);
  }
  free(memory);
  return 0;
}

/* Outputs of a panel, and what inputs are a multiple of, for who lays matrices out. */
int64_t panel(void) { return PANEL; }
int64_t step(int half) { return with_tiles(half) ? 32 : 2; }
