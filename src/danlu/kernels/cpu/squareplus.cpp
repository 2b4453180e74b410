// SquarePlus and its derivative from the output alone, elementwise.
#include "common.h"

#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using namespace danlu;

// From here on sqrt(x^2 + b) is |x| for every b up to 1e20, and the squares below it are finite in float.
constexpr double FAR = 1152921504606846976.0;  // 2^60
// A sum of squares that is still divided by.
template <class F>
constexpr F LEAST_SQUARE = std::is_same_v<F, double> ? F(1e-290) : F(1e-30);
// Elements of half dtypes that are converted at a time.
constexpr int64_t BLOCK = 512;

template <class F>
inline F clipped(F magnitude) {
  return magnitude > F(FAR) ? F(FAR) : magnitude;
}

template <class F>
void forward_plain(const F* x, F* y, int64_t n, F b) {
  const F quarter = b * F(0.25);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    F magnitude = std::fabs(x[i]), near = clipped(magnitude);
    F root = std::sqrt(near * near + b);
    // In this order, so that NaN stays.
    root = root > magnitude ? root : magnitude;
    F upper = F(0.5) * magnitude + F(0.5) * root;
    F lower = quarter / upper;
    y[i] = x[i] < F(0) ? lower : upper;
  }
}

// Returns the sum of g y / (4 y^2 + b), which is the gradient of b.
template <bool relu, class F>
F backward_plain(const F* g, const F* y, F* dx, int64_t n, F b) {
  const F quarter = b * F(0.25) > LEAST_SQUARE<F> ? b * F(0.25) : LEAST_SQUARE<F>;
  F total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    // First, since the result may be written over the gradient.
    F grad = g[i], near = clipped(y[i]), square = near * near;
    // The output is 0 where it is too small for the dtype, or the function is ReLU: slope 0.
    F inverse = near == F(0) ? F(0) : F(1) / (square + quarter);
    // The slope of ReLU is 1 also where squares vanish; NaN stays.
    dx[i] = grad * (relu ? (near == F(0) ? F(0) : F(0) * near + F(1)) : square * inverse);
    total += grad * (near * inverse);
  }
  return F(0.25) * total;
}

#ifdef __AVX512F__
// Square root and division wait for the same slow unit: one of them by an estimate and a Newton step, as exact to an ulp.
void forward_vector(const float* x, float* y, int64_t n, float b) {
  const __m512 half = _mm512_set1_ps(0.5f), far = _mm512_set1_ps(static_cast<float>(FAR)), zero = _mm512_setzero_ps();
  const __m512 all_b = _mm512_set1_ps(b), quarter = _mm512_set1_ps(0.25f * b);
  auto sixteen = [&](__m512 value) {
    __m512 magnitude = _mm512_abs_ps(value);
    // Minimum and maximum return their second argument if either is NaN.
    __m512 near = _mm512_min_ps(far, magnitude);
    __m512 square = _mm512_fmadd_ps(near, near, all_b);
    __m512 inverse = _mm512_rsqrt14_ps(square);
    __m512 root = _mm512_mul_ps(square, inverse);
    __m512 rest = _mm512_mul_ps(_mm512_fnmadd_ps(root, root, square), inverse);
    root = _mm512_max_ps(_mm512_fmadd_ps(rest, half, root), magnitude);
    __m512 upper = _mm512_fmadd_ps(half, magnitude, _mm512_mul_ps(half, root));
    __m512 lower = _mm512_div_ps(quarter, upper);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(value, zero, _CMP_LT_OQ), upper, lower);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(y + i, sixteen(_mm512_loadu_ps(x + i)));
  if (i < n) {
    __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1u);
    _mm512_mask_storeu_ps(y + i, rest, sixteen(_mm512_maskz_loadu_ps(rest, x + i)));
  }
}
#endif

template <class F>
void forward_relu(const F* x, F* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] < F(0) ? F(0) : std::fabs(x[i]);
}

inline void forward_of(const float* x, float* y, int64_t n, float b) {
  if (b == 0) return forward_relu(x, y, n);
#ifdef __AVX512F__
  // The estimate needs a square of normal size.
  if (b >= 1e-30f) return forward_vector(x, y, n, b);
#endif
  forward_plain(x, y, n, b);
}
inline void forward_of(const double* x, double* y, int64_t n, double b) {
  if (b == 0) return forward_relu(x, y, n);
  forward_plain(x, y, n, b);
}

