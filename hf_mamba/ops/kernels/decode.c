/* Decoding: one step of the scan (its lanes are states) and of the convolution, RMSNorm, and thin matrix products. */

typedef struct {
    int64_t next;
    int64_t batch, width, softplus, log_A;
    Tensor x, dt, z, B, C, y;  /* no rows: (batch, width) or (batch, STATES) */
    const float *A;            /* (width, STATES): A, or with log_A log(-A) */
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
                vf rate = load_f32(s->A + at, states);
                if (s->log_A) rate = -exp2_lanes(rate * LOG2E);
                const vf decay = exp2_lanes(rate * (delta[c] * LOG2E));
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

/* ---- RMSNorm without gradient: y = weight s / sqrt(mean(s^2) + eps), s = x, or x + residual, which is stored ---- */

typedef struct {
    int64_t next, rows, width;
    double eps;
    Tensor x, weight, y; /* (rows, width), dense, and weight (width) */
    const float *residual; /* (rows, width) or NULL */
    float *sum;            /* (rows, width), with a residual */
} Norm;

INLINE vf norm_input(const Norm *s, int64_t at, int count) {
    const vf x = load(s->x.data, at, (int)s->x.is_bf16, count);
    return s->residual ? x + load_f32(s->residual + at, count) : x;
}

static void norm_row(const Norm *s, int64_t row) {
    const int64_t width = s->width, at = row * width;
    vf squares = {};
    float total[1];
    for (int64_t e = 0; e < width; e += LANES) {
        const int count = at_most(width - e, LANES);
        const vf x = norm_input(s, at + e, count);
        if (s->residual) store_f32(s->sum + at + e, count, x);
        squares += x * x;
    }
    lane_sums(&squares, total, 1);
    const float scale = 1.0f / __builtin_sqrtf(total[0] / (float)width + (float)s->eps);
    for (int64_t e = 0; e < width; e += LANES) {
        const int count = at_most(width - e, LANES);
        const vf x = norm_input(s, at + e, count) * scale;
        store(s->y.data, at + e, (int)s->y.is_bf16, count, x * load(s->weight.data, e, (int)s->weight.is_bf16, count));
    }
}

void norm_forward(Norm *s) {
    for (int64_t unit; (unit = take(&s->next) * ROWS) < s->rows;)
        for (int64_t row = unit; row < s->rows && row < unit + ROWS; row++) norm_row(s, row);
}

/* ---- y = x weight^T + bias for a few rows x: the weights are read once, as fast as memory gives them ---- */

#define TALL 32 /* rows of the weight in one unit */
#define THIN 4  /* rows of x together */

typedef struct {
    int64_t next, rows, width, count;
    Tensor weight, bias, x, y; /* weight (rows, width), bias (rows) or absent, x (count, width), y (count, rows) dense */
} Linear;

INLINE void linear_store(const Linear *s, int64_t row, int64_t m, float total) {
    if (s->bias.data) total += read_one(s->bias.data, row, s->bias.is_bf16);
    store(s->y.data, m * s->rows + row, (int)s->y.is_bf16, 1, splat(total));
}

/* one row of x: four sums along a row of the weight, since an addition takes longer than a load */
INLINE void linear_one(const Linear *s, int64_t row, int64_t m, const int is_bf16) {
    const int64_t width = s->width, w = row * s->weight.row_stride, x = m * s->x.row_stride;
    vf sums[4] = {}, total;
    float out[1];
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        UNROLL for (int c = 0; c < 4; c++)
            sums[c] += load(s->weight.data, w + i + c * LANES, is_bf16, LANES) *
                       load(s->x.data, x + i + c * LANES, is_bf16, LANES);
    total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (; i + LANES <= width; i += LANES)
        total += load(s->weight.data, w + i, is_bf16, LANES) * load(s->x.data, x + i, is_bf16, LANES);
    if (i < width)
        total += load(s->weight.data, w + i, is_bf16, (int)(width - i)) *
                 load(s->x.data, x + i, is_bf16, (int)(width - i));
    lane_sums(&total, out, 1);
    linear_store(s, row, m, out[0]);
}

/* four rows of the weight and `count` of x; past the weight's end its last row is done again */
INLINE void linear_tile(const Linear *s, int64_t row, int64_t m0, const int count, const int is_bf16) {
    const int64_t width = s->width, ahead = 4 * s->weight.row_stride; /* four streams are more than hardware foresees */
    int64_t w[4];
    vf sums[4][THIN] = {};
    for (int r = 0; r < 4; r++) w[r] = (row + r < s->rows ? row + r : s->rows - 1) * s->weight.row_stride;
    int64_t i = 0;
    for (; is_bf16 && i + 2 * LANES <= width; i += 2 * LANES) {
        vf even[THIN], odd[THIN], v[2];
        for (int m = 0; m < count; m++) load_pairs(s->x.data, (m0 + m) * s->x.row_stride + i, &even[m], &odd[m]);
        UNROLL for (int r = 0; r < 4; r++) {
            load_pairs(s->weight.data, w[r] + i, &v[0], &v[1]);
            __builtin_prefetch(s->weight.data + (w[r] + ahead + i) * 2);
            for (int m = 0; m < count; m++) sums[r][m] += v[0] * even[m];
            for (int m = 0; m < count; m++) sums[r][m] += v[1] * odd[m];
        }
    }
    for (; i < width; i += LANES) {
        vf x[THIN];
        const int lanes = at_most(width - i, LANES);
        if (lanes == LANES)
            for (int m = 0; m < count; m++) x[m] = load(s->x.data, (m0 + m) * s->x.row_stride + i, is_bf16, LANES);
        else
            for (int m = 0; m < count; m++) x[m] = load(s->x.data, (m0 + m) * s->x.row_stride + i, is_bf16, lanes);
        UNROLL for (int r = 0; r < 4; r++) {
            const vf v = lanes == LANES ? load(s->weight.data, w[r] + i, is_bf16, LANES)
                                        : load(s->weight.data, w[r] + i, is_bf16, lanes);
            __builtin_prefetch(s->weight.data + (w[r] + ahead + i) * (is_bf16 ? 2 : 4));
            for (int m = 0; m < count; m++) sums[r][m] += v * x[m];
        }
    }
    for (int r = 0; r < 4; r++) {
        float totals[THIN];
        lane_sums(sums[r], totals, count);
        for (int m = 0; m < count && row + r < s->rows; m++) linear_store(s, row + r, m0 + m, totals[m]);
    }
}

INLINE void linear_unit(const Linear *s, int64_t row, int64_t end, const int is_bf16) {
    if (s->count == 1)
        for (; row < end; row++) linear_one(s, row, 0, is_bf16);
    for (; row < end; row += 4)
        for (int64_t m = 0; m < s->count; m += THIN) switch (at_most(s->count - m, THIN)) {
            case 1: linear_tile(s, row, m, 1, is_bf16); break;
            case 2: linear_tile(s, row, m, 2, is_bf16); break;
            case 3: linear_tile(s, row, m, 3, is_bf16); break;
            default: linear_tile(s, row, m, THIN, is_bf16);
        }
}

void linear_forward(Linear *s) {
    for (int64_t row; (row = take(&s->next) * TALL) < s->rows;) {
        const int64_t end = row + TALL < s->rows ? row + TALL : s->rows;
        if (s->weight.is_bf16) linear_unit(s, row, end, 1);
        else linear_unit(s, row, end, 0);
    }
}
