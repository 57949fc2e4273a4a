/* RMSNorm of x silu(z) over equal parts of a row, forward and backward: a unit is ROWS rows. */

typedef struct {
    int64_t next, rows, width, groups;
    double eps;
    Tensor x, z, weight, y;      /* (rows, width), and weight (width) */
    float *scale;                /* (rows, groups): 1/rms */
    /* backward only */
    Tensor grad_y, grad_x, grad_z;
    float *grad_weight;          /* (units, width) */
} GatedNorm;

INLINE vf of_row(const Tensor *t, int64_t row, int64_t e, int count) {
    return count == LANES ? load(t->data, row * t->batch_stride + e, (int)t->is_bf16, LANES)
                          : load(t->data, row * t->batch_stride + e, (int)t->is_bf16, count);
}

INLINE void to_row(const Tensor *t, int64_t row, int64_t e, int count, vf v) {
    if (count == LANES) store(t->data, row * t->batch_stride + e, (int)t->is_bf16, LANES, v);
    else store(t->data, row * t->batch_stride + e, (int)t->is_bf16, count, v);
}

void gated_norm_forward(GatedNorm *s) {
    const int64_t part = s->width / s->groups;
    vf gated[(part + LANES - 1) / LANES];
    for (int64_t unit; (unit = take(&s->next) * ROWS) < s->rows;)
        for (int64_t row = unit; row < s->rows && row < unit + ROWS; row++)
            for (int64_t g = 0; g < s->groups; g++) {
                vf squares = {};
                float total[1];
                for (int64_t e = 0; e < part; e += LANES) {
                    const int count = at_most(part - e, LANES);
                    const vf z = of_row(&s->z, row, g * part + e, count);
                    const vf v = of_row(&s->x, row, g * part + e, count) * (z * sigmoid(z));
                    gated[e / LANES] = v, squares += v * v;
                }
                lane_sums(&squares, total, 1);
                const float scale = 1.0f / __builtin_sqrtf(total[0] / (float)part + (float)s->eps);
                s->scale[row * s->groups + g] = scale;
                for (int64_t e = 0; e < part; e += LANES) {
                    const int count = at_most(part - e, LANES);
                    const vf weight = load(s->weight.data, g * part + e, (int)s->weight.is_bf16, count);
                    to_row(&s->y, row, g * part + e, count, gated[e / LANES] * scale * weight);
                }
            }
}

void gated_norm_backward(GatedNorm *s) {
    const int64_t part = s->width / s->groups, blocks = (part + LANES - 1) / LANES;
    vf normed[blocks], grads[blocks], sigmoids[blocks];
    for (int64_t unit; (unit = take(&s->next)) * ROWS < s->rows;) {
        float *grad_weight = s->grad_weight + unit * s->width;
        memset(grad_weight, 0, (size_t)s->width * 4);
        for (int64_t row = unit * ROWS; row < s->rows && row < (unit + 1) * ROWS; row++)
            for (int64_t g = 0; g < s->groups; g++) {
                const float scale = s->scale[row * s->groups + g];
                vf along = {};
                float total[1];
                for (int64_t i = 0; i < blocks; i++) {
                    const int64_t e = g * part + i * LANES;
                    const int count = at_most(part - i * LANES, LANES);
                    const vf z = of_row(&s->z, row, e, count), grad = of_row(&s->grad_y, row, e, count);
                    const vf sig = sigmoid(z), n = of_row(&s->x, row, e, count) * (z * sig) * scale;
                    const vf of_n = grad * load(s->weight.data, e, (int)s->weight.is_bf16, count);
                    store_f32(grad_weight + e, count, load_f32(grad_weight + e, count) + grad * n);
                    normed[i] = n, grads[i] = of_n, sigmoids[i] = sig, along += of_n * n;
                }
                lane_sums(&along, total, 1);
                const float mean = total[0] / (float)part;
                for (int64_t i = 0; i < blocks; i++) {
                    const int64_t e = g * part + i * LANES;
                    const int count = at_most(part - i * LANES, LANES);
                    const vf z = of_row(&s->z, row, e, count), x = of_row(&s->x, row, e, count), sig = sigmoids[i];
                    const vf grad = (grads[i] - normed[i] * mean) * scale, silu = z * sig;
                    to_row(&s->grad_x, row, e, count, grad * silu);
                    to_row(&s->grad_z, row, e, count, grad * x * (sig + silu * (1.0f - sig)));
                }
            }
    }
}
