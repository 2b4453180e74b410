// Rows of alpha-entmax and their vector-Jacobian product. Only scores within 1/(alpha-1) of the maximum can get a
// probability: they are collected first, and all arithmetic on them is in double, so results are rounded once.
#include "common.h"

#include <algorithm>
#include <limits>

namespace danlu {
namespace {

constexpr int64_t BLOCK = 64;
// Rows are handed to threads in groups of about this many elements.
constexpr int64_t GROUP = 1 << 15;
// The product of the residual and the slope falls by 4 in every Newton step, so 100 is out of reach.
constexpr int STEPS = 100;
// Of the distance of the largest score from the threshold: what is nearer to it is at it, up to rounding.
constexpr double EDGE = 1e-15;

template <class T>
struct Scratch {
  std::vector<arithmetic<T>> maxima;
  std::vector<double> value, weight;
  std::vector<int64_t> index;

  explicit Scratch(int64_t n) : maxima(n / BLOCK + 1), value(n + 1), weight(n + 1), index(n + 1) {}
};

template <class T>
inline void zeros(T* row, int64_t n) {
  std::memset(static_cast<void*>(row), 0, static_cast<size_t>(n) * sizeof(T));
}

// The largest score of every block; false if there is a NaN.
template <class T, class F = arithmetic<T>>
inline bool block_maxima(const T* x, int64_t n, F* maxima) {
  int bad = 0;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t count = n - begin < BLOCK ? n - begin : BLOCK;
    F largest = -std::numeric_limits<F>::infinity();
#pragma omp simd reduction(max : largest) reduction(| : bad)
    for (int64_t i = 0; i < count; ++i) {
      const F value = load(x[begin + i]);
      largest = value > largest ? value : largest;
      bad |= value != value;
    }
    *maxima++ = largest;
  }
  return !bad;
}

inline double integer_power(double base, int exponent) {
  double result = 1;
  for (int i = 0; i < exponent; ++i) result *= base;
  return result;
}

// d^r for the exponents that are frequent, without a call of pow: r = 1, 2 (sparsemax, 1.5), 3, 4 (1.25).
struct Power {
  double r;
  int whole;

  explicit Power(double r) : r(r), whole(r == 1 || r == 2 || r == 3 || r == 4 ? static_cast<int>(r) : 0) {}

  double operator()(double d) const { return whole ? integer_power(d, whole) : std::pow(d, r); }
};

// S = sum of d^r and T = sum of d^(r-1) over d = 1 + v z > 0.
template <int whole>
inline void sums(const double* z, int64_t n, double v, double& total, double& slope) {
  double S = 0, T = 0;
#pragma omp simd reduction(+ : S, T)
  for (int64_t i = 0; i < n; ++i) {
    const double distance = 1 + v * z[i];
    const double d = distance > 0 ? distance : 0;
    double power = d > 0 ? 1 : 0;
    for (int j = 1; j < whole; ++j) power *= d;
    T += power;
    S += power * d;
  }
  total = S, slope = T;
}

inline void sums_by_pow(const double* z, int64_t n, double v, double r, double& total, double& slope) {
  double S = 0, T = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = 1 + v * z[i];
    if (d > 0) {
      const double power = std::pow(d, r - 1);
      T += power, S += power * d;
    }
  }
  total = S, slope = T;
}

inline void sums(const double* z, int64_t n, double v, const Power& power, double& total, double& slope) {
  switch (power.whole) {
    case 1: return sums<1>(z, n, v, total, slope);
    case 2: return sums<2>(z, n, v, total, slope);
    case 3: return sums<3>(z, n, v, total, slope);
    case 4: return sums<4>(z, n, v, total, slope);
    default: return sums_by_pow(z, n, v, power.r, total, slope);
  }
}

// v with sum [1 + v z]_+^(1/beta) = v^(1/beta), for z = beta (x - max x); 1/v is how far the largest is from the
// threshold. That distance is small where many scores are nearly equal, and the threshold would lose its digits.
inline double solve(const double* z, int64_t n, double beta, const Power& power) {
  double total, slope;
  if (beta > 1) {
    // Not convex: halve the interval of log v.
    double low = 0, high = std::min(beta * std::log(static_cast<double>(n)), 700.0);
    for (int i = 0; i < STEPS && high - low > 1e-16 * high; ++i) {
      const double middle = 0.5 * (low + high);
      sums(z, n, std::exp(middle), power, total, slope);
      (beta * std::log(total) >= middle ? low : high) = middle;
    }
    return std::exp(low);
  }
  double v = 1;
  for (int i = 0; i < STEPS; ++i) {
    sums(z, n, v, power, total, slope);
    // Newton on the norm: monotone from the left.
    const double norm = beta == 1 ? total : std::exp(beta * std::log(total));
    const double step = (norm - v) / (1 + norm * (slope / total - 1) / v);
    if (!(step > 0)) break;
    v += step;
    if (step < 1e-15 * v) break;
  }
  return v;
}

template <class T, class F = arithmetic<T>>
void softmax_row(const T* x, T* p, int64_t n, F largest, Scratch<T>& scratch) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i)
    total += scratch.value[i] = std::exp(static_cast<double>(load(x[i])) - static_cast<double>(largest));
  for (int64_t i = 0; i < n; ++i) store(p[i], static_cast<F>(scratch.value[i] / total));
}

