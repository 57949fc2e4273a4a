/* The selective scan, forward and backward: a unit is GROUP channels of one row, from the first token to the last. */

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
    vf delta[STEPS], slope[STEPS], x[STEPS], u[STEPS], y[STEPS], z[STEPS];
    vf grad_y[STEPS], grad_u[STEPS], grad_delta[STEPS];
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
            const int64_t at = b * s->grad_dt.batch_stride + t0 * s->grad_dt.row_stride + e;
            store_tile(&s->grad_dt, at, steps, count, grad_delta);
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
