// The parts of a training step that are not matrix products, for one CPU core.  kernels.py
// compiles and calls them.  Plain loops: the compiler makes vectors of them, of expf too.
// Activations are bfloat16, kept as uint16_t; sums and the residual stream are float32.

#include <cmath>
#include <cstdint>

namespace {

inline float widen(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }

inline uint16_t narrow(float x) {  // rounds to nearest, ties to even
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// GELU by its tanh formula, with 0.5 * (1 + tanh(u)) written as sigmoid(2u).
constexpr float SCALE = 1.5957691216057308f, CUBE = 0.044715f;

// Bounded, as the compiler's fast division makes a nan of 1 / infinity.
inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-(x > -80.0f ? x : -80.0f))); }

// A number for each place and seed; `keep` of them in 2^32 stay.
inline uint32_t scatter(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

}  // namespace

extern "C" {

void gelu(const uint16_t *x, uint16_t *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float v = widen(x[i]);
        y[i] = narrow(v * sigmoid(SCALE * (v + CUBE * v * v * v)));
    }
}

void gelu_backward(const uint16_t *x, const uint16_t *dy, uint16_t *dx, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float v = widen(x[i]), s = sigmoid(SCALE * (v + CUBE * v * v * v));
        dx[i] = narrow(widen(dy[i]) * (s + v * s * (1.0f - s) * SCALE * (1.0f + 3.0f * CUBE * v * v)));
    }
}

// Causal softmax of scale * x in place: x is [batch, rows, width], and row r sees r + first + 1 keys.
void softmax(uint16_t *x, float scale, int64_t batch, int64_t rows, int64_t width, int64_t first) {
    float e[4096];
    for (int64_t b = 0; b < batch * rows; b++, x += width) {
        int64_t seen = b % rows + first + 1;
        float top = -INFINITY, sum = 0.0f;
        for (int64_t i = 0; i < seen; i++) { e[i] = widen(x[i]) * scale; top = e[i] > top ? e[i] : top; }
        for (int64_t i = 0; i < seen; i++) { e[i] = expf(e[i] - top); sum += e[i]; }
        float inverse = 1.0f / sum;
        for (int64_t i = 0; i < seen; i++) x[i] = narrow(e[i] * inverse);
        for (int64_t i = seen; i < width; i++) x[i] = 0;
    }
}

// dp, the gradient of the probabilities p, becomes that of the scores, in place.
void softmax_backward(const uint16_t *p, uint16_t *dp, float scale, int64_t batch, int64_t rows, int64_t width,
                      int64_t first) {
    for (int64_t b = 0; b < batch * rows; b++, p += width, dp += width) {
        int64_t seen = b % rows + first + 1;
        float dot = 0.0f;
        for (int64_t i = 0; i < seen; i++) dot += widen(p[i]) * widen(dp[i]);
        for (int64_t i = 0; i < seen; i++) dp[i] = narrow(widen(p[i]) * (widen(dp[i]) - dot) * scale);
        for (int64_t i = seen; i < width; i++) dp[i] = 0;
    }
}

void layer_norm(const float *x, const float *g, const float *b, uint16_t *y, float *stats, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        float mean = 0.0f, square = 0.0f;
        for (int64_t i = 0; i < n; i++) mean += x[i];
        mean /= n;
        for (int64_t i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
        float inverse = 1.0f / sqrtf(square / n + 1e-5f);
        for (int64_t i = 0; i < n; i++) y[i] = narrow((x[i] - mean) * inverse * g[i] + b[i]);
        stats[2 * r] = mean, stats[2 * r + 1] = inverse;
    }
}

// dg and db come in as zeros.
void layer_norm_backward(const float *x, const float *g, const uint16_t *dy, const float *stats, float *dx, float *dg,
                         float *db, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, x += n, dy += n, dx += n) {
        float mean = stats[2 * r], inverse = stats[2 * r + 1], sum = 0.0f, dot = 0.0f;
        for (int64_t i = 0; i < n; i++) {
            float d = widen(dy[i]), z = (x[i] - mean) * inverse;
            dg[i] += d * z, db[i] += d;
            sum += d * g[i], dot += d * g[i] * z;
        }
        sum /= n, dot /= n;
        for (int64_t i = 0; i < n; i++)
            dx[i] = inverse * (widen(dy[i]) * g[i] - sum - (x[i] - mean) * inverse * dot);
    }
}

// out = x + dropout(y); `keep` is the kept share of 2^32, 0 for all.
void add(const float *x, const uint16_t *y, float *out, int64_t n, uint32_t seed, uint32_t keep, float scale) {
    if (!keep) {
        for (int64_t i = 0; i < n; i++) out[i] = x[i] + widen(y[i]);
        return;
    }
    for (int64_t i = 0; i < n; i++) out[i] = x[i] + (scatter(uint32_t(i) ^ seed) < keep ? scale * widen(y[i]) : 0.0f);
}

void add_backward(const float *dout, uint16_t *dy, int64_t n, uint32_t seed, uint32_t keep, float scale) {
    if (!keep) {
        for (int64_t i = 0; i < n; i++) dy[i] = narrow(dout[i]);
        return;
    }
    for (int64_t i = 0; i < n; i++) dy[i] = narrow(scatter(uint32_t(i) ^ seed) < keep ? scale * dout[i] : 0.0f);
}

// The sum of the rows' cross-entropies; the logits become the gradient of their mean.
double cross_entropy(uint16_t *x, const int64_t *target, int64_t rows, int64_t width) {
    static float e[65536];
    double loss = 0.0;
    for (int64_t r = 0; r < rows; r++, x += width) {
        float top = -INFINITY, sum = 0.0f;
        for (int64_t i = 0; i < width; i++) { float v = widen(x[i]); top = v > top ? v : top; }
        float aim = widen(x[target[r]]) - top;
        for (int64_t i = 0; i < width; i++) { e[i] = expf(widen(x[i]) - top); sum += e[i]; }
        loss += logf(sum) - aim;
        float scale = 1.0f / (sum * rows);
        for (int64_t i = 0; i < width; i++) x[i] = narrow(e[i] * scale);
        x[target[r]] = narrow(e[target[r]] * scale - 1.0f / rows);
    }
    return loss;
}

}
