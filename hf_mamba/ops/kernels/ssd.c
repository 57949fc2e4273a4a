/* The state space dual, in chunks of CHUNK steps (ops/torch/ssd.py has the equations). Its products are small and half
 * of each T x T one is zero, so they are computed here, tile by tile, with the decays applied while a tile is in
 * registers: nothing of the size (heads, T, T) is ever in memory.
 *
 * All sizes are padded to whole vectors with zeros in local copies. States are (states, width) here. */

#define TILE 4                       /* rows of a product in registers */
#define VECS (LANES == 16 ? 4 : 2)   /* vectors of a row in registers */
#define UP(n) (((n) + LANES - 1) / LANES * LANES)
#define LOCAL __attribute__((aligned(64)))

typedef struct {
    int64_t next;
    int64_t batch, length, heads, width, groups, states, chunks;
    Tensor x, B, C, y;           /* rows of heads * width, or groups * states */
    const float *a, *w;          /* (batch, length, heads) */
    const float *D;              /* (heads) or NULL */
    const float *initial;        /* (batch, heads, states, width) or NULL */
    const uint8_t *starts;       /* (batch, length) or NULL: a document starts here */
    float *products;             /* (batch, chunks, groups, CHUNK, CHUNK): C_t . B_s, of the forward */
    float *final;                /* (batch, heads, states, width) */
    float *saved;                /* (batch, chunks, heads, states, width): the states before each chunk, or NULL */
    /* backward only */
    Tensor grad_y, grad_x, grad_B, grad_C;
    const float *grad_final;     /* (batch, heads, states, width) or NULL */
    float *carries;              /* as saved: the gradients of the states after each chunk */
    float *grad_initial;         /* (batch, heads, states, width) */
    float *grad_a, *grad_w;      /* (batch, length, heads) */
    float *grad_D;               /* (batch, chunks, heads) */
} Ssd;

/* 2^x, and zero below 2^-80: nothing beside 1, and products of denormal numbers take a hundred times as long */
INLINE vf decay_of(vf x) { return pick(x < -80.0f, (vf){}, exp2_lanes(x)); }

/* The decays of one head in one chunk. Step s reaches step t where open[t] <= s <= t. */
typedef struct {
    int steps, padded, last;     /* `last`: where the chunk's last document starts, 0 if it is an earlier chunk's */
    int open[CHUNK];
    float sum[CHUNK] LOCAL;      /* of the log2 decays up to t */
    float w[CHUNK] LOCAL;
    float from_start[CHUNK] LOCAL, to_end[CHUNK] LOCAL, whole;
} Decays;

static void load_decays(Decays *d, const Ssd *s, int64_t b, int64_t h, int64_t t0) {
    double total = 0;
    int first = 0, carried = 1, closed = CHUNK;
    d->steps = at_most(s->length - t0, CHUNK), d->padded = UP(d->steps);
    for (int t = 0; t < d->padded; t++) {
        const int64_t at = (b * s->length + t0 + t) * s->heads + h;
        const int inside = t < d->steps;
        if (inside && s->starts && s->starts[b * s->length + t0 + t]) { /* its decay is never used */
            if (carried) closed = t;
            first = t, carried = 0;
        } else if (inside) total += s->a[at] * (double)LOG2E;
        d->sum[t] = (float)total, d->w[t] = inside ? s->w[at] : 0.0f, d->open[t] = first;
    }
    d->last = first, d->whole = 0;
    for (int t = 0; t < d->padded; t += LANES) {
        const vf sum = load_f32(d->sum + t, LANES);
        store_f32(d->from_start + t, LANES, decay_of(sum));
        store_f32(d->to_end + t, LANES, decay_of(d->sum[d->padded - 1] - sum));
    }
    if (carried) d->whole = d->from_start[d->padded - 1];
    for (int t = closed; t < d->padded; t++) d->from_start[t] = 0;
    for (int t = 0; t < first; t++) d->to_end[t] = 0;
}

