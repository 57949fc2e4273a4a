/* The cpu backend's kernels: selective scan, causal convolution, and one decode step of each.
 *
 * Lanes are channels, time is serial, the states stay in registers. Plain C with GCC vector extensions (GCC or Clang, any
 * architecture), compiled for one state size STATES by build.py; no runtime, no threads of its own: a kernel is a function
 * that takes units of work from a shared counter until none is left, and any number of threads may be running it.
 * A unit and its order of summation do not depend on the number of threads, so results do not either.
 * -ffast-math must stay off: it breaks the exponential.
 */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

#define STEPS 32 /* between two saved states: chunked.CHUNK */
#define GROUP 128 /* channels of one unit of work */
#define BLOCKS (GROUP / LANES)
#define LOG2E 1.44269504088896341f
#define LN2 0.693147180559945309f
/* states handled together, in registers; the rest of a padded state size is zeros */
#define TOGETHER (STATES < 8 ? STATES : 8)
#define PADDED ((STATES + TOGETHER - 1) / TOGETHER * TOGETHER)
#define MAX_TAPS 8

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* (batch, length, width) with strides in elements; the last axis is dense. Absent tensors have no data. */
typedef struct {
    char *data;
    int64_t batch_stride, row_stride;
    int64_t is_bf16;
} Tensor;

/* ---- lanes ---- */

