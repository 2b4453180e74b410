// Rows of smooth top-k, p = f(x - lambda) with sum p = k, and their vector-Jacobian product. A row is scanned a few
// times by a Newton's method that stays inside a bracket; nothing is sorted. And rows of hard top-k, exactly.
#include "common.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace danlu {
namespace {

enum Method { EXP = 0, LAPLACE = 1, SIGMOID = 2, CLIP = 3 };

constexpr int STEPS = 100;
// Repetitions of the last step, which is exact but for sigmoid, where it halves the error, or if a score changes sides.
constexpr int MENDS = 8;
// Lanes of the arithmetic's precision within a strip, double beyond.
constexpr int64_t STRIP = 4096;
// Rows are handed to threads in groups of about this many elements.
constexpr int64_t GROUP = 1 << 15;
// Thresholds this far below the largest score are found a second time, with differences to the first.
constexpr double NEAR = 8;
// Of one arithmetic, e^-LEAST is 0 beside 1.
template <class F>
constexpr F LEAST = std::is_same_v<F, double> ? 700 : 80;

template <class F>
inline F exp_down(F x) {
  const F e = exponential(x < -LEAST<F> ? -LEAST<F> : x);
  return x < -LEAST<F> ? F(0) : e;
}

// The same down to the least number that there is.
template <class F>
inline F exp_tail(F x) {
  const bool deep = x < F(-40);
  const F e = exp_down(deep ? x + F(40) : x);
  return deep ? e * F(4.248354255291589e-18) : e;
}

template <class F, int method, bool tail = false>
inline F value_of(F d) {
  const F low = d < 0 ? d : -d;
  if constexpr (method == CLIP) return d < 0 ? F(0) : (d > 1 ? F(1) : d);
  const F small = tail ? exp_tail(low) : exp_down(low);
  if constexpr (method == EXP) return d < 0 ? small : F(1);
  if constexpr (method == LAPLACE) return d < 0 ? F(0.5) * small : F(1) - F(0.5) * small;
  const F upper = F(1) / (F(1) + small);
  return d < 0 ? small * upper : upper;
}

template <class F, int method>
inline F slope_of(F p) {
  if constexpr (method == EXP) return p < 1 ? p : F(0);
  if constexpr (method == LAPLACE) return p < F(1) - p ? p : F(1) - p;
  if constexpr (method == SIGMOID) return p * (F(1) - p);
  return p > 0 && p < 1 ? F(1) : F(0);
}

template <class F, int method>
inline void sums(const F* z, int64_t n, F at, double& value, double& slope) {
  value = slope = 0;
  for (int64_t begin = 0; begin < n; begin += STRIP) {
    const int64_t end = begin + STRIP < n ? begin + STRIP : n;
    F v = 0, s = 0;
#pragma omp simd reduction(+ : v, s)
    for (int64_t i = begin; i < end; ++i) {
      const F p = value_of<F, method>(z[i] - at);
      v += p;
      s += slope_of<F, method>(p);
    }
    value += v, slope += s;
  }
}

// log of the sum of e^(sign (z - center)), for center so that no term is above 1.
template <class F>
inline double log_sum(const F* z, int64_t n, F sign, F center) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += STRIP) {
    const int64_t end = begin + STRIP < n ? begin + STRIP : n;
    F part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += exp_down(sign * (z[i] - center));
    total += part;
  }
  return sign * center + std::log(total);
}

