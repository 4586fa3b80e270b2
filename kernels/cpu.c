/* Norms, rotary position embedding, the activations of an MLP and cross-entropy on a CPU, each in
   one pass over memory: PyTorch has them there as several operations. `_cpu.py` calls it.

   Numbers are fp32 or bf16, all arithmetic is fp32. The same bits come out whatever the threads. */

#include "vectors.h"

/* Before a loop: its rounds are dealt out to threads, each with its own copy of the work `a`. */
#define TEAM _Pragma("omp parallel for num_threads(a.threads) if (a.threads > 1) firstprivate(a)")

#define RUN 1024 /* numbers that a thread takes at a time, or that are summed by themselves */

/* The numbers from x[i] on. */
INLINE void *part(const void *x, int64_t i, int half) { return (char *)x + i * (half ? 2 : 4); }

/* ---- h = x + residual, y = (h − mean(h)) / sqrt(mean((h − mean(h))²) + eps) * weight + bias, of rows
   of n numbers; of RMS norms the mean counts as 0 */

typedef struct {
  const void *x, *residual; /* the residual may be NULL: h is x, and not written */
  const float *weight, *bias; /* the bias may be NULL */
  void *y, *h;
  float *mean, *rstd; /* (rows,); mean NULL: an RMS norm */
  int64_t rows, n, threads;
  float eps;
} Norm;

INLINE void norm_rows(Norm a, int adds, int half, int h_half) {
  const int64_t n = a.n;
  TEAM for (int64_t row = 0; row < a.rows; row++) {
    const void *x = part(a.x, row * n, half);
    void *y = part(a.y, row * n, half);
    vec sum = {}, squares = {};
    float mean = 0;
    if (adds) {
      const void *residual = part(a.residual, row * n, h_half);
      void *h = part(a.h, row * n, h_half);
      EACH(SET(h, h_half, GET(x, half) + GET(residual, h_half));)
      x = h; /* as it was rounded: y is the norm of what the caller gets back */
    }
    if (a.mean) {
      EACH(sum += GET(x, h_half);)
      a.mean[row] = mean = total(sum) / (float)n;
    }
    EACH(
      vec v = GET(x, h_half) - mean;
      if (!full) v = choose(counted() < (int32_t)(n - i), v, (vec){});
      squares += v * v;
    )
    const float rstd = 1 / sqrtf(total(squares) / (float)n + a.eps);
    a.rstd[row] = rstd;
    if (a.bias) {
      EACH(SET(y, half, (GET(x, h_half) - mean) * rstd * GET(a.weight, 0) + GET(a.bias, 0));)
    } else {
      EACH(SET(y, half, (GET(x, h_half) - mean) * rstd * GET(a.weight, 0));)
    }
  }
}

void norm(const Norm *a, int half, int h_half) {
  if (!a->residual) half ? norm_rows(*a, 0, 1, 1) : norm_rows(*a, 0, 0, 0);
  else if (half == h_half) half ? norm_rows(*a, 1, 1, 1) : norm_rows(*a, 1, 0, 0);
  else norm_rows(*a, 1, 1, 0);
}

typedef struct {
  const void *dy, *dh, *h; /* dh may be NULL */
  const float *weight, *mean, *rstd;
  void *dx, *dx_half; /* in h's dtype, and in dy's where that is another */
  float *dweight, *dbias; /* (parts, n); the bias's may be NULL */
  int64_t rows, n, parts, threads;
} NormBackward;