template <class P>
void forward_run(const P* x, P* y, int64_t n, double b) {
  using F = arithmetic<P>;
  if constexpr (std::is_same_v<P, F>) {
    forward_of(x, y, n, static_cast<F>(b));
  } else {
    F buffer[BLOCK];
    for (int64_t start = 0; start < n; start += BLOCK) {
      const int64_t count = n - start < BLOCK ? n - start : BLOCK;
      for (int64_t i = 0; i < count; ++i) buffer[i] = load(x[start + i]);
      forward_of(buffer, buffer, count, static_cast<F>(b));
      for (int64_t i = 0; i < count; ++i) store(y[start + i], buffer[i]);
    }
  }
}

template <class F>
F backward_of(const F* g, const F* y, F* dx, int64_t n, F b) {
  return b == F(0) ? backward_plain<true>(g, y, dx, n, b) : backward_plain<false>(g, y, dx, n, b);
}

template <class P>
double backward_run(const P* g, const P* y, P* dx, int64_t n, double b) {
  using F = arithmetic<P>;
  double total = 0;
  F grad[BLOCK], value[BLOCK];
  // In blocks also without conversion: sums of a block are in the arithmetic's precision, those of blocks in double.
  const int64_t size = std::is_same_v<P, F> ? 4096 : BLOCK;
  for (int64_t start = 0; start < n; start += size) {
    const int64_t count = n - start < size ? n - start : size;
    if constexpr (std::is_same_v<P, F>) {
      total += backward_of(g + start, y + start, dx + start, count, static_cast<F>(b));
    } else {
      for (int64_t i = 0; i < count; ++i) grad[i] = load(g[start + i]);
      for (int64_t i = 0; i < count; ++i) value[i] = load(y[start + i]);
      total += backward_of(grad, value, grad, count, static_cast<F>(b));
      for (int64_t i = 0; i < count; ++i) store(dx[start + i], grad[i]);
    }
  }
  return total;
}

template <class P>
void forward(const void* x, void* y, int64_t n, double b, int threads) {
  const P* in = static_cast<const P*>(x);
  P* out = static_cast<P*>(y);
  const int64_t count = (n + PIECE - 1) / PIECE;
  spread(count, threads, [&](int64_t i) {
    const int64_t begin = i * PIECE, end = begin + PIECE < n ? begin + PIECE : n;
    forward_run(in + begin, out + begin, end - begin, b);
  });
}

template <class P>
double backward(const void* g, const void* y, void* dx, int64_t n, double b, int threads) {
  const P* grad = static_cast<const P*>(g);
  const P* value = static_cast<const P*>(y);
  P* out = static_cast<P*>(dx);
  const int64_t count = (n + PIECE - 1) / PIECE;
  // One sum per piece, added in order: the same on any number of threads.
  std::vector<double> sums(count);
  spread(count, threads, [&](int64_t i) {
    const int64_t begin = i * PIECE, end = begin + PIECE < n ? begin + PIECE : n;
    sums[i] = backward_run(grad + begin, value + begin, out + begin, end - begin, b);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

extern "C" int danlu_squareplus(int dtype, const void* x, void* y, int64_t n, double b, int threads) {
  if (dtype == 0) return forward<float>(x, y, n, b, threads), 1;
  if (dtype == 1) return forward<double>(x, y, n, b, threads), 1;
  if (dtype == 2) return forward<bfloat16>(x, y, n, b, threads), 1;
  if (dtype == 3) return forward<float16>(x, y, n, b, threads), 1;
  return 0;
}

extern "C" int danlu_squareplus_backward(int dtype, const void* g, const void* y, void* dx, int64_t n, double b,
                                         int threads, double* d_b) {
  if (dtype == 0) return *d_b = backward<float>(g, y, dx, n, b, threads), 1;
  if (dtype == 1) return *d_b = backward<double>(g, y, dx, n, b, threads), 1;
  if (dtype == 2) return *d_b = backward<bfloat16>(g, y, dx, n, b, threads), 1;
  if (dtype == 3) return *d_b = backward<float16>(g, y, dx, n, b, threads), 1;
  return 0;
}