// What is left of the threshold once the entries above `at` are known. Their distances to 1 are summed, not their
// values, so that nothing cancels: with the sums A above and B below, B e^-s - A e^s = k - m is solved for the step s.
// Of exponentials (laplace, and exp, where A is 0) that is exact; of sigmoid the sums change with the step, and the
// error is less than halved, or vanishes where all are far from the threshold.
struct Mended {
  double at;
  bool exact;
};
template <class F, int method>
inline Mended mend(const F* z, int64_t n, double k, double at) {
  // The nearest entries on both sides, so that a wide gap does not lose their exponentials.
  const F inf = std::numeric_limits<F>::infinity(), split = static_cast<F>(at);
  F above = inf, below = -inf;
  int64_t m = 0;
#pragma omp simd reduction(min : above) reduction(max : below) reduction(+ : m)
  for (int64_t i = 0; i < n; ++i) {
    const bool over = z[i] > split;
    m += over;
    above = over && z[i] < above ? z[i] : above;
    below = !over && z[i] > below ? z[i] : below;
  }
  double a = 0, b = 0;
  for (int64_t begin = 0; begin < n; begin += STRIP) {
    const int64_t end = begin + STRIP < n ? begin + STRIP : n;
    F pa = 0, pb = 0;
#pragma omp simd reduction(+ : pa, pb)
    for (int64_t i = begin; i < end; ++i) {
      const bool over = z[i] > split;
      F e = exp_down(over ? above - z[i] : z[i] - below);
      if constexpr (method == SIGMOID) e *= F(2) / (F(1) + exp_down(over ? split - z[i] : z[i] - split));
      pa += over ? e : F(0);
      pb += over ? F(0) : e;
    }
    a += pa, b += pb;
  }
  // Logarithms of A and B relative to `split`.
  const double log_a = m > 0 ? std::log(a) - (static_cast<double>(above) - split) : 0;
  const double log_b = m < n ? std::log(b) + (static_cast<double>(below) - split) : 0;
  const double open = k - static_cast<double>(m);
  if constexpr (method == EXP) {
    // Between the k-th largest and the next everything is as good in sums; the answer is next to the k-th largest.
    if (open <= 0) return {above, false};
    return {m < n ? split + log_b - std::log(open) : at, true};
  }
  const double product = m > 0 && m < n ? std::exp(log_a + log_b) : 0, root = std::sqrt(open * open + product);
  double step;
  if (open > 0) {
    step = log_b - std::log(root + open);
  } else if (open < 0) {
    step = std::log(root - open) - log_a;
  } else {
    step = 0.5 * (log_b - log_a);
  }
  const double next = std::isfinite(step) ? split + step : at;
  // Not if an entry has changed sides.
  return {next, method == LAPLACE && next <= above && next >= below};
}

// The threshold of clip from the entries between its ends, in double.
template <class F>
inline double mend_clip(const F* z, int64_t n, double k, double at) {
  double total = 0;
  int64_t full = 0, between = 0;
#pragma omp simd reduction(+ : total, full, between)
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(z[i]) - at;
    const bool inside = d > 0 && d < 1;
    full += d >= 1;
    between += inside;
    total += inside ? static_cast<double>(z[i]) : 0.0;
  }
  return between ? (total + static_cast<double>(full) - k) / static_cast<double>(between) : at;
}

// The threshold within [left, right], by Newton's method from `at`.
template <class F, int method>
inline double newton(const F* z, int64_t n, double k, double left, double right, double at) {
  const double unit = std::numeric_limits<F>::epsilon();
  // The closed form of laplace mends what is left.
  const double enough = method == LAPLACE ? 1e-3 : 0;
  for (int i = 0; i < STEPS; ++i) {
    double value, slope;
    sums<F, method>(z, n, static_cast<F>(at), value, slope);
    const double excess = value - k;
    if (std::fabs(excess) <= enough * slope) break;
    (excess > 0 ? left : right) = at;
    const double wanted = at + excess / slope;
    const double next = slope > 0 && wanted > left && wanted < right ? wanted : 0.5 * left + 0.5 * right;
    const bool still = std::fabs(next - at) <= unit * (std::fabs(at) + 0.25);
    at = next;
    if (still) break;
  }
  if constexpr (method == CLIP) return mend_clip(z, n, k, at);
  for (int i = 0; i < MENDS; ++i) {
    const auto [next, exact] = mend<F, method>(z, n, k, at);
    const bool still = std::fabs(next - at) <= 4 * unit * (std::fabs(at) + 0.25);
    at = next;
    if (exact || (still && method != EXP)) break;
  }
  return at;
}