/* rows of a tensor as fp32, (padded, UP(count)), zeros beyond */
static void load_block(float *out, const Tensor *t, int64_t at, int count, int steps, int padded) {
    const int width = UP(count);
    for (int i = 0; i < padded; i++)
        for (int j = 0; j < width; j += LANES) {
            const int lanes = i < steps ? at_most(count - j, LANES) : 0;
            const int64_t from = at + i * t->row_stride + j;
            store_f32(out + i * width + j, LANES, lanes == LANES ? load(t->data, from, (int)t->is_bf16, LANES)
                                                  : lanes > 0    ? load(t->data, from, (int)t->is_bf16, lanes)
                                                                 : (vf){});
        }
}

static void store_block(const Tensor *t, int64_t at, int count, int steps, const float *in) {
    const int width = UP(count);
    for (int i = 0; i < steps; i++)
        for (int j = 0; j < count; j += LANES)
            store(t->data, at + i * t->row_stride + j, (int)t->is_bf16, at_most(count - j, LANES),
                  load_f32(in + i * width + j, LANES));
}

static void load_state(float *out, const float *in, const Ssd *s) {
    const int width = UP((int)s->width), states = UP((int)s->states);
    if (!in) {
        memset(out, 0, (size_t)states * width * 4);
        return;
    }
    const Tensor t = {(char *)in, 0, s->width, 0};
    load_block(out, &t, 0, (int)s->width, (int)s->states, states);
}

static void store_state(float *out, const float *in, const Ssd *s) {
    const Tensor t = {(char *)out, 0, s->width, 0};
    store_block(&t, 0, (int)s->width, (int)s->states, in);
}

/* (rows, columns) to (columns, rows), both multiples of 4 */
static void transpose(float *out, const float *in, int rows, int columns) {
    for (int j = 0; j < columns; j += 4)
        for (int i = 0; i < rows; i += 4)
            for (int k = 0; k < 4; k++)
                for (int l = 0; l < 4; l++) out[(j + k) * rows + i + l] = in[(i + l) * columns + j + k];
}

/* sums[r][v] += sum over k of left[r * row + k * step] * right[k * width + v * LANES ...] */
INLINE void product(vf sums[TILE][VECS], const int vecs, const float *left, const int64_t row, const int64_t step,
                    const float *right, const int64_t width, int64_t k, const int64_t end) {
    for (; k < end; k++) {
        vf v[VECS];
        UNROLL for (int i = 0; i < vecs; i++) v[i] = load_f32(right + k * width + i * LANES, LANES);
        UNROLL for (int r = 0; r < TILE; r++)
            UNROLL for (int i = 0; i < vecs; i++) sums[r][i] += left[r * row + k * step] * v[i];
    }
}

/* calls f(column, vectors) over all of a row: whole tiles first, then single vectors */
#define EACH_COLUMN(from, width, f)                                              \
    do {                                                                         \
        int column_ = (from);                                                    \
        for (; column_ + VECS * LANES <= (width); column_ += VECS * LANES) f(column_, VECS); \
        for (; column_ < (width); column_ += LANES) f(column_, 1);               \
    } while (0)

INLINE vi counting(int from) {
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = from + i;
    return v;
}

static int64_t state_at(const Ssd *s, int64_t b, int64_t chunk, int64_t h) {
    return ((b * s->chunks + chunk) * s->heads + h) * s->states * s->width;
}

/* ---- forward: first the products of B and C, which the heads of a group share; then a head of a row is a unit ---- */

