// Sums of squares and the LARS update over many layers, one parallel loop each.  Loaded by
// native.py through ctypes: a plain C interface, no Python and no torch headers, so that one build
// serves any version of both.
//
// Bytes a parameter (float32): sums 4, update 20 (reads w, g, v; writes w, v).  The update takes
// the sums of squares of the old and the new weights on its way.
//
// Results do not depend on the number of threads nor on the processor's vector width: work is cut
// into fixed chunks, sums go into 16 float lanes within a block of 4096 elements and into double
// across blocks, and fused multiply-add is off (-ffp-contract=off in setup.py).  The update's sums
// have the same bits as those that hvd_lars_sums takes of the same weights: a run that resumes,
// and so has to read its weights again, goes on with the same bits.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define IS_INTEL (__builtin_cpu_init(), __builtin_cpu_is("intel") != 0)
#else
#define IS_INTEL false
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t kBlock = 4096;        // float32 sums end here
constexpr int64_t kChunk = 8 * kBlock;  // one thread's unit of work
constexpr int64_t kAhead = 256;         // elements to fetch ahead, where that helps
constexpr int64_t kAlone = 1 << 16;     // fewer elements than this are not worth a second thread

// Measured: fetching ahead takes 12 % off the update and 20 % off the sums on an Intel Xeon, and adds
// 13 % and 21 % on an AMD EPYC (Zen 4), whose own prefetchers are better.  The results are the same.
const bool fetch_ahead = IS_INTEL;

typedef float Floats __attribute__((vector_size(64)));    // 16
typedef double Doubles __attribute__((vector_size(64)));  // 8

template <typename T> struct Vector;
template <> struct Vector<float> { using type = Floats; };
template <> struct Vector<double> { using type = Doubles; };

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