// The same without a bracket: z holds n finite entries, the largest 0 and the least `lowest`, and 0 < k < n.
template <class F, int method>
inline double solve(const F* z, int64_t n, double k, F lowest) {
  double left, right;
  if constexpr (method == EXP) {
    left = lowest, right = log_sum(z, n, F(1), F(0)) - std::log(k);
  } else if constexpr (method == CLIP) {
    left = lowest - 1.0, right = 0;
  } else {
    // f is at most e^d (half of it for laplace), and 1 - f as much on the other side.
    const double twice = method == LAPLACE ? std::log(2.0) : 0;
    left = std::log(static_cast<double>(n) - k) + twice - log_sum(z, n, F(-1), lowest);
    right = log_sum(z, n, F(1), F(0)) - std::log(k) - twice;
  }
  const double slack = 4 * std::numeric_limits<F>::epsilon() * (1 + std::fabs(left) + std::fabs(right));
  left = (left < right ? left : right) - slack, right += slack;
  return newton<F, method>(z, n, k, left, right, right);
}

// A difference of finite numbers at both ends of the range is finite.
template <class F>
inline F far_below(F difference) {
  const F least = std::numeric_limits<F>::lowest() / 2;
  return difference < least ? least : difference;
}

template <class P, int method>
void forward_row(const P* x, int64_t n, double k, P* p, arithmetic<P>* threshold, std::vector<arithmetic<P>>& scratch) {
  using F = arithmetic<P>;
  const F inf = std::numeric_limits<F>::infinity();
  auto fill = [&](F value) {
    for (int64_t i = 0; i < n; ++i) store(p[i], value);
  };
  F top = -inf, finite_top = -inf;
  int64_t visible = 0, infinite = 0;
  int bad = 0;
#pragma omp simd reduction(max : top, finite_top) reduction(+ : visible, infinite) reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const F value = load(x[i]);
    bad |= value != value;
    visible += value > -inf;
    infinite += value == inf;
    top = value > top ? value : top;
    finite_top = value < inf && value > finite_top ? value : finite_top;
  }
  if (bad) {
    *threshold = std::numeric_limits<F>::quiet_NaN();
    return fill(*threshold);
  }
  if (static_cast<double>(visible) <= k || k <= 0) {
    const F one = k <= 0 ? F(0) : F(1);
    *threshold = k <= 0 ? inf : -inf;
    for (int64_t i = 0; i < n; ++i) store(p[i], load(x[i]) > -inf ? one : F(0));
    return;
  }
  // An infinite score is far above all others.
  const F center = finite_top > -inf ? finite_top : F(0), far = F(1e6);
  const F shift = infinite ? far : F(0);
  F* z = scratch.data();
  int64_t count = 0;
  if (visible == n && !infinite) {
    for (int64_t i = 0; i < n; ++i) z[i] = far_below(load(x[i]) - center);
    count = n;
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const F value = load(x[i]);
      if (value > -inf) z[count++] = value == inf ? F(0) : far_below(value - center - shift);
    }
  }
  F lowest = 0;
#pragma omp simd reduction(min : lowest)
  for (int64_t i = 0; i < count; ++i) lowest = z[i] < lowest ? z[i] : lowest;
  double at = solve<F, method>(z, count, k, lowest);
  const double base = static_cast<double>(center) + shift + at;
  if (std::fabs(at) > NEAR && !infinite) {
    // Far from the largest score differences are coarse: measured from the threshold they are not.
    int64_t next = 0;
    for (int64_t i = 0; i < n; ++i) {
      const F value = load(x[i]);
      if (value > -inf) z[next++] = static_cast<F>(value - base);
    }
    at = newton<F, method>(z, count, k, -1, 1, 0);
    *threshold = static_cast<F>(base + at);
  } else {
    *threshold = static_cast<F>(base);
  }
  // Next to the edges of clip a threshold rounded to the arithmetic is too coarse.
  using Split = std::conditional_t<method == CLIP, double, F>;
  const Split split = static_cast<Split>(at);
  auto value = [&](F score) { return value_of<F, method, true>(static_cast<F>(score - split)); };
  if (count == n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(p[i], value(z[i]));
  } else {
    int64_t next = 0;
    for (int64_t i = 0; i < n; ++i) store(p[i], load(x[i]) > -inf ? value(z[next++]) : F(0));
  }
}

