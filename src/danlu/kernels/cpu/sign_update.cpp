// One step of Lion and of Tiger on many tensors: each element is read once and written once.
// Plain C interface: columns of addresses and numbers, one entry per tensor; see danlu/kernels/sign_update.py.
#include "common.h"

using namespace danlu;

namespace {

struct Columns {
  int64_t n;
  const int64_t *p, *g, *m, *compensation, *numel, *row, *number;
  uint8_t* finite;
};

struct LionNumbers {
  double lr, near, far, weight_decay;
  int32_t guard, mode, threads;
  uint32_t seed, step;
};

struct TigerNumbers {
  double lr, gain, weight_decay, vector_scale, rms_floor;
  int32_t guard, mode, threads;
  uint32_t seed, step;
  int32_t update, decay_vectors;
};

// `decay` is what the momenta are multiplied by first; null means 1.
template <class P, class M, Mode mode>
void lion_step(const Columns& c, const double* decay, const LionNumbers& o) {
  using F = arithmetic<P>;
  const F near = o.near, far = o.far, lr = o.lr, wd = o.weight_decay;
  std::vector<uint8_t> good(1);
  if (o.guard && o.threads > 1) good.resize(pieces(c.n, c.numel, nullptr, PIECE).size());
  auto check = [&](const Piece& x, int64_t slot) {
    good[slot] = all_finite(reinterpret_cast<const P*>(c.g[x.tensor]) + x.begin, x.end - x.begin);
  };
  auto combine = [&](int64_t t, int64_t begin, int64_t end) {
    uint8_t all = 1;
    for (int64_t i = begin; i < end; ++i) all &= good[i];
    c.finite[t] = all;
  };
  auto step = [&](const Piece& x) {
    if (o.guard && !c.finite[x.tensor]) return;
    P* p = reinterpret_cast<P*>(c.p[x.tensor]) + x.begin;
    const P* g = reinterpret_cast<const P*>(c.g[x.tensor]) + x.begin;
    M* m = reinterpret_cast<M*>(c.m[x.tensor]) + x.begin;
    P* k = mode == kahan ? reinterpret_cast<P*>(c.compensation[x.tensor]) + x.begin : nullptr;
    Key key{0, 0};
    if (mode == stochastic) key = make_key(o.seed, o.step, static_cast<uint32_t>(c.number[x.tensor]));
    int64_t count = x.end - x.begin;
    auto element = [&](int64_t i, F momentum) {
      F grad = load(g[i]), theta = read<P, mode>(p, k, i);
      F u = lerp(momentum, grad, near);
      F sign = F(u > 0) - F(u < 0);
      store(m[i], lerp(momentum, grad, far));
      write<P, mode>(p, k, i, theta - lr * (sign + wd * theta), key, x.begin);
    };
    if (decay && decay[x.tensor] != 1) {
      const F keep = decay[x.tensor];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) element(i, keep * load(m[i]));
    } else {
      auto run = [&](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) element(i, load(m[i]));
      };
      // With the look for bad gradients the gradient is in the cache, and all else is waited for.
      o.guard ? stream(0, count, run, p, m, k) : run(0, count);
    }
  };
  two_rounds(c.n, c.numel, nullptr, o.threads, o.guard, check, combine, step);
}

template <class P, class M, Mode mode>
void tiger_step(const Columns& c, const double* decay, const uint8_t* decayed, const TigerNumbers& o) {
  using F = arithmetic<P>;
  const F gain = o.gain, lr = o.lr;
  std::vector<double> squares(1), rms(c.n);
  std::vector<uint8_t> good(1);
  if (o.threads > 1) {
    size_t count = pieces(c.n, c.numel, c.row, PIECE).size();
    squares.resize(count);
    good.resize(count);
  }
  auto check = [&](const Piece& x, int64_t slot) {
    const P* g = reinterpret_cast<const P*>(c.g[x.tensor]);
    good[slot] = !o.guard || !g || all_finite(g + x.begin, x.end - x.begin);
    squares[slot] = 0;
    if (o.update && decayed[x.tensor] && c.row[x.tensor] == 0) {
      const P* k = mode == kahan ? reinterpret_cast<const P*>(c.compensation[x.tensor]) + x.begin : nullptr;
      squares[slot] = sum_of_squares<P, mode>(reinterpret_cast<const P*>(c.p[x.tensor]) + x.begin, k, x.end - x.begin);
    }
  };
  auto combine = [&](int64_t t, int64_t begin, int64_t end) {
    uint8_t all = 1;
    double total = 0;
    for (int64_t i = begin; i < end; ++i) {
      all &= good[i];
      total += squares[i];
    }
    c.finite[t] = all;
    rms[t] = std::sqrt(total / static_cast<double>(c.numel[t] > 0 ? c.numel[t] : 1));
  };
  auto step = [&](const Piece& x) {
    int64_t t = x.tensor;
    if (o.guard && !c.finite[t]) return;
    P* p = reinterpret_cast<P*>(c.p[t]) + x.begin;
    const P* g = c.g[t] ? reinterpret_cast<const P*>(c.g[t]) + x.begin : nullptr;
    M* m = reinterpret_cast<M*>(c.m[t]) + x.begin;
    P* k = mode == kahan ? reinterpret_cast<P*>(c.compensation[t]) + x.begin : nullptr;
    Key key{0, 0};
    if (mode == stochastic) key = make_key(o.seed, o.step, static_cast<uint32_t>(c.number[t]));
    const F keep = decay[t], wd = decayed[t] || o.decay_vectors ? o.weight_decay : 0;
    const bool averaging = decay[t] + o.gain == 1.0;
    int64_t count = x.end - x.begin, row = c.row[t] > 0 ? c.row[t] : count;
    for (int64_t begin = 0; begin < count; begin += row) {
      F scale = 0;
      if (o.update) {
        double size = o.vector_scale;
        if (c.row[t] > 0) {
          size = std::sqrt(sum_of_squares<P, mode>(p + begin, k ? k + begin : k, row) / static_cast<double>(row));
        } else if (decayed[t]) {
          size = rms[t];
        }
        if (decayed[t] && size < o.rms_floor) size = o.rms_floor;
        scale = lr * F(size);
      }
      auto element = [&](int64_t i, F momentum) {
        F theta = read<P, mode>(p, k, i);
        F sign = F(momentum > 0) - F(momentum < 0);
        write<P, mode>(p, k, i, theta - scale * (sign + wd * theta), key, x.begin);
      };
      if (!g) {
#pragma omp simd
        for (int64_t i = begin; i < begin + row; ++i) element(i, load(m[i]));
      } else if (!o.update) {
#pragma omp simd
        for (int64_t i = begin; i < begin + row; ++i) {
          F momentum = load(m[i]), grad = load(g[i]);
          store(m[i], averaging ? lerp(momentum, grad, gain) : keep * momentum + gain * grad);
        }
      } else {
        auto run = [&](int64_t first, int64_t last) {
#pragma omp simd
          for (int64_t i = first; i < last; ++i) {
            F momentum = load(m[i]), grad = load(g[i]);
            momentum = averaging ? lerp(momentum, grad, gain) : keep * momentum + gain * grad;
            store(m[i], momentum);
            element(i, momentum);
          }
        };
        o.guard ? stream(begin, begin + row, run, m) : run(begin, begin + row);
      }
    }
  };
  two_rounds(c.n, c.numel, c.row, o.threads, true, check, combine, step);
}