INLINE void norm_backward_rows(NormBackward a, int adds, int half, int h_half) {
  const int64_t n = a.n;
  TEAM for (int64_t share = 0; share < a.parts; share++) {
    float *dweight = a.dweight + share * n, *dbias = a.dbias + share * n;
    const int64_t last = a.rows * (share + 1) / a.parts;
    for (int64_t row = a.rows * share / a.parts; row < last; row++) {
      const void *dy = part(a.dy, row * n, half), *h = part(a.h, row * n, h_half);
      const void *dh = part(a.dh, row * n, h_half);
      void *dx = part(a.dx, row * n, h_half), *dx_half = part(a.dx_half, row * n, half);
      const float rstd = a.rstd[row], mean = a.mean ? a.mean[row] : 0;
      vec sum = {}, slopes = {};
      EACH(
        const vec product = GET(dy, half) * ((GET(h, h_half) - mean) * rstd);
        SET(dweight, 0, GET(dweight, 0) + product);
        sum += product * GET(a.weight, 0);
      )
      if (a.dbias) { EACH(SET(dbias, 0, GET(dbias, 0) + GET(dy, half));) }
      if (a.mean) { EACH(slopes += GET(dy, half) * GET(a.weight, 0);) }
      const float along = rstd * total(sum) / (float)n, level = total(slopes) / (float)n;
      EACH(
        const vec slope = GET(dy, half) * GET(a.weight, 0) - level;
        vec value = rstd * (slope - (GET(h, h_half) - mean) * along);
        if (adds) value += GET(dh, h_half);
        SET(dx, h_half, value);
        if (half != h_half) SET(dx_half, half, value);
      )
    }
  }
}

void norm_backward(const NormBackward *a, int half, int h_half) {
  const int adds = a->dh != NULL;
  if (half != h_half) adds ? norm_backward_rows(*a, 1, 1, 0) : norm_backward_rows(*a, 0, 1, 0);
  else if (half) adds ? norm_backward_rows(*a, 1, 1, 1) : norm_backward_rows(*a, 0, 1, 1);
  else adds ? norm_backward_rows(*a, 1, 0, 0) : norm_backward_rows(*a, 0, 0, 0);
}

/* ---- y = (a cos θ − b sin θ, b cos θ + a sin θ), x = (a, b) the halves of a head, or of a head
   after its RMS norm: h = x / sqrt(mean(x²) + eps) · weight */

typedef struct {
  const void *x, *dy; /* dy: in the backward pass with norms */
  void *y;            /* or dx */
  const float *weight; /* or NULL: no norm */
  float *dweight;      /* (parts, 2 n) */
  int64_t heads, x_batch, x_head, x_token; /* strides, in numbers */
  int64_t dy_batch, dy_head, dy_token, y_batch, y_head, y_token;
} Heads;

typedef struct {
  Heads of[2]; /* q and k */
  const float *cos, *sin; /* (T, n), or a table of each row of the batch */
  int64_t batch, tokens, n, cos_batch, parts, threads; /* n: half a head */
  float direction, eps; /* direction −1: back again */
} Rotation;

INLINE float rstd_of_halves(const void *x, int64_t n, float eps, int half) {
  vec sum = {};
  EACH(
    const vec a = GET(x, half), b = GET(part(x, n, half), half);
    sum += a * a + b * b;
  )
  return 1 / sqrtf(total(sum) / (float)(2 * n) + eps);
}

INLINE void rotate_heads(Rotation a, int normed, int half) {
  const int64_t n = a.n;
  TEAM for (int64_t place = 0; place < a.batch * a.tokens; place++) {
    const int64_t row = place / a.tokens, token = place % a.tokens;
    const float *cos = a.cos + row * a.cos_batch + token * n;
    const float *sin = a.sin + row * a.cos_batch + token * n;
    for (int which = 0; which < 2; which++) {
      const Heads h = a.of[which];
      const void *x = part(h.x, row * h.x_batch + token * h.x_token, half);
      void *y = part(h.y, row * h.y_batch + token * h.y_token, half);
      for (int64_t head = 0; head < h.heads; head++) {
        const float rstd = normed ? rstd_of_halves(x, n, a.eps, half) : 1;
        EACH(
          vec first = GET(x, half), second = GET(part(x, n, half), half);
          if (normed) {
            first = first * rstd * GET(h.weight, 0);
            second = second * rstd * GET(h.weight + n, 0);
          }
          const vec c = GET(cos, 0), d = GET(sin, 0) * a.direction;
          SET(y, half, first * c - second * d);
          SET(part(y, n, half), half, second * c + first * d);
        )
        x = part(x, h.x_head, half), y = part(y, h.y_head, half);
      }
    }
  }
}