void ssd_products(Ssd *s) {
    const int N = UP((int)s->states);
    float B[CHUNK * N] LOCAL, C[CHUNK * N] LOCAL, right[CHUNK * N] LOCAL;
    for (int64_t unit; (unit = take(&s->next)) < s->batch * s->chunks * s->groups;) {
        const int64_t g = unit % s->groups, chunk = unit / s->groups % s->chunks, b = unit / s->groups / s->chunks;
        const int steps = at_most(s->length - chunk * CHUNK, CHUNK), padded = UP(steps);
        const int64_t row = chunk * CHUNK, n = g * s->states;
        load_block(B, &s->B, b * s->B.batch_stride + row * s->B.row_stride + n, (int)s->states, steps, padded);
        load_block(C, &s->C, b * s->C.batch_stride + row * s->C.row_stride + n, (int)s->states, steps, padded);
        transpose(right, B, padded, N);
        float *out = s->products + unit * CHUNK * CHUNK;
        for (int t = 0; t < padded; t += TILE) {
            const int end = t / LANES * LANES + LANES; /* later steps are not used */
#define COLUMN(c, vecs)                                                                             \
    do {                                                                                            \
        vf sums[TILE][VECS] = {};                                                                   \
        product(sums, vecs, C + t * N, N, 1, right + c, padded, 0, N);                              \
        UNROLL for (int r = 0; r < TILE; r++)                                                       \
            UNROLL for (int i = 0; i < vecs; i++) store_f32(out + (t + r) * CHUNK + c + i * LANES, LANES, sums[r][i]); \
    } while (0)
            EACH_COLUMN(0, end, COLUMN);
#undef COLUMN
        }
    }
}

INLINE void forward_tile(const Ssd *s, const Decays *d, const float *x, const float *C, const float *state,
                         const float *weights, int64_t at, int t, int low, int column, float skip, const int vecs) {
    const int P = UP((int)s->width), N = UP((int)s->states);
    vf sums[TILE][VECS] = {};
    product(sums, vecs, C + t * N, N, 1, state + column, P, 0, N);
    UNROLL for (int r = 0; r < TILE; r++) UNROLL for (int i = 0; i < vecs; i++) sums[r][i] *= d->from_start[t + r];
    product(sums, vecs, weights, CHUNK, 1, x + column, P, low, t + TILE);
    UNROLL for (int r = 0; r < TILE; r++) UNROLL for (int i = 0; i < vecs; i++) {
        const int lanes = at_most(s->width - column - i * LANES, LANES);
        sums[r][i] += skip * load_f32(x + (t + r) * P + column + i * LANES, LANES);
        if (t + r < d->steps)
            store(s->y.data, at + (t + r) * s->y.row_stride + column + i * LANES, (int)s->y.is_bf16, lanes, sums[r][i]);
    }
}

INLINE void state_tile(float *state, const float *left, const float *right, int64_t P, int n, int column, int padded,
                       float whole, const int vecs) {
    vf sums[TILE][VECS];
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int i = 0; i < vecs; i++)
            sums[r][i] = whole * load_f32(state + (n + r) * P + column + i * LANES, LANES);
    product(sums, vecs, left, 1, LANES, right + column, P, 0, padded);
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int i = 0; i < vecs; i++)
            store_f32(state + (n + r) * P + column + i * LANES, LANES, sums[r][i]);
}

/* state = whole state + left^T (scale right), with left (padded, N), right (padded, P) and a scale a row */
static void add_to_state(float *state, const float *left, float *right, const float *scale, int P, int N, int padded,
                         float whole) {
    for (int t = 0; t < padded; t++)
        for (int p = 0; p < P; p += LANES) store_f32(right + t * P + p, LANES, scale[t] * load_f32(right + t * P + p, LANES));
    float columns[CHUNK * LANES] LOCAL; /* of left: far apart in memory, they would push each other out of the cache */
    for (int n = 0; n < N; n += TILE) {
        if (n % LANES == 0)
            for (int t = 0; t < padded; t++) store_f32(columns + t * LANES, LANES, load_f32(left + t * N + n, LANES));
#define COLUMN(c, vecs) state_tile(state, columns + n % LANES, right, P, n, c, padded, whole, vecs)
        EACH_COLUMN(0, P, COLUMN);
#undef COLUMN
    }
}

