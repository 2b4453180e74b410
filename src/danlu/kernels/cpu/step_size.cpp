// One step of momentum SGD with exponentiated gains on many tensors: each element is read once and written once.
// Plain C interface: columns of addresses and numbers, one entry per tensor; see danlu/kernels/step_size.py.
#include "common.h"

using namespace danlu;

namespace {

constexpr int64_t PIECE = 1 << 16;
constexpr double TINY = 1e-10;

struct Columns {
  int64_t n;
  // Addresses; average, log_gain, log_scale and count are null columns where there are none.
  const int64_t *p, *g, *m, *average, *log_gain, *log_scale, *count, *numel;
  uint8_t* finite;
};

struct Numbers {
  double lr, decay, momentum, momentum_beta, gain_lr, gain_low, gain_high, scale_lr, scale_low, scale_high;
  int32_t normalize, sign_gain, climb, guard, shared, threads;
};

template <class F>
inline F clipped(F x, F low, F high) {
  return x < low ? low : (x > high ? high : x);
}
template <class F>
inline F sign_of(F x) {
  return F(x > 0) - F(x < 0);
}

struct Sums {
  double dot = 0, grad = 0, direction = 0;
  bool finite = true;
};

// Inner products of the gradient and the momentum: lanes within 4096 elements, double beyond.
template <class P, class F>
Sums measure(const P* g, const F* m, int64_t n) {
  Sums total;
  for (int64_t start = 0; start < n; start += 4096) {
    int64_t end = n - start < 4096 ? n : start + 4096;
    F dot = 0, grad = 0, direction = 0;
#pragma omp simd reduction(+ : dot, grad, direction)
    for (int64_t i = start; i < end; ++i) {
      F x = load(g[i]), y = m[i];
      dot += x * y;
      grad += x * x;
      direction += y * y;
    }
    total.dot += dot;
    total.grad += grad;
    total.direction += direction;
  }
  // A sum of squares is finite only if every element is; one that is not may be an overflow.
  total.finite = std::isfinite(total.grad) || all_finite(g, n);
  return total;
}

template <class F>
void adapt(F* log_scale, const Sums& s, const Numbers& o) {
  double evidence = o.lr * s.dot;
  if (o.normalize) evidence /= (std::sqrt(s.grad) + TINY) * (o.lr * std::sqrt(s.direction) + TINY);
  if (!std::isfinite(evidence)) evidence = 0;  // inner products that overflow say nothing
  *log_scale = clipped(*log_scale + F(o.scale_lr * evidence), F(o.scale_low), F(o.scale_high));
}

template <class P, bool gained>
void move(const Columns& c, const Numbers& o, const Piece& x) {
  using F = arithmetic<P>;
  const int64_t t = x.tensor;
  P* p = reinterpret_cast<P*>(c.p[t]) + x.begin;
  const P* g = reinterpret_cast<const P*>(c.g[t]) + x.begin;
  F* m = reinterpret_cast<F*>(c.m[t]) + x.begin;
  F* average = gained ? reinterpret_cast<F*>(c.average[t]) + x.begin : nullptr;
  F* log_gain = gained ? reinterpret_cast<F*>(c.log_gain[t]) + x.begin : nullptr;
  double scale = c.log_scale ? std::exp(static_cast<double>(*reinterpret_cast<F*>(c.log_scale[t]))) : 1.0;
  const F keep = F(1 - o.decay), coefficient = F((o.climb ? -o.lr : o.lr) * scale), mu = F(o.momentum);
  const F far = F(1 - o.momentum_beta), low = F(o.gain_low), high = F(o.gain_high);
  F weight = F(o.gain_lr);
  if (gained && !o.sign_gain) {
    double steps = *reinterpret_cast<float*>(c.count[t]);
    weight = F(o.gain_lr / (1 - std::pow(o.momentum_beta, steps > 1 ? steps : 1)));
  }
  const int64_t count = x.end - x.begin;
  auto element = [&](int64_t i, auto signs) {
    F grad = load(g[i]), gain = 1;
    if constexpr (gained) {
      F bar = average[i];
      F e = decltype(signs)::value ? sign_of(grad) * sign_of(bar) : grad * bar;
      F logarithm = clipped(log_gain[i] + weight * e, low, high);
      log_gain[i] = logarithm;
      gain = exponential(logarithm);
      average[i] = lerp(bar, grad, far);
    }
    F momentum = mu * m[i] + gain * grad;
    m[i] = momentum;
    store(p[i], keep * load(p[i]) - coefficient * momentum);
  };
  auto run = [&](int64_t first, int64_t last) {
    if (o.sign_gain) {
#pragma omp simd
      for (int64_t i = first; i < last; ++i) element(i, std::true_type{});
    } else {
#pragma omp simd
      for (int64_t i = first; i < last; ++i) element(i, std::false_type{});
    }
  };
  // With gains there are streams enough that none is waited for.
  gained ? run(0, count) : stream(0, count, run, p);
}

template <class P>
void step(const Columns& c, const Numbers& o) {
  using F = arithmetic<P>;
  const bool products = o.scale_lr > 0 && c.log_scale;
  auto look = [&](const Piece& x) {
    const P* g = reinterpret_cast<const P*>(c.g[x.tensor]) + x.begin;
    int64_t n = x.end - x.begin;
    Sums found;
    if (products) {
      found = measure(g, reinterpret_cast<const F*>(c.m[x.tensor]) + x.begin, n);
    } else {
      found.finite = all_finite(g, n);
    }
    return found;
  };
  auto gather = [&](int64_t t, const Sums* begin, const Sums* end) {
    Sums total;
    for (; begin != end; ++begin) {
      total.dot += begin->dot;
      total.grad += begin->grad;
      total.direction += begin->direction;
      total.finite &= begin->finite;
    }
    c.finite[t] = !o.guard || total.finite;
    return total;
  };
  auto scaled = [&](int64_t t, const Sums& sums) {
    if (products && c.finite[t]) adapt(reinterpret_cast<F*>(c.log_scale[t]), sums, o);
  };
  auto moved = [&](const Piece& x) {
    if (!c.finite[x.tensor]) return;
    if (c.log_gain) {
      move<P, true>(c, o, x);
    } else {
      move<P, false>(c, o, x);
    }
  };
  const bool checked = o.guard || products;
  if (o.threads <= 1 && !o.shared) {
    // Tensor by tensor, so that the second pass finds what the first has read in the cache, if that is large enough.
    for (int64_t t = 0; t < c.n; ++t) {
      Piece whole{t, 0, c.numel[t]};
      c.finite[t] = 1;
      if (checked) {
        Sums sums = look(whole);
        scaled(t, gather(t, &sums, &sums + 1));
      }
      moved(whole);
    }
  } else {
    auto all = pieces(c.n, c.numel, nullptr, PIECE);
    int64_t count = static_cast<int64_t>(all.size());
    std::vector<Sums> found(count), totals(c.n);
    if (checked) spread(count, o.threads, [&](int64_t i) { found[i] = look(all[i]); });
    Sums everything;
    for (int64_t begin = 0, t = 0; t < c.n; ++t) {
      int64_t end = begin;
      while (end < count && all[end].tensor == t) ++end;
      totals[t] = gather(t, found.data() + begin, found.data() + end);
      begin = end;
      if (!c.finite[t]) continue;
      everything.dot += totals[t].dot;
      everything.grad += totals[t].grad;
      everything.direction += totals[t].direction;
    }
    for (int64_t t = 0; t < c.n; ++t) scaled(t, o.shared ? everything : totals[t]);
    spread(count, o.threads, [&](int64_t i) { moved(all[i]); });
  }
  if (c.count)
    for (int64_t t = 0; t < c.n; ++t)
      if (c.finite[t]) *reinterpret_cast<float*>(c.count[t]) += 1;
}

}  // namespace

extern "C" int danlu_step_size(int dtype, const Columns* columns, const Numbers* numbers) {
  if (dtype == 0) return step<float>(*columns, *numbers), 1;
  if (dtype == 1) return step<double>(*columns, *numbers), 1;
  if (dtype == 2) return step<bfloat16>(*columns, *numbers), 1;
  if (dtype == 3) return step<float16>(*columns, *numbers), 1;
  return 0;
}