void rotate(const Rotation *a, int half) {
  if (a->of[0].weight) half ? rotate_heads(*a, 1, 1) : rotate_heads(*a, 1, 0);
  else half ? rotate_heads(*a, 0, 1) : rotate_heads(*a, 0, 0);
}

/* Of the rotation with norms. */
INLINE void rotate_heads_backward(Rotation a, int half) {
  const int64_t n = a.n, places = a.batch * a.tokens;
  TEAM for (int64_t share = 0; share < a.parts; share++) {
    const int64_t last = places * (share + 1) / a.parts;
    for (int64_t place = places * share / a.parts; place < last; place++) {
      const int64_t row = place / a.tokens, token = place % a.tokens;
      const float *cos = a.cos + row * a.cos_batch + token * n;
      const float *sin = a.sin + row * a.cos_batch + token * n;
      for (int which = 0; which < 2; which++) {
        const Heads h = a.of[which];
        float *dweight = h.dweight + share * 2 * n;
        const void *x = part(h.x, row * h.x_batch + token * h.x_token, half);
        const void *dy = part(h.dy, row * h.dy_batch + token * h.dy_token, half);
        void *dx = part(h.y, row * h.y_batch + token * h.y_token, half);
        for (int64_t head = 0; head < h.heads; head++) {
          const float rstd = rstd_of_halves(x, n, a.eps, half);
          vec sum = {};
          /* Their gradients are turned back twice: that is quicker than to keep them. */
          #define BACK                                                                             \
            const vec c = GET(cos, 0), d = GET(sin, 0);                                            \
            const vec dfirst = GET(dy, half), dsecond = GET(part(dy, n, half), half);              \
            const vec da = dfirst * c + dsecond * d, db = dsecond * c - dfirst * d;
          EACH(
            BACK
            const vec first = da * (GET(x, half) * rstd);
            const vec second = db * (GET(part(x, n, half), half) * rstd);
            SET(dweight, 0, GET(dweight, 0) + first);
            SET(dweight + n, 0, GET(dweight + n, 0) + second);
            sum += first * GET(h.weight, 0) + second * GET(h.weight + n, 0);
          )
          const float along = rstd * total(sum) / (float)(2 * n);
          EACH(
            BACK
            const vec first = GET(x, half), second = GET(part(x, n, half), half);
            SET(dx, half, rstd * (da * GET(h.weight, 0) - first * along));
            SET(part(dx, n, half), half, rstd * (db * GET(h.weight + n, 0) - second * along));
          )
          #undef BACK
          x = part(x, h.x_head, half), dy = part(dy, h.dy_head, half);
          dx = part(dx, h.y_head, half);
        }
      }
    }
  }
}

void rotate_backward(const Rotation *a, int half) {
  if (half) rotate_heads_backward(*a, 1);
  else rotate_heads_backward(*a, 0);
}

/* ---- y = act(gate) · up, number by number */

typedef struct {
  const void *gate, *up, *dy; /* up may be NULL: 1 */
  void *y, *dgate, *dup;
  int64_t count, threads;
} Hidden;

enum { RELU2_OUTPUT = IDENTITY + 1 }; /* the slope is to come from what relu² gave */

/* act'(x), and act(x) in y; not of GELU and TANH. */
INLINE vec slope(vec x, int64_t activation, vec *y) {
  vec s = spread(1.0f), rest, square;
  *y = x;
  switch (activation) {
    case RELU:
      *y = not_below(x, 0.0f);
      return choose(x <= 0.0f, spread(0.0f), s);
    case RELU2:
      x = not_below(x, 0.0f);
      *y = x * x;
      return 2.0f * x;
    case RELU2_OUTPUT:
      EACH_LANE(i) s[i] = 2.0f * sqrtf(x[i]);
      return s;
    case GELU_TANH:
      x = not_below(x, -10.0f);
      square = x * x;
      rest = exponential(-x * (1.59576912f + 0.07135482f * square));
      s = 1.0f / (1.0f + rest);
      *y = x * s;
      return s + *y * s * rest * (1.59576912f + 0.21406445f * square);
    case SILU:
      x = not_below(x, -87.0f);
      rest = exponential(-x);
      s = 1.0f / (1.0f + rest);
      *y = x * s;
      return s + *y * s * rest;
  }
  return s;
}