static void ssd_forward_unit(const Ssd *s, int64_t b, int64_t h) {
    const int P = UP((int)s->width), N = UP((int)s->states);
    const int64_t g = h / (s->heads / s->groups);
    float x[CHUNK * P] LOCAL, B[CHUNK * N] LOCAL, C[CHUNK * N] LOCAL, state[N * P] LOCAL;
    float weights[TILE * CHUNK] LOCAL;
    Decays d;
    load_state(state, s->initial ? s->initial + (b * s->heads + h) * s->states * s->width : NULL, s);
    for (int64_t chunk = 0; chunk < s->chunks; chunk++) {
        const int64_t row = chunk * CHUNK, n = g * s->states, p = h * s->width;
        if (s->saved) store_state(s->saved + state_at(s, b, chunk, h), state, s);
        load_decays(&d, s, b, h, row);
        load_block(x, &s->x, b * s->x.batch_stride + row * s->x.row_stride + p, (int)s->width, d.steps, d.padded);
        load_block(B, &s->B, b * s->B.batch_stride + row * s->B.row_stride + n, (int)s->states, d.steps, d.padded);
        load_block(C, &s->C, b * s->C.batch_stride + row * s->C.row_stride + n, (int)s->states, d.steps, d.padded);
        const float *products = s->products + ((b * s->chunks + chunk) * s->groups + g) * CHUNK * CHUNK;
        const int64_t y = b * s->y.batch_stride + row * s->y.row_stride + p;
        const float skip = s->D ? s->D[h] : 0.0f;
        for (int t = 0; t < d.padded; t += TILE) {
            const int low = d.open[t] / LANES * LANES;
            for (int u = low; u < t + TILE; u += LANES) {
                const vf w = load_f32(d.w + u, LANES), sum = load_f32(d.sum + u, LANES);
                const vi step = counting(u);
                for (int r = 0; r < TILE; r++) {
                    const vf decay = decay_of(d.sum[t + r] - sum) * w;
                    const vi reached = (step >= d.open[t + r]) & (step <= t + r);
                    const vf v = decay * load_f32(products + (t + r) * CHUNK + u, LANES);
                    store_f32(weights + r * CHUNK + u, LANES, pick(reached, v, (vf){}));
                }
            }
#define COLUMN(c, vecs) forward_tile(s, &d, x, C, state, weights, y, t, low, c, skip, vecs)
            EACH_COLUMN(0, P, COLUMN);
#undef COLUMN
        }
        for (int t = 0; t < d.padded; t++) d.to_end[t] *= d.w[t];
        add_to_state(state, B, x, d.to_end, P, N, d.padded, d.whole);
    }
    store_state(s->final + (b * s->heads + h) * s->states * s->width, state, s);
}

void ssd_forward(Ssd *s) {
    for (int64_t unit; (unit = take(&s->next)) < s->batch * s->heads;)
        ssd_forward_unit(s, unit / s->heads, unit % s->heads);
}

/* ---- backward: first the gradients of the states, a head of a row a unit; then a group of a chunk is a unit ---- */

void ssd_carries(Ssd *s) {
    const int P = UP((int)s->width), N = UP((int)s->states);
    float grad[CHUNK * P] LOCAL, C[CHUNK * N] LOCAL, carry[N * P] LOCAL;
    Decays d;
    for (int64_t unit; (unit = take(&s->next)) < s->batch * s->heads;) {
        const int64_t b = unit / s->heads, h = unit % s->heads, g = h / (s->heads / s->groups);
        load_state(carry, s->grad_final ? s->grad_final + unit * s->states * s->width : NULL, s);
        for (int64_t chunk = s->chunks - 1; chunk >= 0; chunk--) {
            const int64_t row = chunk * CHUNK;
            const int64_t n = b * s->C.batch_stride + row * s->C.row_stride + g * s->states;
            const int64_t p = b * s->grad_y.batch_stride + row * s->grad_y.row_stride + h * s->width;
            store_state(s->carries + state_at(s, b, chunk, h), carry, s);
            load_decays(&d, s, b, h, row);
            load_block(grad, &s->grad_y, p, (int)s->width, s->grad_y.data ? d.steps : 0, d.padded);
            load_block(C, &s->C, n, (int)s->states, d.steps, d.padded);
            add_to_state(carry, C, grad, d.from_start, P, N, d.padded, d.whole);
        }
        store_state(s->grad_initial + unit * s->states * s->width, carry, s);
    }
}