INLINE vf splat(float v) { return (vf){} + v; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf absolute(vf v) { return (vf)((vi)v & 0x7fffffff); }

/* the sum of the lanes of each of `count` vectors */
INLINE void lane_sums(const vf *v, float *out, int count) {
    typedef float v4 __attribute__((vector_size(16)));
    float parts[count][4];
    for (int i = 0; i < count; i++) {
        v4 quarters[LANES / 4], total = {};
        memcpy(quarters, &v[i], sizeof v[i]);
        for (int j = 0; j < LANES / 4; j++) total += quarters[j];
        memcpy(parts[i], &total, sizeof total);
    }
    for (int i = 0; i < count; i++) out[i] = (parts[i][0] + parts[i][1]) + (parts[i][2] + parts[i][3]);
}

INLINE vf widen(vh bits) { return (vf)(__builtin_convertvector(bits, vu) << 16); }

INLINE vh narrow(vf v) { /* to nearest, ties to even; NaN stays NaN */
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
}

/* `count` lanes, at most LANES; the others read zero and are not written */
INLINE vf load(const char *data, int64_t index, int is_bf16, int count) {
    if (is_bf16) {
        vh bits = {};
        if (count == LANES) memcpy(&bits, data + index * 2, sizeof bits);
        else memcpy(&bits, data + index * 2, (size_t)count * 2);
        return widen(bits);
    }
    vf v = {};
    if (count == LANES) memcpy(&v, data + index * 4, sizeof v);
    else memcpy(&v, data + index * 4, (size_t)count * 4);
    return v;
}

INLINE void store(char *data, int64_t index, int is_bf16, int count, vf v) {
    if (is_bf16) {
        vh bits = narrow(v);
        if (count == LANES) memcpy(data + index * 2, &bits, sizeof bits);
        else memcpy(data + index * 2, &bits, (size_t)count * 2);
    } else if (count == LANES) memcpy(data + index * 4, &v, sizeof v);
    else memcpy(data + index * 4, &v, (size_t)count * 4);
}

INLINE vf load_f32(const float *data, int count) { return load((const char *)data, 0, 0, count); }
INLINE void store_f32(float *data, int count, vf v) { store((char *)data, 0, 0, count, v); }

/* ---- functions: polynomials fitted for relative error, 8.2e-8 (2^x) and 4.5e-9 (log1p) ---- */

INLINE vf exp2_lanes(vf x) {
#ifdef __AVX512DQ__
    vf f = (vf)_mm512_reduce_ps((__m512)x, 1); /* x - floor(x) */
    vf p = splat(0x1.e97502p-10f);
    p = p * f + 0x1.277852p-7f;
    p = p * f + 0x1.c91ce6p-5f;
    p = p * f + 0x1.ebdb56p-3f;
    p = p * f + 0x1.62e4bap-1f;
    p = p * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x); /* p 2^floor(x); underflows and overflows as it should */
#else
    const vf low = splat(-126.0f), high = splat(127.0f), magic = splat(0x1.8p23f);
    x = pick(x < low, low, x);
    x = pick(x > high, high, x);
    vf shifted = x + magic; /* the integer part, in the low bits */
    vf f = x - (shifted - magic);
    vf p = splat(0x1.5bba0ep-10f);
    p = p * f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

/* softplus(x) = max(x, 0) + log1p(exp(-|x|)), and its derivative sigmoid(x) */
INLINE vf softplus(vf x, vf *slope) {
    vf w = exp2_lanes(absolute(x) * -LOG2E);
    vf s = w / (w + 2.0f), q = s * s; /* log1p(w) = 2 atanh(w / (2 + w)) */
    vf p = splat(0.14005997f);
    p = p * q + 0.14000902f;
    p = p * q + 0.20010764f;
    p = p * q + 0.33333208f;
    p = p * q + 1.0f;
    vi positive = x > 0.0f;
    *slope = pick(positive, splat(1.0f), w) / (w + 1.0f);
    return pick(positive, x, (vf){} * x) + 2.0f * s * p; /* 0 x keeps a NaN */
}

INLINE vf sigmoid(vf x) {
    vf w = exp2_lanes(absolute(x) * -LOG2E);
    return pick(x > 0.0f, splat(1.0f), w) / (w + 1.0f);
}

/* ---- selective scan ---- */

typedef struct {
    int64_t next; /* the shared counter: the next unit to take */
    int64_t batch, length, width, chunks, softplus;
    Tensor x, dt, z, B, C, y;
    const float *A;              /* (STATES, width), times log2(e) */
    const float *D, *bias;       /* (width) or NULL */
    const float *initial;        /* (batch, STATES, width) or NULL */
    const uint8_t *starts;       /* (batch, length) or NULL: a document starts here */
    float *final;                /* (batch, STATES, width) */
    float *saved;                /* (batch, chunks, STATES, width): the states before each chunk, or NULL */
    /* backward only */
    Tensor grad_y, grad_x, grad_dt, grad_z;
    const float *grad_final;     /* (batch, STATES, width) or NULL */
    float *grad_initial;         /* (batch, STATES, width) */
    float *grad_A;               /* (batch, STATES, width) */
    float *grad_D, *grad_bias;   /* (batch, width) */
    float *grad_B, *grad_C;      /* (groups, batch, length, STATES) */
} Scan;

INLINE int at_most(int64_t value, int limit) { return value < limit ? (int)value : limit; }

/* B and C of one chunk as fp32, padded with zeros: (STEPS, PADDED) */
static void load_rows(float out[][PADDED], const Tensor *t, int64_t b, int64_t t0, int steps) {
    for (int t_ = 0; t_ < steps; t_++) {
        int64_t at = b * t->batch_stride + (t0 + t_) * t->row_stride;
        for (int n = 0; n < PADDED; n++) {
            float v = 0;
            if (n < STATES) {
                if (t->is_bf16) {
                    uint32_t bits = (uint32_t)((const uint16_t *)t->data)[at + n] << 16;
                    memcpy(&v, &bits, 4);
                } else v = ((const float *)t->data)[at + n];
            }
            out[t_][n] = v;
        }
    }
}

/* also asks for the same rows of the next block, which are too far apart for the hardware to foresee */
INLINE void load_tile(vf *out, const Tensor *t, int64_t at, int steps, int count) {
    if (t->is_bf16)
        for (int i = 0; i < steps; i++, at += t->row_stride) {
            out[i] = load(t->data, at, 1, count);
            __builtin_prefetch(t->data + (at + LANES) * 2);
        }
    else
        for (int i = 0; i < steps; i++, at += t->row_stride) {
            out[i] = load(t->data, at, 0, count);
            __builtin_prefetch(t->data + (at + LANES) * 4);
        }
}

INLINE void store_tile(const Tensor *t, int64_t at, int steps, int count, const vf *in) {
    if (t->is_bf16)
        for (int i = 0; i < steps; i++) store(t->data, at + i * t->row_stride, 1, count, in[i]);
    else
        for (int i = 0; i < steps; i++) store(t->data, at + i * t->row_stride, 0, count, in[i]);
}

INLINE void load_states(vf *out, const float *in, int64_t width, int count) {
    for (int n = 0; n < PADDED; n++) out[n] = n < STATES ? load_f32(in + n * width, count) : (vf){};
}

INLINE void store_states(float *out, int64_t width, int count, const vf *in) {
    for (int n = 0; n < STATES; n++) store_f32(out + n * width, count, in[n]);
}

static void scan_forward_unit(Scan *s, int64_t b, int64_t e0) {
    const int64_t width = s->width, end = e0 + GROUP < width ? e0 + GROUP : width;
    float rows_B[STEPS][PADDED], rows_C[STEPS][PADDED];
    vf state[BLOCKS][PADDED], rates[BLOCKS][PADDED];
    vf delta[STEPS], u[STEPS], x[STEPS], y[STEPS], slope;
    for (int64_t e = e0, k = 0; e < end; e += LANES, k++) {
        int count = at_most(end - e, LANES);
        load_states(rates[k], s->A + e, width, count);
        if (s->initial) load_states(state[k], s->initial + b * STATES * width + e, width, count);
        else memset(state[k], 0, sizeof state[k]);
    }
    for (int64_t chunk = 0; chunk * STEPS < s->length; chunk++) {
        const int64_t t0 = chunk * STEPS;
        const int steps = at_most(s->length - t0, STEPS);
        const uint8_t *starts = s->starts ? s->starts + b * s->length + t0 : NULL;
        load_rows(rows_B, &s->B, b, t0, steps);
        load_rows(rows_C, &s->C, b, t0, steps);
        for (int64_t e = e0, k = 0; e < end; e += LANES, k++) {
            const int count = at_most(end - e, LANES);
            if (s->saved) store_states(s->saved + (b * s->chunks + chunk) * STATES * width + e, width, count, state[k]);
            load_tile(delta, &s->dt, b * s->dt.batch_stride + t0 * s->dt.row_stride + e, steps, count);
            load_tile(x, &s->x, b * s->x.batch_stride + t0 * s->x.row_stride + e, steps, count);
            const vf bias = s->bias ? load_f32(s->bias + e, count) : (vf){};
            const vf skip = s->D ? load_f32(s->D + e, count) : (vf){};
            for (int t = 0; t < steps; t++) {
                delta[t] += bias;
                if (s->softplus) delta[t] = softplus(delta[t], &slope);
                u[t] = delta[t] * x[t];
                y[t] = skip * x[t];
            }
            for (int n0 = 0; n0 < PADDED; n0 += TOGETHER) {
                vf h[TOGETHER], rate[TOGETHER];
                UNROLL for (int n = 0; n < TOGETHER; n++) h[n] = state[k][n0 + n], rate[n] = rates[k][n0 + n];
                for (int t = 0; t < steps; t++) {
                    if (starts && starts[t]) UNROLL for (int n = 0; n < TOGETHER; n++) h[n] = (vf){};
                    vf out = y[t];
                    UNROLL for (int n = 0; n < TOGETHER; n++) {
                        h[n] = exp2_lanes(delta[t] * rate[n]) * h[n] + u[t] * rows_B[t][n0 + n];
                        out += h[n] * rows_C[t][n0 + n];
                    }
                    y[t] = out;
                }
                UNROLL for (int n = 0; n < TOGETHER; n++) state[k][n0 + n] = h[n];
            }
            if (s->z.data) {
                vf *z = u; /* no longer needed */
                load_tile(z, &s->z, b * s->z.batch_stride + t0 * s->z.row_stride + e, steps, count);
                for (int t = 0; t < steps; t++) y[t] *= z[t] * sigmoid(z[t]);
            }
            store_tile(&s->y, b * s->y.batch_stride + t0 * s->y.row_stride + e, steps, count, y);
        }
    }
    for (int64_t e = e0, k = 0; e < end; e += LANES, k++)
        store_states(s->final + b * STATES * width + e, width, at_most(end - e, LANES), state[k]);
}

/* With g_t the gradient of h_t, carried from t + 1 as exp(Δ A) g:
 *   dC_t = Σ_e dy_t h_t,  dB_t = Σ_e g_t Δ_t x_t,  d(Δx)_t = Σ_n g_t B_t,  d(ΔA)_t = g_t exp(Δ_t A) h_{t-1} */
static void scan_backward_unit(Scan *s, int64_t b, int64_t e0, int64_t group) {
    const int64_t width = s->width, end = e0 + GROUP < width ? e0 + GROUP : width;
    float rows_B[STEPS][PADDED], rows_C[STEPS][PADDED];
    vf sum_B[STEPS][PADDED], sum_C[STEPS][PADDED]; /* over the blocks, still one number per lane */
    vf rates[BLOCKS][PADDED], carries[BLOCKS][PADDED], sum_A[BLOCKS][PADDED], sum_D[BLOCKS], sum_bias[BLOCKS];
    vf before[STEPS][TOGETHER], decay[STEPS][TOGETHER];
    vf delta[STEPS], slope[STEPS], x[STEPS], u[STEPS], y[STEPS], z[STEPS], grad_y[STEPS], grad_u[STEPS], grad_delta[STEPS];
    memset(sum_A, 0, sizeof sum_A), memset(sum_D, 0, sizeof sum_D), memset(sum_bias, 0, sizeof sum_bias);
    for (int64_t e = e0, k = 0; e < end; e += LANES, k++) {
        int count = at_most(end - e, LANES);
        load_states(rates[k], s->A + e, width, count);
        if (s->grad_final) load_states(carries[k], s->grad_final + b * STATES * width + e, width, count);
        else memset(carries[k], 0, sizeof carries[k]);
    }
    for (int64_t chunk = s->chunks - 1; chunk >= 0; chunk--) {
        const int64_t t0 = chunk * STEPS;
        const int steps = at_most(s->length - t0, STEPS);
        const uint8_t *starts = s->starts ? s->starts + b * s->length + t0 : NULL;
        load_rows(rows_B, &s->B, b, t0, steps);
        load_rows(rows_C, &s->C, b, t0, steps);
        memset(sum_B, 0, sizeof sum_B), memset(sum_C, 0, sizeof sum_C);
        for (int64_t e = e0, k = 0; e < end; e += LANES, k++) {
            const int count = at_most(end - e, LANES);
            const float *saved = s->saved + (b * s->chunks + chunk) * STATES * width + e;
            load_tile(delta, &s->dt, b * s->dt.batch_stride + t0 * s->dt.row_stride + e, steps, count);
            load_tile(x, &s->x, b * s->x.batch_stride + t0 * s->x.row_stride + e, steps, count);
            if (s->grad_y.data)
                load_tile(grad_y, &s->grad_y, b * s->grad_y.batch_stride + t0 * s->grad_y.row_stride + e, steps, count);
            else memset(grad_y, 0, sizeof grad_y);
            const vf bias = s->bias ? load_f32(s->bias + e, count) : (vf){};
            const vf skip = s->D ? load_f32(s->D + e, count) : (vf){};
            for (int t = 0; t < steps; t++) {
                delta[t] += bias;
                slope[t] = splat(1.0f);
                if (s->softplus) delta[t] = softplus(delta[t], &slope[t]);
                u[t] = delta[t] * x[t];
                y[t] = skip * x[t];
                grad_u[t] = grad_delta[t] = (vf){};
            }
            if (s->z.data) { /* from here grad_y is that of the ungated output; z keeps dz / y */
                load_tile(z, &s->z, b * s->z.batch_stride + t0 * s->z.row_stride + e, steps, count);
                for (int t = 0; t < steps; t++) {
                    vf sig = sigmoid(z[t]), gate = z[t] * sig;
                    z[t] = grad_y[t] * (sig + gate * (1.0f - sig));
                    grad_y[t] *= gate;
                }
            }
            for (int n0 = 0; n0 < PADDED; n0 += TOGETHER) {
                vf h[TOGETHER], rate[TOGETHER];
                UNROLL for (int n = 0; n < TOGETHER; n++) {
                    h[n] = n0 + n < STATES ? load_f32(saved + (n0 + n) * width, count) : (vf){};
                    rate[n] = rates[k][n0 + n];
                }
                for (int t = 0; t < steps; t++) {
                    if (starts && starts[t]) UNROLL for (int n = 0; n < TOGETHER; n++) h[n] = (vf){};
                    vf out = y[t];
                    UNROLL for (int n = 0; n < TOGETHER; n++) {
                        vf a = exp2_lanes(delta[t] * rate[n]);
                        before[t][n] = h[n];
                        decay[t][n] = a;
                        h[n] = a * h[n] + u[t] * rows_B[t][n0 + n];
                        sum_C[t][n0 + n] += h[n] * grad_y[t];
                        out += h[n] * rows_C[t][n0 + n];
                    }
                    y[t] = out;
                }
                vf carry[TOGETHER], grad_rate[TOGETHER];
                UNROLL for (int n = 0; n < TOGETHER; n++) carry[n] = carries[k][n0 + n], grad_rate[n] = (vf){};
                for (int t = steps - 1; t >= 0; t--) {
                    vf du = grad_u[t], dd = grad_delta[t];
                    UNROLL for (int n = 0; n < TOGETHER; n++) {
                        vf g = carry[n] + grad_y[t] * rows_C[t][n0 + n];
                        sum_B[t][n0 + n] += g * u[t];
                        du += g * rows_B[t][n0 + n];
                        carry[n] = g * decay[t][n];
                        vf grad_exponent = carry[n] * before[t][n];
                        dd += grad_exponent * rate[n];
                        grad_rate[n] += grad_exponent * delta[t];
                    }
                    grad_u[t] = du, grad_delta[t] = dd;
                    if (starts && starts[t]) UNROLL for (int n = 0; n < TOGETHER; n++) carry[n] = (vf){};
                }
                UNROLL for (int n = 0; n < TOGETHER; n++) {
                    carries[k][n0 + n] = carry[n];
                    sum_A[k][n0 + n] += grad_rate[n];
                }
            }
            if (s->z.data) {
                for (int t = 0; t < steps; t++) z[t] *= y[t];
                store_tile(&s->grad_z, b * s->grad_z.batch_stride + t0 * s->grad_z.row_stride + e, steps, count, z);
            }
            vf total_D = {}, total_bias = {};
            for (int t = 0; t < steps; t++) { /* rates carry log2(e): undo it in dΔ */
                vf dt = (grad_delta[t] * LN2 + grad_u[t] * x[t]) * slope[t];
                total_D += grad_y[t] * x[t];
                total_bias += dt;
                grad_delta[t] = dt;
                grad_u[t] = grad_u[t] * delta[t] + grad_y[t] * skip;
            }
            sum_D[k] += total_D, sum_bias[k] += total_bias;
            store_tile(&s->grad_x, b * s->grad_x.batch_stride + t0 * s->grad_x.row_stride + e, steps, count, grad_u);
            store_tile(&s->grad_dt, b * s->grad_dt.batch_stride + t0 * s->grad_dt.row_stride + e, steps, count, grad_delta);
        }
        float *out_B = s->grad_B + ((group * s->batch + b) * s->length + t0) * STATES;
        float *out_C = s->grad_C + ((group * s->batch + b) * s->length + t0) * STATES;
        for (int t = 0; t < steps; t++) {
            lane_sums(sum_B[t], out_B + t * STATES, STATES);
            lane_sums(sum_C[t], out_C + t * STATES, STATES);
        }
    }
    for (int64_t e = e0, k = 0; e < end; e += LANES, k++) {
        const int count = at_most(end - e, LANES);
        store_states(s->grad_initial + b * STATES * width + e, width, count, carries[k]);
        store_states(s->grad_A + b * STATES * width + e, width, count, sum_A[k]);
        store_f32(s->grad_D + b * width + e, count, sum_D[k]);
        store_f32(s->grad_bias + b * width + e, count, sum_bias[k]);
    }
}

INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
INLINE int64_t groups_of(int64_t width) { return (width + GROUP - 1) / GROUP; }

void scan_forward(Scan *s) {
    const int64_t groups = groups_of(s->width);
    for (int64_t unit; (unit = take(&s->next)) < s->batch * groups;)
        scan_forward_unit(s, unit / groups, unit % groups * GROUP);
}

void scan_backward(Scan *s) {
    const int64_t groups = groups_of(s->width);
    for (int64_t unit; (unit = take(&s->next)) < s->batch * groups;)
        scan_backward_unit(s, unit / groups, unit % groups * GROUP, unit % groups);
}

/* ---- causal convolution ---- */

#define ROWS 128 /* time steps of one unit */

typedef struct {
    int64_t next;
    int64_t batch, length, width, taps, silu;
    Tensor x, y;
    const float *weight;     /* (taps, width) */
    const float *bias;       /* (width) or NULL */
    const float *initial;    /* (batch, taps - 1, width): the inputs before x, or NULL */
    const uint8_t *starts;   /* (batch, length) or NULL */
    /* backward only */
    Tensor grad_y, grad_x;
    float *grad_weight;      /* (batch, row blocks, taps + 1, width); the last row is the bias's */
    float *grad_initial;     /* (batch, taps - 1, width) or NULL */
} Conv;

/* how many inputs before t the output at t sees: those of its own document */
static int reach_of(const Conv *s, int64_t b, int64_t t) {
    const int64_t first = s->initial ? -(s->taps - 1) : 0;
    int reach = 0;
    while (reach < s->taps - 1 && t - reach > first) {
        if (s->starts && t - reach > 0 && s->starts[b * s->length + t - reach]) break;
        reach++;
    }
    return reach;
}

/* the inputs at t0 .. t0 + count - 1; zeros outside of what exists */
INLINE void load_window(vf *out, const Conv *s, int64_t b, int64_t t0, int count, int64_t e, int lanes) {
    for (int i = 0; i < count; i++) {
        const int64_t t = t0 + i;
        out[i] = (vf){};
        if (t >= 0 && t < s->length)
            out[i] = load(s->x.data, b * s->x.batch_stride + t * s->x.row_stride + e, s->x.is_bf16, lanes);
        else if (t < 0 && s->initial)
            out[i] = load_f32(s->initial + (b * (s->taps - 1) + s->taps - 1 + t) * s->width + e, lanes);
    }
}

INLINE void conv_forward_unit(const Conv *s, int taps, int64_t b, int64_t t0, int64_t e0) {
    const int64_t end = e0 + GROUP < s->width ? e0 + GROUP : s->width;
    const int rows = at_most(s->length - t0, ROWS);
    int reach[ROWS];
    vf x[ROWS + MAX_TAPS], y[ROWS], weight[MAX_TAPS];
    for (int i = 0; i < rows; i++) reach[i] = reach_of(s, b, t0 + i);
    for (int64_t e = e0; e < end; e += LANES) {
        const int count = at_most(end - e, LANES);
        for (int j = 0; j < taps; j++) weight[j] = load_f32(s->weight + j * s->width + e, count);
        const vf bias = s->bias ? load_f32(s->bias + e, count) : (vf){};
        load_window(x, s, b, t0 - (taps - 1), rows + taps - 1, e, count);
        for (int i = 0; i < rows; i++) {
            vf out = bias;
            if (reach[i] == taps - 1)
                UNROLL for (int m = 0; m < taps; m++) out += weight[m] * x[i + m];
            else
                for (int m = 0; m <= reach[i]; m++) out += weight[taps - 1 - m] * x[i + taps - 1 - m];
            y[i] = s->silu ? out * sigmoid(out) : out;
        }
        store_tile(&s->y, b * s->y.batch_stride + t0 * s->y.row_stride + e, rows, count, y);
    }
}

INLINE void conv_backward_unit(const Conv *s, int taps, int64_t b, int64_t block, int64_t e0) {
    const int64_t end = e0 + GROUP < s->width ? e0 + GROUP : s->width, t0 = block * ROWS;
    const int rows = at_most(s->length - t0, ROWS), all = at_most(s->length - t0, ROWS + taps - 1);
    int reach[ROWS + MAX_TAPS];
    vf x[ROWS + 2 * MAX_TAPS], grad[ROWS + MAX_TAPS], grad_x[ROWS], weight[MAX_TAPS], sums[MAX_TAPS + 1];
    for (int i = 0; i < all; i++) reach[i] = reach_of(s, b, t0 + i);
    float *grad_weight = s->grad_weight + (b * ((s->length + ROWS - 1) / ROWS) + block) * (taps + 1) * s->width;
    for (int64_t e = e0; e < end; e += LANES) {
        const int count = at_most(end - e, LANES);
        for (int j = 0; j < taps; j++) weight[j] = load_f32(s->weight + j * s->width + e, count);
        const vf bias = s->bias ? load_f32(s->bias + e, count) : (vf){};
        memset(sums, 0, sizeof sums);
        load_window(x, s, b, t0 - (taps - 1), all + taps - 1, e, count);
        load_tile(grad, &s->grad_y, b * s->grad_y.batch_stride + t0 * s->grad_y.row_stride + e, all, count);
        for (int i = 0; i < all; i++) { /* the gradient before the activation; the last taps - 1 rows belong to the next unit */
            const int whole = reach[i] == taps - 1;
            if (s->silu) {
                vf out = bias;
                if (whole) UNROLL for (int m = 0; m < taps; m++) out += weight[m] * x[i + m];
                else for (int m = 0; m <= reach[i]; m++) out += weight[taps - 1 - m] * x[i + taps - 1 - m];
                vf sig = sigmoid(out);
                grad[i] *= sig + out * sig * (1.0f - sig);
            }
            if (i >= rows) continue;
            sums[taps] += grad[i];
            if (whole) UNROLL for (int m = 0; m < taps; m++) sums[m] += grad[i] * x[i + m];
            else for (int m = 0; m <= reach[i]; m++) sums[taps - 1 - m] += grad[i] * x[i + taps - 1 - m];
        }
        for (int i = 0; i < rows; i++) {
            vf out = {};
            for (int m = 0; m < taps && i + m < all; m++)
                if (reach[i + m] >= m) out += weight[taps - 1 - m] * grad[i + m];
            grad_x[i] = out;
        }
        store_tile(&s->grad_x, b * s->grad_x.batch_stride + t0 * s->grad_x.row_stride + e, rows, count, grad_x);
        for (int j = 0; j <= taps; j++) store_f32(grad_weight + j * s->width + e, count, sums[j]);
        if (t0 == 0 && s->grad_initial)
            for (int back = 1; back < taps; back++) { /* the input at t = -back */
                vf out = {};
                for (int m = back; m < taps && m - back < all; m++)
                    if (reach[m - back] >= m) out += weight[taps - 1 - m] * grad[m - back];
                store_f32(s->grad_initial + (b * (taps - 1) + taps - 1 - back) * s->width + e, count, out);
            }
    }
}

void conv_forward(Conv *s) {
    const int64_t groups = groups_of(s->width), blocks = (s->length + ROWS - 1) / ROWS;
    for (int64_t unit; (unit = take(&s->next)) < s->batch * blocks * groups;) {
        const int64_t b = unit / (blocks * groups), t0 = unit / groups % blocks * ROWS, e0 = unit % groups * GROUP;
        if (s->taps == 4) conv_forward_unit(s, 4, b, t0, e0); /* what every published model has */
        else conv_forward_unit(s, (int)s->taps, b, t0, e0);
    }
}

void conv_backward(Conv *s) {
    const int64_t groups = groups_of(s->width), blocks = (s->length + ROWS - 1) / ROWS;
    for (int64_t unit; (unit = take(&s->next)) < s->batch * blocks * groups;) {
        const int64_t b = unit / (blocks * groups), block = unit / groups % blocks, e0 = unit % groups * GROUP;
        if (s->taps == 4) conv_backward_unit(s, 4, b, block, e0);
        else conv_backward_unit(s, (int)s->taps, b, block, e0);
    }
}

/* ---- decode: one step, here the lanes are states ---- */

typedef struct {
    int64_t next;
    int64_t batch, width, softplus;
    Tensor x, dt, z, B, C, y;  /* no rows: (batch, width) or (batch, STATES) */
    const float *A;            /* (width, STATES) */
    const float *D, *bias;     /* (width) or NULL */
    float *state;              /* (batch, width, STATES), updated */
} Step;

static void scan_step_unit(const Step *s, int64_t b, int64_t e0) {
    enum { WHOLE = (STATES + LANES - 1) / LANES };
    const int64_t end = e0 + GROUP < s->width ? e0 + GROUP : s->width;
    vf rows_B[WHOLE], rows_C[WHOLE], slope;
    for (int i = 0; i < WHOLE; i++) {
        const int count = at_most(STATES - i * LANES, LANES);
        rows_B[i] = load(s->B.data, b * s->B.batch_stride + i * LANES, s->B.is_bf16, count);
        rows_C[i] = load(s->C.data, b * s->C.batch_stride + i * LANES, s->C.is_bf16, count);
    }
    for (int64_t e = e0; e < end; e += LANES) {
        const int count = at_most(end - e, LANES);
        vf delta = load(s->dt.data, b * s->dt.batch_stride + e, s->dt.is_bf16, count);
        const vf x = load(s->x.data, b * s->x.batch_stride + e, s->x.is_bf16, count);
        if (s->bias) delta += load_f32(s->bias + e, count);
        if (s->softplus) delta = softplus(delta, &slope);
        const vf u = delta * x;
        vf y, outs[LANES];
        memset(outs, 0, sizeof outs);
        for (int c = 0; c < count; c++) {
            vf out = {};
            for (int i = 0; i < WHOLE; i++) {
                const int64_t at = (e + c) * STATES + i * LANES;
                const int states = at_most(STATES - i * LANES, LANES);
                float *state = s->state + b * s->width * STATES + at;
                const vf decay = exp2_lanes(load_f32(s->A + at, states) * (delta[c] * LOG2E));
                const vf h = decay * load_f32(state, states) + u[c] * rows_B[i];
                store_f32(state, states, h);
                out += h * rows_C[i];
            }
            outs[c] = out;
        }
        float totals[LANES];
        lane_sums(outs, totals, LANES);
        y = load_f32(totals, LANES);
        if (s->D) y += x * load_f32(s->D + e, count);
        if (s->z.data) {
            const vf z = load(s->z.data, b * s->z.batch_stride + e, s->z.is_bf16, count);
            y *= z * sigmoid(z);
        }
        store(s->y.data, b * s->y.batch_stride + e, s->y.is_bf16, count, y);
    }
}

void scan_step(Step *s) {
    const int64_t groups = groups_of(s->width);
    for (int64_t unit; (unit = take(&s->next)) < s->batch * groups;)
        scan_step_unit(s, unit / groups, unit % groups * GROUP);
}

typedef struct {
    int64_t next;
    int64_t batch, width, taps, silu;
    Tensor x, y, weight;    /* weight: (1, width, taps) */
    const float *bias;      /* (width) or NULL */
    Tensor state;           /* (batch, width, taps), updated */
} ConvStep;

INLINE float read_one(const char *data, int64_t at, int64_t is_bf16) {
    if (!is_bf16) return ((const float *)data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

INLINE void conv_step_unit(const ConvStep *s, int taps, int64_t b, int64_t e0) {
    const int64_t end = e0 + GROUP < s->width ? e0 + GROUP : s->width;
    for (int64_t e = e0; e < end; e += LANES) {
        const int count = at_most(end - e, LANES);
        vf y = s->bias ? load_f32(s->bias + e, count) : (vf){};
        const vf x = load(s->x.data, b * s->x.batch_stride + e, s->x.is_bf16, count);
        for (int c = 0; c < count; c++) {
            const int64_t size = s->state.is_bf16 ? 2 : 4;
            const int64_t at = b * s->state.batch_stride + (e + c) * s->state.row_stride;
            char *state = s->state.data + at * size;
            memmove(state, state + size, (size_t)((taps - 1) * size));
            vf newest = splat(x[c]);
            store(state, taps - 1, (int)s->state.is_bf16, 1, newest);
            float out = 0;
            for (int j = 0; j < taps; j++)
                out += read_one(state, j, s->state.is_bf16) *
                       read_one(s->weight.data, (e + c) * s->weight.row_stride + j, s->weight.is_bf16);
            y[c] += out;
        }
        if (s->silu) y *= sigmoid(y);
        store(s->y.data, b * s->y.batch_stride + e, s->y.is_bf16, count, y);
    }
}

void conv_step(ConvStep *s) {
    const int64_t groups = groups_of(s->width);
    for (int64_t unit; (unit = take(&s->next)) < s->batch * groups;) {
        if (s->taps == 4) conv_step_unit(s, 4, unit / groups, unit % groups * GROUP);
        else conv_step_unit(s, (int)s->taps, unit / groups, unit % groups * GROUP);
    }
}
