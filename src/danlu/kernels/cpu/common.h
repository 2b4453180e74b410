// What the compiled optimizer steps share: dtypes, rounding, and a split of the work over threads.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

namespace danlu {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

template <class T>
using arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(float16 x) { return static_cast<float>(x); }
inline float load(bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

inline void store(float& target, float value) { target = value; }
inline void store(double& target, double value) { target = value; }
inline void store(float16& target, float value) { target = static_cast<float16>(value); }
inline void store(bfloat16& target, float value) {
  uint32_t word = bits_as<uint32_t>(value);
  // To nearest, ties to even; NaN must not become infinite by the carry.
  uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
  target.bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
}

// The finalizer of MurmurHash3; danlu/optim/_rounding.py holds the same function for tensors.
inline uint32_t mix(uint32_t word) {
  word ^= word >> 16;
  word *= 0x85EBCA6Bu;
  word ^= word >> 13;
  word *= 0xC2B2AE35u;
  return word ^ (word >> 16);
}

struct Key {
  uint32_t first, second;
};
// One key per parameter and step, as in `rounding_key` there.
inline Key make_key(uint32_t seed, uint32_t step, uint32_t parameter) {
  uint32_t first = mix(mix(seed) + 0x9E3779B9u * (parameter + 1u));
  return {first, mix((step * 0x7F4A7C15u) ^ mix(first + 1u))};
}
inline uint32_t random_bits(Key key, uint32_t index) { return mix(mix(index ^ key.first) + key.second); }

inline void store_stochastic(bfloat16& target, float value, uint32_t noise) {
  uint32_t word = bits_as<uint32_t>(value);
  uint32_t stepped = (word + (noise >> 16)) >> 16;
  bfloat16 nearest;
  store(nearest, value);
  // 0x7F7F0000 is the largest bfloat16; beyond it, and for NaN, to nearest.
  target.bits = (word & 0x7FFFFFFFu) < 0x7F7F0000u ? static_cast<uint16_t>(stepped) : nearest.bits;
}
inline void store_stochastic(float16& target, float value, uint32_t noise) {
  float magnitude = std::fabs(value);
  int32_t exponent = static_cast<int32_t>(bits_as<uint32_t>(magnitude) >> 23) - 126;
  int32_t last = exponent - 11 < -24 ? -24 : exponent - 11;
  float spacing = bits_as<float>(static_cast<uint32_t>(last + 127) << 23);
  float inverse = bits_as<float>(static_cast<uint32_t>(127 - last) << 23);
  float rounded = std::floor(magnitude * inverse + static_cast<float>(noise >> 19) / 8192.0f) * spacing;
  store(target, magnitude < 65504.0f ? std::copysign(rounded, value) : value);
}
inline void store_stochastic(float& target, float value, uint32_t) { target = value; }
inline void store_stochastic(double& target, double value, uint32_t) { target = value; }

enum Mode { nearest = 0, stochastic = 1, kahan = 2 };

template <class P, Mode mode>
inline arithmetic<P> read(const P* p, const P* compensation, int64_t i) {
  arithmetic<P> value = load(p[i]);
  if constexpr (mode == kahan) value += load(compensation[i]);
  return value;
}

template <class P, Mode mode>
inline void write(P* p, P* compensation, int64_t i, arithmetic<P> value, Key key, int64_t start) {
  if constexpr (mode == stochastic) {
    store_stochastic(p[i], value, random_bits(key, static_cast<uint32_t>(start + i)));
  } else {
    store(p[i], value);
    if constexpr (mode == kahan) store(compensation[i], value - load(p[i]));
  }
}

template <class F>
inline F lerp(F from, F to, F weight) {
  return weight < F(0.5) ? from + weight * (to - from) : to - (to - from) * (F(1) - weight);
}

// exp for |x| <= 700 (double) and 80 (float): x = n ln 2 + r with |r| <= ln 2 / 2, then the series of exp(r).
inline float exponential(float x) {
  const float magic = 12582912.0f;
  float n = (x * 1.44269504f + magic) - magic;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float high = 1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)));
  float sum = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * high)));
  return sum * bits_as<float>((static_cast<int32_t>(n) + 127) << 23);
}
inline double exponential(double x) {
  const double magic = 6755399441055744.0;
  double n = (x * 1.4426950408889634 + magic) - magic;
  double r = x - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
  double top = 1.0 / 3628800 + r * (1.0 / 39916800 + r * (1.0 / 479001600 + r * (1.0 / 6227020800)));
  double high = 1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320 + r * (1.0 / 362880 + r * top)));
  double sum = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * high)))));
  return sum * bits_as<double>((static_cast<int64_t>(n) + 1023) << 52);
}

