// One step of Amos on many tensors: the gradient is read for its mean squares, then everything once for the step.
// Plain C interface: columns of addresses and numbers, one entry per tensor; see danlu/kernels/amos.py.
#include <limits>

#include "common.h"

using namespace danlu;

namespace {

struct Columns {
  int64_t n;
  // Parameters, gradients, momenta (or 0), mean squares, decays, counts of steps (float).
  const int64_t *p, *g, *m, *v, *b, *t, *compensation, *numel, *rows, *number;
  const double* scale;
  uint8_t* finite;
};

struct Numbers {
  double lr, beta, momentum, clip, extra_l2, c_coef, d_coef, eps, sign;
  int32_t guard, mode, threads;
  uint32_t seed, step;
};

template <class F>
inline F clipped(F x, F bound) {
  // NaN stays NaN.
  return x < -bound ? -bound : (x > bound ? bound : x);
}

// Mean of the squares of (clipped) elements; NaN if an element is infinite, which clipping would hide.
template <class P, bool clip>
inline double mean_square(const P* g, int64_t n, arithmetic<P> bound) {
  using F = arithmetic<P>;
  // Few enough per sum in the arithmetic's precision that one which is not vectorized is as exact as any other.
  constexpr int64_t block = 512;
  double total = 0;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t end = n - start < block ? n : start + block;
    F part = 0, poison = 0;
#pragma omp simd reduction(+ : part, poison)
    for (int64_t i = start; i < end; ++i) {
      F raw = load(g[i]), x = clip ? clipped(raw, bound) : raw;
      part += x * x;
      if (clip) poison += raw * F(0);
    }
    total += part + poison;
  }
  return total / static_cast<double>(n);
}