INLINE void hidden_runs(Hidden a, int64_t activation, int gated, int half) {
  TEAM for (int64_t first = 0; first < a.count; first += RUN) {
    const int64_t n = a.count - first < RUN ? a.count - first : RUN;
    const void *gate = part(a.gate, first, half), *up = part(a.up, first, half);
    void *y = part(a.y, first, half);
    EACH(
      vec value = activated(GET(gate, half), activation);
      if (gated) value *= GET(up, half);
      SET(y, half, value);
    )
  }
}

INLINE void hidden_backward_runs(Hidden a, int64_t activation, int gated, int half) {
  TEAM for (int64_t first = 0; first < a.count; first += RUN) {
    const int64_t n = a.count - first < RUN ? a.count - first : RUN;
    const void *gate = part(a.gate, first, half), *up = part(a.up, first, half);
    const void *dy = part(a.dy, first, half);
    void *dgate = part(a.dgate, first, half), *dup = part(a.dup, first, half);
    EACH(
      vec y, upstream = GET(dy, half);
      const vec s = slope(GET(gate, half), activation, &y);
      if (gated) {
        SET(dup, half, upstream * y);
        upstream *= GET(up, half);
      }
      SET(dgate, half, upstream * s);
    )
  }
}

/* Each activation compiled by itself. */
#define BY_ACTIVATION(run)                                                                         \
  switch (activation) {                                                                            \
    case RELU: BY_KIND(run, RELU) break;                                                           \
    case RELU2: BY_KIND(run, RELU2) break;                                                         \
    case RELU2_OUTPUT: BY_KIND(run, RELU2_OUTPUT) break;                                           \
    case GELU_TANH: BY_KIND(run, GELU_TANH) break;                                                 \
    case SILU: BY_KIND(run, SILU)                                                                  \
  }
#define BY_KIND(run, activation)                                                                   \
  if (a->up) half ? run(*a, activation, 1, 1) : run(*a, activation, 1, 0);                         \
  else half ? run(*a, activation, 0, 1) : run(*a, activation, 0, 0);

void hidden(const Hidden *a, int64_t activation, int half) { BY_ACTIVATION(hidden_runs) }

void hidden_backward(const Hidden *a, int64_t activation, int half) {
  BY_ACTIVATION(hidden_backward_runs)
}

/* ---- loss = log Σ exp(z) − z[target] of rows of n logits, z where they are capped, with what else
   is asked for, and its gradient: cross_entropy.py has the formulas, and why each is as it is */

typedef struct {
  const void *logits;
  const int64_t *targets; /* in [0, n), or ignore_index */
  const float *upstream;  /* (rows,), or NULL: 1 */
  void *dlogits;          /* contiguous, or the logits themselves; NULL: the losses alone */
  float *losses;          /* NULL: the gradient alone, by the statistics of before */
  float *statistics;      /* (rows, 2): max z, Σ exp(z − max z); NULL: nobody wants them */
  int64_t rows, n, logits_row, dlogits_row, ignore_index, threads;
  float label_smoothing, z_loss, softcap;
} Losses;