// Integers in the order of the numbers, without a negative zero.
template <class F>
using Order = std::conditional_t<std::is_same_v<F, double>, int64_t, int32_t>;
template <class F>
inline Order<F> order_of(F x) {
  using Word = Order<F>;
  constexpr Word without_sign = std::numeric_limits<Word>::max();
  const Word word = bits_as<Word>(x);
  return word < 0 ? -(word & without_sign) : word;
}
template <class F>
inline F number_of(Order<F> order) {
  using Word = Order<F>;
  return order < 0 ? -bits_as<F>(static_cast<Word>(-order)) : bits_as<F>(order);
}

// The m-th largest of x, without NaN: a heap of the largest so far, into which few of many enter.
template <class P>
arithmetic<P> by_heap(const P* x, int64_t n, int64_t m, std::vector<arithmetic<P>>& heap) {
  using F = arithmetic<P>;
  constexpr int64_t LANES = 128;
  const std::greater<F> falling;
  for (int64_t i = 0; i < m; ++i) heap[i] = load(x[i]);
  const auto begin = heap.begin(), end = begin + m;
  std::make_heap(begin, end, falling);
  for (int64_t i = m; i < n; i += LANES) {
    const int64_t stop = i + LANES < n ? i + LANES : n;
    const F least = heap[0];
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = i; j < stop; ++j) any |= load(x[j]) > least;
    if (!any) continue;
    for (int64_t j = i; j < stop; ++j) {
      const F value = load(x[j]);
      if (!(value > heap[0])) continue;
      std::pop_heap(begin, end, falling);
      heap[m - 1] = value;
      std::push_heap(begin, end, falling);
    }
  }
  return heap[0];
}

// A number that m of x reach, or that more reach and fewer exceed: the bits of the m-th largest, one after the other.
template <class P>
arithmetic<P> by_halves(const P* x, int64_t n, int64_t m, std::vector<arithmetic<P>>& scratch) {
  using F = arithmetic<P>;
  using Word = Order<F>;
  F* z = scratch.data();
  F least = std::numeric_limits<F>::infinity(), most = -least;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    z[i] = load(x[i]);
    least = z[i] < least ? z[i] : least;
    most = z[i] > most ? z[i] : most;
  }
  // At least m reach `low`, fewer than m reach `high` + 1.
  Word low = order_of(least), high = order_of(most);
  while (low < high) {
    // Half the distance, rounded up, where the distance may be beyond the range of Word.
    const Word middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1);
    const F at = number_of<F>(middle);
    Word count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) count += z[i] >= at;
    if (static_cast<int64_t>(count) == m) return at;
    if (static_cast<int64_t>(count) > m) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return number_of<F>(low);
}

// 1 for the k largest visible entries, of equal ones the first, else 0.
template <class P>
void hard_row(const P* x, int64_t n, double k, P* out, std::vector<arithmetic<P>>& scratch) {
  using F = arithmetic<P>;
  const F inf = std::numeric_limits<F>::infinity();
  int64_t visible = 0;
  int bad = 0;
#pragma omp simd reduction(+ : visible) reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const F value = load(x[i]);
    bad |= value != value;
    visible += value > -inf;
  }
  if (bad || k < 1 || static_cast<double>(visible) <= k) {
    const F one = bad ? std::numeric_limits<F>::quiet_NaN() : F(k < 1 ? 0 : 1);
    for (int64_t i = 0; i < n; ++i) store(out[i], bad || load(x[i]) > -inf ? one : F(0));
    return;
  }
  const int64_t m = static_cast<int64_t>(k);
  const F at = m <= n / 64 ? by_heap(x, n, m, scratch) : by_halves(x, n, m, scratch);
  int64_t reached = 0;
#pragma omp simd reduction(+ : reached)
  for (int64_t i = 0; i < n; ++i) {
    const F value = load(x[i]);
    reached += value >= at;
    store(out[i], value >= at ? F(1) : F(0));
  }
  // Of those that are equal, the last leave.
  for (int64_t i = n, extra = reached - m; extra > 0;) {
    if (load(x[--i]) != at) continue;
    store(out[i], F(0));
    --extra;
  }
}