INLINE float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
// The exponent moves by a multiplication with 2^112, which also makes subnormal numbers normal;
// what exceeds the largest half then gets the exponent of infinity.
INLINE float widen(Half x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float y = as_float(magnitude) * as_float(uint32_t(254 - 15) << 23);
  uint32_t bits = as_bits(y);
  bits |= magnitude >= (uint32_t(31) << 23) ? uint32_t(255) << 23 : 0;
  return as_float(bits | uint32_t(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even.
INLINE void narrow(float x, BFloat16* out) {
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
INLINE void narrow(float x, Half* out) {
  uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude >= 0x47800000) {  // 65536 and more, infinity, NaN
    result = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {  // below the smallest normal half: the adder rounds
    result = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(result | sign);
}

template <typename V, typename T> INLINE V load(const T* from) {
  using S = decltype(widen(*from));
  constexpr int lanes = sizeof(V) / sizeof(S);
  V v;
  if constexpr (sizeof(S) == sizeof(T)) {
    std::memcpy(&v, from, sizeof v);
  } else {
    S wide[lanes];
    for (int i = 0; i < lanes; ++i) wide[i] = widen(from[i]);
    std::memcpy(&v, wide, sizeof v);
  }
  return v;
}

template <typename V> INLINE double total(V lanes) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(lanes[0]); ++i) sum += double(lanes[i]);
  return sum;
}

// One block of each of two streams, 4096 or fewer elements: a core fetches two streams of memory
// faster than one.  Adds each stream's sum to its own total.
template <typename V, typename T, bool Two, bool Ahead>
INLINE void squares_of_block(const T* x, const T* y, int64_t count, double* sum_x, double* sum_y) {
  using S = decltype(widen(*x));
  constexpr int64_t lanes = sizeof(V) / sizeof(S);
  V a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    for (int64_t j = 0; Ahead && j < 2 * lanes; j += lanes) {
      const int64_t ahead = i + kAhead + j;
      __builtin_prefetch(x + ahead);
      if constexpr (Two) __builtin_prefetch(y + ahead);
    }
    const V x0 = load<V>(x + i), x1 = load<V>(x + i + lanes);
    a += x0 * x0, b += x1 * x1;
    if constexpr (Two) {
      const V y0 = load<V>(y + i), y1 = load<V>(y + i + lanes);
      c += y0 * y0, d += y1 * y1;
    }
  }
  for (; i < count; ++i) {
    const S last = widen(x[i]);
    a[0] += last * last;
  }
  *sum_x += total(V(a + b));
  if constexpr (Two) *sum_y += total(V(c + d));
}

template <bool Ahead, typename T> INLINE double squares(const T* x, int64_t count) {
  using V = typename Vector<decltype(widen(*x))>::type;
  double first = 0, second = 0;
  int64_t i = 0;
  if (count == kChunk) {
    for (; i < kChunk / 2; i += kBlock) {
      squares_of_block<V, T, true, Ahead>(x + i, x + kChunk / 2 + i, kBlock, &first, &second);
    }
    return first + second;
  }
  for (; i < count; i += kBlock) {
    const int64_t left = count - i < kBlock ? count - i : kBlock;
    squares_of_block<V, T, false, Ahead>(x + i, nullptr, left, &first, &second);
  }
  return first;
}

// What a chunk of the update works with; the order of Coefficient below.
template <typename S> struct Rule { S momentum, decay, inside, outside, unscale; bool nesterov; };

template <bool HasBuffer, bool Nesterov, typename X, typename S>
INLINE X advance(X w, X g, X* v, const Rule<S>& rule) {
  const X d = (g * rule.unscale + rule.decay * w) * rule.inside;
  if constexpr (!HasBuffer) return w - rule.outside * d;
  *v = rule.momentum * *v + d;
  if constexpr (Nesterov) return w - rule.outside * (rule.momentum * *v + d);
  return w - rule.outside * *v;
}

template <bool Ahead, bool HasBuffer, bool Nesterov, typename S, typename G, typename P>
INLINE void update_rule(S* w, const G* g, S* v, P* out, int64_t count, const Rule<S>& rule,
                        double* before, double* after) {
  using V = typename Vector<S>::type;
  constexpr int64_t lanes = sizeof(V) / sizeof(S);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    V a = {}, b = {}, a_new = {}, b_new = {};
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      for (int64_t j = 0; Ahead && j < 2 * lanes; j += lanes) {
        const int64_t ahead = i + kAhead + j;
        __builtin_prefetch(w + ahead, 1);
        __builtin_prefetch(g + ahead);
        if constexpr (HasBuffer) __builtin_prefetch(v + ahead, 1);
      }
      const V w0 = load<V>(w + i), w1 = load<V>(w + i + lanes);
      V v0 = {}, v1 = {};
      if constexpr (HasBuffer) v0 = load<V>(v + i), v1 = load<V>(v + i + lanes);
      const V n0 = advance<HasBuffer, Nesterov>(w0, load<V>(g + i), &v0, rule);
      const V n1 = advance<HasBuffer, Nesterov>(w1, load<V>(g + i + lanes), &v1, rule);
      if constexpr (HasBuffer) {
        std::memcpy(v + i, &v0, sizeof v0);
        std::memcpy(v + i + lanes, &v1, sizeof v1);
      }
      std::memcpy(w + i, &n0, sizeof n0);
      std::memcpy(w + i + lanes, &n1, sizeof n1);
      a += w0 * w0, b += w1 * w1;
      a_new += n0 * n0, b_new += n1 * n1;
    }
    for (; i < end; ++i) {
      S buffer = HasBuffer ? v[i] : S(0);
      const S old = w[i];
      const S now = advance<HasBuffer, Nesterov>(old, S(widen(g[i])), &buffer, rule);
      if constexpr (HasBuffer) v[i] = buffer;
      w[i] = now;
      a[0] += old * old;
      a_new[0] += now * now;
    }
    if constexpr (sizeof(P) != sizeof(S)) {  // the parameter is a rounded copy of its master
      for (int64_t j = begin; j < end; ++j) narrow(w[j], out + j);
    }
    *before += total(V(a + b));
    *after += total(V(a_new + b_new));
  }
}