// The bits of a number without its sign, as an integer: in the order of magnitudes, with infinity and NaN last.
template <class T>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Word = uint32_t;
  static constexpr Word sign = 0x80000000u, infinity = 0x7F800000u;
};
template <>
struct Magnitude<double> {
  using Word = uint64_t;
  static constexpr Word sign = 0x8000000000000000u, infinity = 0x7FF0000000000000u;
};
template <>
struct Magnitude<bfloat16> {
  using Word = uint16_t;
  static constexpr Word sign = 0x8000u, infinity = 0x7F80u;
};
template <>
struct Magnitude<float16> {
  using Word = uint16_t;
  static constexpr Word sign = 0x8000u, infinity = 0x7C00u;
};

// Whether every element is finite. A maximum of integers takes one cycle, where a sum of floats would wait for four.
template <class T>
inline bool all_finite(const T* x, int64_t n) {
  using Word = typename Magnitude<T>::Word;
  constexpr Word mask = static_cast<Word>(~Magnitude<T>::sign);
  Word largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    Word word = static_cast<Word>(bits_as<Word>(x[i]) & mask);
    largest = word > largest ? word : largest;
  }
  return largest < Magnitude<T>::infinity;
}

// Sum of squares; lanes of the arithmetic's precision within 4096 elements, double beyond.
template <class P, Mode mode>
inline double sum_of_squares(const P* p, const P* compensation, int64_t n) {
  using F = arithmetic<P>;
  double total = 0;
  for (int64_t start = 0; start < n; start += 4096) {
    int64_t count = n - start < 4096 ? n - start : 4096;
    F part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < count; ++i) {
      F value = read<P, mode>(p + start, mode == kahan ? compensation + start : compensation, i);
      part += value * value;
    }
    total += part;
  }
  return total;
}

// Calls work(0) ... work(count - 1), in order on one thread, else whichever thread is free.
template <class Work>
inline void spread(int64_t count, int threads, const Work& work) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  auto run = [&] {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> team;
  int64_t size = threads < count ? threads : count;
  for (int64_t t = 1; t < size; ++t) team.emplace_back(run);
  run();
  for (auto& thread : team) thread.join();
}

// Calls body(first, last) for runs of [begin, end), while the arrays are fetched a page ahead: the processor's own
// prefetching stops at the end of each page, where a step then waits. As data that is used once, so that what was read
// before stays in the cache. Null pointers are left out.
template <class Body, class... Arrays>
inline void stream(int64_t begin, int64_t end, const Body& body, const Arrays*... arrays) {
  constexpr int64_t RUN = 64, LINE = 64, PAGE = 4096;
  auto fetch = [](const auto* array, int64_t first) {
    const char* x = reinterpret_cast<const char*>(array + first);
    const int64_t bytes = array ? RUN * static_cast<int64_t>(sizeof(*array)) : 0;
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(x + PAGE + i, 0, 0);
  };
  for (int64_t first = begin; first < end; first += RUN) {
    (fetch(arrays, first), ...);
    body(first, first + RUN < end ? first + RUN : end);
  }
}

struct Piece {
  int64_t tensor, begin, end;
};

// Pieces of at most `size` elements; they never cut a row where the tensor has rows (row > 0).
inline std::vector<Piece> pieces(int64_t n, const int64_t* numel, const int64_t* row, int64_t size) {
  std::vector<Piece> found;
  for (int64_t t = 0; t < n; ++t) {
    int64_t step = size;
    if (row && row[t] > 0) step = row[t] * (size / row[t] > 0 ? size / row[t] : 1);
    for (int64_t begin = 0; begin < numel[t]; begin += step)
      found.push_back({t, begin, begin + step < numel[t] ? begin + step : numel[t]});
  }
  return found;
}

constexpr int64_t PIECE = 1 << 16;

// The checks of a tensor, then its step: by tensor on one thread, so that the second pass finds it in the cache;
// in two rounds over all pieces on several.
template <class Check, class Combine, class Step>
inline void two_rounds(int64_t n, const int64_t* numel, const int64_t* row, int threads, bool checked,
                       const Check& check, const Combine& combine, const Step& step) {
  if (threads <= 1) {
    for (int64_t t = 0; t < n; ++t) {
      Piece whole{t, 0, numel[t]};
      if (checked) {
        check(whole, 0);
        combine(t, 0, 1);
      }
      step(whole);
    }
    return;
  }
  auto all = pieces(n, numel, row, PIECE);
  int64_t count = static_cast<int64_t>(all.size());
  if (checked) {
    spread(count, threads, [&](int64_t i) { check(all[i], i); });
    for (int64_t begin = 0, t = 0; t < n; ++t) {
      int64_t end = begin;
      while (end < count && all[end].tensor == t) ++end;
      combine(t, begin, end);
      begin = end;
    }
  }
  spread(count, threads, [&](int64_t i) { step(all[i]); });
}

}  // namespace danlu
