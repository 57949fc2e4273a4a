/* Vectors of fp32 lanes: loads and stores of fp32 and bf16, elementary functions, and the sharing out of work. */

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

#define BLOCKS (GROUP / LANES)
#define LOG2E 1.44269504088896341f
#define LN2 0.693147180559945309f
/* states handled together, in registers; the rest of a padded state size is zeros */
#define TOGETHER (STATES < 8 ? STATES : 8)
#define PADDED ((STATES + TOGETHER - 1) / TOGETHER * TOGETHER)

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* (batch, length, width) with strides in elements; the last axis is dense. Absent tensors have no data. */
typedef struct {
    char *data;
    int64_t batch_stride, row_stride;
    int64_t is_bf16;
} Tensor;

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

/* 2 LANES bf16 numbers, those at even places and those at odd ones: half the work of two loads */
INLINE void load_pairs(const char *data, int64_t index, vf *even, vf *odd) {
    vu bits;
    memcpy(&bits, data + index * 2, sizeof bits);
    *even = (vf)(bits << 16);
    *odd = (vf)(bits & 0xffff0000u);
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

/* ---- units of work ---- */

INLINE int at_most(int64_t value, int limit) { return value < limit ? (int)value : limit; }

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

INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
INLINE int64_t groups_of(int64_t width) { return (width + GROUP - 1) / GROUP; }