template <bool Ahead, typename S, typename G, typename P>
INLINE void update(S* w, const G* g, S* v, P* out, int64_t count, const Rule<S>& rule,
                   double* before, double* after) {
  if (!v) return update_rule<Ahead, false, false>(w, g, v, out, count, rule, before, after);
  if (rule.nesterov) return update_rule<Ahead, true, true>(w, g, v, out, count, rule, before, after);
  update_rule<Ahead, true, false>(w, g, v, out, count, rule, before, after);
}

// Functions for each type, since target_clones takes no templates.
#define SUM_OF(NAME, T)                                                                           \
  FOR_EVERY_CPU double NAME##_ahead(const T* x, int64_t count) { return squares<true>(x, count); } \
  FOR_EVERY_CPU double NAME##_plain(const T* x, int64_t count) { return squares<false>(x, count); } \
  double NAME(const T* x, int64_t count) {                                                        \
    return fetch_ahead ? NAME##_ahead(x, count) : NAME##_plain(x, count);                         \
  }
SUM_OF(sum_float, float)
SUM_OF(sum_double, double)
SUM_OF(sum_bfloat16, BFloat16)
SUM_OF(sum_half, Half)

#define UPDATE_OF(NAME, S, G, P)                                                            \
  FOR_EVERY_CPU void NAME##_ahead(S* w, const G* g, S* v, P* out, int64_t count,            \
                                  const Rule<S>& rule, double* before, double* after) {     \
    update<true>(w, g, v, out, count, rule, before, after);                                 \
  }                                                                                         \
  FOR_EVERY_CPU void NAME##_plain(S* w, const G* g, S* v, P* out, int64_t count,            \
                                  const Rule<S>& rule, double* before, double* after) {     \
    update<false>(w, g, v, out, count, rule, before, after);                                \
  }                                                                                         \
  void NAME(S* w, const G* g, S* v, P* out, int64_t count, const Rule<S>& rule,             \
            double* before, double* after) {                                                \
    (fetch_ahead ? NAME##_ahead : NAME##_plain)(w, g, v, out, count, rule, before, after);  \
  }
UPDATE_OF(update_float, float, float, float)
UPDATE_OF(update_double, double, double, double)
UPDATE_OF(update_bfloat16, float, BFloat16, BFloat16)
UPDATE_OF(update_half, float, Half, Half)

enum Kind : int64_t { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };
const int64_t kSize[] = {4, 8, 2, 2};

// Addresses, numbers of elements, and which of them the update sums the squares of.
struct Layer { int64_t weight, gradient, buffer, copy, count, kind, sum_begin, sum_end; };
struct Coefficients { double momentum, decay, inside, outside, nesterov, unscale; };
struct Piece { int64_t layer, begin, count; bool summed; };

template <typename T> T* at(int64_t address, int64_t begin) {
  return address ? reinterpret_cast<T*>(address) + begin : nullptr;
}

void cut(int64_t layer, int64_t begin, int64_t end, bool summed, std::vector<Piece>* pieces) {
  for (; begin < end; begin += kChunk) {
    pieces->push_back({layer, begin, end - begin < kChunk ? end - begin : kChunk, summed});
  }
}

int threads_for(const std::vector<Piece>& pieces, int threads) {
  int64_t elements = 0;
  for (const Piece& piece : pieces) elements += piece.count;
  return elements < kAlone ? 1 : threads;
}

template <typename S>
Rule<S> rule_of(const Coefficients& c) {
  return {S(c.momentum), S(c.decay), S(c.inside), S(c.outside), S(c.unscale), c.nesterov != 0};
}

void update_run(const Layer& layer, const Coefficients& c, int64_t begin, int64_t count,
                double* before, double* after) {
  if (layer.kind == kDouble) {
    return update_double(at<double>(layer.weight, begin), at<double>(layer.gradient, begin),
                         at<double>(layer.buffer, begin), nullptr, count, rule_of<double>(c),
                         before, after);
  }
  float* w = at<float>(layer.weight, begin);
  float* v = at<float>(layer.buffer, begin);
  const Rule<float> rule = rule_of<float>(c);
  if (layer.kind == kFloat) {
    update_float(w, at<float>(layer.gradient, begin), v, nullptr, count, rule, before, after);
  } else if (layer.kind == kBFloat16) {
    update_bfloat16(w, at<BFloat16>(layer.gradient, begin), v, at<BFloat16>(layer.copy, begin),
                    count, rule, before, after);
  } else {
    update_half(w, at<Half>(layer.gradient, begin), v, at<Half>(layer.copy, begin), count, rule,
                before, after);
  }
}

void update_piece(const Layer& layer, const Coefficients& c, const Piece& piece, double* before,
                  double* after) {
  if (piece.count < kChunk) {
    return update_run(layer, c, piece.begin, piece.count, before, after);
  }
  double more[2] = {0, 0};  // in halves, as squares() sums a chunk
  update_run(layer, c, piece.begin, kChunk / 2, before, after);
  update_run(layer, c, piece.begin + kChunk / 2, kChunk / 2, &more[0], &more[1]);
  *before += more[0];
  *after += more[1];
}

}  // namespace