template <class T, class F = arithmetic<T>>
void forward_row(const T* x, T* p, int64_t n, double alpha, Scratch<T>& scratch) {
  constexpr F infinity = std::numeric_limits<F>::infinity();
  F* maxima = scratch.maxima.data();
  if (!block_maxima(x, n, maxima) || !(alpha >= 1)) {
    for (int64_t i = 0; i < n; ++i) store(p[i], std::numeric_limits<F>::quiet_NaN());
    return;
  }
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  F largest = -infinity;
  for (int64_t b = 0; b < blocks; ++b) largest = maxima[b] > largest ? maxima[b] : largest;
  if (largest == infinity) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += load(x[i]) == infinity;
    for (int64_t i = 0; i < n; ++i) store(p[i], load(x[i]) == infinity ? F(1) / static_cast<F>(count) : F(0));
    return;
  }
  if (largest == -infinity) return zeros(p, n);
  if (alpha == 1) return softmax_row(x, p, n, largest, scratch);

  const double beta = alpha - 1, m = static_cast<double>(largest);
  // Rounded down: a candidate too many gets probability 0.
  const F cut = std::nextafter(static_cast<F>(m - 1 / beta), -infinity);
  double* z = scratch.value.data();
  int64_t *index = scratch.index.data(), count = 0;
  zeros(p, n);
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(maxima[b] > cut)) continue;
    const int64_t end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
    for (int64_t i = b * BLOCK; i < end; ++i) {
      const F value = load(x[i]);
      z[count] = beta * (static_cast<double>(value) - m);
      index[count] = i;
      count += value > cut;
    }
  }
  const Power power(1 / beta);
  const double v = solve(z, count, beta, power);
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = 1 + v * z[i];
    total += z[i] = d > EDGE ? power(d) : 0;
  }
  for (int64_t i = 0; i < count; ++i) store(p[index[i]], static_cast<F>(z[i] / total));
}

// dx = s (v - <s, v> / sum s), with s = p^(2-alpha) where p is not 0.
template <class T, class F = arithmetic<T>>
void vjp_row(const T* p, const T* v, T* dx, int64_t n, double alpha, Scratch<T>& scratch) {
  using Word = typename Magnitude<T>::Word;
  double *s = scratch.value.data(), *cotangent = scratch.weight.data();
  int64_t *index = scratch.index.data(), count = 0;
  zeros(dx, n);
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
    Word any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = begin; i < end; ++i) any |= bits_as<Word>(p[i]);
    if (!any) continue;
    for (int64_t i = begin; i < end; ++i) {
      // Not read back from the array: the next place would wait for the store.
      const double probability = static_cast<double>(load(p[i]));
      s[count] = probability;
      cotangent[count] = static_cast<double>(load(v[i]));
      index[count] = i;
      count += probability != 0;
    }
  }
  double total = 0, mean = 0;
  if (alpha == 2) {
    for (int64_t i = 0; i < count; ++i) s[i] = s[i] == s[i] ? 1 : s[i];
  } else if (alpha == 1.5) {
    for (int64_t i = 0; i < count; ++i) s[i] = std::sqrt(s[i]);
  } else if (alpha != 1) {
    for (int64_t i = 0; i < count; ++i) s[i] = std::pow(s[i], 2 - alpha);
  }
#pragma omp simd reduction(+ : total, mean)
  for (int64_t i = 0; i < count; ++i) total += s[i], mean += s[i] * cotangent[i];
  mean /= total;
  for (int64_t i = 0; i < count; ++i) store(dx[index[i]], static_cast<F>(s[i] * (cotangent[i] - mean)));
}

template <class T, class Row>
void over_rows(int64_t rows, int64_t n, int threads, const Row& row) {
  const int64_t group = n < GROUP ? GROUP / n : 1;
  spread((rows + group - 1) / group, threads, [&](int64_t g) {
    Scratch<T> scratch(n);
    const int64_t end = (g + 1) * group < rows ? (g + 1) * group : rows;
    for (int64_t r = g * group; r < end; ++r) row(r, scratch);
  });
}

template <class T>
void run(int64_t rows, int64_t n, const void* first, const void* second, void* out, double alpha, const double* alphas,
         int threads) {
  const T *a = static_cast<const T*>(first), *b = static_cast<const T*>(second);
  T* result = static_cast<T*>(out);
  over_rows<T>(rows, n, threads, [&](int64_t r, Scratch<T>& scratch) {
    const double chosen = alphas ? alphas[r] : alpha;
    if (b)
      vjp_row(a + r * n, b + r * n, result + r * n, n, chosen, scratch);
    else
      forward_row(a + r * n, result + r * n, n, chosen, scratch);
  });
}

}  // namespace
}  // namespace danlu

// The map of the rows of `first` if there is no `second`, else the product of `second` with the Jacobian at the
// probabilities `first`. `alphas` holds one number per row, or is null.
extern "C" int danlu_entmax(int dtype, int64_t rows, int64_t n, const void* first, const void* second, void* out,
                            double alpha, const double* alphas, int threads) {
  using namespace danlu;
  switch (dtype) {
    case 0: run<float>(rows, n, first, second, out, alpha, alphas, threads); return 1;
    case 1: run<double>(rows, n, first, second, out, alpha, alphas, threads); return 1;
    case 2: run<bfloat16>(rows, n, first, second, out, alpha, alphas, threads); return 1;
    case 3: run<float16>(rows, n, first, second, out, alpha, alphas, threads); return 1;
    default: return 0;
  }
}