/* What one head's backward reads and adds to; T is the padded number of steps. */
typedef struct {
    int T, P, N;
    const float *x, *grad, *right_grad;  /* (T, P), (T, P), (P, T) */
    const float *B, *right_C, *products; /* (T, N), (N, T), (T, T): B_s . C_t */
    const float *state, *carry;          /* (N, P) */
    float *grad_products;                /* (T, T): of B_s . C_t, over the heads so far */
    float *weights;                      /* (TILE, T): what g_t adds to the gradient of w_s x_s */
    float *by_t, *by_s, *ended;          /* (T): sums over the pairs before t, after s; what s gives to the state */
} Head;

/* rows s, columns t: the pairs of a chunk */
INLINE void pairs_tile(const Head *o, const Decays *d, int s, int column, vf later[TILE], const int vecs) {
    vf sums[TILE][VECS] = {};
    product(sums, vecs, o->x + s * o->P, o->P, 1, o->right_grad + column, o->T, 0, o->P);
    UNROLL for (int i = 0; i < vecs; i++) {
        const int t = column + i * LANES;
        const vf sum = load_f32(d->sum + t, LANES);
        vi step = counting(t), open;
        memcpy(&open, d->open + t, sizeof open);
        vf before = load_f32(o->by_t + t, LANES);
        UNROLL for (int r = 0; r < TILE; r++) {
            const int at = (s + r) * o->T + t;
            const vi reached = (open <= s + r) & (step >= s + r);
            const vf decay = pick(reached, decay_of(sum - d->sum[s + r]), (vf){});
            const vf shared = load_f32(o->products + at, LANES), grad = sums[r][i] * decay * d->w[s + r];
            store_f32(o->weights + r * o->T + t, LANES, decay * shared);
            store_f32(o->grad_products + at, LANES, load_f32(o->grad_products + at, LANES) + grad);
            const vf pair = pick(step > s + r, grad * shared, (vf){}); /* a step's own decay is 1 */
            before += pair, later[r] += pair;
        }
        store_f32(o->by_t + t, LANES, before);
    }
}

/* rows s, columns p: the gradients of x and, in part, of w */
INLINE void inputs_tile(const Head *o, const Decays *d, const Ssd *op, int64_t at, float skip, int s, int column,
                        vf of_w[TILE], vf of_end[TILE], const int vecs) {
    vf sums[TILE][VECS] = {};
    product(sums, vecs, o->B + s * o->N, o->N, 1, o->carry + column, o->P, 0, o->N);
    UNROLL for (int r = 0; r < TILE; r++) UNROLL for (int i = 0; i < vecs; i++) {
        sums[r][i] *= d->to_end[s + r];
        of_end[r] += sums[r][i] * load_f32(o->x + (s + r) * o->P + column + i * LANES, LANES);
    }
    product(sums, vecs, o->weights, o->T, 1, o->grad + column, o->P, s, o->T);
    UNROLL for (int r = 0; r < TILE; r++) UNROLL for (int i = 0; i < vecs; i++) {
        const int64_t here = (s + r) * o->P + column + i * LANES;
        of_w[r] += sums[r][i] * load_f32(o->x + here, LANES);
        const vf out = sums[r][i] * d->w[s + r] + skip * load_f32(o->grad + here, LANES);
        if (s + r < d->steps)
            store(op->grad_x.data, at + (s + r) * op->grad_x.row_stride + column + i * LANES, (int)op->grad_x.is_bf16,
                  at_most(op->width - column - i * LANES, LANES), out);
    }
}