extern "C" {

// sums[i] = sum of squares of the elements of layer i at `gradient`, of its kind.
void hvd_lars_sums(const Layer* layers, int64_t num_layers, double* sums, int threads) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < num_layers; ++i) cut(i, 0, layers[i].count, true, &pieces);
  const int64_t num_pieces = int64_t(pieces.size());
  std::vector<double> partial(pieces.size());
#pragma omp parallel for schedule(static) num_threads(threads_for(pieces, threads))
  for (int64_t p = 0; p < num_pieces; ++p) {
    const Piece piece = pieces[size_t(p)];
    const Layer& layer = layers[piece.layer];
    const int64_t from = layer.gradient, begin = piece.begin;
    partial[size_t(p)] =
        layer.kind == kFloat      ? sum_float(at<float>(from, begin), piece.count)
        : layer.kind == kDouble   ? sum_double(at<double>(from, begin), piece.count)
        : layer.kind == kBFloat16 ? sum_bfloat16(at<BFloat16>(from, begin), piece.count)
                                  : sum_half(at<Half>(from, begin), piece.count);
  }
  for (int64_t i = 0; i < num_layers; ++i) sums[i] = 0;
  for (size_t p = 0; p < pieces.size(); ++p) sums[pieces[p].layer] += partial[p];
}

// v = momentum v + inside (unscale g + decay w); w -= outside v, or the same looked ahead (nesterov).
// sums[2 i] and sums[2 i + 1]: sums of squares of layer i's weights from sum_begin to sum_end,
// before and after.
void hvd_lars_update(const Layer* layers, int64_t num_layers, const Coefficients* coefficients,
                     double* sums, int threads) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& layer = layers[i];
    cut(i, 0, layer.sum_begin, false, &pieces);
    cut(i, layer.sum_begin, layer.sum_end, true, &pieces);
    cut(i, layer.sum_end, layer.count, false, &pieces);
  }
  const int64_t num_pieces = int64_t(pieces.size());
  std::vector<double> partial(2 * pieces.size());
#pragma omp parallel for schedule(static) num_threads(threads_for(pieces, threads))
  for (int64_t p = 0; p < num_pieces; ++p) {
    const Piece& piece = pieces[size_t(p)];
    double before = 0, after = 0;
    update_piece(layers[piece.layer], coefficients[piece.layer], piece, &before, &after);
    partial[size_t(2 * p)] = before;
    partial[size_t(2 * p + 1)] = after;
  }
  for (int64_t i = 0; i < 2 * num_layers; ++i) sums[i] = 0;
  for (size_t p = 0; p < pieces.size(); ++p) {
    if (!pieces[p].summed) continue;
    sums[2 * pieces[p].layer] += partial[2 * p];
    sums[2 * pieces[p].layer + 1] += partial[2 * p + 1];
  }
}

}  // extern "C"
