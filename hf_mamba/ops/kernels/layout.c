/* Where each field of each structure lies, for ops/cpu/structures.py to compare with its own. The last entry of a table
 * has no name and holds the structure's size. */

#include <stddef.h>

typedef struct {
    const char *name;
    size_t offset;
} Field;

#define AT(name) {#name, offsetof(OF, name)}
#define END {NULL, sizeof(OF)}

#define OF Tensor
const Field Tensor_layout[] = {AT(data), AT(batch_stride), AT(row_stride), AT(is_bf16), END};
#undef OF

#define OF Scan
const Field Scan_layout[] = {
    AT(next), AT(batch), AT(length), AT(width), AT(chunks), AT(softplus),
    AT(x), AT(dt), AT(z), AT(B), AT(C), AT(y),
    AT(A), AT(D), AT(bias), AT(initial), AT(starts), AT(final), AT(saved),
    AT(grad_y), AT(grad_x), AT(grad_dt), AT(grad_z),
    AT(grad_final), AT(grad_initial), AT(grad_A), AT(grad_D), AT(grad_bias), AT(grad_B), AT(grad_C), END,
};
#undef OF

#define OF Conv
const Field Conv_layout[] = {
    AT(next), AT(batch), AT(length), AT(width), AT(taps), AT(silu), AT(x), AT(y),
    AT(weight), AT(bias), AT(initial), AT(starts), AT(grad_y), AT(grad_x), AT(grad_weight), AT(grad_initial), END,
};
#undef OF

#define OF Step
const Field Step_layout[] = {
    AT(next), AT(batch), AT(width), AT(softplus), AT(log_A),
    AT(x), AT(dt), AT(z), AT(B), AT(C), AT(y), AT(A), AT(D), AT(bias), AT(state), END,
};
#undef OF

#define OF ConvStep
const Field ConvStep_layout[] = {
    AT(next), AT(batch), AT(width), AT(taps), AT(silu), AT(x), AT(y), AT(weight), AT(bias), AT(state), END,
};
#undef OF

#define OF Norm
const Field Norm_layout[] = {
    AT(next), AT(rows), AT(width), AT(eps), AT(x), AT(weight), AT(y), AT(residual), AT(sum), END,
};
#undef OF

#define OF Linear
const Field Linear_layout[] = {
    AT(next), AT(rows), AT(width), AT(count), AT(weight), AT(bias), AT(x), AT(y), END,
};
#undef OF

#define OF Ssd
const Field Ssd_layout[] = {
    AT(next), AT(batch), AT(length), AT(heads), AT(width), AT(groups), AT(states), AT(chunks),
    AT(x), AT(B), AT(C), AT(y), AT(a), AT(w), AT(D), AT(initial), AT(starts), AT(products), AT(final), AT(saved),
    AT(grad_y), AT(grad_x), AT(grad_B), AT(grad_C),
    AT(grad_final), AT(carries), AT(grad_initial), AT(grad_a), AT(grad_w), AT(grad_D), END,
};
#undef OF

#define OF SsdStep
const Field SsdStep_layout[] = {
    AT(next), AT(batch), AT(heads), AT(width), AT(groups), AT(states),
    AT(x), AT(B), AT(C), AT(y), AT(a), AT(w), AT(D), AT(state), END,
};
#undef OF

#define OF GatedNorm
const Field GatedNorm_layout[] = {
    AT(next), AT(rows), AT(width), AT(groups), AT(eps), AT(x), AT(z), AT(weight), AT(y), AT(scale),
    AT(grad_y), AT(grad_x), AT(grad_z), AT(grad_weight), END,
};
#undef OF