/* rows n, columns t: out += scale_t (state x^T), for the gradients of B and C; `along` also sums its product with C */
INLINE void shared_tile(float *out, const float *state, const float *right, const float *scale, const float *C,
                        float *along, int P, int T, int n, int column, const int vecs) {
    vf sums[TILE][VECS] = {};
    product(sums, vecs, state + n * P, P, 1, right + column, T, 0, P);
    UNROLL for (int i = 0; i < vecs; i++) {
        const int t = column + i * LANES;
        const vf factor = load_f32(scale + t, LANES);
        vf total = along ? load_f32(along + t, LANES) : (vf){};
        UNROLL for (int r = 0; r < TILE; r++) {
            const int at = (n + r) * T + t;
            const vf v = sums[r][i] * factor;
            store_f32(out + at, LANES, load_f32(out + at, LANES) + v);
            if (along) total += v * load_f32(C + at, LANES);
        }
        if (along) store_f32(along + t, LANES, total);
    }
}

/* rows of left^T or left times right, added to what `out` has transposed: (T, N) */
INLINE void closing_tile(float *out, const float *added, const float *left, int64_t row, int64_t step,
                         const float *right, int N, int t, int k, int end, int column, const int vecs) {
    vf sums[TILE][VECS] = {};
    product(sums, vecs, left, row, step, right + column, N, k, end);
    UNROLL for (int r = 0; r < TILE; r++) UNROLL for (int i = 0; i < vecs; i++) {
        const int at = (t + r) * N + column + i * LANES;
        store_f32(out + at, LANES, sums[r][i] + load_f32(added + at, LANES));
    }
}

static void ssd_backward_head(const Ssd *s, const Head *o, Decays *d, int64_t b, int64_t chunk, int64_t h) {
    const float skip = s->D ? s->D[h] : 0.0f;
    const int64_t row = b * s->length + chunk * CHUNK;
    const int64_t at = b * s->grad_x.batch_stride + chunk * CHUNK * s->grad_x.row_stride + h * s->width;
    memset(o->by_t, 0, o->T * sizeof(float));
    float total_w[CHUNK];
    for (int u = 0; u < o->T; u += TILE) {
        vf later[TILE] = {}, of_w[TILE] = {}, of_end[TILE] = {};
        const int first = u / LANES * LANES;
#define COLUMN(c, vecs) pairs_tile(o, d, u, c, later, vecs)
        EACH_COLUMN(first, o->T, COLUMN);
#undef COLUMN
#define COLUMN(c, vecs) inputs_tile(o, d, s, at, skip, u, c, of_w, of_end, vecs)
        EACH_COLUMN(0, o->P, COLUMN);
#undef COLUMN
        lane_sums(later, o->by_s + u, TILE);
        lane_sums(of_w, total_w + u, TILE);
        lane_sums(of_end, o->ended + u, TILE);
    }
    vf D = {}, through = {};
    float sum[2];
    for (int i = 0; i < o->T * o->P; i += LANES) D += load_f32(o->x + i, LANES) * load_f32(o->grad + i, LANES);
    for (int i = 0; i < o->N * o->P; i += LANES) through += load_f32(o->state + i, LANES) * load_f32(o->carry + i, LANES);
    lane_sums(&D, sum, 1), lane_sums(&through, sum + 1, 1);
    s->grad_D[(b * s->chunks + chunk) * s->heads + h] = sum[0];

    /* a decay acts on each pair around it, on what the state before gives after it, and what the steps before it give
     * to the state after */
    double after = 0, before = (double)sum[1] * d->whole;
    for (int t = 0; t < d->steps; t++) s->grad_w[(row + t) * s->heads + h] = total_w[t];
    float gives[CHUNK];
    for (int t = 0; t < d->steps; t++) gives[t] = (float)before, before += (double)o->ended[t] * d->w[t];
    for (int t = d->steps - 1; t >= 0; t--) {
        after += (double)o->by_t[t] - o->by_s[t];
        const int start = s->starts && s->starts[row + t];
        s->grad_a[(row + t) * s->heads + h] = start ? 0.0f : (float)(after + gives[t]);
    }
}