template <class P, Mode mode>
void amos_step(const Columns& c, const Numbers& o) {
  using F = arithmetic<P>;
  const bool clip = o.clip > 0;
  const F bound = o.clip, far = 1 - o.momentum;
  const double lowest = std::is_same_v<F, double> ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
  const double floor = o.eps > lowest ? o.eps : lowest, root = std::sqrt(o.lr);
  // Where a tensor has rows: their length, else 0; and where its mean squares begin in the buffer.
  std::vector<int64_t> row(c.n), place(c.n, 0);
  int64_t entries = 0;
  for (int64_t t = 0; t < c.n; ++t) {
    row[t] = c.rows[t] > 1 ? c.numel[t] / c.rows[t] : 0;
    if (o.threads > 1) {
      place[t] = entries;
      entries += c.rows[t];
    } else if (c.rows[t] > entries) {
      entries = c.rows[t];
    }
  }
  std::vector<double> squares(entries), parts(1), pull(c.n), push(c.n);
  std::vector<uint8_t> good(1);
  if (o.threads > 1) {
    size_t count = pieces(c.n, c.numel, row.data(), PIECE).size();
    parts.resize(count);
    good.resize(count);
  }
  // Moves one entry of the state on, and gives the factors of parameter and gradient in minus the step.
  auto advance = [&](int64_t t, int64_t entry, double& pulling, double& pushing) {
    F* v = reinterpret_cast<F*>(c.v[t]) + entry;
    F* b = reinterpret_cast<F*>(c.b[t]) + entry;
    const double count = *reinterpret_cast<const float*>(c.t[t]), square = squares[place[t] + entry];
    const double correction = o.beta > 0 ? -std::expm1(count * std::log(o.beta)) : 1.0, decay = *b;
    const F mean = static_cast<F>(lerp<double>(*v, square, 1 - o.beta));
    const double inverse = correction / (mean > floor ? static_cast<double>(mean) : (mean != mean ? mean : floor));
    const double gamma = o.lr * o.lr * (inverse * square) / std::sqrt(1 + o.c_coef * root * decay);
    const double rate = o.lr * c.scale[t], fading = 1 / (1 + o.d_coef * std::sqrt(rate) * decay);
    *v = mean;
    *b = static_cast<F>(decay + gamma * (1 + decay));
    // A rate of 0 moves nothing.
    pulling = fading * (0.5 * gamma + (o.lr > 0 ? o.extra_l2 : 0.0));
    pushing = fading * rate * o.sign * std::sqrt(inverse);
  };
  auto square_of = [&](const P* g, int64_t count) {
    return clip ? mean_square<P, true>(g, count, bound) : mean_square<P, false>(g, count, bound);
  };
  auto check = [&](const Piece& x, int64_t slot) {
    const int64_t t = x.tensor;
    const P* g = reinterpret_cast<const P*>(c.g[t]);
    bool fine = true;
    if (row[t] == 0) {
      parts[slot] = square_of(g + x.begin, x.end - x.begin) * static_cast<double>(x.end - x.begin);
    } else {
      for (int64_t begin = x.begin; begin < x.end; begin += row[t]) {
        double square = square_of(g + begin, row[t]);
        squares[place[t] + begin / row[t]] = square;
        // As a number of the state's dtype.
        fine = fine && std::isfinite(static_cast<F>(square));
      }
    }
    good[slot] = fine;
  };
  auto combine = [&](int64_t t, int64_t begin, int64_t end) {
    bool fine = true;
    double total = 0;
    for (int64_t i = begin; i < end; ++i) {
      fine = fine && good[i];
      total += parts[i];
    }
    if (row[t] == 0) {
      squares[place[t]] = total / static_cast<double>(c.numel[t]);
      fine = std::isfinite(static_cast<F>(squares[place[t]]));
    }
    c.finite[t] = fine;
    if (o.guard && !fine) return;
    *reinterpret_cast<float*>(c.t[t]) += 1;
    if (row[t] == 0) advance(t, 0, pull[t], push[t]);
  };
  auto step = [&](const Piece& x) {
    const int64_t t = x.tensor;
    if (o.guard && !c.finite[t]) return;
    P* p = reinterpret_cast<P*>(c.p[t]) + x.begin;
    const P* g = reinterpret_cast<const P*>(c.g[t]) + x.begin;
    F* m = c.m ? reinterpret_cast<F*>(c.m[t]) + x.begin : nullptr;
    P* k = mode == kahan ? reinterpret_cast<P*>(c.compensation[t]) + x.begin : nullptr;
    Key key{0, 0};
    if (mode == stochastic) key = make_key(o.seed, o.step, static_cast<uint32_t>(c.number[t]));
    const int64_t count = x.end - x.begin, length = row[t] > 0 ? row[t] : count;
    double pulling = pull[t], pushing = push[t];
    for (int64_t begin = 0; begin < count; begin += length) {
      if (row[t] > 0) advance(t, (x.begin + begin) / length, pulling, pushing);
      const F a = pulling, s = pushing;
      if (!m && !clip) {
#pragma omp simd
        for (int64_t i = begin; i < begin + length; ++i) {
          F theta = read<P, mode>(p, k, i);
          write<P, mode>(p, k, i, theta - (a * theta + s * F(load(g[i]))), key, x.begin);
        }
      } else if (!m) {
#pragma omp simd
        for (int64_t i = begin; i < begin + length; ++i) {
          F theta = read<P, mode>(p, k, i);
          write<P, mode>(p, k, i, theta - (a * theta + s * clipped(F(load(g[i])), bound)), key, x.begin);
        }
      } else {
        const F limit = clip ? bound : std::numeric_limits<F>::infinity();
#pragma omp simd
        for (int64_t i = begin; i < begin + length; ++i) {
          F theta = read<P, mode>(p, k, i);
          F change = lerp(m[i], -(a * theta + s * clipped(F(load(g[i])), limit)), far);
          m[i] = change;
          write<P, mode>(p, k, i, theta + change, key, x.begin);
        }
      }
    }
  };
  two_rounds(c.n, c.numel, row.data(), o.threads, true, check, combine, step);
}

}  // namespace

extern "C" int danlu_amos(int dtype, const Columns* columns, const Numbers* numbers) {
  const Columns& c = *columns;
  const Numbers& o = *numbers;
  switch (dtype * 3 + o.mode) {
    case 0: return amos_step<float, nearest>(c, o), 1;
    case 3: return amos_step<double, nearest>(c, o), 1;
    case 6: return amos_step<bfloat16, nearest>(c, o), 1;
    case 7: return amos_step<bfloat16, stochastic>(c, o), 1;
    case 8: return amos_step<bfloat16, kahan>(c, o), 1;
    case 9: return amos_step<float16, nearest>(c, o), 1;
    case 10: return amos_step<float16, stochastic>(c, o), 1;
    case 11: return amos_step<float16, kahan>(c, o), 1;
    default: return 0;
  }
}