// Which rows of a contiguous table hold an element other than 0; returns whether every element is finite.
template <class T>
bool find_rows(const T* table, int64_t rows, int64_t width, int threads, uint8_t* found) {
  using F = arithmetic<T>;
  int64_t size = PIECE / width > 0 ? PIECE / width : 1, count = (rows + size - 1) / size;
  std::atomic<bool> finite{true};
  spread(count, threads, [&](int64_t piece) {
    F poison = 0;
    int64_t end = (piece + 1) * size < rows ? (piece + 1) * size : rows;
    for (int64_t row = piece * size; row < end; ++row) {
      const T* x = table + row * width;
      F seen = 0;
#pragma omp simd reduction(+ : poison, seen)
      for (int64_t i = 0; i < width; ++i) {
        F value = load(x[i]);
        poison += value * F(0);
        seen += F(value != 0);
      }
      found[row] = seen != 0;
    }
    if (poison != F(0)) finite = false;
  });
  return finite;
}

enum Dtype { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Calls step.template operator()<P, M, mode>() for the dtypes of parameter and momentum; false if there is none.
template <class Step>
bool dispatch(int p, int m, int mode, const Step& step) {
  if (p == f32 && m == f32) return step.template operator()<float, float, nearest>(), true;
  if (p == f64 && m == f64) return step.template operator()<double, double, nearest>(), true;
#define LOW(CODE, TYPE)                                                                                   \
  if (p == CODE) {                                                                                        \
    if (m == CODE && mode == 0) return step.template operator()<TYPE, TYPE, nearest>(), true;             \
    if (m == CODE && mode == 1) return step.template operator()<TYPE, TYPE, stochastic>(), true;          \
    if (m == CODE && mode == 2) return step.template operator()<TYPE, TYPE, kahan>(), true;               \
    if (m == f32 && mode == 0) return step.template operator()<TYPE, float, nearest>(), true;             \
    if (m == f32 && mode == 1) return step.template operator()<TYPE, float, stochastic>(), true;          \
    if (m == f32 && mode == 2) return step.template operator()<TYPE, float, kahan>(), true;               \
  }
  LOW(bf16, bfloat16)
  LOW(f16, float16)
#undef LOW
  return false;
}

}  // namespace

extern "C" int danlu_lion(int p, int m, const Columns* columns, const double* decay, const LionNumbers* numbers) {
  return dispatch(p, m, numbers->mode,
                  [&]<class P, class M, Mode mode>() { lion_step<P, M, mode>(*columns, decay, *numbers); });
}

extern "C" int danlu_tiger(int p, int m, const Columns* columns, const double* decay, const uint8_t* decayed,
                           const TigerNumbers* numbers) {
  return dispatch(p, m, numbers->mode, [&]<class P, class M, Mode mode>() {
    tiger_step<P, M, mode>(*columns, decay, decayed, *numbers);
  });
}

extern "C" int danlu_find_rows(int dtype, const void* table, int64_t rows, int64_t width, int threads, uint8_t* found) {
  auto find = [&]<class T>(const T* x) { return find_rows(x, rows, width, threads, found); };
  if (dtype == f32) return find(static_cast<const float*>(table));
  if (dtype == f64) return find(static_cast<const double*>(table));
  if (dtype == bf16) return find(static_cast<const bfloat16*>(table));
  return find(static_cast<const float16*>(table));
}