void ssd_backward(Ssd *s) {
    const int P = UP((int)s->width), N = UP((int)s->states);
    float x[CHUNK * P] LOCAL, grad[CHUNK * P] LOCAL, right_x[CHUNK * P] LOCAL, right_grad[CHUNK * P] LOCAL;
    float B[CHUNK * N] LOCAL, C[CHUNK * N] LOCAL, right_C[CHUNK * N] LOCAL, state[N * P] LOCAL, carry[N * P] LOCAL;
    float grad_B[CHUNK * N] LOCAL, grad_C[CHUNK * N] LOCAL, turned[CHUNK * N] LOCAL;
    float products[CHUNK * CHUNK] LOCAL, grad_products[CHUNK * CHUNK] LOCAL, weights[TILE * CHUNK] LOCAL;
    float by_t[CHUNK] LOCAL, by_s[CHUNK] LOCAL, ended[CHUNK] LOCAL;
    Decays d;
    for (int64_t unit; (unit = take(&s->next)) < s->batch * s->chunks * s->groups;) {
        const int64_t g = unit % s->groups, chunk = unit / s->groups % s->chunks, b = unit / s->groups / s->chunks;
        const int64_t row = chunk * CHUNK, each = s->heads / s->groups;
        const int steps = at_most(s->length - row, CHUNK), T = UP(steps);
        const int64_t at_B = b * s->B.batch_stride + row * s->B.row_stride + g * s->states;
        load_block(B, &s->B, at_B, (int)s->states, steps, T);
        load_block(C, &s->C, b * s->C.batch_stride + row * s->C.row_stride + g * s->states, (int)s->states, steps, T);
        transpose(right_C, C, T, N);
        for (int u = 0; u < T; u += TILE) {
#define COLUMN(c, vecs)                                                                             \
    do {                                                                                            \
        vf sums[TILE][VECS] = {};                                                                   \
        product(sums, vecs, B + u * N, N, 1, right_C + c, T, 0, N);                                 \
        UNROLL for (int r = 0; r < TILE; r++)                                                       \
            UNROLL for (int i = 0; i < vecs; i++) store_f32(products + (u + r) * T + c + i * LANES, LANES, sums[r][i]); \
    } while (0)
            EACH_COLUMN(u / LANES * LANES, T, COLUMN);
#undef COLUMN
        }
        memset(grad_products, 0, (size_t)T * T * 4);
        memset(grad_B, 0, (size_t)T * N * 4), memset(grad_C, 0, (size_t)T * N * 4);
        for (int64_t h = g * each; h < (g + 1) * each; h++) {
            load_decays(&d, s, b, h, row);
            const int64_t p = h * s->width;
            load_block(x, &s->x, b * s->x.batch_stride + row * s->x.row_stride + p, (int)s->width, steps, T);
            load_block(grad, &s->grad_y, b * s->grad_y.batch_stride + row * s->grad_y.row_stride + p, (int)s->width,
                       s->grad_y.data ? steps : 0, T);
            load_state(state, s->saved + state_at(s, b, chunk, h), s);
            load_state(carry, s->carries + state_at(s, b, chunk, h), s);
            transpose(right_x, x, T, P);
            transpose(right_grad, grad, T, P);
            const Head o = {T, P, N, x, grad, right_grad, B, right_C, products, state, carry, grad_products, weights,
                            by_t, by_s, ended};
            ssd_backward_head(s, &o, &d, b, chunk, h);
            float along[CHUNK] LOCAL = {}, scale[CHUNK] LOCAL;
            for (int t = 0; t < T; t++) scale[t] = d.w[t] * d.to_end[t];
            for (int n = 0; n < N; n += TILE) {
#define COLUMN(c, vecs) shared_tile(grad_C, state, right_grad, d.from_start, right_C, along, P, T, n, c, vecs)
                EACH_COLUMN(0, T, COLUMN);
#undef COLUMN
#define COLUMN(c, vecs) shared_tile(grad_B, carry, right_x, scale, NULL, NULL, P, T, n, c, vecs)
                EACH_COLUMN(0, T, COLUMN);
#undef COLUMN
            }
            double after = 0;
            for (int t = steps - 1; t >= 0; t--) {
                after += along[t];
                if (!(s->starts && s->starts[b * s->length + row + t]))
                    s->grad_a[(b * s->length + row + t) * s->heads + h] += (float)after;
            }
        }
        transpose(turned, grad_B, N, T);
        for (int u = 0; u < T; u += TILE) {
#define COLUMN(c, vecs) closing_tile(turned, turned, grad_products + u * T, T, 1, C, N, u, u / LANES * LANES, T, c, vecs)
            EACH_COLUMN(0, N, COLUMN);
#undef COLUMN
        }
        const int64_t rows = b * s->grad_B.batch_stride + row * s->grad_B.row_stride + g * s->states;
        store_block(&s->grad_B, rows, (int)s->states, steps, turned);
        transpose(turned, grad_C, N, T);
        for (int t = 0; t < T; t += TILE) {
#define COLUMN(c, vecs) closing_tile(turned, turned, grad_products + t, 1, T, B, N, t, 0, t + TILE, c, vecs)
            EACH_COLUMN(0, N, COLUMN);
#undef COLUMN
        }
        store_block(&s->grad_C, rows, (int)s->states, steps, turned);
    }
}

