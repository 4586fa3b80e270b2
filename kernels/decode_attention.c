/* Attention of each row's few newest tokens to its cache, on a CPU: `_decode_attention_cpu.py` calls
   it.

   Shapes: B rows, H query heads, G key-value heads, T new tokens, S and P positions of a row's own
   and of a shared cache, D head dimension. */

#include "decode_attention.h"

typedef struct {
  void *data; /* (B, H or G, T or S, D); a cache's positions lie side by side */
  int64_t row, head, token; /* strides, in numbers */
} View;

typedef struct {
  View q, out, k, v, k_prefix, v_prefix; /* of prefixes: (groups, G, P, D), or no data */
  const int64_t *lengths, *prefix_lengths; /* (B,), (groups,) */
  const int64_t *pages; /* (B,) where a row's keys and values are, or NULL: in order */
  int64_t rows, heads, kv_heads, tokens, capacity, prefix_capacity, dim;
  int64_t samples; /* rows of a group */
  int64_t threads;
  float scale;
} Decode;

INLINE void *head_of(View x, int64_t row, int64_t head, int half) {
  return (char *)x.data + (row * x.row + head * x.head) * (half ? 2 : 4);
}

INLINE int64_t within(int64_t n, int64_t least, int64_t most) {
  return n < least ? least : n > most ? most : n;
}

/* A row's query heads of one key-value head. */
INLINE void attend_row(const Decode *a, int64_t row, int64_t group, float *scores, int half) {
  const int64_t D = a->dim, each = a->heads / a->kv_heads, end = (group + 1) * each;
  const int64_t own = a->pages ? a->pages[row] : row, shared = row / a->samples;
  Segment segment[2] = {{0}, {head_of(a->k, own, group, half), head_of(a->v, own, group, half), 0}};
  if (a->k_prefix.data)
    segment[0] = (Segment){head_of(a->k_prefix, shared, group, half),
                           head_of(a->v_prefix, shared, group, half),
                           within(a->prefix_lengths[shared], 0, a->prefix_capacity)};
  for (int64_t t = 0; t < a->tokens; t++) {
    segment[1].n = within(a->lengths[row] - a->tokens + t + 1, 1, a->capacity);
    for (int64_t head = group * each; head < end; head += GROUP) {
      const int heads = end - head < GROUP ? end - head : GROUP;
      float q[GROUP * MOST_DIM], found[GROUP * MOST_DIM];
      for (int h = 0; h < heads; h++) {
        const void *from = head_of(a->q, row, head + h, half);
        for (int64_t d = 0; d < D; d++) q[h * D + d] = at(from, t * a->q.token + d, half);
      }
      attend_group(heads, q, segment, D, a->scale, scores, found, half);
      for (int h = 0; h < heads; h++) {
        void *to = head_of(a->out, row, head + h, half);
        if (half) narrow(found + h * D, D, (bf16 *)to + t * a->out.token);
        else memcpy((float *)to + t * a->out.token, found + h * D, D * sizeof *found);
      }
    }
  }
}

/* 1: no memory. */
int decode_attention(const Decode *a, int half) {
  const int64_t positions = round_up(a->capacity, LANES) + round_up(a->prefix_capacity, LANES);
  const int64_t units = a->rows * a->kv_heads, size = GROUP * positions;
  float *memory = malloc(a->threads * size * sizeof *memory);
  if (!memory) return 1;
#pragma omp parallel for num_threads(a->threads) if (a->threads > 1) schedule(static)
  for (int64_t thread = 0; thread < a->threads; thread++) {
    const int64_t last = units * (thread + 1) / a->threads;
    for (int64_t unit = units * thread / a->threads; unit < last; unit++) {
      const int64_t sample = unit % a->samples, head = unit / a->samples; /* who shares, in turn */
      const int64_t row = head / a->kv_heads * a->samples + sample;
      attend_row(a, row, head % a->kv_heads, memory + thread * size, half);
    }
  }
  free(memory);
  return 0;
}
