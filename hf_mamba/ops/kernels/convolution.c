/* The causal convolution with SiLU, forward and backward: a unit is ROWS steps of GROUP channels. */

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
        for (int i = 0; i < all; i++) { /* now before the activation; the last taps - 1 rows are the next unit's */
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