/* ---- decoding: one step; a head of a row is a unit, lanes are states ---- */

typedef struct {
    int64_t next;
    int64_t batch, heads, width, groups, states;
    Tensor x, B, C, y;           /* no rows: (batch, heads * width) or (batch, groups * states) */
    const float *a, *w;          /* (batch, heads) */
    const float *D;              /* (heads) or NULL */
    float *state;                /* (batch, heads, width, states), updated */
} SsdStep;

void ssd_step(SsdStep *s) {
    const int64_t whole = s->states / LANES * LANES;
    for (int64_t unit; (unit = take(&s->next)) < s->batch * s->heads;) {
        const int64_t b = unit / s->heads, h = unit % s->heads, n0 = h / (s->heads / s->groups) * s->states;
        const float decay = decay_of(splat(s->a[unit] * LOG2E))[0], skip = s->D ? s->D[h] : 0.0f;
        for (int64_t p0 = 0; p0 < s->width; p0 += LANES) {
            const int count = at_most(s->width - p0, LANES);
            const vf x = load(s->x.data, b * s->x.batch_stride + h * s->width + p0, (int)s->x.is_bf16, count);
            const vf u = x * s->w[unit];
            vf outs[LANES];
            memset(outs, 0, sizeof outs);
            for (int p = 0; p < count; p++) {
                float *state = s->state + (unit * s->width + p0 + p) * s->states;
                vf out = {};
                for (int64_t n = 0; n < s->states; n += LANES) {
                    const int lanes = n < whole ? LANES : (int)(s->states - n);
                    const vf B = load(s->B.data, b * s->B.batch_stride + n0 + n, (int)s->B.is_bf16, lanes);
                    const vf next = decay * load_f32(state + n, lanes) + u[p] * B;
                    store_f32(state + n, lanes, next);
                    out += next * load(s->C.data, b * s->C.batch_stride + n0 + n, (int)s->C.is_bf16, lanes);
                }
                outs[p] = out;
            }
            float totals[LANES];
            lane_sums(outs, totals, LANES);
            store(s->y.data, b * s->y.batch_stride + h * s->width + p0, (int)s->y.is_bf16, count,
                  load_f32(totals, LANES) + skip * x);
        }
    }
}