template <class P, int method>
void vjp_row(const P* p, const P* v, int64_t n, P* out) {
  using F = arithmetic<P>;
  double total = 0, pull = 0;
  for (int64_t begin = 0; begin < n; begin += STRIP) {
    const int64_t end = begin + STRIP < n ? begin + STRIP : n;
    F t = 0, q = 0;
#pragma omp simd reduction(+ : t, q)
    for (int64_t i = begin; i < end; ++i) {
      const F s = slope_of<F, method>(load(p[i]));
      t += s;
      q += s * load(v[i]);
    }
    total += t, pull += q;
  }
  const F mean = total > 0 ? static_cast<F>(pull / total) : (total == 0 ? F(0) : static_cast<F>(total));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out[i], slope_of<F, method>(load(p[i])) * (load(v[i]) - mean));
}

template <class Row>
void over_rows(int64_t rows, int64_t n, int threads, const Row& row) {
  const int64_t group = GROUP / n > 0 ? GROUP / n : 1, groups = (rows + group - 1) / group;
  spread(groups, threads, [&](int64_t g) { row(g * group, (g + 1) * group < rows ? (g + 1) * group : rows); });
}

template <class P, int method>
void forward(int64_t rows, int64_t n, const void* x, const double* k, void* p, void* thresholds, int threads) {
  using F = arithmetic<P>;
  over_rows(rows, n, threads, [&](int64_t begin, int64_t end) {
    std::vector<F> scratch(n);
    for (int64_t r = begin; r < end; ++r)
      forward_row<P, method>(static_cast<const P*>(x) + r * n, n, k[r], static_cast<P*>(p) + r * n,
                             static_cast<F*>(thresholds) + r, scratch);
  });
}

template <class P, int method>
void vjp(int64_t rows, int64_t n, const void* p, const void* v, void* out, int threads) {
  over_rows(rows, n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      vjp_row<P, method>(static_cast<const P*>(p) + r * n, static_cast<const P*>(v) + r * n, n,
                         static_cast<P*>(out) + r * n);
  });
}

template <class P>
void hard(int64_t rows, int64_t n, const void* x, const double* k, void* out, int threads) {
  over_rows(rows, n, threads, [&](int64_t begin, int64_t end) {
    std::vector<arithmetic<P>> scratch(n);
    for (int64_t r = begin; r < end; ++r)
      hard_row<P>(static_cast<const P*>(x) + r * n, n, k[r], static_cast<P*>(out) + r * n, scratch);
  });
}

template <class P, class Call>
void by_method(int method, const Call& call) {
  if (method == EXP) return call.template operator()<P, EXP>();
  if (method == LAPLACE) return call.template operator()<P, LAPLACE>();
  if (method == SIGMOID) return call.template operator()<P, SIGMOID>();
  call.template operator()<P, CLIP>();
}

template <class Call>
void dispatch(int dtype, int method, const Call& call) {
  if (dtype == 0) return by_method<float>(method, call);
  if (dtype == 1) return by_method<double>(method, call);
  if (dtype == 2) return by_method<bfloat16>(method, call);
  by_method<float16>(method, call);
}

}  // namespace
}  // namespace danlu

extern "C" void danlu_soft_topk(int dtype, int method, int64_t rows, int64_t n, const void* x, const double* k, void* p,
                                void* thresholds, int threads) {
  danlu::dispatch(dtype, method, [&]<class P, int M>() {
    danlu::forward<P, M>(rows, n, x, k, p, thresholds, threads);
  });
}

extern "C" void danlu_soft_topk_vjp(int dtype, int method, int64_t rows, int64_t n, const void* p, const void* v,
                                    void* out, int threads) {
  danlu::dispatch(dtype, method, [&]<class P, int M>() { danlu::vjp<P, M>(rows, n, p, v, out, threads); });
}

extern "C" void danlu_hard_topk(int dtype, int64_t rows, int64_t n, const void* x, const double* k, void* out,
                                int threads) {
  if (dtype == 0) return danlu::hard<float>(rows, n, x, k, out, threads);
  if (dtype == 1) return danlu::hard<double>(rows, n, x, k, out, threads);
  if (dtype == 2) return danlu::hard<danlu::bfloat16>(rows, n, x, k, out, threads);
  danlu::hard<danlu::float16>(rows, n, x, k, out, threads);
}