INLINE float largest(vec x) {
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

/* softcap · tanh(x / softcap), and its derivative. */
INLINE vec capped(vec x, float softcap, vec *slope) {
  const vec u = x * (1 / softcap), square = u * u;
  const vec e = exponential(-2.0f * choose(u < 0.0f, -u, u));
  const vec inverse = 1.0f / (1.0f + e), tanh = (1.0f - e) * inverse;
  /* Near 0 the difference 1 − e cancels: there the series. */
  vec series = -17.0f / 315.0f + square * (62.0f / 2835.0f);
  series = u * (1.0f + square * (-1.0f / 3.0f + square * (2.0f / 15.0f + square * series)));
  *slope = 4.0f * e * inverse * inverse;
  return softcap * choose(square < 0.0625f, series, choose(u < 0.0f, -tanh, tanh));
}

INLINE void loss_rows(Losses a, int caps, int half) {
  TEAM for (int64_t row = 0; row < a.rows; row++) {
    const void *logits = part(a.logits, row * a.logits_row, half);
    void *dlogits = a.dlogits ? part(a.dlogits, row * a.dlogits_row, half) : NULL;
    const int64_t target = a.targets[row];
    float most = -FLT_MAX;
    double sum = 0; /* of runs, which may all be small beside it */
    if (target == a.ignore_index) {
      if (a.losses) a.losses[row] = 0;
      if (a.statistics) a.statistics[2 * row] = a.statistics[2 * row + 1] = 0;
      if (dlogits) memset(dlogits, 0, a.n * (half ? 2 : 4));
      continue;
    }
    const int exists = target >= 0 && target < a.n; /* if not, all is NaN, as on a GPU */
    vec slope = spread(1.0f), chosen = spread(exists ? at(logits, target, half) : NAN);
    if (caps) chosen = capped(chosen, a.softcap, &slope);
    if (a.losses) {
      /* Logits are summed as differences from a number that is near them. */
      const float origin = chosen[0] > -INFINITY ? chosen[0] : 0;
      float below = 0;
      for (int64_t first = 0; first < a.n; first += RUN) {
        const int64_t n = a.n - first < RUN ? a.n - first : RUN;
        const void *x = part(logits, first, half);
        vec z[RUN / LANES], highest = spread(most), under = {}, share = {};
        EACH(
          vec value = GET(x, half), unused;
          if (caps) value = capped(value, a.softcap, &unused);
          if (a.label_smoothing && full) under += origin - value;
          if (!full) {
            for (int64_t j = 0; a.label_smoothing && j < n - i; j++) under[j] += origin - value[j];
            for (int64_t j = n - i; j < LANES; j++) value[j] = -INFINITY;
          }
          highest = choose(value > highest, value, highest);
          z[i / LANES] = value;
        )
        const float before = most;
        most = largest(highest);
        for (int64_t i = 0; i < n; i += LANES) share += exponential(z[i / LANES] - most);
        sum = sum * exp(before - most) + total(share);
        below += total(under);
      }
      const float log_sum = log(sum);
      float loss = (most - chosen[0]) + log_sum;
      if (a.label_smoothing) {
        const float of_all = (most - origin) + log_sum + below / (float)a.n;
        loss = (1 - a.label_smoothing) * loss + a.label_smoothing * of_all;
      }
      if (a.z_loss) loss += a.z_loss * (most + log_sum) * (most + log_sum);
      a.losses[row] = loss;
      if (a.statistics) a.statistics[2 * row] = most, a.statistics[2 * row + 1] = sum;
    } else {
      most = a.statistics[2 * row], sum = a.statistics[2 * row + 1];
    }
    if (!dlogits) continue;
    const float upstream = !exists ? NAN : a.upstream ? a.upstream[row] : 1;
    float of_exp = upstream / (float)sum;
    if (a.z_loss) of_exp *= 1 + 2 * a.z_loss * (most + logf((float)sum));
    const float of_each = a.label_smoothing * upstream / (float)a.n;
    float of_target = exponential(chosen - most)[0] * of_exp - of_each;
    of_target -= (1 - a.label_smoothing) * upstream;
    const int64_t n = a.n;
    EACH(
      vec z = GET(logits, half), s;
      if (caps) z = capped(z, a.softcap, &s);
      vec value = exponential(z - most) * of_exp - of_each;
      if (caps) value *= s;
      SET(dlogits, half, value);
    )
    if (exists) put(dlogits, target, of_target * slope[0], half);
  }
}

void losses(const Losses *a, int half) {
  if (a->softcap > 0) half ? loss_rows(*a, 1, 1) : loss_rows(*a, 1, 0);
  else half ? loss_rows(*a, 0, 1) : loss_rows(*a, 0, 0);
}
